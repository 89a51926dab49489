//! `--chardev` and `--monitor`: where the control channel listens.
//!
//! Called by [`super::cli`] for every occurrence, in order. Only describes; opening sockets is left to whoever
//! runs the main loop. Knows no QMP.
//!
//! Of QEMU's character devices only the unix stream socket is offered. Others are refused by name: `stdio` because
//! stdout belongs to no client of a daemon, and TCP because the control channel can open any file the process can
//! and has no authentication of its own; put it on a unix socket and let file permissions or a forwarder guard it.

use std::path::PathBuf;

use serde_json::Value;

use super::opts::{self, Bare, Members, OptError, err};

/// Longest path of a unix socket, in bytes: `sun_path` is 108 bytes with its final NUL (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// QEMU's character devices that ringblk does not offer.
const OTHER_BACKENDS: [&str; 21] = [
    "braille",
    "console",
    "dbus",
    "file",
    "hub",
    "memory",
    "msmouse",
    "mux",
    "null",
    "parallel",
    "pipe",
    "pty",
    "ringbuf",
    "serial",
    "spiceport",
    "spicevmc",
    "stdio",
    "testdev",
    "udp",
    "vc",
    "wctablet",
];

/// Members of QEMU's socket chardev that ringblk knows and does not offer.
const OTHER_MEMBERS: [&str; 21] = [
    "abstract",
    "delay",
    "host",
    "ipv4",
    "ipv6",
    "logappend",
    "logfile",
    "logtimestamp",
    "mux",
    "nodelay",
    "port",
    "reconnect",
    "reconnect-ms",
    "signal",
    "telnet",
    "tight",
    "tls-authz",
    "tls-creds",
    "tn3270",
    "to",
    "websocket",
];

/// Where a chardev's socket comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChardevAddress {
    /// A socket in the file system, created here (server) or connected to (client).
    Path(PathBuf),
    /// An inherited descriptor, by number or by name: see [`super::listen_fds::PassedFds::take_socket`].
    Fd(String),
}

/// One `--chardev socket,...`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chardev {
    /// Unique among chardevs.
    pub id: String,
    /// Where the socket is.
    pub address: ChardevAddress,
    /// `true`: listen; `false` (QEMU's default): connect to `Path`, or use `Fd` as a connected socket.
    pub server: bool,
    /// Whether start-up waits for the first client. QEMU's default for a server is `true`.
    pub wait: bool,
}

impl Chardev {
    /// Reads the text after `--chardev`.
    ///
    /// # Errors
    ///
    /// Anything but a unix stream socket, a missing or malformed `id`, none or both of `path` and `fd`, a path
    /// longer than [`MAX_SOCKET_PATH`], `wait` without `server=on`, unknown members.
    pub fn parse(text: &str) -> Result<Self, OptError> {
        let mut members = Members::parse(text, "backend", Bare::Flag)?;
        let Some(id) = members.take("id") else {
            return err("chardev: no id specified: add id=NAME");
        };
        opts::check_id(&id)?;
        match members.take("backend").as_deref() {
            Some("socket") => {}
            Some(other) if OTHER_BACKENDS.contains(&other) => {
                return err(format!(
                    "'{other}' is not supported: use socket,id={id},path=PATH,server=on,wait=off"
                ));
            }
            Some(other) => {
                return err(format!(
                    "'{other}' is not a valid char driver name: the one offered is 'socket'"
                ));
            }
            None => return err(format!("chardev: \"{id}\" missing backend: start with 'socket,'")),
        }
        let server = members.take_bool("server")?.unwrap_or(false);
        let wait = members.take_bool("wait")?;
        if wait.is_some() && !server {
            return err("'wait' option is incompatible with socket in client connect mode: add server=on");
        }
        let address = match (members.take("path"), members.take("fd")) {
            (Some(path), None) => ChardevAddress::Path(check_socket_path(&path)?),
            (None, Some(fd)) => ChardevAddress::Fd(fd),
            (Some(_), Some(_)) => return err("'path' and 'fd' exclude each other"),
            (None, None) => match members.first_left() {
                Some(key) if OTHER_MEMBERS.contains(&key) => return unsupported(key),
                _ => return err("'path' or 'fd' is missing: add path=PATH"),
            },
        };
        match members.first_left() {
            None => Ok(Self { id, address, server, wait: wait.unwrap_or(server) }),
            Some(key) if OTHER_MEMBERS.contains(&key) => unsupported(key),
            Some(key) => err(format!("Invalid parameter '{key}'")),
        }
    }
}

fn unsupported<T>(key: &str) -> Result<T, OptError> {
    err(format!("Parameter '{key}' is not supported: a chardev is a unix socket (path= or fd=)"))
}

/// Checks the length of a unix socket path.
///
/// # Errors
///
/// An empty path, or one longer than [`MAX_SOCKET_PATH`] bytes.
pub fn check_socket_path(path: &str) -> Result<PathBuf, OptError> {
    if path.is_empty() {
        return err("the socket path is empty");
    }
    if path.len() > MAX_SOCKET_PATH {
        return err(format!(
            "UNIX socket path '{path}' is too long: at most {MAX_SOCKET_PATH} bytes; a relative path may fit"
        ));
    }
    Ok(PathBuf::from(path))
}

/// One `--monitor`: a QMP channel on a chardev.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Monitor {
    /// The chardev it speaks on.
    pub chardev: String,
    /// Its own name, if given.
    pub id: Option<String>,
    /// Whether replies are indented for human eyes.
    pub pretty: bool,
}

impl Monitor {
    /// Reads the text after `--monitor`: dotted keys or JSON. `known` are the chardevs defined so far, `taken`
    /// those another monitor already speaks on.
    ///
    /// # Errors
    ///
    /// A chardev that is unknown or taken, `mode=readline`, unknown or mistyped members.
    pub fn parse(text: &str, known: &[&str], taken: &[&str]) -> Result<Self, OptError> {
        let (chardev, id, mode, pretty) =
            if text.starts_with('{') { monitor_json(text)? } else { monitor_keyval(text)? };
        let Some(chardev) = chardev else {
            return err("Parameter 'chardev' is missing");
        };
        if !known.contains(&chardev.as_str()) {
            return err(format!(
                "chardev \"{chardev}\" not found: define it with --chardev before --monitor"
            ));
        }
        if taken.contains(&chardev.as_str()) {
            return err(format!("chardev '{chardev}' is already in use: each monitor needs its own"));
        }
        match mode.as_deref() {
            None | Some("control") => Ok(Self { chardev, id, pretty: pretty.unwrap_or(false) }),
            Some("readline") => err("Only QMP is supported: use mode=control"),
            Some(other) => err(format!("Parameter 'mode' does not accept value '{other}'")),
        }
    }
}

type MonitorMembers = (Option<String>, Option<String>, Option<String>, Option<bool>);

fn monitor_keyval(text: &str) -> Result<MonitorMembers, OptError> {
    let mut members = Members::parse(text, "chardev", Bare::Refused)?;
    let found =
        (members.take("chardev"), members.take("id"), members.take("mode"), members.take_bool("pretty")?);
    match members.first_left() {
        None => Ok(found),
        Some(key) => err(format!("Parameter '{key}' is unexpected")),
    }
}

fn monitor_json(text: &str) -> Result<MonitorMembers, OptError> {
    let value: Value = serde_json::from_str(text).map_err(|e| OptError(format!("JSON parse error, {e}")))?;
    let Value::Object(mut object) = value else {
        return err("JSON parse error, an object is expected");
    };
    let mut string = |key: &str| match object.remove(key) {
        None => Ok(None),
        Some(Value::String(s)) => Ok(Some(s)),
        Some(_) => err(format!("Invalid parameter type for '{key}', expected: string")),
    };
    let (chardev, id, mode) = (string("chardev")?, string("id")?, string("mode")?);
    let pretty = match object.remove("pretty") {
        None => None,
        Some(Value::Bool(b)) => Some(b),
        Some(_) => return err("Invalid parameter type for 'pretty', expected: boolean"),
    };
    match object.keys().next() {
        None => Ok((chardev, id, mode, pretty)),
        Some(key) => err(format!("Parameter '{key}' is unexpected")),
    }
}

#[cfg(test)]
mod tests;
