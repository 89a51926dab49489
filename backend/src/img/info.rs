//! `ringblk img info`: what is known about an image.
//!
//! Opens nothing but the image; with `--backing-chain` also those it names below, one after the other, in the formats it
//! names. Without a format the first bytes say what is reported (`probe`): telling is all that comes of it. Must not
//! read data.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use graph::SnapshotInfo;
use serde_json::{Map, Value, json};

use super::cli::{InfoArgs, Output};
use super::failure::{Failure, Outcome};
use super::image::{How, Image, Spec};
use super::output;
use super::probe;
use super::session::Session;
use super::size;
use super::snapshot;

/// Longest chain that is followed.
const MAX_CHAIN: usize = 200;

/// Runs the command.
///
/// # Errors
/// An image cannot be opened, or names itself below itself.
pub async fn run(session: Session, args: InfoArgs) -> Outcome {
    session.objects(&args.source.objects).await?;
    let mut spec = Spec::new(&args.filename, args.source.format.as_deref(), args.source.image_opts)?;
    let mut images = Vec::new();
    let mut seen = BTreeSet::new();
    loop {
        if spec.format.is_none() && !spec.opts {
            spec.format = Some(probe::format(&spec.name)?.to_owned());
        }
        if !seen.insert(spec.name.clone()) {
            return Err(Failure::new(format!("Backing file '{}' creates an infinite loop.", spec.name)));
        }
        let image = session.open(&spec, How::inspect(args.share.force_share)).await?;
        let info = of_image(&session, &image, &spec)?;
        image.close().await?;
        let below = info.get("full-backing-filename").and_then(Value::as_str).map(str::to_owned);
        let format = info.get("backing-filename-format").and_then(Value::as_str).map(str::to_owned);
        images.push(info);
        let Some(below) = below.filter(|_| args.backing_chain) else { break };
        if images.len() >= MAX_CHAIN {
            return Err(Failure::new(format!("there are more than {MAX_CHAIN} images below each other")));
        }
        spec = Spec::new(&below, format.as_deref(), false)?;
    }
    let text = match args.output {
        Output::Human => {
            let texts: Vec<_> = images.iter().map(human).collect();
            texts.join("\n")
        }
        Output::Json if args.backing_chain => {
            output::json(&Value::Array(images.into_iter().map(Value::Object).collect()))
        }
        Output::Json => output::json(&images.into_iter().next().map_or(Value::Null, Value::Object)),
    };
    output::print(&text)?;
    Ok(0)
}

/// The image's members in JSON.
fn of_image(session: &Session, image: &Image, spec: &Spec) -> Result<Map<String, Value>, Failure> {
    let mut info = Tree::new(session).node(image.node_name(), 0)?;
    if spec.opts {
        info.insert("filename".to_owned(), Value::String(shown_name(spec)));
    }
    Ok(info)
}

/// An image that was given by options is named by its file if they say nothing else, by all of them otherwise.
fn shown_name(spec: &Spec) -> String {
    let parsed = qmp::keyval::parse(&spec.name, &qmp::keyval::Dialect::implied("driver"));
    let (qmp::keyval::Parsed::Json(mut options) | qmp::keyval::Parsed::Keyval(mut options)) =
        parsed.unwrap_or(qmp::keyval::Parsed::Help)
    else {
        return spec.name.clone();
    };
    let plain = |options: &Value| -> Option<String> {
        let top = options.as_object()?;
        let file = top.get("file").and_then(Value::as_object);
        let only = |map: &Map<String, Value>, names: &[&str]| map.keys().all(|k| names.contains(&k.as_str()));
        let holder = match file {
            Some(file) if only(top, &["driver", "file"]) => file,
            None => top,
            _ => return None,
        };
        only(holder, &["driver", "filename"]).then_some(())?;
        Some(holder.get("filename")?.as_str()?.to_owned())
    };
    let nested =
        options.as_object_mut().into_iter().flat_map(Map::values_mut).filter_map(Value::as_object_mut);
    for file in nested.filter(|nested| nested.contains_key("filename")) {
        file.entry("driver").or_insert_with(|| json!("file"));
    }
    plain(&options).unwrap_or_else(|| format!("json:{}", output::json_line(&options)))
}

/// The nodes of an image and who is whose child.
struct Tree<'a> {
    session: &'a Session,
    /// (parent, name of the edge, child), by node names.
    edges: Vec<(String, String, String)>,
}

impl<'a> Tree<'a> {
    fn new(session: &'a Session) -> Tree<'a> {
        let graph = session.graph().query_block_graph();
        let name = |id: u64| graph.nodes.iter().find(|n| n.id == id).map(|n| n.name.clone());
        let edges =
            graph.edges.iter().filter_map(|e| Some((name(e.parent)?, e.name.clone(), name(e.child)?)));
        Tree { session, edges: edges.collect() }
    }

    fn node(&self, name: &str, depth: usize) -> Result<Map<String, Value>, Failure> {
        if depth > MAX_CHAIN {
            return Err(Failure::new("the image is nested too deeply"));
        }
        let node = self.session.graph().node(name)?;
        let info = node.driver().info();
        let below: Vec<_> = self
            .edges
            .iter()
            .filter(|(parent, edge, _)| parent == name && edge != "backing")
            .map(|(_, edge, child)| (edge.clone(), child.clone()))
            .collect();
        let mut children = Vec::new();
        for (edge, child) in &below {
            children.push((edge.clone(), self.node(child, depth + 1)?));
        }
        let of_child = |member: &str| {
            let child = children.iter().find(|(edge, _)| edge == "file").or(children.first());
            child.and_then(|(_, info)| info.get(member).cloned())
        };
        let mut out = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                out.insert(name.to_owned(), value);
            }
        };
        let filename = match info.filename.as_str() {
            "" => of_child("filename").unwrap_or_else(|| json!("")),
            name => json!(name),
        };
        put("virtual-size", Some(json!(node.size())));
        put("format", Some(json!(node.driver_name())));
        put("actual-size", info.allocated.map(|n| json!(n)).or_else(|| of_child("actual-size")));
        put("cluster-size", info.cluster_size.map(|n| json!(n)));
        put("encrypted", info.encrypted.then(|| json!(true)));
        put("dirty-flag", Some(json!(info.dirty)));
        if let Some(backing) = &info.backing_file {
            let image = filename.as_str().unwrap_or_default();
            put("full-backing-filename", Some(json!(full_name(image, backing))));
            put("backing-filename", Some(json!(backing)));
        }
        put("backing-filename-format", info.backing_format.map(|f| json!(f)));
        put("filename", Some(filename));
        put("format-specific", info.format_specific);
        let snapshots: Vec<_> = node.driver().snapshots().iter().map(snapshot_members).collect();
        put("snapshots", (!snapshots.is_empty()).then_some(Value::Array(snapshots)));
        let list = children.into_iter().map(|(name, info)| json!({"name": name, "info": info})).collect();
        put("children", Some(Value::Array(list)));
        Ok(out)
    }
}

/// A name inside an image is meant from where the image lies.
pub fn full_name(image: &str, backing: &str) -> String {
    let has_protocol = backing.split('/').next().is_some_and(|first| first.contains(':'));
    if backing.starts_with('/') || has_protocol {
        return backing.to_owned();
    }
    match Path::new(image).parent().and_then(Path::to_str) {
        Some("") | None => backing.to_owned(),
        Some("/") => format!("/{backing}"),
        Some(directory) => format!("{directory}/{backing}"),
    }
}

fn snapshot_members(s: &SnapshotInfo) -> Value {
    let mut members = json!({
        "id": s.id,
        "name": s.name,
        "vm-state-size": s.vm_state_size,
        "date-sec": s.date_sec,
        "date-nsec": s.date_nsec,
        "vm-clock-sec": s.vm_clock_nsec / 1_000_000_000,
        "vm-clock-nsec": s.vm_clock_nsec % 1_000_000_000,
    });
    if let (Some(icount), Some(members)) = (s.icount, members.as_object_mut()) {
        members.insert("icount".to_owned(), json!(icount));
    }
    members
}

/// The snapshots as the table for people wants them.
fn snapshots_of(info: &Map<String, Value>) -> Vec<SnapshotInfo> {
    let list = info.get("snapshots").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let of = |s: &Value| {
        let text = |name: &str| s.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let number = |name: &str| s.get(name).and_then(Value::as_u64);
        let (sec, nsec) = (number("vm-clock-sec").unwrap_or(0), number("vm-clock-nsec").unwrap_or(0));
        SnapshotInfo {
            id: text("id"),
            name: text("name"),
            vm_state_size: number("vm-state-size").unwrap_or(0),
            date_sec: number("date-sec").and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
            vm_clock_nsec: sec.saturating_mul(1_000_000_000).saturating_add(nsec),
            icount: number("icount"),
            ..SnapshotInfo::default()
        }
    };
    list.iter().map(of).collect()
}

/// The text for people.
fn human(info: &Map<String, Value>) -> String {
    let mut out = String::new();
    node_text(&mut out, info, 0, false);
    children_text(&mut out, info, "", 1);
    out
}

fn node_text(out: &mut String, info: &Map<String, Value>, indent: usize, protocol: bool) {
    let pad = " ".repeat(4 * indent);
    let text = |name: &str| info.get(name).and_then(Value::as_str);
    let number = |name: &str| info.get(name).and_then(Value::as_u64);
    let mut line = |name: &str, value: String| {
        // Writing into a string cannot fail.
        let _ = writeln!(out, "{pad}{name}: {value}");
    };
    line(if protocol { "filename" } else { "image" }, text("filename").unwrap_or_default().to_owned());
    line(
        if protocol { "protocol type" } else { "file format" },
        text("format").unwrap_or_default().to_owned(),
    );
    let virtual_size = number("virtual-size").unwrap_or(0);
    let shown = format!("{} ({virtual_size} bytes)", size::human(virtual_size));
    line(if protocol { "file length" } else { "virtual size" }, shown);
    line("disk size", number("actual-size").map_or_else(|| "unavailable".to_owned(), size::human));
    if info.get("encrypted") == Some(&json!(true)) {
        line("encrypted", "yes".to_owned());
    }
    if let Some(size) = number("cluster-size") {
        line("cluster_size", size.to_string());
    }
    if info.get("dirty-flag") == Some(&json!(true)) {
        line("cleanly shut down", "no".to_owned());
    }
    if let Some(backing) = text("backing-filename") {
        let full = text("full-backing-filename").filter(|full| *full != backing);
        line(
            "backing file",
            format!("{backing}{}", full.map(|f| format!(" (actual path: {f})")).unwrap_or_default()),
        );
        if let Some(format) = text("backing-filename-format") {
            line("backing file format", format.to_owned());
        }
    }
    out.push_str(&snapshot::list(&snapshots_of(info)));
    let specific = info.get("format-specific").and_then(|f| f.get("data"));
    if let Some(data) = specific.filter(|d| d.as_object().is_some_and(|d| !d.is_empty())) {
        let _ = writeln!(out, "{pad}Format specific information:");
        output::tree(out, data, indent + 1);
    }
}

fn children_text(out: &mut String, info: &Map<String, Value>, path: &str, indent: usize) {
    let children = info.get("children").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    for child in children {
        let name = child.get("name").and_then(Value::as_str).unwrap_or_default();
        let Some(info) = child.get("info").and_then(Value::as_object) else { continue };
        let path = format!("{path}/{name}");
        let leaf = info.get("children").and_then(Value::as_array).is_none_or(Vec::is_empty);
        let _ = writeln!(out, "{}Child node '{path}':", " ".repeat(4 * (indent - 1)));
        node_text(out, info, indent, leaf);
        children_text(out, info, &path, indent + 1);
    }
}
