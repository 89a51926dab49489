//! Sessions on sockets, as one subscriber of the main thread's `event-manager` loop. Made by the binary, which hands it
//! listeners and adds it to the loop; it needs nothing else: wakers and deadlines arrive through descriptors of its own.
//!
//! Must not interpret what it carries. Never blocks.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events as Ready, MutEventSubscriber};
use rustix::event::{EventfdFlags, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::server::{MAX_SESSIONS, Server, SessionId};
use crate::session::SessionOptions;
use crate::socket::Listener;

/// Bytes read at once.
const READ_SIZE: usize = 16 * 1024;
/// Connections accepted in one turn.
const ACCEPT_BATCH: usize = 16;
/// How long a listener rests when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What a descriptor is, in the user data of its registration: the kind in the upper bits, an index below.
const WAKE: u32 = 0;
const TIMER: u32 = 1;
const LISTENER: u32 = 2;
const CONNECTION: u32 = 3;

/// Wakes the loop from any thread.
#[derive(Debug)]
struct WakeFd(OwnedFd);

impl Wake for WakeFd {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // The only failure is a counter at its maximum, which is awake enough.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    /// What the loop watches; `None`: not registered.
    watched: Option<EventSet>,
    /// Both directions are shut down. Level-triggered, that would be reported for ever: the descriptor is not watched any
    /// more, and what it still holds is read when there is room.
    hung_up: bool,
    /// The loop has not seen it yet.
    failed: bool,
}

#[derive(Debug)]
struct Door {
    listener: Listener,
    options: SessionOptions,
    /// Descriptors had run out; not watched until then.
    rests_until: Option<Instant>,
}

/// The control channel.
#[derive(Debug)]
pub struct ControlChannel<S> {
    server: Server<S>,
    doors: Vec<Door>,
    connections: BTreeMap<SessionId, Connection>,
    wake: Arc<WakeFd>,
    waker: Waker,
    timer: OwnedFd,
    timer_at: Option<Instant>,
}

impl<S: Clone + 'static> ControlChannel<S> {
    /// A channel without listeners.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new(server: Server<S>) -> io::Result<Self> {
        let wake = Arc::new(WakeFd(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?));
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(ControlChannel {
            server,
            doors: Vec::new(),
            connections: BTreeMap::new(),
            waker: Waker::from(wake.clone()),
            wake,
            timer,
            timer_at: None,
        })
    }

    /// Adds a listening socket; call before the channel is added to the loop. Any number of clients may be connected to it, up
    /// to [`MAX_SESSIONS`] in all.
    pub fn listen(&mut self, listener: Listener, options: SessionOptions) {
        self.doors.push(Door { listener, options, rests_until: None });
    }

    /// Adds a client that is connected already, e.g. an inherited descriptor; call before the channel is added to the loop.
    ///
    /// # Errors
    /// Too many sessions, or the socket cannot be made non-blocking.
    pub fn attach(&mut self, stream: UnixStream, options: SessionOptions) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let id = self
            .server
            .connect(options)
            .ok_or_else(|| io::Error::other(format!("more than {MAX_SESSIONS} QMP sessions")))?;
        self.connections.insert(id, Connection { stream, watched: None, hung_up: false, failed: false });
        Ok(())
    }

    /// The server.
    pub fn server(&mut self) -> &mut Server<S> {
        &mut self.server
    }

    /// Does what can be done without the loop: for the end of the process, so that last answers and events still go out.
    pub fn pump(&mut self) {
        loop {
            self.server.poll(&mut Context::from_waker(&self.waker));
            let mut progress = false;
            for (id, connection) in &mut self.connections {
                progress |= write(&mut self.server, *id, connection);
                if connection.hung_up && self.server.session(*id).is_some_and(|s| s.wants_input()) {
                    progress |= read(&mut self.server, *id, connection);
                }
            }
            if !progress {
                return;
            }
        }
    }

    fn accept(&mut self, index: usize) {
        for _ in 0..ACCEPT_BATCH {
            let Some(door) = self.doors.get_mut(index) else { return };
            let mut stream = match door.listener.socket().accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) =>
                {
                    continue;
                }
                Err(e) => {
                    log::error!("cannot accept a QMP client: {e}");
                    door.rests_until = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            };
            if let Err(e) = stream.set_nonblocking(true) {
                log::error!("cannot use a QMP client's socket: {e}");
                continue;
            }
            match self.server.connect(door.options) {
                Some(id) => {
                    let connection = Connection { stream, watched: None, hung_up: false, failed: false };
                    self.connections.insert(id, connection);
                }
                None => {
                    log::warn!("a QMP client was turned away: {MAX_SESSIONS} sessions exist");
                    let text = format!(
                        "{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"Too many QMP sessions (limit \
                         {MAX_SESSIONS})\"}}}}\r\n"
                    );
                    // Best effort: it is being turned away.
                    let _ = stream.write(text.as_bytes());
                }
            }
        }
    }

    /// A connection is ready.
    fn ready(&mut self, id: SessionId, set: EventSet, ops: &mut EventOps) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.hung_up = true;
            unwatch(connection, ops);
        }
        if set.contains(EventSet::IN) && self.server.session(id).is_some_and(|s| s.wants_input()) {
            read(&mut self.server, id, connection);
        }
    }

    /// After anything happened: let the server work, write, and tell the loop what to watch.
    fn settle(&mut self, ops: &mut EventOps) {
        self.pump();
        let ids: Vec<SessionId> = self.connections.keys().copied().collect();
        for id in ids {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            if connection.failed || self.server.is_finished(id) {
                unwatch(connection, ops);
                self.connections.remove(&id);
                self.server.disconnect(id);
                continue;
            }
            if connection.hung_up {
                continue;
            }
            let Some(session) = self.server.session(id) else { continue };
            let mut set = EventSet::empty();
            if session.wants_input() {
                set |= EventSet::IN;
            }
            if !session.output().is_empty() {
                set |= EventSet::OUT;
            }
            if connection.watched == Some(set) {
                continue;
            }
            let data = CONNECTION + id.0.wrapping_mul(4);
            let wanted = Ready::with_data(&connection.stream, data, set);
            let result = match connection.watched {
                None => ops.add(wanted),
                Some(_) => ops.modify(wanted),
            };
            match result {
                Ok(()) => connection.watched = Some(set),
                Err(e) => {
                    log::error!("cannot watch a QMP client: {e}");
                    self.connections.remove(&id);
                    self.server.disconnect(id);
                }
            }
        }
        let now = Instant::now();
        for (index, door) in self.doors.iter_mut().enumerate() {
            // A listener that rests is watched for nothing; it stays registered.
            let set = match door.rests_until {
                Some(until) if until > now => EventSet::empty(),
                Some(_) => {
                    door.rests_until = None;
                    EventSet::IN
                }
                None => continue,
            };
            if let Err(e) =
                ops.modify(Ready::with_data(door.listener.socket(), data_of(LISTENER, index), set))
            {
                log::error!("cannot watch a QMP listener: {e}");
            }
        }
        self.arm();
    }

    /// Sets the timer to the next deadline.
    fn arm(&mut self) {
        let next = self.doors.iter().filter_map(|d| d.rests_until).chain(self.server.deadline()).min();
        if next == self.timer_at {
            return;
        }
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = match next {
            None => zero,
            Some(at) => {
                // Zero would disarm it.
                let wait = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
                Timespec {
                    tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: wait.subsec_nanos().into(),
                }
            }
        };
        let spec = Itimerspec { it_interval: zero, it_value: value };
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            Ok(_) => self.timer_at = next,
            Err(e) => log::error!("cannot set the QMP timer: {e}"),
        }
    }
}

fn data_of(kind: u32, index: usize) -> u32 {
    kind + u32::try_from(index).unwrap_or(0).wrapping_mul(4)
}

fn unwatch(connection: &mut Connection, ops: &mut EventOps) {
    if let Some(set) = connection.watched.take()
        && let Err(e) = ops.remove(Ready::new(&connection.stream, set))
    {
        log::error!("cannot stop watching a QMP client: {e}");
    }
}

/// Reads once; returns whether that changed anything.
fn read<S: Clone + 'static>(server: &mut Server<S>, id: SessionId, connection: &mut Connection) -> bool {
    let Some(session) = server.session(id) else { return false };
    let mut buffer = [0; READ_SIZE];
    match connection.stream.read(&mut buffer) {
        Ok(0) => session.receive_end(),
        Ok(count) => session.receive(buffer.get(..count).unwrap_or(&[])),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            // A connection that is hung up has nothing more to come.
            if connection.hung_up && e.kind() == io::ErrorKind::WouldBlock {
                session.receive_end();
            }
            return false;
        }
        Err(e) => {
            log::debug!("QMP client: {e}");
            session.receive_end();
            connection.failed |= !connection.hung_up;
        }
    }
    true
}

/// Writes what the socket takes; returns whether that was anything.
fn write<S: Clone + 'static>(server: &mut Server<S>, id: SessionId, connection: &mut Connection) -> bool {
    let Some(session) = server.session(id) else { return false };
    let mut progress = false;
    while !session.output().is_empty() {
        if connection.hung_up {
            // Nobody is there to read it; the requests behind it are still executed.
            let all = session.output().len();
            session.consume(all);
            return true;
        }
        match connection.stream.write(session.output()) {
            Ok(0) => break,
            Ok(count) => {
                session.consume(count);
                progress = true;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => {
                log::debug!("QMP client: {e}");
                connection.failed = true;
                session.close();
                break;
            }
        }
    }
    progress
}

impl<S: Clone + 'static> MutEventSubscriber for ControlChannel<S> {
    fn init(&mut self, ops: &mut EventOps) {
        let mut watched = vec![
            Ready::with_data(&self.wake.0, WAKE, EventSet::IN),
            Ready::with_data(&self.timer, TIMER, EventSet::IN),
        ];
        for (index, door) in self.doors.iter().enumerate() {
            watched.push(Ready::with_data(door.listener.socket(), data_of(LISTENER, index), EventSet::IN));
        }
        for events in watched {
            if let Err(e) = ops.add(events) {
                log::error!("the control channel cannot be watched: {e}");
            }
        }
        self.settle(ops);
    }

    fn process(&mut self, events: Ready, ops: &mut EventOps) {
        let (kind, index) = (events.data() % 4, events.data() / 4);
        match kind {
            WAKE | TIMER => {
                // Counters: reading sets them back. What happened is found by looking.
                let mut counter = [0; 8];
                if kind == TIMER {
                    let _ = rustix::io::read(&self.timer, &mut counter);
                    self.timer_at = None;
                } else {
                    let _ = rustix::io::read(&self.wake.0, &mut counter);
                }
            }
            LISTENER => self.accept(index as usize),
            _ => {
                // 30 bits of the id fit; the descriptor settles which one it is.
                let id = self
                    .connections
                    .iter()
                    .find(|(id, c)| id.0.wrapping_mul(4) / 4 == index && c.stream.as_raw_fd() == events.fd())
                    .map(|(id, _)| *id);
                if let Some(id) = id {
                    self.ready(id, events.event_set(), ops);
                }
            }
        }
        self.settle(ops);
    }
}
