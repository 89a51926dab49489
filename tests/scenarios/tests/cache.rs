//! A cache in a running daemon: under a guest's writes, warmed from a bitmap, reopened while it is in use, taken out again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use client::Setup;
use ringblk_scenarios::Rig;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A daemon with a cache `c` over the file `f`, exported as `e`.
fn rig(more: Value) -> Rig {
    let mut rig = Rig::start(&[]);
    let path = rig.folder().join("f");
    std::fs::write(&path, vec![0; 4 << 20]).unwrap();
    rig.command("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": path}));
    let mut options = json!({"driver": "cache", "node-name": "c", "file": "f", "size": 2 * MIB});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    rig.command("blockdev-add", options);
    rig
}

fn stat(rig: &mut Rig, name: &str) -> u64 {
    let stats = rig.command("query-blockstats", json!({"query-nodes": true}));
    let cache = stats.as_array().unwrap().iter().find(|n| n["node-name"] == "c").unwrap();
    cache["driver-specific"][name].as_u64().unwrap_or_else(|| panic!("{name} in {cache}"))
}

#[test]
fn a_bitmap_says_what_is_warmed() {
    let mut rig = rig(json!({}));
    rig.command("block-dirty-bitmap-add", json!({"node": "f", "name": "b", "granularity": 65536}));
    rig.add_export("e", "c", &json!({"writable": true})).unwrap();
    let mut disk = rig.disk("e", &Setup::default());
    disk.write(MIB, &[1; 65536]).unwrap();
    disk.write(3 * MIB, &[2; 65536]).unwrap();
    drop(disk);
    rig.wait_disconnected("e");
    rig.command("block-export-del", json!({"id": "e"}));
    rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
    rig.command("blockdev-del", json!({"node-name": "c"}));
    rig.command("blockdev-add", json!({"driver": "cache", "node-name": "c", "file": "f", "size": 2 * MIB}));
    assert_eq!(stat(&mut rig, "resident-blocks"), 0);
    for (arguments, words) in [
        (json!({"bitmap": "none", "bitmap-node": "f"}), "Dirty bitmap 'none' not found"),
        (json!({"bitmap": "b"}), "Dirty bitmap 'b' not found"),
        (json!({"bitmap": "b", "bitmap-node": "f", "speed": -1}), "Parameter 'speed' expects"),
    ] {
        let mut all = json!({"job-id": "w", "node-name": "c"});
        all.as_object_mut().unwrap().extend(arguments.as_object().unwrap().clone());
        let refused = rig.qmp.execute("block-cache-warm", all).unwrap_err().to_string();
        assert!(refused.contains(words), "{refused}");
    }
    let warm = json!({"job-id": "w", "node-name": "c", "bitmap": "b", "bitmap-node": "f"});
    rig.command("block-cache-warm", warm);
    let end = rig.qmp.wait_event("BLOCK_JOB_COMPLETED").unwrap();
    assert_eq!((&end["data"]["device"], &end["data"]["error"]), (&json!("w"), &Value::Null), "{end}");
    assert_eq!(end["data"]["offset"], 2 * 65536);
    assert_eq!(stat(&mut rig, "resident-blocks"), 2 * 65536 / 16384);
    rig.add_export("e", "c", &json!({})).unwrap();
    let misses = stat(&mut rig, "misses");
    let mut disk = rig.disk("e", &Setup::default());
    assert_eq!(disk.read(3 * MIB, 65536).unwrap(), [2; 65536]);
    assert_eq!(stat(&mut rig, "misses"), misses, "all of it was there");
}

#[test]
fn it_is_reopened_and_turned_off_while_a_guest_writes() {
    let mut rig = rig(json!({"mode": "writeback"}));
    let path = rig.folder().join("f");
    rig.add_export("e", "c", &json!({"writable": true})).unwrap();
    let mut disk = rig.disk("e", &Setup::default());
    disk.write(0, &[1; 4096]).unwrap();
    assert_eq!(stat(&mut rig, "dirty-blocks"), 1);
    assert_eq!(&std::fs::read(&path).unwrap()[..4096], [0; 4096], "in memory alone");
    let reopen = |rig: &mut Rig, more: Value| {
        let mut options = json!({"driver": "cache", "node-name": "c", "file": "f"});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        rig.qmp.execute("blockdev-reopen", json!({"options": [options]})).map_err(|e| e.to_string())
    };
    let refused = reopen(&mut rig, json!({"size": 2 * MIB, "block-size": 4096})).unwrap_err();
    assert!(refused.contains("Cannot change the option 'block-size'"), "{refused}");
    reopen(&mut rig, json!({"size": 2 * MIB, "mode": "writethrough"})).unwrap();
    assert_eq!(&std::fs::read(&path).unwrap()[..4096], [1; 4096], "written back before the mode changed");
    disk.write(4096, &[2; 4096]).unwrap();
    assert_eq!(&std::fs::read(&path).unwrap()[4096..8192], [2; 4096], "written through");
    reopen(&mut rig, json!({"size": 0})).unwrap();
    assert_eq!(stat(&mut rig, "resident-blocks"), 0);
    disk.write(8192, &[3; 4096]).unwrap();
    assert_eq!(disk.read(0, 12288).unwrap(), [[1; 4096], [2; 4096], [3; 4096]].concat());
    // Off, it is in nobody's way.
    rig.add_export("below", "f", &json!({"share-rw": true})).unwrap();
}
