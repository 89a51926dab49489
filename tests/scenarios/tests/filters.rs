//! Filters below an export, seen from its front end and from the control channel: limits that hold across disks and change at
//! run time, data that moves up, writes that arrive compressed, files that grow ahead.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use client::daemon::{Daemon, Launch};
use client::disk::{Disk, Payload, Request};
use client::{Guest, Session, Setup, blk};
use ringblk_scenarios::{Rig, Wanted, image::pattern};
use serde_json::{Value, json};

const BLOCK: u64 = 4096;

fn setup() -> Setup {
    Setup { memory: vec![(0, 16 << 20)], ..Setup::default() }
}

fn read_request(sector: u64) -> Request {
    Request::new(blk::op::IN, sector, Payload::In(BLOCK as u32))
}

/// Keeps `depth` reads in flight on each disk as long as `running` says; how many have ended, by disk.
fn drive(disks: &mut [Disk], depth: u64, mut running: impl FnMut() -> bool) -> Vec<u64> {
    let mut done = vec![0; disks.len()];
    for disk in disks.iter_mut() {
        for n in 0..depth {
            disk.submit(0, &read_request(n * 8)).unwrap();
        }
        disk.kick(0).unwrap();
    }
    while running() {
        for (disk, done) in disks.iter_mut().zip(&mut done) {
            while let Some(completion) = disk.poll(0).unwrap() {
                assert_eq!(completion.status, blk::status::OK);
                *done += 1;
                disk.submit(0, &read_request(*done % 64 * 8)).unwrap();
                disk.kick(0).unwrap();
            }
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    done
}

/// As [`drive`] for two seconds; besides how long it really was, from before the first request on.
fn drive_a_while(disks: &mut [Disk]) -> (Vec<u64>, f64) {
    let start = Instant::now();
    let done = drive(disks, 8, || start.elapsed() < Duration::from_secs(2));
    (done, start.elapsed().as_secs_f64())
}

fn throttled(id: &str) -> Wanted {
    Wanted::node(id, "throttle,throttle-group=limits,file.driver=null-co,file.size=64M,file.read-zeroes=on")
}

const GROUP: [&str; 2] = ["--object", "throttle-group,id=limits,x-iops-total=200"];

#[test]
fn a_group_holds_back_two_disks_together_and_lets_go_when_told() {
    let threads = ["--object", "iothread,id=t0", "--object", "iothread,id=t1"];
    let wanted = [
        throttled("a").options("writable=on,iothread=t0"),
        throttled("b").options("writable=on,iothread=t1"),
    ];
    let mut rig = Rig::start_with(&wanted, &[GROUP.as_slice(), threads.as_slice()].concat());
    let mut disks = [rig.disk("a", &setup()), rig.disk("b", &setup())];
    let (done, seconds) = drive_a_while(&mut disks);
    let tokens = 200.0 * seconds + 20.0 + 2.0;
    let all: u64 = done.iter().sum();
    assert!(all as f64 <= tokens, "{done:?} in {seconds} s");
    // Both had a share, on threads of their own.
    assert!(done.iter().all(|n| *n > 0), "{done:?}");
    let set = |rig: &mut Rig, limits: Value| {
        rig.command("qom-set", json!({"path": "/objects/limits", "property": "limits", "value": limits}));
    };
    // Those held back at this moment go by the new limits, too.
    set(&mut rig, json!({"iops-total": 0}));
    let free = drive(&mut disks, 0, {
        let mut turns = 0;
        move || {
            turns += 1;
            turns < 5_000
        }
    });
    assert!(free.iter().sum::<u64>() > 2 * all, "{free:?} after {done:?}");
    set(&mut rig, json!({"iops-read": 100, "iops-read-max": 300, "iops-read-max-length": 3}));
    let told = rig.command("qom-get", json!({"path": "limits", "property": "limits"}));
    assert_eq!((&told["iops-read-max"], &told["iops-total"]), (&json!(300), &json!(0)));
    rig.assert_running();
}

/// qemu-storage-daemon with the same node and export.
fn peer(folder: &Path) -> Option<(Daemon, Disk)> {
    let program = PathBuf::from("/usr/bin/qemu-storage-daemon");
    if !program.exists() {
        eprintln!("skipped what needs qemu-storage-daemon");
        return None;
    }
    let socket = folder.join("disk").display().to_string();
    let launch = Launch::new(program).args(GROUP).args([
        "--blockdev",
        "null-co,node-name=null,size=67108864,read-zeroes=on",
        "--blockdev",
        "throttle,throttle-group=limits,node-name=node-a,file=null",
        "--export",
        &format!("vhost-user-blk,id=a,node-name=node-a,writable=on,addr.type=unix,addr.path={socket}"),
    ]);
    let mut daemon = launch.spawn().unwrap();
    let connection = daemon.connect(Path::new(&socket)).unwrap();
    let guest = Guest::new(&setup()).unwrap();
    let session = Session::establish(connection, guest, &setup(), &[]).unwrap();
    Some((daemon, Disk::new(session)))
}

#[test]
fn as_much_goes_through_as_with_the_peer() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut daemon, disk)) = peer(folder.path()) else { return };
    let (theirs, their_seconds) = drive_a_while(&mut [disk]);
    daemon.terminate(Duration::from_secs(20)).unwrap();
    let rig = Rig::start_with(&[throttled("a")], &GROUP);
    let (ours, our_seconds) = drive_a_while(&mut [rig.disk("a", &setup())]);
    for (who, done, seconds) in [("theirs", theirs[0], their_seconds), ("ours", ours[0], our_seconds)] {
        let tokens = 200.0 * seconds + 20.0 + 2.0;
        assert!(done as f64 <= tokens, "{who}: {done} in {seconds} s");
        // The limit, and nothing else, holds them back.
        assert!(done as f64 >= tokens / 4.0, "{who}: {done} in {seconds} s");
    }
}

#[test]
fn a_drain_does_not_wait_for_tokens() {
    let wanted = Wanted::node("a", "throttle,throttle-group=limits,file=null");
    let null = "null-co,node-name=null,size=64M,read-zeroes=on";
    let group = "throttle-group,id=limits,limits.bps-total=1";
    let mut rig = Rig::start_with(&[wanted], &["--object", group, "--blockdev", null]);
    let mut disk = rig.disk("a", &setup());
    // The first one passes; each of the others would have to wait for an hour.
    let tokens: Vec<_> = (0..20).map(|n| disk.submit(0, &read_request(n * 8)).unwrap()).collect();
    disk.kick(0).unwrap();
    disk.wait(tokens[0]).unwrap();
    rig.command("object-add", json!({"qom-type": "throttle-group", "id": "free"}));
    let other =
        json!({"driver": "throttle", "node-name": "node-a", "throttle-group": "free", "file": "null"});
    rig.command("blockdev-reopen", json!({"options": [other]}));
    for token in &tokens[1..] {
        assert_eq!(disk.wait(*token).unwrap().status, blk::status::OK);
    }
    // The group it left is nobody's now, the other one is in use.
    disk.read(0, BLOCK as u32).unwrap();
    rig.command("object-del", json!({"id": "limits"}));
    let refusal = rig.qmp.execute("object-del", json!({"id": "free"})).unwrap_err();
    assert!(refusal.to_string().contains("object 'free' is in use, can not be deleted"), "{refusal}");
}

#[test]
fn groups_are_objects_like_others() {
    let mut rig = Rig::start(&[]);
    let refusal = |rig: &mut Rig, command: &str, arguments: Value| {
        rig.qmp.execute(command, arguments).unwrap_err().to_string()
    };
    let group = |limits: Value| json!({"qom-type": "throttle-group", "id": "g", "limits": limits});
    let words = refusal(&mut rig, "object-add", group(json!({"bps-total-max": 7})));
    assert!(words.contains("bps_max/iops_max require corresponding bps/iops values"), "{words}");
    rig.command("object-add", group(json!({"bps-total": 7})));
    let words = refusal(&mut rig, "object-add", group(json!({})));
    assert!(words.contains("attempt to add duplicate property 'g' to object (type 'container')"), "{words}");
    let listed = rig.command("qom-list", json!({"path": "/objects"}));
    assert!(listed.as_array().unwrap().contains(&json!({"name": "g", "type": "child<throttle-group>"})));
    let listed = rig.command("qom-list", json!({"path": "/objects/g"}));
    assert_eq!(listed.as_array().unwrap().len(), 21, "{listed}");
    let node = |group: &str| {
        json!({"driver": "throttle", "node-name": "t", "throttle-group": group,
               "file": {"driver": "null-co", "node-name": "n"}})
    };
    let words = refusal(&mut rig, "blockdev-add", node("nope"));
    assert!(words.contains("Throttle group 'nope' does not exist"), "{words}");
    rig.command("blockdev-add", node("g"));
    let words = refusal(&mut rig, "object-del", json!({"id": "g"}));
    assert!(words.contains("object 'g' is in use, can not be deleted"), "{words}");
    let nodes = rig.command("query-named-block-nodes", json!({}));
    let named = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "t").unwrap();
    assert_eq!((&named["drv"], &named["image"]["virtual-size"]), (&json!("throttle"), &json!(1u64 << 30)));
    rig.command("blockdev-del", json!({"node-name": "t"}));
    rig.command("object-del", json!({"id": "g"}));
    let words = refusal(&mut rig, "qom-get", json!({"path": "g", "property": "limits"}));
    assert!(words.contains("not found"), "{words}");
}

fn qemu_img(arguments: &[&str]) -> String {
    let out = Command::new("qemu-img").args(arguments).output().expect("qemu-img");
    assert!(out.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn ended(mut rig: Rig, disk: Disk) {
    drop(disk);
    assert!(rig.daemon.terminate(Duration::from_secs(20)).unwrap().success(), "{}", rig.daemon.stderr());
}

#[test]
fn what_a_guest_reads_moves_up_compressed() {
    const SIZE: u64 = 4 << 20;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let data: Vec<u8> = (0..SIZE).map(|n| (n / 65536) as u8 + 1).collect();
    std::fs::write(at("base"), &data).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &at("base"), "-F", "raw", &at("top")]);
    // Copied up through a filter: each cluster arrives compressed.
    let node = format!(
        "copy-on-read,file.driver=compress,file.file.driver=qcow2,file.file.file.driver=file,\
         file.file.file.filename={},file.file.backing.driver=raw,file.file.backing.file.driver=file,\
         file.file.backing.file.filename={}",
        at("top"),
        at("base"),
    );
    let rig = Rig::start(&[Wanted::node("disk", &node)]);
    let mut disk = rig.disk("disk", &setup());
    assert!(disk.read(0, 1 << 20).unwrap() == data[..1 << 20]);
    assert!(disk.read(3 << 20, 512).unwrap() == data[3 << 20..][..512]);
    let written = pattern(1, 512);
    disk.write(65536 + 512, &written).unwrap();
    assert!(disk.read(65536, 65536).unwrap()[512..1024] == written);
    ended(rig, disk);
    let report: Value =
        serde_json::from_str(&qemu_img(&["check", "--output=json", "-f", "qcow2", &at("top")])).unwrap();
    assert_eq!((&report["allocated-clusters"], &report["compressed-clusters"]), (&json!(17), &json!(17)));
    // Nothing of it is needed from below any more.
    std::fs::write(at("base"), vec![0xee; SIZE as usize]).unwrap();
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &at("top"), &at("flat")]);
    let mut expected = vec![0xee; SIZE as usize];
    expected[..1 << 20].copy_from_slice(&data[..1 << 20]);
    expected[3 << 20..(3 << 20) + 65536].copy_from_slice(&data[3 << 20..(3 << 20) + 65536]);
    expected[65536 + 512..65536 + 1024].copy_from_slice(&written);
    assert!(std::fs::read(at("flat")).unwrap() == expected);
}

#[test]
fn an_image_grows_ahead_and_ends_at_its_data() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2").display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &path, "64M"]);
    let node = format!(
        "qcow2,file.driver=preallocate,file.prealloc-size=8M,file.file.driver=file,file.file.filename={path}"
    );
    let rig = Rig::start(&[Wanted::node("disk", &node)]);
    let mut disk = rig.disk("disk", &setup());
    let length = || std::fs::metadata(&path).unwrap().len();
    let mut lengths = Vec::new();
    for n in 0..40u64 {
        disk.write(n << 20, &pattern(n, 200 << 10)).unwrap();
        if lengths.last() != Some(&length()) {
            lengths.push(length());
        }
    }
    // 40 times as much as was written at once, and the file grew twice.
    assert!(lengths.len() <= 3 && lengths.iter().all(|l| l.is_multiple_of(1 << 20)), "{lengths:?}");
    disk.flush().unwrap();
    ended(rig, disk);
    assert!(length() < *lengths.last().unwrap() && length() > 8 << 20, "{} after {lengths:?}", length());
    qemu_img(&["check", "-q", "-f", "qcow2", &path]);
}
