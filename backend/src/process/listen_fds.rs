//! Sockets that were open when the process started: `--fd`, `addr.type=fd`, `fd=` of a chardev, socket activation.
//!
//! `main.rs` calls [`PassedFds::from_env`] before anything else opens a descriptor; exports and chardevs take what
//! they name through [`PassedFds::take_socket`]. Must not be used for descriptors that ringblk opened itself: only
//! those noted at start-up are handed out, each once.
//!
//! # Names
//!
//! As in QEMU's `SocketAddress` of type `fd`: what starts with a digit is a descriptor number, everything else a
//! name. Names come from `LISTEN_FDNAMES` (sd_listen_fds_with_names(3); `FileDescriptorName=` of a socket unit):
//! by custom `vhost` or the export's id for an export and `qmp` for a control socket, but what counts is what the
//! option says: `--fd=NAME`, `addr.str=NAME` of an export, `fd=NAME` of a chardev. Several descriptors may share a name; they are handed out
//! in order.
//!
//! # Ownership
//!
//! A number cannot become an owner without `unsafe`, which this crate forbids. The descriptor is therefore sent
//! through a socket pair (SCM_RIGHTS) and what comes out is owned and close-on-exec. The number stays open until the
//! process ends. For a listening socket that changes nothing, whoever passed it holds it too. A *connected* one must
//! be ended with `shutdown(2)`, since dropping it leaves the peer connected.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketType, recvmsg, sockopt,
};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::daemonize;

/// First descriptor of socket activation (`SD_LISTEN_FDS_START`).
pub const LISTEN_FDS_START: RawFd = 3;

/// Most descriptors taken from socket activation; systemd's own limit is the unit's `LimitNOFILE`.
pub const MAX_LISTEN_FDS: RawFd = 1024;

/// Why a passed descriptor cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub struct FdError(String);

impl fmt::Display for FdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FdError {}

fn err<T>(text: String) -> Result<T, FdError> {
    Err(FdError(text))
}

/// A passed unix stream socket.
#[derive(Debug)]
pub enum Socket {
    /// It listens (`SO_ACCEPTCONN`): accept front ends from it.
    Listening(UnixListener),
    /// It is connected: it is the one front end. End it with `shutdown`, see the module's text.
    Connected(UnixStream),
}

#[derive(Debug)]
struct Named {
    name: String,
    number: RawFd,
}

/// The descriptors inherited at start-up that nobody has taken yet.
#[derive(Debug, Default)]
pub struct PassedFds {
    open: BTreeSet<RawFd>,
    named: Vec<Named>,
}

impl PassedFds {
    /// Notes all descriptors above stderr and reads `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES`.
    ///
    /// # Errors
    ///
    /// `/proc` is not there, or the variables are addressed to this process and contradict themselves or what
    /// is open. Variables addressed to another process are ignored.
    pub fn from_env() -> Result<Self, FdError> {
        let open = open_descriptors().map_err(|e| FdError(format!("/proc/self/fd: {e}")))?;
        let variable = |name: &str| std::env::var(name).ok();
        let ours = |pid: u32| pid == std::process::id() || daemonize::launched_by(pid);
        Self::new(open, variable, ours)
    }

    fn new(
        open: BTreeSet<RawFd>,
        variable: impl Fn(&str) -> Option<String>,
        ours: impl Fn(u32) -> bool,
    ) -> Result<Self, FdError> {
        let mut passed = Self { open, named: Vec::new() };
        let (Some(pid), Some(count)) = (variable("LISTEN_PID"), variable("LISTEN_FDS")) else {
            return Ok(passed);
        };
        if !pid.parse().is_ok_and(ours) {
            return Ok(passed);
        }
        let count: RawFd = match count.parse() {
            Ok(count @ 0..=MAX_LISTEN_FDS) => count,
            _ => return err(format!("LISTEN_FDS={count}: a number from 0 to {MAX_LISTEN_FDS} is expected")),
        };
        let numbers = LISTEN_FDS_START..LISTEN_FDS_START + count;
        if let Some(closed) = numbers.clone().find(|n| !passed.open.contains(n)) {
            return err(format!("LISTEN_FDS={count}: descriptor {closed} is not open"));
        }
        let names = match variable("LISTEN_FDNAMES") {
            Some(names) => names.split(':').map(str::to_owned).collect(),
            // sd_listen_fds_with_names(3): the name of those that have none.
            None => vec!["unknown".to_owned(); numbers.len()],
        };
        if count > 0 && names.len() != numbers.len() {
            return err(format!("LISTEN_FDNAMES has {} names for {count} descriptors", names.len()));
        }
        passed.named = names.into_iter().zip(numbers).map(|(name, number)| Named { name, number }).collect();
        Ok(passed)
    }

    /// Names of the descriptors of socket activation that are not taken, in order.
    #[cfg(test)]
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.named.iter().map(|n| n.name.as_str())
    }

    /// Takes the descriptor with this number or name, whatever it is.
    ///
    /// # Errors
    ///
    /// No such descriptor was inherited, it is taken, or it is a standard stream.
    pub fn take(&mut self, designator: &str) -> Result<OwnedFd, FdError> {
        let number = self.resolve(designator)?;
        if !self.open.contains(&number) {
            return err(format!(
                "descriptor '{designator}' was not passed to this process, or is in use already"
            ));
        }
        let owned = duplicate(number).map_err(|e| FdError(format!("descriptor '{designator}': {e}")))?;
        self.open.remove(&number);
        self.named.retain(|n| n.number != number);
        Ok(owned)
    }

    /// Takes a unix stream socket, listening or connected.
    ///
    /// # Errors
    ///
    /// As [`PassedFds::take`], or it is something else; it counts as taken then.
    pub fn take_socket(&mut self, designator: &str) -> Result<Socket, FdError> {
        let owned = self.take(designator)?;
        classify(owned).map_err(|e| FdError(format!("File descriptor '{designator}' {e}")))
    }

    fn resolve(&self, designator: &str) -> Result<RawFd, FdError> {
        if designator.starts_with(|c: char| c.is_ascii_digit()) {
            return match designator.parse() {
                Ok(number @ LISTEN_FDS_START..) => Ok(number),
                Ok(_) => err(format!(
                    "descriptor {designator} is a standard stream: pass the socket as 3 or above"
                )),
                Err(_) => err(format!("'{designator}' is not a descriptor number")),
            };
        }
        match self.named.iter().find(|n| n.name == designator) {
            Some(named) => Ok(named.number),
            None => err(format!(
                "no descriptor named '{designator}' was passed: set LISTEN_FDNAMES (FileDescriptorName=), or give a number"
            )),
        }
    }
}

/// Descriptors above stderr that are open now.
fn open_descriptors() -> io::Result<BTreeSet<RawFd>> {
    let mut listed = BTreeSet::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        listed.extend(name.to_str().and_then(|n| n.parse::<RawFd>().ok()).filter(|n| *n >= LISTEN_FDS_START));
    }
    // The listing's own descriptor was among them and is closed by now.
    listed.retain(|n| std::fs::symlink_metadata(format!("/proc/self/fd/{n}")).is_ok());
    Ok(listed)
}

/// An owned, close-on-exec duplicate of a descriptor number.
fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    let (sender, receiver) = UnixStream::pair()?;
    sender.send_with_fd(&[0_u8][..], number).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    recvmsg(&receiver, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT)?;
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    received.ok_or_else(|| io::Error::other("the kernel did not pass it on"))
}

/// Tells a listening unix stream socket from a connected one.
fn classify(fd: OwnedFd) -> Result<Socket, &'static str> {
    let Ok(kind) = sockopt::socket_type(fd.as_fd()) else {
        return Err("is not a socket");
    };
    if sockopt::socket_domain(&fd) != Ok(AddressFamily::UNIX) || kind != SocketType::STREAM {
        return Err("is not a unix stream socket");
    }
    match sockopt::socket_acceptconn(&fd) {
        Ok(true) => Ok(Socket::Listening(UnixListener::from(fd))),
        Ok(false) if rustix::net::getpeername(&fd).is_ok() => Ok(Socket::Connected(UnixStream::from(fd))),
        Ok(false) => Err("is a socket that neither listens nor is connected"),
        Err(_) => Err("does not tell whether it listens"),
    }
}

#[cfg(test)]
mod tests;
