//! Exports: a node, served on a socket to one front end at a time.
//!
//! Main thread only. `add` checks the options, attaches to the node and listens; the event loop calls `accept` when
//! the listener is readable; `remove` ends the connection, detaches and says so. Must not touch a ring.

pub mod listener;
pub mod options;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use graph::{Graph, Perm, Root, RootOptions, WaysOut};
use host::IoThread;
use host::exec::MainRemote;
use qmp::QmpError;

use crate::blk::config::{DeviceConfig, DeviceOptions};
use crate::blk::device::{BlkDevice, DeviceSource, ErrorSink};
use crate::vhost_user::connection::Connection;
use listener::ExportSocket;
use options::{ExportOptions, IoThreadVirtQueueMapping, RemoveMode, VhostUserBlkOptions};

/// Most queues of one export.
pub const MAX_QUEUES: u16 = 256;
/// Largest ring.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Segments announced unless `queue-size` is given: fits rings of 128, what front ends set up by default.
const DEFAULT_SEG_MAX: u16 = 126;

/// How long an export of the command line waits for an image that another process has locked.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// And how often it looks.
const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// What `query-block-exports` tells of an export.
#[derive(Clone, Debug, serde::Serialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExportInfo {
    /// Its id.
    pub id: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The node it serves.
    pub node_name: String,
    /// Whether it is being removed.
    pub shutting_down: bool,
    /// Whether a front end is connected.
    pub connected: bool,
    /// For each queue the id of the iothread that serves it.
    pub iothreads: Vec<String>,
}

/// What exports need of the process.
pub trait Host {
    /// The graph.
    fn graph(&self) -> &Graph;
    /// An iothread by id, or the process's own for `None`.
    ///
    /// # Errors
    /// No such object, or it cannot be started.
    fn iothread(&self, id: Option<&str>) -> Result<IoThread, QmpError>;
    /// Whether the command line is still being carried out: the main thread has nobody to serve yet, and may wait.
    fn starting(&self) -> bool;
    /// Where errors of this export's I/O go.
    fn error_sink(&self, export: &str) -> ErrorSink;
}

/// A running export.
pub struct Export {
    id: String,
    device: Arc<BlkDevice>,
    listener: RefCell<Option<Rc<ExportSocket>>>,
    root: RefCell<Option<Root>>,
    connection: RefCell<Option<Connection>>,
    /// Wakes a removal that waits for the connection to end.
    ended: host::sync::Event,
    closing: Cell<bool>,
    /// No front end is let in for a moment: the last one could not be served.
    resting: Cell<bool>,
}

fn invalid(option: &str, text: impl std::fmt::Display) -> QmpError {
    QmpError::generic(format!("Parameter '{option}' {text}"))
}

/// Checks what can be checked without the node.
fn device_options(o: &VhostUserBlkOptions) -> Result<DeviceOptions, QmpError> {
    if !(1..=MAX_QUEUES).contains(&o.num_queues) {
        return Err(invalid("num-queues", format_args!("expects a number from 1 to {MAX_QUEUES}")));
    }
    let queue_size = o.queue_size.unwrap_or(MAX_QUEUE_SIZE);
    if !queue_size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(&queue_size) {
        return Err(invalid("queue-size", format_args!("expects a power of 2 from 4 to {MAX_QUEUE_SIZE}")));
    }
    let text = o.serial.as_deref().unwrap_or(&o.id);
    if o.serial.is_some() && text.len() > 20 {
        return Err(invalid("serial", format_args!("is {} bytes long, the limit is 20", text.len())));
    }
    let mut serial = [0; 20];
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    Ok(DeviceOptions {
        writable: o.writable,
        num_queues: o.num_queues,
        queue_size,
        seg_max: o.queue_size.map_or(DEFAULT_SEG_MAX, |n| n - 2),
        logical_block_size: o.logical_block_size.unwrap_or(0),
        physical_block_size: o.physical_block_size.unwrap_or(0),
        writethrough: o.writethrough,
        pin_memory: o.pin_memory,
        serial,
    })
}

/// Which iothread serves which queue, by the rules of QEMU's `iothread-vq-mapping`.
fn place(mapping: &[IoThreadVirtQueueMapping], queues: u16) -> Result<Vec<usize>, QmpError> {
    let bad = |text: String| invalid("iothread-vq-mapping", text);
    if mapping.is_empty() {
        return Err(bad("needs at least one entry".into()));
    }
    for (i, m) in mapping.iter().enumerate() {
        if mapping.iter().take(i).any(|other| other.iothread == m.iothread) {
            return Err(bad(format!("names iothread '{}' twice", m.iothread)));
        }
    }
    let given = mapping.iter().filter(|m| m.vqs.is_some()).count();
    if given == 0 {
        return Ok((0..queues.into()).map(|q: usize| q % mapping.len()).collect());
    }
    if given != mapping.len() {
        return Err(bad("must have 'vqs' in all entries or in none".into()));
    }
    let mut placed = vec![None; queues.into()];
    for (i, m) in mapping.iter().enumerate() {
        for &vq in m.vqs.iter().flatten() {
            match placed.get_mut(usize::from(vq)) {
                None => return Err(bad(format!("has vq {vq}, but the export has {queues} queue(s)"))),
                Some(Some(_)) => return Err(bad(format!("assigns vq {vq} twice"))),
                Some(slot) => *slot = Some(i),
            }
        }
    }
    placed
        .into_iter()
        .enumerate()
        .map(|(vq, p)| p.ok_or_else(|| bad(format!("leaves vq {vq} without an iothread"))))
        .collect()
}

/// Attaches to the node. At the start of the process it waits a moment for an image that is locked: by a predecessor which
/// was killed, as a rule. The kernel gives a dead process' locks back only when the last of its writes is done; before
/// that, a request it left must not be done again, or the old write could overtake what follows. That takes milliseconds on a
/// healthy disk; a lock that stays is somebody else's. Front ends that connect meanwhile wait in the backlog.
async fn attach(
    host: &dyn Host,
    node: &str,
    root: RootOptions,
    source: Rc<DeviceSource>,
) -> graph::Result<Root> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match host.graph().attach(node, root.clone(), source.clone()).await {
            // EAGAIN is what drivers say of a lock; nothing was changed.
            Err(e) if e.errno() == graph::Errno::EAGAIN && host.starting() && Instant::now() < deadline => {
                std::thread::sleep(LOCK_INTERVAL);
            }
            other => return other,
        }
    }
}

impl Export {
    /// Makes an export: checks, attaches to the node, listens. Nothing stays behind on an error.
    ///
    /// # Errors
    /// The option at fault, a conflict over the node, or a socket that cannot be had.
    pub async fn add(
        host: &dyn Host,
        options: ExportOptions,
        inherited: listener::Inherited<'_>,
    ) -> Result<Rc<Export>, QmpError> {
        let ExportOptions::VhostUserBlk(o) = options;
        if !valid_id(&o.id) {
            return Err(invalid(
                "id",
                "expects an identifier: a letter, then letters, digits, '-', '.', '_'",
            ));
        }
        let device_options = device_options(&o)?;
        let graph = host.graph();
        let node = graph.node(&o.node_name).map_err(crate::daemon::errors::block)?;
        if o.writable && node.options().read_only {
            return Err(QmpError::generic(format!(
                "Block node '{}' is read-only: export it with writable=off, or add the node without read-only",
                o.node_name
            )));
        }
        if o.allow_inactive {
            return Err(QmpError::generic("Export type does not support inactive exports"));
        }
        if graph.is_inactive(&o.node_name) {
            graph.set_active(Some(&o.node_name), true).await.map_err(crate::daemon::errors::block)?;
        }
        // After what is cheap to refuse: it may start the process's own thread, which stays.
        let iothreads = match (&o.iothread, &o.iothread_vq_mapping) {
            (Some(_), Some(_)) => {
                return Err(QmpError::generic(
                    "Options 'iothread' and 'iothread-vq-mapping' are mutually exclusive",
                ));
            }
            (one, None) => vec![host.iothread(one.as_deref())?; o.num_queues.into()],
            (None, Some(mapping)) => {
                let threads = mapping
                    .iter()
                    .map(|m| host.iothread(Some(&m.iothread)))
                    .collect::<Result<Vec<_>, _>>()?;
                let placed = place(mapping, o.num_queues)?;
                placed.into_iter().filter_map(|i| threads.get(i).cloned()).collect()
            }
        };
        let description = format!("{DESCRIPTION}{}'", o.id);
        let mut perm = Perm::CONSISTENT_READ;
        if o.writable {
            perm |= Perm::WRITE;
        }
        let shared = if o.share_rw { Perm::ALL } else { Perm::ALL - Perm::WRITE };
        let limits = graph.limits(&o.node_name).map_err(crate::daemon::errors::block)?;
        let config = DeviceConfig::new(device_options, &limits, node.size()).map_err(QmpError::generic)?;
        let granularity = config.logical_block_size();
        let device = BlkDevice::new(o.id.clone(), config, &iothreads, host.error_sink(&o.id));
        let listener = ExportSocket::open(&o.addr, inherited)?;
        let source = Rc::new(DeviceSource(device.clone()));
        let ways_out = WaysOut {
            share: Some(format!("use share-rw=on on {description}")),
            need_less: o.writable.then(|| format!("use writable=off on {description}")),
        };
        let root =
            RootOptions { perm, shared, granularity, ways_out, ..RootOptions::new(description, false) };
        let root = attach(host, &o.node_name, root, source).await.map_err(crate::daemon::errors::block)?;
        Ok(Rc::new(Export {
            id: o.id,
            device,
            listener: RefCell::new(Some(Rc::new(listener))),
            root: RefCell::new(Some(root)),
            connection: RefCell::new(None),
            ended: host::sync::Event::new(),
            closing: Cell::new(false),
            resting: Cell::new(false),
        }))
    }

    /// Its hold on the node, by its number in the graph.
    pub fn root(&self) -> Option<graph::EdgeId> {
        self.root.borrow().as_ref().map(Root::id)
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The socket to wait on: readable means [`Export::accept`]. `None` while a front end is connected (the next one
    /// waits in the backlog), and when the export ends.
    pub fn waiting_on(&self) -> Option<Rc<ExportSocket>> {
        if self.accepting() { self.listener.borrow().clone() } else { None }
    }

    fn accepting(&self) -> bool {
        !self.closing.get() && !self.resting.get() && self.connection.borrow().is_none()
    }

    /// Takes the next front end, if one waits and none is connected. False: one waits and cannot be served now; the export
    /// rests until [`Export::rested`] is called, since its socket stays readable and would be looked at without end.
    pub fn accept(&self, remote: &MainRemote, ended: impl FnOnce() + Send + 'static) -> bool {
        if !self.accepting() {
            return true;
        }
        let next = self.listener.borrow().as_ref().map_or(Ok(None), |l| l.accept());
        let served = match next {
            Ok(Some(socket)) => self.connect(socket, remote, ended),
            other => other.map(drop),
        };
        if let Err(e) = &served {
            log::error!("export '{}': cannot serve a front end: {e}", self.id);
            self.resting.set(true);
        }
        served.is_ok()
    }

    /// Front ends are let in again.
    pub fn rested(&self) {
        self.resting.set(false);
    }

    fn connect(
        &self,
        socket: UnixStream,
        remote: &MainRemote,
        ended: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<()> {
        let remote = remote.clone();
        self.ended.clear();
        let connection = Connection::start(socket, self.device.clone(), move || remote.post(ended))?;
        *self.connection.borrow_mut() = Some(connection);
        Ok(())
    }

    /// The connection's thread is through.
    pub fn connection_ended(&self) {
        if let Some(c) = self.connection.borrow_mut().take() {
            c.join();
        }
        self.ended.set();
    }

    /// Whether the export may be removed in this mode.
    ///
    /// # Errors
    /// `safe` with a front end connected, or an export that is being removed already.
    pub fn check_remove(&self, mode: RemoveMode) -> Result<(), QmpError> {
        if self.closing.get() {
            return Err(QmpError::generic(format!("export '{}' is already shutting down", self.id)));
        }
        if mode == RemoveMode::Safe && self.connection.borrow().is_some() {
            return Err(QmpError::generic(format!(
                "export '{}' still in use: a front end is connected (mode 'hard' disconnects it)",
                self.id
            )));
        }
        Ok(())
    }

    /// From now on no front end is let in; the socket's path is free again.
    pub fn stop_accepting(&self) {
        self.closing.set(true);
        if let Some(l) = self.listener.borrow_mut().take() {
            l.remove_path();
        }
    }

    /// Ends the export: the present front end is disconnected once nothing is in flight, the node is given back.
    pub async fn close(&self) {
        self.stop_accepting();
        let connected = match &*self.connection.borrow() {
            Some(c) => {
                c.shutdown();
                true
            }
            None => false,
        };
        if connected {
            self.ended.wait().await;
        }
        self.device.release_view();
        let root = self.root.borrow_mut().take();
        if let Some(root) = root {
            root.detach().await;
        }
    }

    /// For `query-block-exports`.
    pub fn info(&self) -> BlockExportInfo {
        let node = self.root.borrow().as_ref().and_then(|r| r.node().ok());
        BlockExportInfo {
            id: self.id.clone(),
            kind: "vhost-user-blk",
            node_name: node.map(|n| n.name().to_owned()).unwrap_or_default(),
            shutting_down: self.closing.get(),
            connected: self.connection.borrow().is_some(),
            iothreads: self.device.placement(),
        }
    }

    /// Whether this export's queues run on the iothread.
    pub fn uses_iothread(&self, id: &str) -> bool {
        self.device.placement().iter().any(|p| p == id)
    }
}

/// How the graph names an export in its messages, up to the id.
const DESCRIPTION: &str = "block export '";

/// The id of the export that the graph calls so.
pub fn id_in_description(text: &str) -> Option<&str> {
    text.strip_prefix(DESCRIPTION)?.strip_suffix('\'')
}

/// All exports by id.
pub type Exports = HashMap<String, Rc<Export>>;

/// QEMU's rule for identifiers.
pub fn valid_id(id: &str) -> bool {
    id.len() <= 127
        && id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

#[cfg(test)]
mod tests;
