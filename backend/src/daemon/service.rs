//! The main loop's own subscriber: signals, the executor, and the listeners of exports.
//!
//! After each event it compares the listeners it watches with those that wait for a front end, and tells the loop the
//! difference. It holds a socket for as long as the loop knows its descriptor, so a number is never watched for
//! something that is closed.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::Daemon;
use crate::export::listener::ExportSocket;
use crate::process::signals::Signals;

/// See the module's words.
pub struct Service {
    daemon: Rc<Daemon>,
    signals: Signals,
    executor: RawFd,
    /// By descriptor: the export's id and its socket.
    watched: BTreeMap<RawFd, (String, Rc<ExportSocket>)>,
}

impl Service {
    /// Watches nothing before it is added to the loop.
    pub fn new(daemon: Rc<Daemon>, signals: Signals) -> Service {
        let executor = daemon.executor.fd().as_raw_fd();
        Service { daemon, signals, executor, watched: BTreeMap::new() }
    }

    fn sync(&mut self, ops: &mut EventOps) {
        let wanted: BTreeMap<RawFd, (String, Rc<ExportSocket>)> = self
            .daemon
            .exports
            .borrow()
            .values()
            .filter_map(|e| {
                let socket = e.waiting_on()?;
                let fd = socket.fd()?.as_raw_fd();
                Some((fd, (e.id().to_owned(), socket)))
            })
            .collect();
        let same = |fd: &RawFd, socket: &Rc<ExportSocket>| {
            wanted.get(fd).is_some_and(|(_, w)| Rc::ptr_eq(w, socket))
        };
        self.watched.retain(|fd, (_, socket)| {
            let keep = same(fd, socket);
            if !keep && let Err(e) = ops.remove(Events::new_raw(*fd, EventSet::IN)) {
                log::error!("an export's socket cannot be left alone: {e}");
            }
            keep
        });
        for (fd, entry) in wanted {
            if self.watched.contains_key(&fd) {
                continue;
            }
            match ops.add(Events::new_raw(fd, EventSet::IN)) {
                Ok(()) => {
                    self.watched.insert(fd, entry);
                }
                Err(e) => log::error!("export '{}' cannot be watched: {e}", entry.0),
            }
        }
    }
}

impl MutEventSubscriber for Service {
    fn init(&mut self, ops: &mut EventOps) {
        for fd in [self.signals.as_raw_fd(), self.executor] {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error!("the main loop cannot be set up: {e}");
                self.daemon.request_quit();
            }
        }
        self.sync(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.signals.as_raw_fd() {
            if let Some(signal) = self.signals.take() {
                log::info!("ending: {}", signal.name());
                self.daemon.request_quit();
            }
        } else if fd == self.executor {
            self.daemon.executor.run();
        } else if let Some((id, _)) = self.watched.get(&fd) {
            let export = self.daemon.exports.borrow().get(id).cloned();
            if let Some(export) = export {
                self.daemon.accept(&export);
            }
        }
        self.sync(ops);
    }
}
