//! The same graphs in `qemu-storage-daemon` and here: every edge holds the same permissions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use super::peer::{Peer, Program, run};

/// An edge by names: parent, edge, child; what it uses and shares.
type Edges = BTreeMap<(String, String, String), (BTreeSet<String>, BTreeSet<String>)>;

/// The graph without numbers. Users from outside are `user`: QEMU's have no names.
fn edges(peer: &mut Peer) -> Edges {
    let graph = peer.command("x-debug-query-block-graph", json!({}));
    let mut names = BTreeMap::new();
    for node in graph["nodes"].as_array().unwrap() {
        let name = match node["type"].as_str().unwrap() {
            "block-driver" => node["name"].as_str().unwrap(),
            _ => "user",
        };
        assert!(!name.starts_with('#'), "nodes of this test have names: {graph}");
        names.insert(node["id"].as_u64().unwrap(), name.to_owned());
    }
    let set = |list: &Value| -> BTreeSet<String> {
        list.as_array().unwrap().iter().map(|p| p.as_str().unwrap().to_owned()).collect()
    };
    let edge = |e: &Value| {
        let name = |key: &str| names[&e[key].as_u64().unwrap()].clone();
        let key = (name("parent"), e["name"].as_str().unwrap().to_owned(), name("child"));
        (key, (set(&e["perm"]), set(&e["shared-perm"])))
    };
    let list = graph["edges"].as_array().unwrap();
    let edges: Edges = list.iter().map(edge).collect();
    assert_eq!(edges.len(), list.len(), "each edge has a name of its own: {graph}");
    edges
}

fn file(name: &str, image: &str, read_only: bool) -> Value {
    json!({"driver": "file", "node-name": name, "filename": format!("@/{image}"), "read-only": read_only})
}

fn over(driver: &str, name: &str, below: &Value, more: Value) -> Value {
    let mut node = json!({"driver": driver, "node-name": name, "file": below});
    node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    node
}

/// An export of a node.
fn export(node: &str, writable: bool) -> Value {
    json!({"export": node, "writable": writable})
}

/// Every graph: nodes in order, `{"export": ..}` and `{"object": ..}` among them; `@/` is the folder.
fn graphs() -> Vec<(&'static str, Vec<Value>)> {
    let ro = json!({"read-only": true});
    let qcow2 = |name: &str, image: &str, more: Value| {
        let read_only = more["read-only"] == true;
        over("qcow2", name, &file(&format!("{name}-file"), image, read_only), more)
    };
    let null = |name: &str| json!({"driver": "null-co", "node-name": name, "size": 1 << 20});
    let mut all = vec![
        ("null", vec![null("n"), export("n", true)]),
        ("file", vec![file("n", "raw", false), export("n", true)]),
        ("file, read-only", vec![file("n", "raw", true), export("n", false)]),
        ("raw", vec![over("raw", "n", &file("f", "raw", false), json!({})), export("n", true)]),
        ("raw, nobody", vec![over("raw", "n", &file("f", "raw", false), json!({}))]),
        ("raw, reader", vec![over("raw", "n", &file("f", "raw", false), json!({})), export("n", false)]),
        (
            "raw window",
            vec![over("raw", "n", &file("f", "raw", false), json!({"offset": 4096})), export("n", true)],
        ),
        (
            "raw window, reader",
            vec![over("raw", "n", &file("f", "raw", false), json!({"size": 4096})), export("n", false)],
        ),
        (
            "raw over raw",
            vec![
                over("raw", "a", &file("f", "raw", false), json!({"size": 65536})),
                over("raw", "b", &json!("a"), json!({})),
                export("b", true),
            ],
        ),
        ("qcow2, nobody", vec![qcow2("n", "a", json!({}))]),
        ("qcow2", vec![qcow2("n", "a", json!({})), export("n", true)]),
        ("qcow2, reader", vec![qcow2("n", "a", json!({})), export("n", false)]),
        ("qcow2, read-only", vec![qcow2("n", "a", ro.clone()), export("n", false)]),
        ("qcow2, read-only, nobody", vec![qcow2("n", "a", ro.clone())]),
        (
            "qcow2 over raw",
            vec![
                over("qcow2", "n", &over("raw", "r", &file("f", "a", false), json!({})), json!({})),
                export("n", true),
            ],
        ),
        (
            "force-share",
            vec![
                json!({"driver": "qcow2", "node-name": "n", "read-only": true, "force-share": true, "file": {
                "driver": "file", "node-name": "f", "filename": "@/a", "read-only": true, "force-share": true}}),
                export("n", false),
            ],
        ),
        (
            "chain",
            vec![
                qcow2("base", "a", ro.clone()),
                qcow2("mid", "b", json!({"read-only": true, "backing": "base"})),
                qcow2("top", "c", json!({"backing": "mid"})),
                export("top", true),
            ],
        ),
        (
            "chain, reader",
            vec![
                qcow2("base", "a", ro.clone()),
                qcow2("mid", "b", json!({"read-only": true, "backing": "base"})),
                qcow2("top", "c", json!({"backing": "mid"})),
                export("top", false),
            ],
        ),
        (
            "chain, writable base, nobody",
            vec![qcow2("base", "a", json!({})), qcow2("top", "c", json!({"backing": "base"}))],
        ),
        (
            "chain, users in the middle",
            vec![
                qcow2("base", "a", json!({})),
                qcow2("top", "c", json!({"backing": "base"})),
                export("top", true),
                export("base", false),
            ],
        ),
        (
            "two overlays of one base",
            vec![
                over("raw", "base", &file("f", "raw", true), ro.clone()),
                qcow2("one", "b", json!({"backing": "base"})),
                qcow2("two", "c", json!({"backing": "base"})),
                export("one", true),
                export("two", true),
            ],
        ),
        (
            "external data",
            vec![qcow2("n", "d", json!({"data-file": file("data", "raw", false)})), export("n", true)],
        ),
        ("external data, nobody", vec![qcow2("n", "d", json!({"data-file": file("data", "raw", false)}))]),
        (
            "luks",
            vec![
                json!({"object": {"qom-type": "secret", "id": "s", "data": "passphrase"}}),
                over("luks", "n", &file("f", "luks", false), json!({"key-secret": "s"})),
                export("n", true),
            ],
        ),
        (
            "luks, reader",
            vec![
                json!({"object": {"qom-type": "secret", "id": "s", "data": "passphrase"}}),
                over("luks", "n", &file("f", "luks", true), json!({"key-secret": "s", "read-only": true})),
                export("n", false),
            ],
        ),
    ];
    let group = json!({"object": {"qom-type": "throttle-group", "id": "g"}});
    let raw = || over("raw", "disk", &file("f", "raw", false), json!({}));
    let image = || qcow2("disk", "a", json!({}));
    // Filters, each over raw and over qcow2, with a writer, a reader and nobody.
    for (name, filter) in [
        ("throttle", json!({"driver": "throttle", "throttle-group": "g", "file": "disk"})),
        ("copy-on-read", json!({"driver": "copy-on-read", "file": "disk"})),
        ("compress", json!({"driver": "compress", "file": "disk"})),
        ("preallocate", json!({"driver": "preallocate", "file": "disk"})),
        ("blkdebug", json!({"driver": "blkdebug", "image": "disk"})),
        (
            "blkdebug, other permissions",
            json!({"driver": "blkdebug", "image": "disk",
            "take-child-perms": ["write-unchanged"], "unshare-child-perms": ["resize"]}),
        ),
        ("blkverify", json!({"driver": "blkverify", "raw": "other", "test": "disk"})),
        ("blklogwrites", json!({"driver": "blklogwrites", "file": "disk", "log": "other"})),
        ("quorum", json!({"driver": "quorum", "vote-threshold": 1, "children": ["disk", "other"]})),
        (
            "quorum, rewriting",
            json!({"driver": "quorum", "vote-threshold": 1, "rewrite-corrupted": true,
            "children": ["disk", "other"]}),
        ),
    ] {
        for below in [raw(), image()] {
            for user in [None, Some(true), Some(false)] {
                let mut filter = filter.clone();
                filter["node-name"] = json!("n");
                let mut nodes = vec![group.clone(), null("other"), below.clone(), filter];
                nodes.extend(user.map(|writable| export("n", writable)));
                all.push((name, nodes));
            }
        }
    }
    all
}

/// Whether an error says that this program has no such thing.
fn is_unknown(error: &str) -> bool {
    error.contains("does not accept value") || error.contains("Unknown driver")
}

/// Builds a graph; the error of what is refused.
fn build(peer: &mut Peer, nodes: &[Value], images: &Path) -> Result<(), String> {
    for (at, node) in nodes.iter().enumerate() {
        let text = node.to_string().replace("\"@/", &format!("\"{}/", images.display()));
        let node: Value = serde_json::from_str(&text).unwrap();
        if let Some(object) = node.get("object") {
            peer.try_command("object-add", object.clone())?;
        } else if let Some(name) = node.get("export") {
            let path = peer.folder().join(format!("socket{at}")).display().to_string();
            let mut export = json!({
                "type": "vhost-user-blk", "id": format!("e{at}"), "node-name": name, "writable": node["writable"],
                "addr": {"type": "unix", "path": path},
            });
            if peer.program == Program::Ringblk {
                // What the other's exports are.
                export["share-rw"] = json!(true);
            }
            peer.try_command("block-export-add", export)?;
        } else {
            peer.try_command("blockdev-add", node)?;
        }
    }
    Ok(())
}

/// Takes a graph apart again, as far as it was built.
fn tear_down(peer: &mut Peer, nodes: &[Value]) {
    for (at, node) in nodes.iter().enumerate().rev() {
        if let Some(object) = node.get("object") {
            let _ = peer.try_command("object-del", json!({"id": object["id"]}));
        } else if node.get("export").is_some() {
            if peer.try_command("block-export-del", json!({"id": format!("e{at}")})).is_ok() {
                peer.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
            }
        } else {
            let _ = peer.try_command("blockdev-del", json!({"node-name": node["node-name"]}));
        }
    }
    assert_eq!(edges(peer), Edges::new());
}

#[test]
fn every_edge_holds_what_it_holds_in_qemu() {
    let Some(mut theirs) = Peer::start(Program::StorageDaemon) else { return };
    let mut ours = Peer::start(Program::Ringblk).unwrap();
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for folder in &folders {
        let at = |name: &str| folder.path().join(name).display().to_string();
        run("qemu-img", &["create", "-q", "-f", "raw", &at("raw"), "1M"]).unwrap();
        for name in ["a", "b", "c"] {
            run("qemu-img", &["create", "-q", "-f", "qcow2", &at(name), "1M"]).unwrap();
        }
        let data = format!("data_file={},data_file_raw=on", at("raw"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data, &at("d"), "1M"]).unwrap();
        let secret = ["--object", "secret,id=s,data=passphrase"];
        let options = ["-o", "key-secret=s,iter-time=10"];
        let path = at("luks");
        let luks =
            [&["create", "-q"], &secret[..], &["-f", "luks"], &options, &[path.as_str(), "1M"]].concat();
        run("qemu-img", &luks).unwrap();
    }
    let (mut compared, mut unknown) = (0, BTreeSet::new());
    for (name, nodes) in graphs() {
        let what = format!("{name}: {}", json!(nodes));
        let there = build(&mut theirs, &nodes, folders[0].path());
        let here = build(&mut ours, &nodes, folders[1].path());
        match (&there, &here) {
            (_, Err(e)) if is_unknown(e) => drop(unknown.insert(name)),
            (Err(e), _) if is_unknown(e) => drop(unknown.insert(name)),
            (Ok(()), Ok(())) => {
                assert_eq!(edges(&mut ours), edges(&mut theirs), "{what}");
                compared += 1;
            }
            // Refused by both is agreement, too.
            (Err(_), Err(_)) => compared += 1,
            _ => panic!("{what}\nQEMU: {there:?}\nringblk: {here:?}"),
        }
        tear_down(&mut theirs, &nodes);
        tear_down(&mut ours, &nodes);
    }
    eprintln!("{compared} graphs compared; not known here: {unknown:?}");
    assert!(compared >= 25, "only {compared} graphs compared");
}
