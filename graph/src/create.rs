//! Creating images: what a driver has at hand for it ([`CreateContext`]), and how it tells how far it is ([`JobControl`]).
//!
//! Made by the create job and by the command line tools, on the main thread; drivers name their function in
//! `DriverDef::create`. The nodes the driver opens are held by roots that go with the context. Must not know any driver.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use serde_json::Value;

use crate::control::{Graph, Root};
use crate::drain::NoSource;
use crate::driver::BoxFut;
use crate::edge::RootOptions;
use crate::error::{BlockError, Errno, Result};
use crate::io::NodeIo;
use crate::node::Node;
use crate::options::{BlockdevRef, NodeOptions};
use crate::perm::PermPair;
use crate::secret::Secret;

/// How a driver creates images.
#[derive(Clone, Copy)]
pub struct CreateDef {
    /// Schema of the options (without `driver`).
    pub schema: fn() -> schemars::Schema,
    /// Creates an image; main thread, must not block it.
    pub create: fn(CreateContext, Value) -> BoxFut<'static, ()>,
}

/// Progress and the wish to end, shared between work on any thread and whoever watches it.
#[derive(Debug, Default)]
pub struct JobControl {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl JobControl {
    /// Says how much is done of how much, in units of the work's own.
    pub fn progress(&self, done: u64, total: u64) {
        self.done.store(done, Relaxed);
        self.total.store(total, Relaxed);
    }

    /// (done, total) as last told.
    pub fn current(&self) -> (u64, u64) {
        (self.done.load(Relaxed), self.total.load(Relaxed))
    }

    /// Asks the work to end.
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
    }

    /// Whether somebody asked it to end.
    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Relaxed)
    }

    /// `ECANCELED` once somebody asked the work to end; for use with `?` between two steps.
    ///
    /// # Errors
    /// See above.
    pub fn check(&self) -> Result<()> {
        if self.cancelled() { Err(BlockError::errno_only(Errno::ECANCELED)) } else { Ok(()) }
    }
}

/// What a driver has at hand while it creates an image. Main thread.
pub struct CreateContext {
    graph: Graph,
    control: Arc<JobControl>,
    roots: Vec<Root>,
}

impl CreateContext {
    /// For images of this graph.
    pub fn new(graph: Graph, control: Arc<JobControl>) -> CreateContext {
        CreateContext { graph, control, roots: Vec::new() }
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Opens or finds a node and holds it with these permissions until the context goes; returns its index, counted from
    /// 0 in the order of the calls. A node that is defined here goes with the context.
    ///
    /// # Errors
    /// No such node, a bad definition, a permission conflict, whatever the node's driver says.
    pub async fn open(&mut self, reference: BlockdevRef, hold: PermPair) -> Result<usize> {
        let options = RootOptions {
            perm: hold.perm,
            shared: hold.shared,
            // What it does is aligned by the node itself; nobody else shares the node.
            granularity: 1,
            stay_at_node: true,
            ..RootOptions::new("the creation of an image", false)
        };
        let root = match reference {
            BlockdevRef::Reference(name) => self.graph.attach(&name, options, Rc::new(NoSource)).await?,
            BlockdevRef::Inline(map) => {
                self.graph.open_and_attach(map, NodeOptions::default(), options).await?
            }
        };
        self.roots.push(root);
        Ok(self.roots.len() - 1)
    }

    /// The node opened as number `index`.
    ///
    /// # Errors
    /// `EINVAL` for an index that was not opened.
    pub fn child(&self, index: usize) -> Result<Arc<Node>> {
        self.root(index)?.node()
    }

    fn root(&self, index: usize) -> Result<&Root> {
        self.roots.get(index).ok_or_else(|| BlockError::invalid("This node has not been opened"))
    }

    /// Runs requests on a node, on an iothread. The node is used as by a parent: past its end it reads as zeroes, and with
    /// RESIZE it can be written there.
    ///
    /// # Errors
    /// There is no iothread, or what `work` returns.
    pub async fn child_io<R, F, Fut>(&self, index: usize, work: F) -> Result<R>
    where
        R: Send + 'static,
        F: FnOnce(NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = Result<R>> + 'static,
    {
        let root = self.root(index)?;
        self.graph.on_iothread_with(root.node()?.id(), root.perm(), work).await
    }

    /// Changes the size of a node that is held with RESIZE and used by nobody else, and tells the graph.
    ///
    /// # Errors
    /// What the driver says.
    pub async fn truncate(&self, index: usize, size: u64, how: crate::driver::Truncate) -> Result<()> {
        let root = self.root(index)?;
        let (id, perm) = (root.node()?.id(), root.perm());
        let guard = self.graph.drain_nodes(vec![id]).await;
        let truncate = move |io: NodeIo| async move { io.truncate(size, how).await };
        let result = self.graph.on_iothread_with(id, perm, truncate).await;
        self.graph.propagate_size(id);
        drop(guard);
        result
    }

    /// The secret of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn secret(&self, id: &str) -> Result<Secret> {
        self.graph.secrets().get(id)
    }

    /// Says how much is done of how much, in bytes where there is a choice.
    pub fn progress(&self, done: u64, total: u64) {
        self.control.progress(done, total);
    }

    /// Whether somebody wants the job to end.
    pub fn cancelled(&self) -> bool {
        self.control.cancelled()
    }

    /// Progress and cancellation for work on iothreads.
    pub fn control(&self) -> Arc<JobControl> {
        Arc::clone(&self.control)
    }

    /// Gives all nodes back and closes those that were opened here. Dropping the context does so too, but leaves closing to
    /// the next operation of the graph.
    pub async fn close(mut self) {
        for root in self.roots.drain(..).rev() {
            root.detach().await;
        }
    }
}

impl std::fmt::Debug for CreateContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreateContext").field("roots", &self.roots).finish_non_exhaustive()
    }
}
