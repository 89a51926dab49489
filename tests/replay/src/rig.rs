//! A graph and its iothread, for opening one node after the other.
//!
//! Used for the run of a workload and for every state that is judged. Opening and closing happen on the iothread, as in the
//! process; requests are sent from the simulated host ([`Opened::run`]).

use std::rc::Rc;
use std::sync::Arc;

use graph::{Graph, NoSource, Node, NodeIo, Perm, Registry, Root, RootOptions, View};
use host::exec::block_on;
use host::sim::{self, Faults};
use host::{Engine, IoThread, IoThreadOptions, PollParams};
use serde_json::{Value, json};

use crate::words;

/// The node's name.
pub const NODE: &str = "top";

/// See the module's page.
pub struct Rig {
    graph: Graph,
    thread: IoThread,
}

/// A node that is open and has a user.
pub struct Opened<'a> {
    rig: &'a Rig,
    root: Option<Root>,
}

impl Rig {
    /// An empty graph over these drivers.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn new(registry: Registry) -> Result<Rig, String> {
        let poll = PollParams { max_ns: 0, ..PollParams::default() };
        let options = IoThreadOptions { name: "replay".to_owned(), engine: Engine::Threads, poll };
        let thread = IoThread::start(options).map_err(words)?;
        Ok(Rig { graph: Graph::new(registry, Some(thread.clone())), thread })
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Opens a node for reading and, unless `read_only`, writing and resizing.
    ///
    /// # Errors
    /// What the graph says.
    pub fn open(&self, mut options: Value, read_only: bool) -> Result<Opened<'_>, String> {
        if let Value::Object(options) = &mut options {
            options.insert("node-name".to_owned(), json!(NODE));
            if read_only {
                options.insert("read-only".to_owned(), json!(true));
            }
        }
        block_on(self.graph.blockdev_add(options)).map_err(|e| format!("blockdev-add: {e}"))?;
        let mut how = RootOptions::new("the crash states", !read_only);
        how.granularity = 512;
        if !read_only {
            how.perm |= Perm::RESIZE;
        }
        match block_on(self.graph.attach(NODE, how, Rc::new(NoSource))) {
            Ok(root) => Ok(Opened { rig: self, root: Some(root) }),
            Err(e) => {
                let _ = block_on(self.graph.blockdev_del(NODE));
                Err(format!("attach: {e}"))
            }
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        block_on(self.graph.close_all());
        self.graph.set_iothread(None);
        self.thread.clone().stop();
    }
}

impl Opened<'_> {
    /// The user's view.
    ///
    /// # Errors
    /// There is none.
    pub fn view(&self) -> Result<Arc<View>, String> {
        self.root.as_ref().and_then(Root::view).ok_or_else(|| "the user has no view".to_owned())
    }

    /// The node.
    ///
    /// # Errors
    /// There is none.
    pub fn node(&self) -> Result<Arc<Node>, String> {
        self.rig.graph.node(NODE).map_err(words)
    }

    /// Runs requests on the simulated host.
    ///
    /// # Errors
    /// What `work` returns, or that it would wait for ever.
    pub fn run<T, F, Fut>(&self, seed: u64, work: F) -> Result<T, String>
    where
        T: 'static,
        F: FnOnce(NodeIo) -> Fut,
        Fut: Future<Output = Result<T, String>> + 'static,
    {
        let view = self.view()?;
        let run = sim::run(seed, Faults::default(), move |local| work(view.io(&local)));
        run.map_err(|e| format!("the simulation ended: {e:?}"))?
    }

    /// Runs requests on the iothread.
    ///
    /// # Errors
    /// What `work` returns, or that it panicked.
    pub fn on_iothread<T, F, Fut>(&self, work: F) -> Result<T, String>
    where
        T: Send + 'static,
        F: FnOnce(NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, String>> + 'static,
    {
        let view = self.view()?;
        let call = self.rig.thread.call_blocking(move |local| work(view.io(&local)));
        call.map_err(|_| "the request panicked".to_owned())?
    }

    /// Closes the node.
    ///
    /// # Errors
    /// What the graph says.
    pub fn close(mut self) -> Result<(), String> {
        if let Some(root) = self.root.take() {
            block_on(root.detach());
        }
        block_on(self.rig.graph.blockdev_del(NODE)).map_err(|e| format!("blockdev-del: {e}"))
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        // After something failed: the next node has the same name.
        if let Some(root) = self.root.take() {
            block_on(root.detach());
            let _ = block_on(self.rig.graph.blockdev_del(NODE));
        }
    }
}
