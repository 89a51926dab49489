//! Events with their causes: exports that end, requests that fail.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

use client::{Disk, Setup, blk, disk};
use ringblk_scenarios::{Rig, Wanted};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// Adds an export of a file whose writes fail from now on: the kernel lets a file in memory be sealed under its
/// users. Reads go on. Needs no privilege and fills no disk. Returns the export's id; its node is `sealed`.
pub fn breakable(rig: &mut Rig) -> String {
    let file = memfd_create("image", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, MIB).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    rig.command("blockdev-add", json!({"driver": "file", "node-name": "sealed", "filename": path}));
    rig.add_export("broken", "sealed", &json!({"writable": true})).unwrap();
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    "broken".to_owned()
}

fn write(disk: &mut Disk, sector: u64) -> u8 {
    let request = disk::Request::new(blk::op::OUT, sector, disk::Payload::Out(vec![1; 512]));
    disk.run(0, &request).unwrap().status
}

#[test]
fn a_write_that_the_kernel_refuses_is_the_guests_error_and_an_event() {
    let mut rig = Rig::start(&[]);
    let id = breakable(&mut rig);
    let mut disk = rig.disk(&id, &Setup::default());
    assert_eq!(write(&mut disk, 8), blk::status::IOERR);
    let event = rig.qmp.wait_event("BLOCK_IO_ERROR").unwrap();
    let data = &event["data"];
    assert_eq!(data["device"], "broken", "{event}");
    assert_eq!(data["node-name"], "sealed", "{event}");
    assert_eq!(data["operation"], "write", "{event}");
    assert_eq!(data["action"], "report", "{event}");
    assert_eq!(data["nospace"], false, "{event}");
    assert!(data["reason"].as_str().unwrap().contains("not permitted"), "{event}");
    // The queue goes on: reads are served, the failure is counted.
    assert_eq!(disk.read(0, 4096).unwrap(), [0; 4096]);
    let stats = rig.command("query-blockstats", json!({}));
    assert_eq!(stats[0]["stats"]["failed_wr_operations"], 1, "{stats}");
    assert_eq!(stats[0]["stats"]["failed_rd_operations"], 0, "{stats}");
}

/// A file system of one MiB; gone when dropped.
struct SmallFs(tempfile::TempDir);

impl SmallFs {
    /// `None` where mounting is not allowed.
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(folder.path());
        mount.output().ok()?.status.success().then_some(Self(folder))
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

#[test]
fn a_full_file_system_is_told_as_such() {
    let Some(fs) = SmallFs::mount() else {
        eprintln!("skipped: mounting a tmpfs is not allowed here");
        return;
    };
    let image = fs.0.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    let node = format!("file,filename={}", image.display());
    let mut rig = Rig::start(&[Wanted::node("e", &node)]);
    let mut disk = rig.disk("e", &Setup::default());
    let failed = (0..16 * MIB / 65536).find(|block| disk.write(block * 65536, &[1; 65536]).is_err());
    assert!(failed.is_some(), "16 MiB fit into one");
    let event = rig.qmp.wait_event("BLOCK_IO_ERROR").unwrap();
    assert_eq!(event["data"]["nospace"], true, "{event}");
    assert_eq!(event["data"]["operation"], "write", "{event}");
    // What was there before is still served.
    assert_eq!(disk.read(0, 65536).unwrap(), [1; 65536]);
    drop((disk, rig));
}

#[test]
fn removing_an_export_safely_waits_for_nobody_and_hard_disconnects() {
    let mut rig = Rig::start(&[Wanted::file("e", MIB)]);
    let mut disk = rig.disk("e", &Setup::default());
    disk.write(0, &[9; 512]).unwrap();
    let (class, text) = crate::refusal(&mut rig.qmp, "block-export-del", json!({"id": "e"}));
    assert_eq!(class, "GenericError");
    assert!(text.starts_with("export 'e' still in use"), "{text}");
    let (_, text) = crate::refusal(&mut rig.qmp, "block-export-del", json!({"id": "e", "mode": "safe"}));
    assert!(text.starts_with("export 'e' still in use"), "{text}");
    assert_eq!(disk.read(0, 512).unwrap(), [9; 512], "a refused removal is no removal");
    assert!(
        crate::refusal(&mut rig.qmp, "blockdev-del", json!({"node-name": "node-e"})).1.contains("in use")
    );

    rig.command("block-export-del", json!({"id": "e", "mode": "hard"}));
    let event = rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
    assert_eq!(event["data"]["id"], "e");
    assert_eq!(rig.command("query-block-exports", json!({})), json!([]));
    assert!(!rig.socket("e").exists(), "the socket's path is free");
    let request = disk::Request::new(blk::op::IN, 0, disk::Payload::In(512));
    let after = disk.submit(0, &request).and_then(|token| {
        disk.kick(0)?;
        disk.session_mut().frontend.get_features()?;
        disk.wait(token)
    });
    assert!(after.is_err(), "a removed export still answers");

    // Id, socket and node are free: the same again, removed without anybody connected.
    rig.add_export("e", "node-e", &json!({"writable": true})).unwrap();
    let mut disk = rig.disk("e", &Setup::default());
    assert_eq!(disk.read(0, 512).unwrap(), [9; 512]);
    drop(disk);
    rig.wait_disconnected("e");
    rig.command("block-export-del", json!({"id": "e"}));
    rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
    rig.command("blockdev-del", json!({"node-name": "node-e"}));
    assert_eq!(rig.command("query-named-block-nodes", json!({})), json!([]));
    rig.assert_running();
}

#[test]
fn hard_removal_with_requests_in_flight_ends_them_first() {
    let node = "null-co,size=1048576,latency-ns=300000000";
    let mut rig = Rig::start(&[Wanted::node("e", node)]);
    let mut disk = rig.disk("e", &Setup::default());
    let request = disk::Request::new(blk::op::IN, 0, disk::Payload::In(512));
    let tokens: Vec<_> = (0..8).map(|_| disk.submit(0, &request).unwrap()).collect();
    disk.kick(0).unwrap();
    rig.wait_for("requests to be taken", |rig| {
        let threads = rig.command("query-iothreads", json!({}));
        threads.as_array().unwrap().iter().any(|t| t["requests"].as_u64().unwrap() >= 8)
    });
    rig.command("block-export-del", json!({"id": "e", "mode": "hard"}));
    // A second removal is not a second event.
    if let Err(e) = rig.qmp.execute("block-export-del", json!({"id": "e", "mode": "hard"})) {
        let text = e.to_string();
        assert!(text.contains("already shutting down") || text.contains("not found"), "{text}");
    }
    // A VMM that sees the end of the connection takes what is not completed by then for never begun, and has it done
    // again by the next backend.
    let mut stream = disk.session().frontend.connection().stream().try_clone().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0, "the connection ends");
    for _ in tokens {
        let done = disk.poll(0).unwrap().expect("what was in flight is completed before the connection ends");
        assert_eq!(done.status, blk::status::OK);
    }
    rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
    rig.command("blockdev-del", json!({"node-name": "node-e"}));
    rig.qmp.set_limit(Duration::from_millis(200));
    assert!(rig.qmp.wait_event("BLOCK_EXPORT_DELETED").is_err(), "the event comes once");
}

#[test]
fn hard_removal_ends_a_front_end_that_reads_no_reply() {
    let mut rig = Rig::start(&[Wanted::file("e", MIB)]);
    let connection = rig.connection("e");
    let mut stream = connection.stream().try_clone().unwrap();
    stream.set_nonblocking(true).unwrap();
    // GET_FEATURES, version 1, no payload; until replies fill one direction and questions the other.
    let question = [1_u32, 1, 0].map(u32::to_ne_bytes).concat();
    let mut full = 0;
    while full < 20 {
        match stream.write(&question) {
            Ok(n) => assert_eq!(n, question.len(), "small messages go out whole"),
            Err(e) => {
                assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock);
                full += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    rig.command("block-export-del", json!({"id": "e", "mode": "hard"}));
    rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
    rig.command("blockdev-del", json!({"node-name": "node-e"}));
}
