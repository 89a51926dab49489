//! From the command line to a running daemon, and from there to its end.
//!
//! Called by `main` with a plan that has been checked. Each step goes through the command table, so that an option
//! means the same on the command line and on the control channel.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::Poll;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use graph::Registry;
use qmp::adapter::ControlChannel;
use qmp::server::Server;
use qmp::session::SessionOptions;
use qmp::socket::Listener;
use qmp::{CommandTable, Events};

use super::Daemon;
use super::commands::{self, State};
use super::service::Service;
use crate::process::chardev::{Chardev, ChardevAddress, Monitor};
use crate::process::cli::{Action, Plan, QapiText, Step};
use crate::process::daemonize::Ready;
use crate::process::listen_fds::{PassedFds, Socket};
use crate::process::notify::Notifier;
use crate::process::pidfile::Pidfile;
use crate::process::{logging, signals::Signals};

/// Without an event for this long, ms, the process has started and been set up.
const SETTLED_MS: i32 = 200;

type Subscriber = Box<dyn MutEventSubscriber>;
type Channel = Rc<RefCell<ControlChannel<State>>>;

/// A control channel that both the loop and the end of the process reach.
struct Shared(Channel);

impl MutEventSubscriber for Shared {
    fn init(&mut self, ops: &mut event_manager::EventOps) {
        self.0.borrow_mut().init(ops);
    }

    fn process(&mut self, events: event_manager::Events, ops: &mut event_manager::EventOps) {
        self.0.borrow_mut().process(events, ops);
    }
}

/// Sets everything up, serves until asked to end, takes everything down.
///
/// # Errors
/// The line for stderr: the step that failed and why, or what failed at the end.
pub fn run(plan: Plan, passed: PassedFds, signals: Signals, ready: Option<Ready>) -> Result<(), String> {
    let registry = Registry::new(drivers::ALL.iter().copied());
    let events = Events::new();
    let table = commands::table(&registry);
    let text = |e: std::io::Error| e.to_string();
    let daemon = Daemon::new(registry, passed, events.clone()).map_err(text)?;
    let channel = ControlChannel::new(Server::new(table.clone(), daemon.clone(), events)).map_err(text)?;
    let channel = Rc::new(RefCell::new(channel));
    let result = serve(plan, &daemon, &table, &channel, signals, ready);
    end_commands(&daemon, &channel);
    let ending = daemon.clone();
    daemon.executor.block_on(async move { ending.shutdown().await });
    // Last answers and events still go out.
    channel.borrow_mut().pump();
    drop(channel);
    daemon.stop_threads();
    result
}

/// Waits for the commands that are being executed and begins no further one: what changes an image must come to its end
/// before the image is closed, and nothing may be opened after.
fn end_commands(daemon: &Rc<Daemon>, channel: &Channel) {
    let channel = channel.clone();
    channel.borrow_mut().server().stop_starting();
    daemon.executor.block_on(poll_fn(move |cx| {
        let mut channel = channel.borrow_mut();
        channel.server().poll(cx);
        if channel.server().is_busy() { Poll::Pending } else { Poll::Ready(()) }
    }));
}

fn serve(
    plan: Plan,
    daemon: &Rc<Daemon>,
    table: &Rc<CommandTable<State>>,
    channel: &Channel,
    signals: Signals,
    ready: Option<Ready>,
) -> Result<(), String> {
    let notifier = Notifier::from_env().map_err(|e| format!("NOTIFY_SOCKET: {e}"))?;
    let mut chardevs = HashMap::new();
    for step in plan.steps {
        apply(&step, daemon, table, channel, &mut chardevs).map_err(|e| step.error(e).to_string())?;
    }
    daemon.started();
    let text = |e: event_manager::Error| format!("the main loop cannot be set up: {e}");
    let mut manager: EventManager<Subscriber> = EventManager::new().map_err(text)?;
    manager.add_subscriber(Box::new(Service::new(daemon.clone(), signals)));
    manager.add_subscriber(Box::new(Shared(channel.clone())));
    let _pidfile = match &plan.pidfile {
        Some(path) => Some(Pidfile::create(path).map_err(|e| format!("--pidfile: {e}"))?),
        None => None,
    };
    if let Some(ready) = ready {
        ready.announce().map_err(|e| format!("--daemonize: {e}"))?;
    }
    if let Err(e) = notifier.ready("serving") {
        log::warn!("the service manager cannot be told that we are ready: {e}");
    }
    let failed = |e: event_manager::Error| format!("the main loop failed: {e}");
    // Thousands of processes: none keeps what only its start needed. Not at once, for the first front end would have to
    // fetch a part of it again.
    while !daemon.quitting() && manager.run_with_timeout(SETTLED_MS).map_err(failed)? > 0 {}
    host::forget_program_pages();
    while !daemon.quitting() {
        manager.run().map_err(failed)?;
    }
    if let Err(e) = notifier.stopping("ending") {
        log::debug!("the service manager cannot be told that we end: {e}");
    }
    Ok(())
}

/// Applies one option.
fn apply(
    step: &Step,
    daemon: &Rc<Daemon>,
    table: &Rc<CommandTable<State>>,
    channel: &Channel,
    chardevs: &mut HashMap<String, Chardev>,
) -> Result<(), String> {
    match &step.action {
        Action::Blockdev(text) => command(daemon, table, "blockdev-add", text),
        Action::Export(text) => command(daemon, table, "block-export-add", text),
        Action::Object(text) => command(daemon, table, "object-add", text),
        Action::Chardev(c) => {
            chardevs.insert(c.id.clone(), c.clone());
            Ok(())
        }
        Action::Monitor(m) => monitor(daemon, channel, m, chardevs),
        Action::Trace(t) => logging::apply(t).map_err(|e| e.to_string()),
    }
}

fn command(
    daemon: &Rc<Daemon>,
    table: &CommandTable<State>,
    name: &str,
    text: &QapiText,
) -> Result<(), String> {
    let call = table.call_option(daemon.clone(), name, &text.text, text.implied_key).map_err(|e| e.desc)?;
    daemon.executor.block_on(call).map(drop).map_err(|e| e.desc)
}

fn monitor(
    daemon: &Daemon,
    channel: &Channel,
    monitor: &Monitor,
    chardevs: &mut HashMap<String, Chardev>,
) -> Result<(), String> {
    let options = SessionOptions { pretty: monitor.pretty };
    let chardev = chardevs
        .remove(&monitor.chardev)
        .ok_or_else(|| format!("chardev '{}' is in use by another monitor", monitor.chardev))?;
    let io = |e: std::io::Error| e.to_string();
    let mut channel = channel.borrow_mut();
    match (&chardev.address, chardev.server) {
        (ChardevAddress::Path(path), true) => {
            channel.listen(Listener::bind(path, None).map_err(io)?, options)
        }
        (ChardevAddress::Path(path), false) => {
            let stream = std::os::unix::net::UnixStream::connect(path)
                .map_err(|e| format!("Failed to connect to '{}': {e}", path.display()))?;
            channel.attach(stream, options).map_err(io)?;
        }
        (ChardevAddress::Fd(name), server) => {
            match (daemon.passed.borrow_mut().take_socket(name).map_err(|e| e.to_string())?, server) {
                (Socket::Listening(l), true) => {
                    channel.listen(Listener::from_fd(OwnedFd::from(l)).map_err(io)?, options);
                }
                (Socket::Connected(s), false) => channel.attach(s, options).map_err(io)?,
                (Socket::Listening(_), false) => {
                    return Err(format!("descriptor '{name}' is a listening socket: say server=on"));
                }
                (Socket::Connected(_), true) => {
                    return Err(format!("descriptor '{name}' is a connected socket: say server=off"));
                }
            }
        }
    }
    if chardev.wait && chardev.server {
        log::info!(
            "monitor on chardev '{}': wait=on is taken as wait=off; start-up does not wait for a client",
            chardev.id
        );
    }
    Ok(())
}
