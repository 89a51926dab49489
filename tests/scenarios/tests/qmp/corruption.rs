//! Images found damaged while a guest uses them: marked, told, kept from further writes, and nobody else suffers. And what
//! `overlap-check` has to do with it. `qemu-io` on a copy of the image says what is right.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use client::{Setup, blk, disk};
use ringblk_scenarios::{Rig, Wanted};
use serde_json::{Value, json};

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;

fn run(name: &str, arguments: &[&str]) -> String {
    let out = Command::new(name).args(arguments).output().unwrap_or_else(|e| panic!("{name}: {e}"));
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// An image with a snapshot and data before and after it, on which an entry is damaged.
struct Image {
    path: PathBuf,
    folder: tempfile::TempDir,
}

impl Image {
    fn new() -> Image {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let name = path.to_str().unwrap();
        assert_eq!(run("qemu-img", &["create", "-q", "-f", "qcow2", name, "64M"]), "");
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 4M", name]);
        assert_eq!(run("qemu-img", &["snapshot", "-c", "then", name]), "");
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 0 2M", name]);
        Image { path, folder }
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        std::fs::File::open(&self.path).unwrap().read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn poke(&self, at: u64, word: u64) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.path).unwrap();
        file.write_all_at(&word.to_be_bytes(), at).unwrap();
    }

    /// Where metadata lies, by the name of the flag that guards it.
    fn places(&self) -> Vec<(&'static str, u64)> {
        let offset = |word: u64| word & 0x00ff_ffff_ffff_fe00;
        let (l1, table, snapshots) = (self.word(40), self.word(48), self.word(64));
        // The first entry of the snapshot table begins with the offset of its L1 table.
        let old_l1 = self.word(snapshots);
        vec![
            ("active-l1", l1),
            ("active-l2", offset(self.word(l1))),
            ("refcount-table", table),
            ("refcount-block", offset(self.word(table))),
            ("snapshot-table", snapshots),
            ("inactive-l1", old_l1),
            ("inactive-l2", offset(self.word(old_l1))),
        ]
    }

    /// Makes the guest's second cluster lie there.
    fn damage(&self, host: u64) -> Image {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::copy(&self.path, &path).unwrap();
        let copy = Image { path, folder };
        let table = copy.word(copy.word(40)) & 0x00ff_ffff_ffff_fe00;
        copy.poke(table + 8, host | COPIED);
        copy
    }

    fn copy(&self) -> String {
        static COPIES: AtomicU32 = AtomicU32::new(0);
        let copy = self.folder.path().join(format!("copy{}", COPIES.fetch_add(1, Relaxed)));
        std::fs::copy(&self.path, &copy).unwrap();
        copy.to_str().unwrap().to_owned()
    }

    /// What QEMU says when that cluster is written with this option; `None`: it writes.
    fn theirs(&self, option: &str) -> Option<String> {
        let opts = format!("driver=qcow2,file.filename={}{option}", self.copy());
        let said = run("qemu-io", &["--image-opts", &opts, "-c", &format!("write -P 9 {CLUSTER} 512")]);
        let mark = "qcow2: Marking image as corrupt: ";
        let words = said.lines().find_map(|line| line.strip_prefix(mark));
        assert!(words.is_some() || said.contains("wrote 512/512"), "{option}: {said}");
        words.map(|w| w.split("; further").next().unwrap().to_owned())
    }

    fn is_marked(&self) -> bool {
        self.word(72) & 2 != 0
    }
}

fn serve(path: &Path, option: &str) -> Rig {
    let node = format!("qcow2,file.driver=file,file.filename={}{option}", path.display());
    Rig::start(&[Wanted::node("e", &node), Wanted::file("other", 1 << 20)])
}

fn status(disk: &mut disk::Disk, op: u32, at: u64) -> u8 {
    let payload = if op == blk::op::IN { disk::Payload::In(512) } else { disk::Payload::Out(vec![9; 512]) };
    disk.run(0, &disk::Request::new(op, at / 512, payload)).unwrap().status
}

#[test]
fn damage_met_by_a_write_is_told_and_stays_with_its_image() {
    let image = Image::new();
    for (what, place) in image.places() {
        if what == "inactive-l2" {
            continue; // Not by default.
        }
        let image = image.damage(place);
        let theirs = image.theirs("").expect("QEMU refuses");
        let mut rig = serve(&image.path, "");
        let mut guest = rig.disk("e", &Setup::default());
        let mut other = rig.disk("other", &Setup::default());
        assert_eq!(guest.read(0, 512).unwrap(), [2; 512]);
        assert_eq!(status(&mut guest, blk::op::OUT, CLUSTER), blk::status::IOERR, "{what}");
        let event = rig.qmp.wait_event("BLOCK_IMAGE_CORRUPTED").unwrap();
        let data = &event["data"];
        assert_eq!(data["device"], "", "{event}");
        assert_eq!(data["node-name"], "node-e", "{event}");
        assert_eq!(data["msg"], theirs, "{what}: {event}");
        assert_eq!(data["offset"], place, "{event}");
        assert_eq!(data["size"], 512, "{event}");
        assert_eq!(data["fatal"], true, "{event}");
        assert!(image.is_marked(), "{what}");
        // No write any more, wherever to; what is there can still be read.
        for at in [0, CLUSTER, 32 << 20] {
            assert_eq!(status(&mut guest, blk::op::OUT, at), blk::status::IOERR, "{what} at {at}");
        }
        assert!(guest.flush().is_err(), "{what}");
        assert_eq!(guest.read(0, 512).unwrap(), [2; 512]);
        // Told once, and the others go on.
        other.write(0, &[7; 4096]).unwrap();
        other.flush().unwrap();
        assert!(!rig.qmp.take_events().iter().any(|e| e["event"] == "BLOCK_IMAGE_CORRUPTED"));
        rig.assert_running();
        drop(guest);
        // It is looked at as it is on disk.
        rig.command("block-check", json!({"job-id": "c", "node-name": "node-e"}));
        let is_over = |data: &Value| data["id"] == "c" && data["status"] == "concluded";
        rig.qmp.wait_event_where("JOB_STATUS_CHANGE", is_over).unwrap();
        let report = rig.command("query-block-check", json!({"id": "c"}));
        assert!(report["corruptions"].as_u64().unwrap() > 0, "{what}: {report}");
        rig.command("job-dismiss", json!({"id": "c"}));
        // Not to be opened for writing again until it is repaired.
        rig.wait_disconnected("e");
        rig.command("block-export-del", json!({"id": "e"}));
        rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
        rig.command("blockdev-del", json!({"node-name": "node-e"}));
        let again = json!({"driver": "qcow2", "node-name": "again",
                           "file": {"driver": "file", "filename": image.path}});
        let refused = rig.qmp.execute("blockdev-add", again).unwrap_err().to_string();
        assert!(refused.contains("Image is corrupt; cannot be opened read/write"), "{refused}");
        assert_eq!(other.read(0, 4096).unwrap(), [7; 4096]);
    }
}

#[test]
fn damage_met_by_a_reader_is_a_complaint() {
    let image = Image::new();
    let image = image.damage(5 * CLUSTER + 512);
    let mut rig = Rig::start(&[]);
    let add = json!({"driver": "qcow2", "node-name": "q", "read-only": true,
                     "file": {"driver": "file", "filename": image.path}});
    rig.command("blockdev-add", add);
    rig.add_export("e", "q", &json!({})).unwrap();
    let mut guest = rig.disk("e", &Setup::default());
    assert_eq!(status(&mut guest, blk::op::IN, CLUSTER), blk::status::IOERR);
    let event = rig.qmp.wait_event("BLOCK_IMAGE_CORRUPTED").unwrap();
    assert_eq!(event["data"]["fatal"], false, "{event}");
    assert_eq!(event["data"]["node-name"], "q", "{event}");
    let words = event["data"]["msg"].as_str().unwrap();
    assert!(words.contains("unaligned"), "{event}");
    assert!(!image.is_marked());
    assert_eq!(guest.read(0, 512).unwrap(), [2; 512]);
}

#[test]
fn overlap_check_refuses_what_qemu_refuses_with_it() {
    let image = Image::new();
    let options = [
        "",
        ",overlap-check=none",
        ",overlap-check=constant",
        ",overlap-check=cached",
        ",overlap-check=all",
        ",overlap-check.template=none,overlap-check.refcount-block=on,overlap-check.inactive-l2=on",
        ",overlap-check.active-l1=off,overlap-check.snapshot-table=off,overlap-check.inactive-l1=off",
        ",overlap-check.template=constant,overlap-check.active-l2=on,overlap-check.refcount-table=off",
    ];
    let mut refused = 0;
    for (what, place) in image.places() {
        let damaged = image.damage(place);
        for option in options {
            let theirs = damaged.theirs(option);
            let path = PathBuf::from(damaged.copy());
            let mut rig = serve(&path, option);
            let mut guest = rig.disk("e", &Setup::default());
            let ours = status(&mut guest, blk::op::OUT, CLUSTER);
            assert_eq!(ours == blk::status::OK, theirs.is_none(), "{what} with '{option}': {theirs:?}");
            if let Some(theirs) = theirs {
                refused += 1;
                let event = rig.qmp.wait_event("BLOCK_IMAGE_CORRUPTED").unwrap();
                assert_eq!(event["data"]["msg"], theirs, "{what} with '{option}'");
            }
        }
    }
    assert!(refused >= 20, "{refused}");
}
