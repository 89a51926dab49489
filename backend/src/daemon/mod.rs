//! The main thread: everything the process owns, the commands that change it, and the loop that runs both.
//!
//! `Daemon` is the context of every QMP command and of the command line's steps. One thread, so `Rc` and `RefCell`;
//! a borrow is never held across waiting.

pub mod commands;
pub mod errors;
pub mod help;
pub mod objects;
pub mod secret;
pub mod service;
pub mod start;
pub mod throttle;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use graph::{Graph, GraphEvent, QuorumOp, Registry};
use host::exec::{MainExecutor, MainRemote};
use host::{IoThread, IoThreadOptions};
use qmp::QmpError;
use qmp::event::{
    BlockErrorAction, BlockExportDeleted, BlockImageCorrupted, BlockIoError, IoOperationType, QuorumFailure,
    QuorumOpType, QuorumReportBad,
};

use crate::blk::device::{ErrorSink, IoErrorReport};
use crate::export::options::{ExportOptions, RemoveMode};
use crate::export::{Export, Exports, Host};
use crate::process::listen_fds::PassedFds;
use objects::{IoThreadProperties, Objects, Removed};
use secret::SecretProperties;
use throttle::ThrottleGroupProperties;

/// The iothread that serves what names none. Not an object: it cannot be removed, and ids of objects start with a letter.
pub const OWN_IOTHREAD: &str = "#main";

/// How long an export leaves its socket alone when a front end cannot be served for want of descriptors, ns.
const ACCEPT_REST_NS: u64 = 500_000_000;

thread_local! {
    /// For closures that other threads send to the main thread: they cannot carry an `Rc`.
    static CURRENT: RefCell<std::rc::Weak<Daemon>> = const { RefCell::new(std::rc::Weak::new()) };
}

/// The process's one `Daemon`, on the main thread.
fn current() -> Option<Rc<Daemon>> {
    CURRENT.with_borrow(std::rc::Weak::upgrade)
}

/// Everything the process owns. Commands get it as an `Rc`.
pub struct Daemon {
    /// Runs commands and whatever else waits on the main thread.
    pub executor: MainExecutor,
    /// The block graph.
    pub graph: Graph,
    /// User-creatable objects.
    pub objects: RefCell<Objects>,
    /// Work in the background.
    pub jobs: jobs::Jobs,
    /// Running exports.
    pub exports: RefCell<Exports>,
    /// Events for control clients.
    pub events: qmp::Events,
    /// Descriptors that were inherited.
    pub passed: RefCell<PassedFds>,
    /// Until the command line is carried out.
    starting: Cell<bool>,
    /// Set when the process should end.
    quit: Cell<bool>,
    own: RefCell<Option<IoThread>>,
    me: std::rc::Weak<Daemon>,
}

impl Daemon {
    /// An empty process: no node, no export, no object.
    ///
    /// # Errors
    /// No descriptors for the executor.
    pub fn new(registry: Registry, passed: PassedFds, events: qmp::Events) -> std::io::Result<Rc<Daemon>> {
        let executor = MainExecutor::new()?;
        let news = events.clone();
        let jobs = jobs::Jobs::new(executor.clone(), move |event| commands::jobs::emit(&news, event));
        let daemon = Rc::new_cyclic(|me| Daemon {
            executor,
            jobs,
            graph: Graph::new(registry, None),
            objects: RefCell::default(),
            exports: RefCell::default(),
            events,
            passed: RefCell::new(passed),
            starting: Cell::new(true),
            quit: Cell::new(false),
            own: RefCell::new(None),
            me: me.clone(),
        });
        CURRENT.set(daemon.me.clone());
        let me = daemon.me.clone();
        daemon.graph.set_iothread_source(Box::new(move || {
            let gone = || graph::BlockError::new(graph::Errno::ENODEV, "The process is ending");
            let daemon = me.upgrade().ok_or_else(gone)?;
            daemon.own_iothread().map_err(|e| graph::BlockError::new(graph::Errno::EAGAIN, e.to_string()))
        }));
        let remote: MainRemote = daemon.executor.remote();
        daemon.graph.set_event_sink(Box::new(move |event| {
            remote.post(move || {
                if let Some(daemon) = current() {
                    daemon.graph_event(event);
                }
            });
        }));
        Ok(daemon)
    }

    /// The command line is carried out: from now on nothing may hold up the main thread.
    pub fn started(&self) {
        self.starting.set(false);
    }

    /// Asks the loop to end.
    pub fn request_quit(&self) {
        self.quit.set(true);
    }

    /// Whether somebody asked.
    pub fn quitting(&self) -> bool {
        self.quit.get()
    }

    /// The process's own iothread, started when first needed.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn own_iothread(&self) -> Result<IoThread, QmpError> {
        if let Some(t) = &*self.own.borrow() {
            return Ok(t.clone());
        }
        let t =
            IoThread::start(IoThreadOptions { name: OWN_IOTHREAD.to_owned(), ..IoThreadOptions::default() })
                .map_err(|e| {
                    QmpError::generic(format!("the process's own iothread cannot be started: {e}"))
                })?;
        *self.own.borrow_mut() = Some(t.clone());
        Ok(t)
    }

    /// Sees to it that the graph has a thread for what nodes do outside of requests (resize, close).
    ///
    /// # Errors
    /// It cannot be started.
    pub fn ready_graph(&self) -> Result<(), QmpError> {
        let first = self.objects.borrow().iothreads().next().cloned();
        let thread = match first {
            Some(t) => t,
            None => self.own_iothread()?,
        };
        self.graph.set_iothread(Some(thread));
        Ok(())
    }

    /// Makes an iothread.
    ///
    /// # Errors
    /// See [`Objects::add_iothread`].
    pub fn add_iothread(&self, options: IoThreadProperties) -> Result<(), QmpError> {
        self.objects.borrow_mut().add_iothread(options)?;
        self.ready_graph_if_any();
        Ok(())
    }

    /// Loads a secret.
    ///
    /// # Errors
    /// The id is taken or no identifier, or see [`secret::load`].
    pub async fn add_secret(&self, options: SecretProperties) -> Result<(), QmpError> {
        self.objects.borrow().check_id(&options.id)?;
        let secret = secret::load(&options, self.graph.secrets()).await?;
        let id = options.id.clone();
        self.objects.borrow_mut().add_secret(options)?;
        self.graph.secrets().add(&id, secret).map_err(|e| QmpError::generic(e.to_string()))
    }

    /// Makes a throttle group.
    ///
    /// # Errors
    /// See [`Objects::add_group`].
    pub fn add_group(&self, options: &ThrottleGroupProperties) -> Result<(), QmpError> {
        let group = self.objects.borrow_mut().add_group(options)?;
        self.graph.objects().add(&options.id, group).map_err(|e| QmpError::generic(e.to_string()))
    }

    /// Removes an object. What was opened with a secret goes on.
    ///
    /// # Errors
    /// No such object, an export's queues run on it, or a node uses it.
    pub async fn object_del(&self, id: &str) -> Result<(), QmpError> {
        if let Some(export) = self.exports.borrow().values().find(|e| e.uses_iothread(id)) {
            return Err(QmpError::generic(format!(
                "object '{id}' is in use, can not be deleted: export '{}' runs on it",
                export.id()
            )));
        }
        if self.graph.objects().in_use(id) {
            return Err(QmpError::generic(format!("object '{id}' is in use, can not be deleted")));
        }
        let removed = self.objects.borrow_mut().remove(id)?;
        let thread = match removed {
            Removed::Iothread(thread) => thread,
            Removed::Secret => {
                self.graph.secrets().remove(id);
                return Ok(());
            }
            Removed::ThrottleGroup => {
                self.graph.objects().remove(id);
                return Ok(());
            }
        };
        // The graph must not be left with a thread that ends.
        self.graph.set_iothread(None);
        self.ready_graph_if_any();
        host::pool::run(move || thread.stop()).await;
        Ok(())
    }

    fn ready_graph_if_any(&self) {
        let first = self.objects.borrow().iothreads().next().cloned().or_else(|| self.own.borrow().clone());
        self.graph.set_iothread(first);
    }

    /// All iothreads: objects by id, then the process's own.
    pub fn iothreads(&self) -> Vec<IoThread> {
        self.objects.borrow().iothreads().cloned().chain(self.own.borrow().clone()).collect()
    }

    /// Makes an export and lets its front ends in.
    ///
    /// # Errors
    /// See [`Export::add`]; also an id that is taken.
    pub async fn export_add(&self, options: ExportOptions) -> Result<(), QmpError> {
        let ExportOptions::VhostUserBlk(o) = &options;
        let id = o.id.clone();
        if self.exports.borrow().contains_key(&id) {
            return Err(QmpError::generic(format!("Block export id '{id}' is already in use")));
        }
        let inherited = |name: &str| self.passed.borrow_mut().take_socket(name).map_err(|e| e.to_string());
        let export = Export::add(self, options, &inherited).await?;
        self.exports.borrow_mut().insert(id, export.clone());
        // One that came with an inherited connection has its front end already.
        self.accept(&export);
        // A command runs on the control channel's turn, and nothing else may happen for hours: the service must have a turn
        // of its own to see the new listener.
        self.executor.remote().post(|| {});
        Ok(())
    }

    /// Lets the next front end of an export in, if one waits and none is connected.
    pub fn accept(&self, export: &Rc<Export>) {
        let id = export.id().to_owned();
        let served = export.accept(&self.executor.remote(), move || {
            if let Some(daemon) = current() {
                daemon.connection_ended(&id);
            }
        });
        if served {
            return;
        }
        let (export, clock) = (export.clone(), self.iothreads().into_iter().next());
        self.executor.spawn_local(async move {
            if let Some(thread) = clock {
                // A thread that ends meanwhile cuts the rest short, which does no harm.
                let _ = thread.call(|local| async move { local.sleep(ACCEPT_REST_NS).await }).await;
            }
            // The service looks at all listeners after each turn of the executor.
            export.rested();
        });
    }

    fn connection_ended(&self, id: &str) {
        let export = self.exports.borrow().get(id).cloned();
        if let Some(export) = export {
            export.connection_ended();
            self.accept(&export);
        }
    }

    /// Removes an export; BLOCK_EXPORT_DELETED says when it is gone.
    ///
    /// # Errors
    /// No such export, or it is in use and the mode is `safe`.
    pub async fn export_del(&self, id: &str, mode: RemoveMode) -> Result<(), QmpError> {
        let export = self.exports.borrow().get(id).cloned();
        let export = export.ok_or_else(|| QmpError::generic(format!("Export '{id}' is not found")))?;
        export.check_remove(mode)?;
        export.stop_accepting();
        let Some(me) = self.me.upgrade() else { return Ok(()) };
        self.executor.spawn_local(async move { me.close_export(&export).await });
        Ok(())
    }

    async fn close_export(&self, export: &Rc<Export>) {
        export.close().await;
        if self.exports.borrow_mut().remove(export.id()).is_some() {
            self.events.emit(&BlockExportDeleted { id: export.id().to_owned() });
        }
    }

    /// Ends everything in order: exports (what is in flight completes), jobs, nodes (flushed), threads.
    pub async fn shutdown(&self) {
        let exports: Vec<_> = self.exports.borrow().values().cloned().collect();
        exports.iter().for_each(|e| e.stop_accepting());
        for export in exports {
            self.close_export(&export).await;
        }
        self.jobs.cancel_all().await;
        // Closing flushes.
        if let Err(e) = self.ready_graph() {
            log::error!("nodes cannot be closed in order: {}", e.desc);
        }
        self.graph.close_all().await;
    }

    /// After the loop has ended: the iothreads are joined.
    pub fn stop_threads(&self) {
        self.objects.borrow_mut().take_all().into_iter().for_each(IoThread::stop);
        if let Some(t) = self.own.borrow_mut().take() {
            t.stop();
        }
    }
}

impl Host for Daemon {
    fn starting(&self) -> bool {
        self.starting.get()
    }

    fn graph(&self) -> &Graph {
        &self.graph
    }

    fn iothread(&self, id: Option<&str>) -> Result<IoThread, QmpError> {
        match id {
            None => self.own_iothread(),
            Some(id) => self
                .objects
                .borrow()
                .iothread(id)
                .cloned()
                .ok_or_else(|| QmpError::generic(format!("iothread \"{id}\" not found"))),
        }
    }

    fn error_sink(&self, export: &str) -> ErrorSink {
        let remote: MainRemote = self.executor.remote();
        let id = export.to_owned();
        Box::new(move |report: IoErrorReport| {
            let id = id.clone();
            remote.post(move || {
                if let Some(daemon) = current() {
                    daemon.io_error(&id, report);
                }
            });
        })
    }
}

/// A count as the wire has it.
fn clamped(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl Daemon {
    fn graph_event(&self, event: GraphEvent) {
        let bytes = |n: Option<u64>| n.and_then(|n| i64::try_from(n).ok());
        match event {
            GraphEvent::ImageCorrupted { node_name, msg, offset, size, fatal } => {
                let node_name = Some(node_name);
                let (offset, size) = (bytes(offset), bytes(size));
                let device = String::new();
                self.events.emit(&BlockImageCorrupted { device, node_name, msg, offset, size, fatal });
            }
            GraphEvent::QuorumFailure { reference, sector_num, sectors_count } => {
                let (sector_num, sectors_count) = (clamped(sector_num), clamped(sectors_count));
                self.events.emit(&QuorumFailure { reference, sector_num, sectors_count });
            }
            GraphEvent::QuorumReportBad { op, error, node_name, sector_num, sectors_count } => {
                let kind = match op {
                    QuorumOp::Read => QuorumOpType::Read,
                    QuorumOp::Write => QuorumOpType::Write,
                    QuorumOp::Flush => QuorumOpType::Flush,
                };
                let (sector_num, sectors_count) = (clamped(sector_num), clamped(sectors_count));
                self.events.emit(&QuorumReportBad { kind, error, node_name, sector_num, sectors_count });
            }
            other => log::warn!("{other:?}"),
        }
    }

    fn io_error(&self, id: &str, report: IoErrorReport) {
        let node = self.exports.borrow().get(id).map(|e| e.info().node_name);
        self.events.emit(&BlockIoError {
            qom_path: id.to_owned(),
            device: id.to_owned(),
            node_name: node,
            operation: if report.read { IoOperationType::Read } else { IoOperationType::Write },
            action: BlockErrorAction::Report,
            nospace: Some(report.nospace),
            reason: report.reason,
        });
    }
}
