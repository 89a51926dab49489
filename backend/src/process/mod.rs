//! The process around the block service: its command line, its descriptors, its log and its place in the system.
//!
//! `main.rs` calls these modules in the order of [the start-up sequence](#start-up); nothing else does. They know
//! no node, no ring and no QMP command: an option that belongs to those travels through as text
//! ([`cli::QapiText`]) and is applied by whoever owns the subject.
//!
//! # Start-up
//!
//! 1. [`listen_fds::PassedFds::from_env`]: note which descriptors were inherited, before any is opened.
//! 2. [`cli::parse`]: all of the command line, in two passes; `--help`, `--version` and bad options end here.
//! 3. [`daemonize::begin`], when asked for: the launcher waits, the daemon goes on.
//! 4. [`logging::init`], [`limits::raise_nofile`], [`signals::Signals::install`].
//! 5. The plan's steps, in the order they were written.
//! 6. [`pidfile::Pidfile::create`], [`daemonize::Ready::announce`], [`notify::Notifier::ready`]: sockets accept now.
//! 7. At the end: [`notify::Notifier::stopping`], the service goes down, the pid file is dropped,
//!    [`logging::flush`].
//!
//! # Environment
//!
//! `LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES`, `NOTIFY_SOCKET`, `JOURNAL_STREAM`: as systemd defines them.
//! `RINGBLK_LOG`: see [`logging`]. `RINGBLK_DAEMON`: private, between launcher and daemon. The protocols ask that
//! such variables be unset once read, so that no child acts on them; changing the environment of a running process
//! cannot be done safely, and ringblk starts no child but the daemon itself, which is meant to see them.

pub mod chardev;
pub mod cli;
pub mod daemonize;
pub mod help;
pub mod limits;
pub mod listen_fds;
pub mod logging;
pub mod notify;
pub mod opts;
pub mod pidfile;
pub mod signals;

/// Exit status: the daemon ended as asked (signal or `quit`), or printed what was asked for.
pub const EXIT_OK: u8 = 0;
/// Exit status: a bad option or configuration, a failed start, or a failure that ended the daemon.
/// The one status QEMU's tools use for all of these; the line on stderr tells them apart.
pub const EXIT_FAILURE: u8 = 1;
