//! User-creatable objects: `iothread`, `secret` and `throttle-group`. `--object`, `object-add`, `object-del`, and their
//! properties for `qom-get`, `qom-set`, `qom-list`, `query-iothreads`.
//!
//! Main thread only. Must not know exports: the caller says whether an object is in use.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use drivers::throttle::ThrottleGroup;
use host::{Engine, IoThread, IoThreadOptions, PollParams};
use qmp::QmpError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::secret::{self, MAX_SECRETS, SecretObject, SecretProperties};
use super::throttle::{self, MAX_GROUPS, ThrottleGroupProperties};

/// Most iothreads of a process.
pub const MAX_IOTHREADS: usize = 256;
/// Longest busy wait that can be set, ns: one second.
pub const MAX_POLL_NS: i64 = 1_000_000_000;
/// Where objects live in the object tree.
const ROOT: &str = "/objects";

/// `iothread`: a thread that serves queues.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct IoThreadProperties {
    /// Name of the object.
    pub id: String,
    /// Longest busy wait for work before the thread sleeps, ns, 0 to 10^9; 0 turns polling off. Default: 32768.
    #[serde(default = "default_poll_max")]
    pub poll_max_ns: i64,
    /// Factor by which the busy wait grows; 0 picks 2. Default: 0.
    #[serde(default)]
    pub poll_grow: i64,
    /// Divisor by which it shrinks; 0 goes to 0 at once. Default: 0.
    #[serde(default)]
    pub poll_shrink: i64,
    /// Accepted for QEMU's sake, kept and told again: here everything that has come together by the end of a turn of the
    /// loop is submitted in one system call. Default: 0.
    #[serde(default)]
    pub aio_max_batch: i64,
    /// How the thread does its I/O. Default: auto.
    #[serde(default)]
    pub aio: Aio,
}

/// How an iothread reaches the kernel.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Aio {
    /// io_uring where the kernel allows it, else threads.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// Worker threads.
    Threads,
}

fn default_poll_max() -> i64 {
    32_768
}

/// `object-add`'s union, by `qom-type`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(tag = "qom-type", rename_all = "kebab-case")]
pub enum ObjectOptions {
    /// A thread that serves queues.
    Iothread(IoThreadProperties),
    /// A passphrase or key.
    Secret(SecretProperties),
    /// Limits that several throttle nodes keep together.
    ThrottleGroup(Box<ThrottleGroupProperties>),
}

/// What `query-iothreads` tells, per iothread: QEMU's members, and how busy it has been.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct IoThreadInfo {
    /// Its id.
    pub id: String,
    /// Its thread id in the kernel.
    pub thread_id: i32,
    /// Longest busy wait, ns.
    pub poll_max_ns: i64,
    /// Growth factor.
    pub poll_grow: i64,
    /// Shrink divisor.
    pub poll_shrink: i64,
    /// As it was set; see `aio-max-batch` of the object.
    pub aio_max_batch: i64,
    /// How it reaches the kernel: `io_uring` or `threads`.
    pub engine: String,
    /// Requests that its queues handed over.
    pub requests: u64,
    /// Operations handed to the kernel asynchronously.
    pub operations: u64,
    /// Operations done at once, from the page cache.
    pub inline_operations: u64,
    /// System calls that submitted or waited.
    pub enters: u64,
    /// Times it went to sleep.
    pub sleeps: u64,
    /// Times that busy waiting found work.
    pub poll_hits: u64,
}

/// One property of an object, for `qom-list`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ObjectPropertyInfo {
    /// Its name.
    pub name: String,
    /// Its type, as `qom-list` of QEMU spells types.
    #[serde(rename = "type")]
    pub kind: String,
}

/// The objects of the process by id.
#[derive(Default)]
pub struct Objects {
    iothreads: BTreeMap<String, IoThread>,
    secrets: BTreeMap<String, SecretObject>,
    /// Held by the graph, which counts who else holds them.
    groups: BTreeMap<String, Weak<ThrottleGroup>>,
}

/// An object that was taken out.
pub enum Removed {
    /// Its thread still runs.
    Iothread(IoThread),
    /// A secret: the graph has to forget it, too.
    Secret,
    /// A throttle group, likewise.
    ThrottleGroup,
}

/// A property of `iothread` that can be read and set.
struct Property {
    name: &'static str,
    get: fn(&PollParams) -> u64,
    set: fn(&mut PollParams, u64),
    max: i64,
}

const PROPERTIES: [Property; 4] = [
    Property { name: "poll-max-ns", get: |p| p.max_ns, set: |p, v| p.max_ns = v, max: MAX_POLL_NS },
    Property { name: "poll-grow", get: |p| p.grow, set: |p, v| p.grow = v, max: i64::MAX },
    Property { name: "poll-shrink", get: |p| p.shrink, set: |p, v| p.shrink = v, max: i64::MAX },
    Property {
        name: "aio-max-batch",
        get: |p| p.aio_max_batch,
        set: |p, v| p.aio_max_batch = v,
        max: i64::MAX,
    },
];

fn checked(p: &Property, value: i64) -> Result<u64, QmpError> {
    if value < 0 || value > p.max {
        return Err(QmpError::generic(format!("{} value must be in range [0, {}]", p.name, p.max)));
    }
    Ok(value as u64)
}

impl Objects {
    /// Checks the name of an object to come.
    ///
    /// # Errors
    /// It is no identifier, or taken.
    pub fn check_id(&self, id: &str) -> Result<(), QmpError> {
        if !crate::export::valid_id(id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        if self.iothreads.contains_key(id) || self.secrets.contains_key(id) || self.groups.contains_key(id) {
            return Err(QmpError::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        Ok(())
    }

    /// Notes a secret whose content the graph has been given.
    ///
    /// # Errors
    /// There are too many; nothing of it may stay then.
    pub fn add_secret(&mut self, p: SecretProperties) -> Result<(), QmpError> {
        self.check_id(&p.id)?;
        if self.secrets.len() >= MAX_SECRETS {
            return Err(QmpError::generic(format!(
                "there are {MAX_SECRETS} secrets already, the most there can be"
            )));
        }
        let object = SecretObject { format: p.format, file: p.file, keyid: p.keyid, iv: p.iv };
        self.secrets.insert(p.id, object);
        Ok(())
    }

    /// Makes a throttle group.
    ///
    /// # Errors
    /// The id is taken or no identifier, there are too many, or its limits are refused.
    pub fn add_group(&mut self, p: &ThrottleGroupProperties) -> Result<Arc<ThrottleGroup>, QmpError> {
        self.check_id(&p.id)?;
        if self.groups.len() >= MAX_GROUPS {
            return Err(QmpError::generic(format!(
                "there are {MAX_GROUPS} throttle groups already, the most there can be"
            )));
        }
        let group = Arc::new(throttle::make(p)?);
        self.groups.insert(p.id.clone(), Arc::downgrade(&group));
        Ok(group)
    }

    /// Makes an iothread.
    ///
    /// # Errors
    /// The id is taken or no identifier, a value is out of range, the thread cannot be started.
    pub fn add_iothread(&mut self, o: IoThreadProperties) -> Result<(), QmpError> {
        self.check_id(&o.id)?;
        if self.iothreads.len() >= MAX_IOTHREADS {
            return Err(QmpError::generic(format!(
                "there are {MAX_IOTHREADS} iothreads already, the most there can be"
            )));
        }
        let mut poll = PollParams::default();
        let given = [o.poll_max_ns, o.poll_grow, o.poll_shrink, o.aio_max_batch];
        for (p, value) in PROPERTIES.iter().zip(given) {
            (p.set)(&mut poll, checked(p, value)?);
        }
        let engine = match o.aio {
            Aio::Auto => Engine::Auto,
            Aio::IoUring => Engine::IoUring,
            Aio::Threads => Engine::Threads,
        };
        let thread = IoThread::start(IoThreadOptions { name: o.id.clone(), engine, poll })
            .map_err(|e| QmpError::generic(format!("iothread '{}' cannot be started: {e}", o.id)))?;
        self.iothreads.insert(o.id, thread);
        Ok(())
    }

    /// Takes out an object that nobody uses.
    ///
    /// # Errors
    /// No such object.
    pub fn remove(&mut self, id: &str) -> Result<Removed, QmpError> {
        if self.secrets.remove(id).is_some() {
            return Ok(Removed::Secret);
        }
        if self.groups.remove(id).is_some() {
            return Ok(Removed::ThrottleGroup);
        }
        let thread = self.iothreads.remove(id).map(Removed::Iothread);
        thread.ok_or_else(|| QmpError::generic(format!("object '{id}' not found")))
    }

    /// An iothread by id.
    pub fn iothread(&self, id: &str) -> Option<&IoThread> {
        self.iothreads.get(id)
    }

    /// All iothreads, by id.
    pub fn iothreads(&self) -> impl Iterator<Item = &IoThread> {
        self.iothreads.values()
    }

    /// All of them, emptied: the process ends.
    pub fn take_all(&mut self) -> Vec<IoThread> {
        std::mem::take(&mut self.iothreads).into_values().collect()
    }

    fn secret_at(&self, path: &str) -> Option<&SecretObject> {
        self.secrets.get(id_of(path))
    }

    fn group_at(&self, path: &str) -> Option<Arc<ThrottleGroup>> {
        self.groups.get(id_of(path)).and_then(Weak::upgrade)
    }

    fn at(&self, path: &str) -> Result<&IoThread, QmpError> {
        self.iothreads.get(id_of(path)).ok_or_else(|| {
            QmpError::new(qmp::ErrorClass::DeviceNotFound, format!("Device '{path}' not found"))
        })
    }

    /// `qom-get`.
    ///
    /// # Errors
    /// No such object or property.
    pub fn get(&self, path: &str, property: &str) -> Result<Value, QmpError> {
        if let Some(secret) = self.secret_at(path) {
            return secret.get(property);
        }
        if let Some(group) = self.group_at(path) {
            return throttle::get(&group, property);
        }
        let thread = self.at(path)?;
        match property {
            "type" => Ok(json!("iothread")),
            "thread-id" => Ok(json!(thread.tid())),
            _ => Ok(json!((find(property)?.get)(&thread.poll_params()))),
        }
    }

    /// `qom-set`.
    ///
    /// # Errors
    /// No such object or property, or a value out of range.
    pub fn set(&self, path: &str, property: &str, value: &Value) -> Result<(), QmpError> {
        if self.secret_at(path).is_some() {
            return Err(QmpError::generic(format!("Property '{property}' is not writable")));
        }
        if let Some(group) = self.group_at(path) {
            return throttle::set(&group, property, value);
        }
        let thread = self.at(path)?;
        if ["type", "thread-id"].contains(&property) {
            return Err(QmpError::generic(format!("Property '{property}' is not writable")));
        }
        let p = find(property)?;
        let value = value.as_i64().ok_or_else(|| QmpError::invalid_type(property, "integer"))?;
        let mut params = thread.poll_params();
        (p.set)(&mut params, checked(p, value)?);
        thread.set_poll_params(params);
        Ok(())
    }

    /// `qom-list`.
    ///
    /// # Errors
    /// No such path.
    pub fn list(&self, path: &str) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
        let info =
            |name: &str, kind: &str| ObjectPropertyInfo { name: name.to_owned(), kind: kind.to_owned() };
        match path {
            "/" => Ok(vec![info("type", "string"), info("objects", "child<container>")]),
            ROOT | "/objects/" => Ok(std::iter::once(info("type", "string"))
                .chain(self.iothreads.keys().map(|id| info(id, "child<iothread>")))
                .chain(self.secrets.keys().map(|id| info(id, "child<secret>")))
                .chain(self.groups.keys().map(|id| info(id, "child<throttle-group>")))
                .collect()),
            _ if self.secret_at(path).is_some() => {
                Ok(secret::PROPERTIES.iter().map(|(name, kind)| info(name, kind)).collect())
            }
            _ if self.group_at(path).is_some() => {
                Ok(throttle::properties().map(|(name, kind)| info(&name, kind)).collect())
            }
            _ => {
                self.at(path)?;
                Ok([info("type", "string"), info("thread-id", "int")]
                    .into_iter()
                    .chain(PROPERTIES.iter().map(|p| info(p.name, "int")))
                    .collect())
            }
        }
    }
}

fn id_of(path: &str) -> &str {
    path.strip_prefix(ROOT).and_then(|p| p.strip_prefix('/')).unwrap_or(path)
}

fn find(property: &str) -> Result<&'static Property, QmpError> {
    PROPERTIES
        .iter()
        .find(|p| p.name == property)
        .ok_or_else(|| QmpError::generic(format!("Property 'iothread.{property}' not found")))
}

/// What `query-iothreads` tells of one.
pub fn info(thread: &IoThread) -> IoThreadInfo {
    let (p, s) = (thread.poll_params(), thread.stats());
    let int = |v: u64| i64::try_from(v).unwrap_or(i64::MAX);
    IoThreadInfo {
        id: thread.name().to_owned(),
        thread_id: thread.tid(),
        poll_max_ns: int(p.max_ns),
        poll_grow: int(p.grow),
        poll_shrink: int(p.shrink),
        aio_max_batch: int(p.aio_max_batch),
        engine: thread.engine().to_owned(),
        requests: s.requests,
        operations: s.ops,
        inline_operations: s.inline_ops,
        enters: s.enters,
        sleeps: s.sleeps,
        poll_hits: s.poll_hits,
    }
}
