//! Every kind of refusal, with its words, and without a trace: graph, options, locks and the guest are as they were.

use client::Setup;
use ringblk_scenarios::{Rig, Wanted, image};
use serde_json::{Value, json};

use crate::load::Load;
use crate::{qcow2, try_command, whole_state};

/// Bytes of the guest's disk.
const SIZE: u64 = 8 << 20;

/// Commands that must fail; `@` stands for the folder.
fn attempts() -> Vec<(&'static str, Value, &'static str)> {
    let file = json!({"driver": "file", "node-name": "file", "filename": "@/image"});
    let disk = |more: Value| {
        let mut options = json!({"driver": "qcow2", "node-name": "node-disk", "file": "file"});
        for (name, value) in more.as_object().unwrap() {
            options[name] = value.clone();
        }
        options
    };
    let reopen = |list: Value| ("blockdev-reopen", json!({"options": list}));
    let insert = |node: Value, parent: &str, child: &str| {
        ("blockdev-insert-node", json!({"node": node, "parent": parent, "child": child}))
    };
    let replace = |from: &str, to: &str, more: Value| {
        let mut arguments = json!({"node-name": from, "replacement": to});
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        ("blockdev-replace-node", arguments)
    };
    let sync = |node: &str, file: &str, name: &str, more: Value| {
        let mut arguments = json!({"node-name": node, "snapshot-file": file, "snapshot-node-name": name});
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        ("blockdev-snapshot-sync", arguments)
    };
    let with = |(command, arguments): (&'static str, Value), words: &'static str| (command, arguments, words);
    let mut wrong_file = file.clone();
    wrong_file["filename"] = json!("@/other");
    let mut read_only = file.clone();
    read_only["read-only"] = json!(true);
    vec![
        // Reopening.
        with(
            reopen(json!([disk(json!({"file": "nowhere"}))])),
            "Cannot find device='' nor node-name='nowhere'",
        ),
        with(reopen(json!([wrong_file])), "Cannot change the option 'filename'"),
        with(
            reopen(json!([disk(json!({"l2-cache-size": 65536})), wrong_file])),
            "Cannot change the option 'filename'",
        ),
        with(
            reopen(json!([disk(json!({"force-share": true, "read-only": true}))])),
            "Cannot change the option 'force-share'",
        ),
        with(
            reopen(json!([disk(json!({"read-only": true}))])),
            "Read-only block node 'node-disk' cannot support read-write users",
        ),
        with(
            reopen(json!([disk(json!({})), read_only])),
            "Block node is read-only. Way out: add node 'file' with read-only=off, or add node 'node-disk' with \
             read-only=on.",
        ),
        with(
            reopen(json!([disk(json!({"file": "other"}))])),
            "Node 'other' does not show the same image as 'file': 'node-disk' cannot change over to it; delete 'node-disk' and add it again",
        ),
        with(
            reopen(json!([disk(json!({"l2-cache-size": 1, "cache-size": 1, "refcount-cache-size": 1}))])),
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        with(reopen(json!([disk(json!({})), disk(json!({}))])), "Node 'node-disk' is listed twice"),
        with(reopen(json!([{"driver": "qcow2", "file": "file"}])), "node-name not specified"),
        with(
            reopen(json!([{"driver": "raw", "node-name": "node-disk", "file": "file"}])),
            "Cannot change the option 'driver'",
        ),
        with(
            reopen(
                json!([{"driver": "qcow2", "node-name": "overlay", "file": "overlay-file", "backing": "overlay"}]),
            ),
            "Making 'overlay' a backing child of 'overlay' would create a cycle",
        ),
        with(
            reopen(json!([{"driver": "raw", "node-name": "above", "file": "other", "offset": 1_u64 << 40}])),
            "Offset (1099511627776) cannot be greater than size of the containing file (8388608)",
        ),
        // Filters put in and taken out.
        with(
            insert(json!("above"), "disk", "root"),
            "Node 'above' is a filter on 'other', not on 'node-disk', which is the 'root' child of block export 'disk'",
        ),
        with(insert(json!("other"), "disk", "root"), "Node 'other' is not a filter"),
        with(
            insert(json!({"driver": "raw", "node-name": "new", "file": "file"}), "disk", "root"),
            "Node 'new' is a filter on 'file', not on 'node-disk', which is the 'root' child of block export 'disk'",
        ),
        with(
            insert(
                json!({"driver": "raw", "node-name": "new", "file": "node-disk", "size": 4096}),
                "disk",
                "root",
            ),
            "Node 'new' is not a filter",
        ),
        with(
            insert(json!({"driver": "raw", "node-name": "new", "file": "nowhere"}), "disk", "root"),
            "Cannot find device='nowhere' nor node-name='nowhere'",
        ),
        with(insert(json!("above"), "nowhere", "file"), "Cannot find device='' nor node-name='nowhere'"),
        with(
            insert(json!("above"), "node-disk", "backing"),
            "Node 'node-disk' does not have child 'backing'",
        ),
        with(insert(json!("above"), "disk", "file"), "The export does not have child 'file'"),
        with(("blockdev-remove-node", json!({"node-name": "node-disk"})), "Node 'node-disk' is not a filter"),
        with(
            ("blockdev-remove-node", json!({"node-name": "above"})),
            "Node 'above' has no users: blockdev-del removes it",
        ),
        with(
            ("blockdev-remove-node", json!({"node-name": "nowhere"})),
            "Cannot find device='' nor node-name='nowhere'",
        ),
        with(
            ("blockdev-del", json!({"node-name": "node-disk"})),
            "Node node-disk is in use: it is used by block export 'disk'",
        ),
        // Nodes in place of others.
        with(
            replace("node-disk", "small", json!({"force": true})),
            "Cannot replace 'node-disk' (8388608 bytes) by 'small' (4194304 bytes): they differ in size",
        ),
        with(
            replace("node-disk", "other", json!({})),
            "Cannot replace 'node-disk' by 'other': nothing shows that they hold the same data; 'force' replaces it all the same",
        ),
        with(replace("node-disk", "node-disk", json!({})), "Node 'node-disk' cannot be replaced by itself"),
        with(
            replace("file", "node-disk", json!({"parent": "node-disk", "force": true})),
            "Making 'node-disk' a file child of 'node-disk' would create a cycle",
        ),
        with(
            replace("other", "node-disk", json!({"parent": "disk"})),
            "The 'root' child of block export 'disk' is 'node-disk', not 'other'",
        ),
        with(replace("small", "small2", json!({})), "Node 'small' has no users"),
        // Overlays.
        with(
            ("blockdev-snapshot", json!({"node": "node-disk", "overlay": "nowhere"})),
            "Cannot find device='nowhere' nor node-name='nowhere'",
        ),
        with(
            ("blockdev-snapshot", json!({"node": "node-disk", "overlay": "above"})),
            "The overlay does not support backing images",
        ),
        with(
            ("blockdev-snapshot", json!({"node": "node-disk", "overlay": "small-overlay"})),
            "The overlay 'small-overlay' is smaller (4194304 bytes) than 'node-disk' (8388608 bytes), whose users would lose the end of their disk",
        ),
        with(
            ("blockdev-snapshot", json!({"node": "node-disk", "overlay": "chained"})),
            "The overlay already has a backing image",
        ),
        with(
            ("blockdev-snapshot", json!({"node": "overlay", "overlay": "node-disk"})),
            "Node 'overlay' is busy: node is used as backing hd of 'chained'",
        ),
        with(
            sync("node-disk", "@/no/such/folder", "new", json!({})),
            "Could not create '@/no/such/folder': No such file or directory",
        ),
        with(sync("node-disk", "@/new", "overlay", json!({})), "New overlay node-name already in use"),
        with(
            sync("node-disk", "@/new", "new", json!({"format": "raw"})),
            "Backing file not supported for file format 'raw'",
        ),
        with(sync("node-disk", "@/new", "new", json!({"format": "none"})), "Unknown file format 'none'"),
        with(
            ("blockdev-snapshot-sync", json!({"node-name": "node-disk", "snapshot-file": "@/new"})),
            "New overlay node name missing",
        ),
        // Several at once.
        with(
            (
                "transaction",
                json!({"actions": [
                    {"type": "blockdev-snapshot-sync", "data": {"node-name": "node-disk", "snapshot-file": "@/new", "snapshot-node-name": "new"}},
                    {"type": "block-dirty-bitmap-add", "data": {"node": "node-disk", "name": "b"}},
                    {"type": "abort", "data": {}},
                ]}),
            ),
            "Transaction aborted using Abort action",
        ),
        with(
            (
                "transaction",
                json!({"actions": [
                    {"type": "blockdev-snapshot", "data": {"node": "node-disk", "overlay": "overlay2"}},
                    {"type": "blockdev-snapshot", "data": {"node": "other", "overlay": "overlay2"}},
                ]}),
            ),
            "The overlay is already in use",
        ),
        with(
            (
                "transaction",
                json!({
                    "actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "node-disk", "name": "b"}}],
                    "properties": {"completion-mode": "grouped"},
                }),
            ),
            "Action 'block-dirty-bitmap-add' does not support transaction property completion-mode = grouped",
        ),
        // Children.
        with(
            ("x-blockdev-change", json!({"parent": "above", "child": "file"})),
            "The node above does not support removing a child",
        ),
        with(
            ("x-blockdev-change", json!({"parent": "above", "node": "small"})),
            "The node above does not support adding a child",
        ),
        with(
            ("x-blockdev-change", json!({"parent": "above", "child": "backing"})),
            "Node 'above' does not have child 'backing'",
        ),
        with(
            ("x-blockdev-change", json!({"parent": "above", "node": "nowhere"})),
            "Node 'nowhere' not found",
        ),
        with(
            ("x-blockdev-change", json!({"parent": "nowhere", "node": "small"})),
            "Cannot find device='nowhere' nor node-name='nowhere'",
        ),
        with(("x-blockdev-change", json!({"parent": "above"})), "Either child or node must be specified"),
        with(
            ("x-blockdev-change", json!({"parent": "above", "node": "small", "child": "file"})),
            "The parameters child and node are in conflict",
        ),
        with(
            (
                "change-backing-file",
                json!({"device": "node-disk", "image-node-name": "node-disk", "backing-file": "x"}),
            ),
            "not allowing backing file change on an image without a backing file",
        ),
        with(
            (
                "change-backing-file",
                json!({"device": "node-disk", "image-node-name": "chained", "backing-file": "x"}),
            ),
            "'node-disk' and image file are not in the same chain",
        ),
    ]
}

fn put_folder(value: &mut Value, folder: &str) {
    match value {
        Value::String(s) => *s = s.replace('@', folder),
        Value::Array(list) => list.iter_mut().for_each(|v| put_folder(v, folder)),
        Value::Object(map) => map.values_mut().for_each(|v| put_folder(v, folder)),
        _ => {}
    }
}

#[test]
fn what_is_refused_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    for (name, size) in [("image", SIZE), ("o1", SIZE), ("o2", SIZE), ("o3", SIZE), ("s", SIZE / 2)] {
        qcow2(&folder.path().join(name), size);
    }
    image::create(&folder.path().join("other"), SIZE);
    let nodes = [
        format!("file,node-name=file,filename={}", at("image")),
        format!("file,node-name=other,filename={}", at("other")),
        "raw,node-name=above,file=other".into(),
        format!("null-co,node-name=small,size={}", SIZE / 2),
        format!("null-co,node-name=small2,size={}", SIZE / 2),
        format!("file,node-name=overlay-file,filename={}", at("o1")),
        r#"{"driver": "qcow2", "node-name": "overlay", "file": "overlay-file", "backing": null}"#.into(),
        json!({"driver": "qcow2", "node-name": "overlay2", "file": {"driver": "file", "filename": at("o3")}, "backing": null}).to_string(),
        json!({"driver": "qcow2", "node-name": "chained", "file": {"driver": "file", "filename": at("o2")}, "backing": "overlay"}).to_string(),
        json!({"driver": "qcow2", "node-name": "small-overlay", "file": {"driver": "file", "filename": at("s")}, "backing": null}).to_string(),
    ];
    let mut arguments = vec!["--object", "iothread,id=t0", "--object", "iothread,id=t1"];
    for node in &nodes {
        arguments.extend(["--blockdev", node]);
    }
    let options =
        "writable=on,num-queues=2,iothread-vq-mapping.0.iothread=t0,iothread-vq-mapping.1.iothread=t1";
    let mut rig = Rig::start_with(&[Wanted::node("disk", "qcow2,file=file").options(options)], &arguments);
    let mut load = Load::start(rig.disk("disk", &Setup { queues: 2, ..Setup::default() }), SIZE, 7);
    // Until every cluster that will be is there: from then on the image's own figures stay.
    while load.done() < 2000 {
        load.check();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let pid = rig.daemon.pid();
    let folder_text = folder.path().display().to_string();
    let files = || {
        let mut names: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let mut wrong = Vec::new();
    for (command, mut arguments, words) in attempts() {
        put_folder(&mut arguments, &folder_text);
        let (before, listed) = (whole_state(&mut rig.qmp, pid), files());
        let said = match try_command(&mut rig.qmp, command, &arguments) {
            Ok(answer) => format!("(accepted: {answer})"),
            Err(said) => said,
        };
        if said != words.replace('@', &folder_text) {
            wrong.push(format!("{command} {arguments}\n   says {said}\n   not  {words}"));
        }
        let after = whole_state(&mut rig.qmp, pid);
        if before != after {
            wrong.push(format!("{command} {arguments} left a trace:\n   {before}\n   {after}"));
        }
        if files() != listed {
            wrong.push(format!("{command} {arguments} left a file: {:?}", files()));
        }
        let done = load.done();
        while load.done() == done {
            load.check();
            std::thread::yield_now();
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    load.end();
}
