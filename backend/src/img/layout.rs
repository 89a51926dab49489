//! The options of a new image, and its creation: what `create` and `convert` share.
//!
//! `-o` has qemu-img's names (`cluster_size`); the drivers' create functions have those of `blockdev-create`
//! (`cluster-size`): the same but for a few, which are listed here. What an option may hold is asked of the driver's
//! schema. Must not know what the options mean.

mod schema;

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use graph::{CreateContext, CreateDef, DriverDef, JobControl};
use qmp::keyval::{self, Bare, Dialect, Parsed};
use serde_json::{Map, Value, json};

use super::failure::Failure;
use super::image::{How, Spec};
use super::session::Session;
use super::{output, size};
use schema::{describe, has_member, kind, member};

/// The order in which options are told, which is qemu-img's; others follow.
const ORDER: &[&str] = &[
    "encryption",
    "encrypt.format",
    "encrypt.key-secret",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.hash-alg",
    "encrypt.iter-time",
    "cluster-size",
    "extended-l2",
    "metadata-preallocation",
    "compression-type",
    "size",
    "nocow",
    "key-secret",
    "cipher-alg",
    "cipher-mode",
    "ivgen-alg",
    "ivgen-hash-alg",
    "hash-alg",
    "iter-time",
    "detached-header",
    "preallocation",
    "compat",
    "backing-file",
    "backing-fmt",
    "data-file",
    "data-file-raw",
    "lazy-refcounts",
    "refcount-bits",
    "extent-size-hint",
];

/// What is told of options that were not given, where the format has them.
const DEFAULTS: [(&str, &str); 5] = [
    ("cluster-size", "65536"),
    ("extended-l2", "off"),
    ("compression-type", "zlib"),
    ("lazy-refcounts", "off"),
    ("refcount-bits", "16"),
];

/// Options by their names with dashes, as text.
#[derive(Clone, Debug, Default)]
pub struct Options(BTreeMap<String, String>);

/// What `-o` holds.
pub enum Given {
    /// Options.
    Options(Options),
    /// `-o help`
    Help,
}

/// Reads `-o`, given any number of times; the last one of a name counts.
///
/// # Errors
/// It is no list of options.
pub fn parse(texts: &[String]) -> Result<Given, Failure> {
    let mut all = BTreeMap::new();
    for text in texts {
        let bad = |e: qmp::QmpError| Failure::new(format!("Invalid options '{text}': {}", e.desc));
        match keyval::parse(text, &Dialect { implied: None, bare: Bare::Flag }).map_err(bad)? {
            Parsed::Help => return Ok(Given::Help),
            Parsed::Keyval(tree) | Parsed::Json(tree) => flatten(&mut all, "", &tree),
        }
    }
    Ok(Given::Options(Options(all)))
}

/// Leaves of a tree under dotted names.
fn flatten(all: &mut BTreeMap<String, String>, prefix: &str, value: &Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let key = key.replace('_', "-");
                let name = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
                flatten(all, &name, value);
            }
        }
        Value::String(text) => {
            all.insert(prefix.to_owned(), text.clone());
        }
        other => {
            all.insert(prefix.to_owned(), other.to_string());
        }
    }
}

impl Options {
    /// An option's text.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Sets an option.
    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.0.insert(name.to_owned(), value.into());
    }

    /// Those that name the secret an image is encrypted with.
    pub fn keys(&self) -> Vec<(String, String)> {
        let named = |name: &str| name == "key-secret" || name.ends_with(".key-secret");
        self.0.iter().filter(|(name, _)| named(name)).map(|(n, v)| (n.clone(), v.clone())).collect()
    }

    /// Whether none was given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A format to create images of.
pub struct Format {
    def: DriverDef,
    create: CreateDef,
    /// The image is the file, not something inside of one.
    pub is_file: bool,
}

impl Session {
    /// The format of that name.
    ///
    /// # Errors
    /// There is none, or its images cannot be created.
    pub fn format(&self, name: &str) -> Result<Format, Failure> {
        let registry = self.graph().registry();
        let def = *registry.get(name).ok_or_else(|| Failure::new(format!("Unknown file format '{name}'")))?;
        let unable = || Failure::new(format!("Format driver '{name}' does not support image creation"));
        let file = || registry.get("file").and_then(|d| d.create);
        // A raw image is its file.
        let create = if name == "raw" { file() } else { def.create };
        let create = create.ok_or_else(unable)?;
        let is_file = !has_member(&(create.schema)(), "file");
        Ok(Format { def, create, is_file })
    }

    fn file_create(&self) -> Result<CreateDef, Failure> {
        let def = self.graph().registry().get("file").and_then(|d| d.create);
        def.ok_or_else(|| Failure::new("files cannot be created"))
    }
}

impl Format {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.def.name
    }

    /// Whether its images can have others below them.
    pub fn has_backing(&self) -> bool {
        has_member(&(self.create.schema)(), "backing-file")
    }

    /// The list of options for `-o help`.
    pub fn help(&self, session: &Session) -> Result<String, Failure> {
        let mut lines = BTreeMap::new();
        describe(&mut lines, &(self.create.schema)(), "");
        if !self.is_file {
            let mut below = BTreeMap::new();
            describe(&mut below, &(session.file_create()?.schema)(), "");
            lines.extend(below.into_iter().filter(|(name, _)| name != "size" && name != "preallocation"));
        }
        for hidden in ["file", "filename", "driver"] {
            lines.remove(hidden);
        }
        let mut out = format!("Supported {} options:\n", self.name());
        for (name, (kind, words)) in lines {
            let name = if name == "version" { "compat".to_owned() } else { name };
            let left = format!("{}=<{kind}>", name_for_users(&name));
            out.push_str(&format!("  {left:<22} - {words}\n"));
        }
        Ok(out)
    }
}

/// An option as qemu-img spells it: those of keys, and names below the top level, keep their dashes.
fn name_for_users(name: &str) -> String {
    const DASHED: [&str; 5] = ["-alg", "-mode", "-secret", "-time", "-header"];
    match name.contains('.') || DASHED.iter().any(|end| name.ends_with(end)) {
        true => name.to_owned(),
        false => name.replace('-', "_"),
    }
}

/// Creates an image. Options that belong to the file are given to it.
///
/// # Errors
/// An option the format has not, and what the drivers say.
pub async fn create(
    session: &Session,
    filename: &str,
    format: &Format,
    options: &Options,
    quiet: bool,
) -> Result<(), Failure> {
    let named = |e: Failure| e.context(filename);
    let plan = Plan::new(session, format, options).map_err(named)?;
    if !quiet {
        output::print(&told(filename, format, options))?;
    }
    plan.carry_out(session, filename, format).await.map_err(named)
}

/// `Formatting 'x', fmt=raw size=1024`
fn told(filename: &str, format: &Format, options: &Options) -> String {
    let mut all = options.clone();
    if !format.is_file {
        let schema = (format.create.schema)();
        for (name, value) in DEFAULTS {
            if options.get(name).is_none() && has_member(&schema, name) {
                all.set(name, value);
            }
        }
    }
    let rank = |name: &str| {
        // In qcow2 it comes early.
        let name = if name == "preallocation" && has_member(&(format.create.schema)(), "extended-l2") {
            "metadata-preallocation"
        } else {
            name
        };
        ORDER.iter().position(|o| *o == name).unwrap_or(ORDER.len())
    };
    let mut list: Vec<_> = all.0.iter().collect();
    list.sort_by_key(|(name, _)| rank(name));
    let mut out = format!("Formatting '{filename}', fmt={}", format.name());
    for (name, value) in list {
        let kind = member(&(format.create.schema)(), name).map(|schema| kind(&schema));
        let bytes = if kind == Some("size") { size::parse(value) } else { None };
        let value = bytes.map_or_else(|| value.clone(), |n| n.to_string());
        out.push_str(&format!(" {}={value}", name_for_users(name)));
    }
    out.push('\n');
    out
}

/// Typed options for the image and for its file.
struct Plan {
    image: Map<String, Value>,
    file: Map<String, Value>,
    /// The path of a data file.
    data_file: Option<String>,
}

impl Plan {
    fn new(session: &Session, format: &Format, options: &Options) -> Result<Plan, Failure> {
        let schema = (format.create.schema)();
        let below = (session.file_create()?.schema)();
        let mut plan = Plan { image: Map::new(), file: Map::new(), data_file: None };
        for (name, text) in &options.0 {
            match name.as_str() {
                // The one name that is not the same.
                "compat" if has_member(&schema, "version") => {
                    let version = match text.as_str() {
                        "0.10" | "v2" => "v2",
                        "1.1" | "v3" => "v3",
                        _ => {
                            return Err(Failure::new(format!(
                                "Invalid parameter '{text}': compat is 0.10 or 1.1"
                            )));
                        }
                    };
                    plan.image.insert("version".to_owned(), json!(version));
                }
                "encryption" if has_member(&schema, "encrypt") => {
                    if typed(&json!({"type": "boolean"}), name, text)? == json!(true) {
                        return Err(Failure::new("encryption=on protects nothing: use encrypt.format=luks"));
                    }
                }
                "data-file" if has_member(&schema, "data-file") => plan.data_file = Some(text.clone()),
                // What only makes sense inside of the program.
                "file" | "filename" | "driver" | "version" => {
                    return Err(Failure::new(format!("Invalid parameter '{name}'")));
                }
                _ => match (member(&schema, name), member(&below, name)) {
                    (Some(schema), _) => put(&mut plan.image, name, typed(&schema, name, text)?),
                    (None, Some(schema)) => put(&mut plan.file, name, typed(&schema, name, text)?),
                    (None, None) => {
                        return Err(Failure::new(format!("Invalid parameter '{}'", name_for_users(name))));
                    }
                },
            }
        }
        if !format.is_file {
            // Images consist of whole sectors.
            if let Some(bytes) = plan.image.get("size").and_then(Value::as_u64) {
                let rounded = bytes
                    .checked_next_multiple_of(512)
                    .ok_or_else(|| Failure::new("The image is too large"))?;
                plan.image.insert("size".to_owned(), json!(rounded));
            }
        }
        Ok(plan)
    }

    async fn carry_out(mut self, session: &Session, filename: &str, format: &Format) -> Result<(), Failure> {
        let node = session.named(filename, None)?;
        let path = node.get("filename").and_then(Value::as_str).unwrap_or_default().to_owned();
        if let Some(data) = &self.data_file {
            let data = session.named(data, None)?;
            if same_file(&path, data.get("filename").and_then(Value::as_str).unwrap_or_default()) {
                return Err(Failure::new("The data file cannot be the image itself"));
            }
        }
        let is_device = node.get("driver") == Some(&json!("host_device"));
        if format.is_file {
            if is_device {
                return fits(&path, self.image.get("size").and_then(Value::as_u64).unwrap_or(0));
            }
            self.image.insert("filename".to_owned(), json!(path));
            return run(session, &format.create, self.image).await;
        }
        let existed = Path::new(&path).exists();
        let file = session.file_create()?;
        if !is_device {
            self.file.insert("filename".to_owned(), json!(path));
            self.file.insert("size".to_owned(), json!(0));
            run(session, &file, self.file).await?;
        }
        if let Some(path) = &self.data_file {
            let data = session.named(path, None)?;
            if data.get("driver") != Some(&json!("host_device")) {
                let mut options = Map::new();
                options.insert("filename".to_owned(), json!(data.get("filename")));
                options.insert("size".to_owned(), json!(0));
                run(session, &file, options).await?;
            }
            self.image.insert("data-file".to_owned(), Value::Object(data));
        }
        self.image.insert("file".to_owned(), Value::Object(node));
        let result = run(session, &format.create, self.image).await;
        if result.is_err() && !is_device && !existed {
            // Half an image is of no use; what was there before is gone already and its file stays.
            if let Err(e) = std::fs::remove_file(&path) {
                log::warn!("'{path}' stays, without an image in it: {e}");
            }
        }
        result
    }
}

/// Whether two names are of one file, whatever links lead to it.
pub fn same_file(a: &str, b: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (std::fs::metadata(a), std::fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        // What is made first would be found by the other name.
        _ => Path::new(a) == Path::new(b),
    }
}

/// Whether a device has room for a raw image.
fn fits(path: &str, size: u64) -> Result<(), Failure> {
    let cannot = |e: std::io::Error| Failure::new(graph::BlockError::io("Could not open the device", e));
    let kind = std::fs::metadata(path).map_err(cannot)?.file_type();
    if kind.is_char_device() {
        return Ok(());
    }
    let options = host::OpenOptions::default();
    let device = host::File::open(Path::new(path), &options).map_err(cannot)?;
    let has = device.len().map_err(cannot)?;
    if has < size {
        return Err(Failure::new(format!("The device has {has} bytes, which is too small for the image")));
    }
    Ok(())
}

async fn run(session: &Session, def: &CreateDef, options: Map<String, Value>) -> Result<(), Failure> {
    let context = CreateContext::new(session.graph().clone(), Arc::new(JobControl::default()));
    Ok((def.create)(context, Value::Object(options)).await?)
}

/// Puts a value under a dotted name.
fn put(map: &mut Map<String, Value>, name: &str, value: Value) {
    match name.split_once('.') {
        None => {
            map.insert(name.to_owned(), value);
        }
        Some((first, rest)) => {
            let inner = map.entry(first.to_owned()).or_insert_with(|| json!({}));
            if let Some(inner) = inner.as_object_mut() {
                put(inner, rest, value);
            }
        }
    }
}

/// A text as its schema wants it.
fn typed(schema: &Value, name: &str, text: &str) -> Result<Value, Failure> {
    let name = name_for_users(name);
    let bad = |expected: &str| Err(Failure::new(format!("Parameter '{name}' expects {expected}")));
    match kind(schema) {
        "bool (on/off)" => match text {
            "on" | "yes" | "true" => Ok(json!(true)),
            "off" | "no" | "false" => Ok(json!(false)),
            _ => bad("'on' or 'off'"),
        },
        "size" => match size::parse(text) {
            Some(value) if value <= i64::MAX as u64 => Ok(json!(value)),
            _ => bad("a number below 2^63, optionally with a suffix k, M, G, T, P or E"),
        },
        _ => Ok(json!(text)),
    }
}

/// Finds out the size of the image below a new one, which also shows that it is there.
///
/// # Errors
/// It cannot be opened.
pub async fn backing_size(
    session: &Session,
    image: &str,
    backing: &str,
    format: &str,
) -> Result<u64, Failure> {
    let path = super::info::full_name(image, backing);
    let spec = Spec::new(&path, Some(format), false)?;
    let below = session.open(&spec, How::inspect(true)).await;
    let below = below.map_err(|e| Failure::new(format!("{}. Could not open backing image.", e.message)))?;
    let bytes = below.size()?;
    below.close().await?;
    Ok(bytes)
}

impl Format {
    /// Whether a new image with these options reads as zeroes: not what lies encrypted in a plain file, nor on a device.
    pub fn is_zero_when_new(&self, filename: &str, options: &Options) -> bool {
        let device = std::fs::metadata(filename).map(|m| m.file_type());
        let on_device = device.is_ok_and(|t| t.is_block_device() || t.is_char_device());
        let schema = (self.create.schema)();
        // A format with a key and no layout of its own shows its file's zeroes as noise.
        let noise = has_member(&schema, "key-secret");
        let on_device =
            on_device && (self.is_file || options.get("preallocation").is_some_and(|p| p != "off"));
        // Nor what is set aside inside an encrypted image: what lies there is deciphered.
        let set_aside = options.get("preallocation").is_some_and(|mode| mode != "off")
            || options.get("data-file-raw").is_some_and(|raw| raw != "off");
        let ciphered = options.0.keys().any(|name| name.starts_with("encrypt."));
        let unclear = noise || on_device || (set_aside && ciphered);
        !unclear
    }
}
