//! An image that a command has open: from its name or options to a node, and to requests on the iothread.
//!
//! Called by every command but `create`. The format is the user's word; it is never found out here.

use std::os::unix::fs::FileTypeExt;
use std::rc::Rc;
use std::sync::Arc;

use graph::{DriverKind, NoSource, Node, NodeIo, Perm, Purpose, Root, RootOptions, SnapshotRef, View};
use qmp::keyval::{self, Dialect, Parsed};
use serde_json::{Map, Value, json};

use super::failure::Failure;
use super::session::Session;

/// Which image.
#[derive(Clone, Debug)]
pub struct Spec {
    /// A file name, or with `opts` options.
    pub name: String,
    /// The format the user gave.
    pub format: Option<String>,
    /// `--image-opts`
    pub opts: bool,
    /// Options of its node that say which secret is its key: of an image that was made with them a moment ago.
    pub keys: Vec<(String, String)>,
}

impl Spec {
    /// An image by its name or options.
    pub fn new(name: &str, format: Option<&str>, opts: bool) -> Result<Spec, Failure> {
        if opts && format.is_some() {
            return Err(Failure::new("--image-opts and --format are mutually exclusive"));
        }
        Ok(Spec { name: name.to_owned(), format: format.map(str::to_owned), opts, keys: Vec::new() })
    }
}

/// How it is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// For writing.
    pub writable: bool,
    /// Others may write meanwhile.
    pub force_share: bool,
    /// Past the page cache.
    pub direct: bool,
    /// Flushes do nothing.
    pub no_flush: bool,
    /// What the image says about files below it is not followed.
    pub alone: bool,
    /// Nobody may write to it meanwhile, nor to what lies below: neither others nor the command itself. Not with
    /// `force_share`.
    pub steady: bool,
    /// What for.
    pub purpose: Purpose,
}

impl How {
    /// For reading.
    pub fn read(force_share: bool) -> How {
        How { force_share, ..How::default() }
    }

    /// For writing.
    pub fn write() -> How {
        How { writable: true, ..How::default() }
    }

    /// To be told what it is: nothing below is opened.
    pub fn inspect(force_share: bool) -> How {
        How { force_share, alone: true, purpose: Purpose::Inspect, ..How::default() }
    }

    /// With a cache mode by its name; `which` is for the message ("source ").
    ///
    /// # Errors
    /// There is no such mode.
    pub fn cache(mut self, mode: &str, which: &str) -> Result<How, Failure> {
        (self.direct, self.no_flush) = match mode {
            "none" | "off" | "directsync" => (true, false),
            "writeback" | "writethrough" => (false, false),
            "unsafe" => (false, true),
            _ => return Err(Failure::new(format!("Invalid {which}cache option: {mode}"))),
        };
        Ok(self)
    }
}

/// An open image.
pub struct Image {
    /// As the user named it.
    pub name: String,
    node: String,
    root: Root,
    /// Keeps other processes from writing to the file of a snapshot's node, which would not mind.
    guard: Option<Root>,
    session: Session,
}

impl Session {
    /// Opens an image.
    ///
    /// # Errors
    /// No format was given, or what its driver says.
    pub async fn open(&self, spec: &Spec, how: How) -> Result<Image, Failure> {
        self.open_with(spec, how, None).await
    }

    async fn open_with(&self, spec: &Spec, how: How, snapshot: Option<String>) -> Result<Image, Failure> {
        let node = self.fresh_name();
        let failed = |e: Failure| e.context(format!("Could not open '{}'", spec.name));
        let mut options = self.options(spec).map_err(failed)?;
        how.put(&mut options, &node);
        let driver = options.get("driver").and_then(Value::as_str).unwrap_or_default();
        if how.alone && self.has_member(driver, "backing") {
            options.insert("backing".to_owned(), Value::Null);
        }
        let in_snapshot = snapshot.is_some();
        if let Some(id) = snapshot {
            options.insert("snapshot".to_owned(), json!(id));
        }
        self.add_node(options, how.purpose).await.map_err(failed)?;
        let guard = match in_snapshot && !how.force_share {
            true => Some(self.guard_file(&node).await.map_err(failed)?),
            false => None,
        };
        let mut root = RootOptions::new("the command", how.writable);
        if how.steady {
            root.shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        }
        let attached = self.graph().attach(&node, root, Rc::new(NoSource)).await;
        let root = attached.map_err(|e| failed(e.into()))?;
        Ok(Image { name: spec.name.clone(), node, root, guard, session: self.clone() })
    }

    /// Opens a snapshot inside an image, for reading: `snapshot.id=ID`, `snapshot.name=NAME` (or both), or an id or name.
    ///
    /// # Errors
    /// No such snapshot, and as [`Session::open`].
    pub async fn open_snapshot(&self, spec: &Spec, how: How, text: &str) -> Result<Image, Failure> {
        let which = snapshot_ref(text);
        let top = self.open(spec, How { alone: true, purpose: Purpose::Inspect, ..how }).await?;
        let found = which.find(&top.node()?.driver().snapshots()).map(|s| s.id.clone());
        top.close().await?;
        let id = found.ok_or_else(|| Failure::new("Failed to load snapshot: Can't find snapshot"))?;
        self.open_with(spec, how, Some(id)).await
    }

    /// Lets nobody else write to the file below a node.
    async fn guard_file(&self, node: &str) -> Result<Root, Failure> {
        let graph = self.graph().query_block_graph();
        let id = |name: &str| graph.nodes.iter().find(|n| n.name == name).map(|n| n.id);
        let edge = graph.edges.iter().find(|e| Some(e.parent) == id(node) && e.name == "file");
        let file = edge.and_then(|e| graph.nodes.iter().find(|n| n.id == e.child));
        let file = file.ok_or_else(|| Failure::new("the image has no file"))?;
        let options = RootOptions {
            perm: Perm::NONE,
            shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
            granularity: 1 << 30,
            ..RootOptions::new("the command", false)
        };
        Ok(self.graph().attach(&file.name, options, Rc::new(NoSource)).await?)
    }

    /// The options of an image's node.
    fn options(&self, spec: &Spec) -> Result<Map<String, Value>, Failure> {
        if spec.opts {
            return self.typed(&spec.name);
        }
        let Some(format) = &spec.format else {
            return Err(Failure::new(
                "the format is not guessed: give -f FORMAT (-f raw for a plain disk image)",
            ));
        };
        let mut options = self.named(&spec.name, Some(format))?;
        for (name, id) in &spec.keys {
            match name.split_once('.') {
                // `encrypt.key-secret`: only LUKS is made.
                Some((group, name)) => {
                    options.insert(group.to_owned(), json!({"format": "luks", name: id}));
                }
                None => {
                    options.insert(name.clone(), json!(id));
                }
            }
        }
        Ok(options)
    }

    /// The options in the text of `--image-opts`: those of `blockdev-add`, where a nested member that has a file name and no
    /// driver is a file.
    ///
    /// # Errors
    /// No driver, or nothing that `blockdev-add` would take.
    pub fn typed(&self, text: &str) -> Result<Map<String, Value>, Failure> {
        let mut text = text.to_owned();
        match keyval::parse(&text, &Dialect::implied("driver"))? {
            Parsed::Json(_) => {}
            Parsed::Keyval(Value::Object(options)) => {
                if !options.contains_key("driver") {
                    return Err(Failure::new("the format is not guessed: give driver=FORMAT"));
                }
                for (key, nested) in options.iter().filter_map(|(k, v)| Some((k, v.as_object()?))) {
                    // Said by the image as well; qemu-img does not want to hear it here.
                    if key == "encrypt" && !nested.contains_key("format") {
                        text.push_str(",encrypt.format=luks");
                    }
                    if nested.contains_key("filename") && !nested.contains_key("driver") {
                        text.push_str(&format!(",{key}.driver=file"));
                    }
                }
            }
            Parsed::Keyval(_) => return Err(Failure::new("the options are no object")),
            Parsed::Help => {
                return Err(Failure::new("Help is not available here: see ringblk --blockdev help"));
            }
        }
        match self.option_arguments("blockdev-add", &text, "driver")? {
            Value::Object(options) => Ok(options),
            _ => Err(Failure::new("the options are no object")),
        }
    }

    /// The options of a node for a file of that name; without a format the file itself.
    ///
    /// # Errors
    /// An unknown format, or a name that asks for something other than a file.
    pub fn named(&self, name: &str, format: Option<&str>) -> Result<Map<String, Value>, Failure> {
        let file = file_options(name)?;
        let Some(format) = format else { return Ok(file) };
        let def = self.graph().registry().get(format);
        let def = def.ok_or_else(|| Failure::new(format!("Unknown driver '{format}'")))?;
        let mut options = Map::new();
        if def.kind == DriverKind::Protocol {
            options = file;
        } else {
            options.insert("file".to_owned(), Value::Object(file));
        }
        options.insert("driver".to_owned(), json!(format));
        Ok(options)
    }

    /// Whether a node of that driver has an option of that name.
    fn has_member(&self, driver: &str, option: &str) -> bool {
        let Some(def) = self.graph().registry().get(driver) else { return false };
        (def.schema)().get("properties").and_then(|p| p.get(option)).is_some()
    }
}

/// What `-l` means.
fn snapshot_ref(text: &str) -> SnapshotRef {
    let mut id = None;
    let mut name = None;
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("snapshot.id", value)) => id = Some(value.to_owned()),
            Some(("snapshot.name", value)) => name = Some(value.to_owned()),
            _ => return SnapshotRef::IdOrName(text.to_owned()),
        }
    }
    match (id, name) {
        (Some(id), Some(name)) => SnapshotRef::Both { id, name },
        (Some(id), None) => SnapshotRef::Id(id),
        (None, Some(name)) => SnapshotRef::Name(name),
        (None, None) => SnapshotRef::IdOrName(text.to_owned()),
    }
}

/// The options of a file of that name: `json:{...}` holds them itself, `file:` may stand in front.
fn file_options(name: &str) -> Result<Map<String, Value>, Failure> {
    if let Some(text) = name.strip_prefix("json:") {
        return match qmp::json::parse(text) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(_) => Err(Failure::new("Could not parse the JSON options: an object is expected")),
            Err(e) => Err(Failure::new(format!("Could not parse the JSON options: {e}"))),
        };
    }
    let path = name.strip_prefix("file:").unwrap_or(name);
    if path.len() == name.len()
        && let Some((protocol, _)) = name.split_once(':')
        && !protocol.contains('/')
    {
        return Err(Failure::new(format!(
            "Unknown protocol '{protocol}': put ./ in front if it is a file name"
        )));
    }
    let device = std::fs::metadata(path).map(|m| m.file_type());
    let device = device.is_ok_and(|t| t.is_block_device() || t.is_char_device());
    let driver = if device { "host_device" } else { "file" };
    let mut options = Map::new();
    options.insert("driver".to_owned(), json!(driver));
    options.insert("filename".to_owned(), json!(path));
    Ok(options)
}

impl How {
    /// Adds the common members.
    fn put(self, options: &mut Map<String, Value>, node: &str) {
        options.insert("node-name".to_owned(), json!(node));
        options.insert("read-only".to_owned(), json!(!self.writable));
        if self.force_share {
            options.insert("force-share".to_owned(), json!(true));
        }
        if self.direct || self.no_flush {
            let cache = options.entry("cache").or_insert_with(|| json!({}));
            if let Some(cache) = cache.as_object_mut() {
                cache.insert("direct".to_owned(), json!(self.direct));
                cache.insert("no-flush".to_owned(), json!(self.no_flush));
            }
        }
    }
}

impl Image {
    /// The name of its node.
    pub fn node_name(&self) -> &str {
        &self.node
    }

    /// Its node.
    ///
    /// # Errors
    /// It is gone (never, while this exists).
    pub fn node(&self) -> Result<Arc<Node>, Failure> {
        Ok(self.root.node()?)
    }

    /// Its size, bytes.
    ///
    /// # Errors
    /// As [`Image::node`].
    pub fn size(&self) -> Result<u64, Failure> {
        Ok(self.node()?.size())
    }

    /// What the iothread needs for requests.
    ///
    /// # Errors
    /// A drain is on (never: nobody else uses the graph).
    pub fn view(&self) -> Result<Arc<View>, Failure> {
        self.root.view().ok_or_else(|| Failure::new(format!("'{}' is in use", self.name)))
    }

    /// Runs requests on the iothread.
    ///
    /// # Errors
    /// What `work` returns.
    pub async fn io<R, F, Fut>(&self, work: F) -> Result<R, Failure>
    where
        R: Send + 'static,
        F: FnOnce(NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = graph::Result<R>> + 'static,
    {
        let view = self.view()?;
        let call = self.session.thread().call(move |local| work(view.io(&local)));
        let done = call.await.map_err(|e| Failure::new(e.to_string()))?;
        Ok(done?)
    }

    /// Makes what was written durable and gives the image back: what closing writes is in it afterwards.
    ///
    /// # Errors
    /// Flushing fails.
    pub async fn close(self) -> Result<(), Failure> {
        let flushed = if self.node()?.options().read_only {
            Ok(())
        } else {
            self.io(|io| async move { io.flush().await }).await
        };
        let Image { node, root, guard, session, .. } = self;
        if let Some(guard) = guard {
            guard.detach().await;
        }
        root.detach().await;
        session.graph().blockdev_del(&node).await?;
        flushed
    }
}
