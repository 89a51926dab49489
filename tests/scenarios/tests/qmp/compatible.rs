//! The same process under both programs: what qemu-storage-daemon accepts and returns, ringblk does too. What is left
//! out is listed here, so that it is a decision and not an accident.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use client::daemon::{Daemon, Launch};
use client::qmp;
use ringblk_scenarios::{image, rig};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::schema::Schema;

/// A daemon with an iothread, a raw node over a file, a window into another node, and an export.
struct Program {
    control: qmp::Client,
    _daemon: Daemon,
    _folder: TempDir,
}

impl Program {
    fn start(program: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        image::create(&folder.path().join("image"), 1 << 20);
        let launch = Launch::new(program)
            .args(["--object", "iothread,id=t0"])
            .args(["--blockdev", &format!("file,node-name=f,filename={}", at("image"))])
            .args(["--blockdev", "raw,node-name=d,file=f"])
            .args([
                "--blockdev",
                "raw,node-name=window,size=512,file.driver=null-co,file.node-name=null,file.size=4096",
            ])
            .args([
                "--export",
                &format!(
                    "vhost-user-blk,id=e,node-name=d,writable=on,iothread=t0,addr.type=unix,addr.path={}",
                    at("disk")
                ),
            ])
            .args([
                "--chardev",
                &format!("socket,id=c,path={},server=on,wait=off", at("qmp")),
                "--monitor",
                "c",
            ]);
        let daemon = launch.spawn().unwrap();
        let control = qmp::Client::connect(&folder.path().join("qmp"));
        let control = control.unwrap_or_else(|e| panic!("{}: {e}: {}", program.display(), daemon.stderr()));
        Self { control, _daemon: daemon, _folder: folder }
    }

    fn both() -> Option<(Self, Self)> {
        Some((Self::start(crate::peer()?), Self::start(&rig::ringblk())))
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.control.execute(command, arguments).unwrap()
    }
}

/// Type of each member, by path; elements of a list all count as one. Empty lists tell nothing.
fn forms(value: &Value, path: &str, out: &mut BTreeMap<String, &'static str>) {
    let mut note = |kind| out.insert(path.to_owned(), kind);
    match value {
        Value::Null => drop(note("null")),
        Value::Bool(_) => drop(note("boolean")),
        Value::Number(_) => drop(note("number")),
        Value::String(_) => drop(note("string")),
        Value::Array(items) => items.iter().for_each(|item| forms(item, &format!("{path}[]"), out)),
        Value::Object(members) => members.iter().for_each(|(k, v)| forms(v, &format!("{path}.{k}"), out)),
    }
}

/// A list by the value of one of its members.
fn by<'a>(list: &'a Value, member: &str) -> BTreeMap<&'a str, &'a Value> {
    list.as_array().unwrap().iter().filter_map(|item| Some((item[member].as_str()?, item))).collect()
}

#[test]
fn replies_have_every_member_that_the_peer_has() {
    let Some((mut peer, mut ours)) = Program::both() else { return };
    for (command, arguments) in [
        ("query-version", json!({})),
        ("query-named-block-nodes", json!({})),
        ("query-block-exports", json!({})),
        ("query-blockstats", json!({"query-nodes": true})),
        ("x-debug-query-block-graph", json!({})),
        ("query-commands", json!({})),
        ("qom-list", json!({"path": "/objects"})),
    ] {
        let (theirs, mine) = (peer.ask(command, arguments.clone()), ours.ask(command, arguments));
        let (mut wanted, mut found) = (BTreeMap::new(), BTreeMap::new());
        forms(&theirs, "", &mut wanted);
        forms(&mine, "", &mut found);
        for (path, kind) in wanted {
            assert_eq!(found.get(&path), Some(&kind), "{command}: {path} in {mine}");
        }
    }
}

#[test]
fn nodes_and_edges_are_described_with_the_same_values() {
    let Some((mut peer, mut ours)) = Program::both() else { return };
    let theirs = peer.ask("query-named-block-nodes", json!({}));
    let mine = ours.ask("query-named-block-nodes", json!({}));
    let (theirs, mine) = (by(&theirs, "node-name"), by(&mine, "node-name"));
    assert_eq!(theirs.keys().collect::<Vec<_>>(), mine.keys().collect::<Vec<_>>());
    for (name, node) in theirs {
        for member in ["drv", "ro", "encrypted", "cache", "detect_zeroes", "active", "backing_file_depth"] {
            assert_eq!(mine[name][member], node[member], "{member} of {name}");
        }
        for member in ["format", "virtual-size", "actual-size"] {
            assert_eq!(mine[name]["image"][member], node["image"][member], "image.{member} of {name}");
        }
    }
    let graphs = [&mut peer, &mut ours].map(|p| p.ask("x-debug-query-block-graph", json!({})));
    let [theirs, mine] = graphs.each_ref().map(edges);
    // Ours keeps other writers away from an exported node unless share-rw says otherwise.
    let exclusive = |(edge, (used, mut shared)): (String, (BTreeSet<String>, BTreeSet<String>))| {
        if used.contains("write") {
            shared.remove("write");
        }
        (edge, (used, shared))
    };
    assert_eq!(mine, theirs.into_iter().map(exclusive).collect());
}

type Permissions = (BTreeSet<String>, BTreeSet<String>);

/// Used and shared permissions of each edge, by its ends and its name. What is above a root has no name in the peer.
fn edges(graph: &Value) -> BTreeMap<String, Permissions> {
    let name = |id: &Value| {
        let node = graph["nodes"].as_array().unwrap().iter().find(|n| &n["id"] == id).unwrap();
        if node["type"] == "block-driver" { node["name"].as_str().unwrap() } else { "user" }.to_owned()
    };
    let set =
        |list: &Value| list.as_array().unwrap().iter().map(|p| p.as_str().unwrap().to_owned()).collect();
    let edge = |e: &Value| {
        let ends = format!("{} -{}-> {}", name(&e["parent"]), e["name"].as_str().unwrap(), name(&e["child"]));
        (ends, (set(&e["perm"]), set(&e["shared-perm"])))
    };
    graph["edges"].as_array().unwrap().iter().map(edge).collect()
}

/// Arguments as paths, for the cases of unions that `known` has too.
fn arguments(
    schema: &Schema,
    known: &Schema,
    types: (&Value, &Value),
    path: &str,
    out: &mut BTreeSet<String>,
) {
    let (ty, same) = types;
    let known_cases = known.cases(same);
    for case in schema.cases(ty).into_iter().filter(|c| known_cases.contains(c)) {
        let place = case.as_ref().map_or_else(|| path.to_owned(), |case| format!("{path}{case}:"));
        let counterparts = known.members(same, case.as_deref());
        for member in schema.members(ty, case.as_deref()) {
            let here = format!("{place}{}", member["name"].as_str().unwrap());
            out.insert(here.clone());
            let Some(counterpart) = counterparts.iter().find(|m| m["name"] == member["name"]) else {
                continue;
            };
            let (inner, same) = (schema.get(&member["type"]), known.get(&counterpart["type"]));
            if inner["meta-type"] == "object" && same["meta-type"] == "object" {
                arguments(schema, known, (inner, same), &format!("{here}."), out);
            }
        }
    }
}

#[test]
fn arguments_of_the_peer_are_accepted_but_for_these() {
    let left_out: BTreeSet<&str> = [
        // Nodes are always active: there is no migration between processes.
        // Persistent reservations need a helper process.
        "blockdev-add pr-manager",
        // A debugging aid of the page cache.
        "blockdev-add x-check-cache-dropped",
        // Sockets without a path.
        "block-export-add addr.unix:abstract",
        "block-export-add addr.unix:tight",
        // An iothread has no pool of its own.
        "object-add thread-pool-min",
        "object-add thread-pool-max",
    ]
    .into();
    let Some((mut peer, mut ours)) = Program::both() else { return };
    let (theirs, mine) = (Schema::read(&mut peer.control), Schema::read(&mut ours.control));
    let mut missing = BTreeSet::new();
    for command in mine.of_meta("command") {
        let name = command["name"].as_str().unwrap();
        let commands = theirs.of_meta("command");
        let Some(same) = commands.iter().find(|c| c["name"] == name) else { continue };
        let types = (theirs.get(&same["arg-type"]), mine.get(&command["arg-type"]));
        let (mut wanted, mut found) = (BTreeSet::new(), BTreeSet::new());
        arguments(&theirs, &mine, types, "", &mut wanted);
        arguments(&mine, &theirs, (types.1, types.0), "", &mut found);
        // The outermost case (driver, type) is left out of the words.
        let short = |path: &String| match path.split_once(':') {
            Some((case, rest)) if !case.contains('.') => format!("{name} {rest}"),
            _ => format!("{name} {path}"),
        };
        missing.extend(wanted.difference(&found).map(short));
    }
    assert_eq!(missing.iter().map(String::as_str).collect::<BTreeSet<_>>(), left_out);
}
