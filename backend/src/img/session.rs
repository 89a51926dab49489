//! The graph of one command: the daemon's, without sockets, with one iothread for everything.
//!
//! Made by [`super::run`]; commands open images through it (`image.rs`). Runs on the main thread; whatever reads and writes
//! is sent to the iothread. Must not outlive the command: [`Session::end`] closes all nodes in order.

use std::cell::Cell;
use std::rc::Rc;

use graph::{Graph, Purpose, Registry};
use host::IoThread;
use qmp::CommandTable;
use qmp::Events;
use serde_json::{Map, Value};

use super::cli::Objects;
use super::failure::Failure;
use crate::daemon::Daemon;
use crate::daemon::commands::{self, State};
use crate::process::listen_fds::PassedFds;

/// See the module's words. A handle, cheap to clone.
#[derive(Clone)]
pub struct Session(Rc<Inner>);

struct Inner {
    daemon: Rc<Daemon>,
    table: Rc<CommandTable<State>>,
    thread: IoThread,
    nodes: Cell<u32>,
}

impl Session {
    /// An empty graph.
    ///
    /// # Errors
    /// No descriptors, or no thread can be started.
    pub fn start() -> Result<Session, Failure> {
        let registry = Registry::new(drivers::ALL.iter().copied());
        let table = commands::table(&registry);
        let daemon = Daemon::new(registry, PassedFds::default(), Events::new())
            .map_err(|e| Failure::new(e).context("cannot start"))?;
        let thread = daemon.own_iothread()?;
        daemon.ready_graph()?;
        Ok(Session(Rc::new(Inner { daemon, table, thread, nodes: Cell::new(0) })))
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.0.daemon.graph
    }

    /// The thread that reads and writes.
    pub fn thread(&self) -> &IoThread {
        &self.0.thread
    }

    /// Runs a command to its end on this thread.
    pub fn block_on<F: Future + 'static>(&self, work: F) -> F::Output {
        self.0.daemon.executor.block_on(work)
    }

    /// A node name nobody has used yet; generated ones start with `#`, and users' names with letters.
    pub fn fresh_name(&self) -> String {
        let n = self.0.nodes.get();
        self.0.nodes.set(n + 1);
        format!("image{n}")
    }

    /// Runs a command of the control channel with the text of an option.
    ///
    /// # Errors
    /// Its own.
    pub async fn option(&self, name: &str, text: &str, implied: &str) -> Result<Value, Failure> {
        let call = self.0.table.call_option(self.0.daemon.clone(), name, text, implied)?;
        Ok(call.await?)
    }

    /// The typed arguments in the text of an option.
    ///
    /// # Errors
    /// They do not fit the command.
    pub fn option_arguments(&self, name: &str, text: &str, implied: &str) -> Result<Value, Failure> {
        Ok(self.0.table.option_arguments(name, text, implied)?)
    }

    /// Creates the objects of `--object`.
    ///
    /// # Errors
    /// One of them cannot be.
    pub async fn objects(&self, objects: &Objects) -> Result<(), Failure> {
        for text in &objects.objects {
            self.option("object-add", text, "qom-type").await.map_err(|e| e.context("--object"))?;
        }
        Ok(())
    }

    /// Creates a node.
    ///
    /// # Errors
    /// What its driver says.
    pub async fn add_node(&self, options: Map<String, Value>, purpose: Purpose) -> Result<(), Failure> {
        Ok(self.graph().blockdev_add_for(Value::Object(options), purpose).await?)
    }

    /// Closes everything. Whatever has to be durable has been flushed before.
    pub fn end(self) {
        let daemon = self.0.daemon.clone();
        self.block_on(async move { daemon.shutdown().await });
        self.0.daemon.stop_threads();
    }
}
