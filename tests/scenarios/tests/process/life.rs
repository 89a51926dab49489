//! From start to end: the pid file, the service manager, the background, and requests in flight at the end.

use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::time::Instant;

use client::daemon::{Daemon, Launch};
use client::{Disk, Setup, blk, disk, qmp};
use ringblk_scenarios::rig::ringblk;
use ringblk_scenarios::{Rig, Wanted};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

use crate::{LIMIT, image, refused, run, text};

/// One disk, a control channel and a pid file in a folder: a command line with everything an orchestrator uses.
fn line(folder: &Path) -> Vec<String> {
    let disk = image(&folder.join("disk"));
    let at = |name: &str| folder.join(name).display().to_string();
    [
        "--blockdev",
        &format!("file,node-name=n,filename={disk}"),
        "--export",
        &format!("vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path={}", at("socket")),
        "--chardev",
        &format!("socket,id=c,path={},server=on,wait=off", at("qmp")),
        "--monitor",
        "c",
        "--pidfile",
        &at("pid"),
    ]
    .map(str::to_owned)
    .to_vec()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "no {what} within {LIMIT:?}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn pid_in(file: &Path) -> Option<i32> {
    std::fs::read_to_string(file).ok()?.strip_suffix('\n')?.parse().ok()
}

#[test]
fn the_pid_file_appears_when_sockets_accept_and_goes_with_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let mut daemon = Launch::new(ringblk()).args(line(folder.path())).spawn().unwrap();
    wait_until("pid file", || pid_in(&pid).is_some());
    UnixStream::connect(folder.path().join("socket")).expect("the export listens by then");
    UnixStream::connect(folder.path().join("qmp")).expect("the control channel listens by then");
    assert_eq!(pid_in(&pid), Some(daemon.pid() as i32));
    // A second daemon with the same file is refused, by name, and does no harm.
    let said = refused(&["--blockdev", "null-co,node-name=n", "--pidfile", &pid.display().to_string()]);
    assert!(said.contains("--pidfile") && said.contains(&format!("process {}", daemon.pid())), "{said}");
    assert_eq!(pid_in(&pid), Some(daemon.pid() as i32));
    assert!(daemon.terminate(LIMIT).unwrap().success(), "{}", daemon.stderr());
    for left in ["pid", "socket", "qmp"] {
        assert!(!folder.path().join(left).exists(), "'{left}' is left behind");
    }
}

#[test]
fn what_a_killed_daemon_left_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let mut first = Launch::new(ringblk()).args(line(folder.path())).spawn().unwrap();
    wait_until("pid file", || pid_in(&pid) == Some(first.pid() as i32));
    first.kill().unwrap();
    for left in ["pid", "socket", "qmp"] {
        assert!(folder.path().join(left).exists(), "a killed process cannot have removed '{left}'");
    }
    let mut second = Launch::new(ringblk()).args(line(folder.path())).spawn().unwrap();
    wait_until("second pid file", || {
        second.check_running().unwrap();
        pid_in(&pid) == Some(second.pid() as i32)
    });
    let mut disk = Disk::connect(&folder.path().join("socket"), &Setup::default()).unwrap();
    disk.write(0, &[1; 512]).unwrap();
    qmp::Client::connect(&folder.path().join("qmp")).unwrap().execute("quit", json!({})).unwrap();
    assert!(second.wait(LIMIT).unwrap().success());
}

#[test]
fn the_service_manager_hears_of_readiness_and_of_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let manager = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let mut launch = Launch::new(ringblk()).args(line(folder.path()));
    launch = launch.env("NOTIFY_SOCKET", folder.path().join("notify"));
    let mut daemon = launch.spawn().unwrap();
    let receive = || {
        let mut buffer = [0; 4096];
        let n = manager.recv(&mut buffer).expect("a message for the service manager");
        String::from_utf8(buffer[..n].to_vec()).unwrap()
    };
    let ready = receive();
    assert!(ready.lines().any(|l| l == "READY=1"), "{ready}");
    assert!(ready.lines().any(|l| l == format!("MAINPID={}", daemon.pid())), "{ready}");
    UnixStream::connect(folder.path().join("socket")).expect("ready means that the export listens");
    UnixStream::connect(folder.path().join("qmp")).expect("ready means that the control channel listens");
    assert!(pid_in(&folder.path().join("pid")).is_some(), "ready means that the pid file is there");
    daemon.signal(Signal::TERM).unwrap();
    let stopping = receive();
    assert!(stopping.lines().any(|l| l == "STOPPING=1"), "{stopping}");
    assert!(daemon.wait(LIMIT).unwrap().success());
}

/// A daemon whose process is not our child.
struct Background(i32);

impl Background {
    fn runs(&self) -> bool {
        // A zombie waits for whoever adopted it; it serves no more.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0));
        stat.is_ok_and(|s| !s.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.0) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

#[test]
fn in_the_background_it_serves_when_the_command_returns() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = line(folder.path());
    args.push("--daemonize".to_owned());
    let output = run(&args);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let pid = pid_in(&folder.path().join("pid")).expect("the pid file is there by then");
    let background = Background(pid);
    assert!(background.runs());
    let mut disk = Disk::connect(&folder.path().join("socket"), &Setup::default()).unwrap();
    disk.write(0, &[3; 512]).unwrap();
    assert_eq!(disk.read(0, 512).unwrap(), [3; 512]);
    drop(disk);
    let link = |what: &str| std::fs::read_link(format!("/proc/{pid}/{what}")).unwrap();
    assert_eq!(link("cwd"), Path::new("/"));
    for stream in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(link(stream), Path::new("/dev/null"), "{stream}");
    }
    qmp::Client::connect(&folder.path().join("qmp")).unwrap().execute("quit", json!({})).unwrap();
    wait_until("end of the daemon", || !background.runs());
    assert!(!folder.path().join("pid").exists());
}

#[test]
fn a_start_that_fails_in_the_background_is_the_commands_failure() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid").display().to_string();
    let args = ["--daemonize", "--pidfile", &pid, "--blockdev", "file,node-name=n,filename=/no/such/file"];
    let said = refused(&args);
    assert!(said.contains("--blockdev n") && said.contains("/no/such/file"), "{said}");
    assert!(!folder.path().join("pid").exists());
}

/// A daemon with slow requests in flight, and those requests.
fn busy() -> (Rig, Disk, Vec<disk::Token>) {
    let node = "null-co,size=1048576,latency-ns=300000000";
    let mut rig = Rig::start(&[Wanted::node("e", node)]);
    let mut disk = rig.disk("e", &Setup::default());
    let request = disk::Request::new(blk::op::OUT, 0, disk::Payload::Out(vec![0; 512]));
    let tokens: Vec<_> = (0..16).map(|_| disk.submit(0, &request).unwrap()).collect();
    disk.kick(0).unwrap();
    rig.wait_for("requests to be taken", |rig| {
        let threads = rig.command("query-iothreads", json!({}));
        threads.as_array().unwrap().iter().any(|t| t["requests"].as_u64().unwrap() >= 16)
    });
    (rig, disk, tokens)
}

fn assert_ended_in_order(mut daemon: Daemon, mut disk: Disk, tokens: Vec<disk::Token>) {
    assert!(daemon.wait(LIMIT).unwrap().success(), "{}", daemon.stderr());
    for token in tokens {
        assert_eq!(disk.wait(token).unwrap().status, blk::status::OK, "what was in flight is completed");
    }
}

#[test]
fn every_way_to_end_completes_what_is_in_flight() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let (rig, disk, tokens) = busy();
        rig.daemon.signal(signal).unwrap();
        // Asking twice does not end it sooner.
        rig.daemon.signal(signal).unwrap();
        assert_ended_in_order(rig.daemon, disk, tokens);
    }
    let (mut rig, disk, tokens) = busy();
    assert_eq!(rig.command("quit", json!({})), json!({}));
    assert_eq!(rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap()["data"]["id"], "e");
    assert_ended_in_order(rig.daemon, disk, tokens);
}

#[test]
fn data_written_and_not_flushed_are_in_the_image_after_an_orderly_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = start(&folder);
    let mut disk = Disk::connect(&folder.path().join("socket"), &Setup::default()).unwrap();
    disk.write(4096, &[0x5a; 4096]).unwrap();
    assert!(daemon.terminate(LIMIT).unwrap().success());
    assert_eq!(ringblk_scenarios::read_at(&folder.path().join("disk"), 4096, 4096), [0x5a; 4096]);
}

fn start(folder: &TempDir) -> Daemon {
    let mut daemon = Launch::new(ringblk()).args(line(folder.path())).spawn().unwrap();
    wait_until("pid file", || {
        daemon.check_running().unwrap();
        pid_in(&folder.path().join("pid")).is_some()
    });
    daemon
}

#[test]
fn a_command_under_way_ends_before_the_process_does_and_none_is_begun_after() {
    let mut rig = Rig::start(&[Wanted::file("e", 1 << 20)]);
    let path = rig.folder().join("locked").display().to_string();
    rig.command("object-add", json!({"qom-type": "secret", "id": "key", "data": "secret"}));
    let file = json!({"driver": "file", "filename": path});
    let create = |rig: &mut Rig, id: &str, options| {
        rig.command("blockdev-create", json!({"job-id": id, "options": options}));
        rig.wait_for("job", |rig| {
            let jobs = rig.command("query-jobs", json!({}));
            let job = jobs.as_array().unwrap().iter().find(|j| j["id"] == id).cloned().unwrap();
            assert_eq!(job["error"], json!(null), "{job}");
            job["status"] == "concluded"
        });
    };
    create(&mut rig, "file", json!({"driver": "file", "filename": path, "size": 0}));
    // Opening it is a second or two of computation.
    let luks = json!({"driver": "luks", "file": file, "key-secret": "key", "size": 1 << 20});
    create(&mut rig, "luks", luks);
    let mut other = qmp::Client::connect(&rig.folder().join("qmp")).unwrap();
    let node = json!({"driver": "luks", "node-name": "n", "file": file, "key-secret": "key"});
    let opening = rig.qmp.start("blockdev-add", node).unwrap();
    // Waits for its turn behind the one above.
    let late = other.start("blockdev-del", json!({"node-name": "n"})).unwrap();
    kill_process(Pid::from_raw(rig.daemon.pid() as i32).unwrap(), Signal::TERM).unwrap();
    assert_eq!(rig.qmp.finish("blockdev-add", opening).unwrap(), json!({}));
    assert!(other.finish("blockdev-del", late).is_err());
    assert!(rig.daemon.wait(LIMIT).unwrap().success());
}
