//! The conventions of vhost-user backends, and sockets that somebody else made: `--socket-path`, `--fd`, socket
//! activation.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use client::daemon::Launch;
use client::{Connection, Disk, Guest, Session, Setup, blk, disk, qmp};
use ringblk_scenarios::rig::ringblk;
use serde_json::json;

use crate::{LIMIT, image};

/// A child with sockets at descriptors 3 and 4, ended with the test.
struct Heir(Child);

impl Heir {
    /// `first` becomes descriptor 3, `second` descriptor 4. A shell moves them there from its standard streams, so that
    /// no descriptor of ours has to be inheritable for a moment. `environment` is shell text in front of the program.
    fn start(first: OwnedFd, second: Option<OwnedFd>, environment: &str, args: &[String]) -> Self {
        let take =
            if second.is_some() { "exec 3<&0 4<&1 </dev/null >/dev/null" } else { "exec 3<&0 </dev/null" };
        let script = format!("{take}; {environment} exec \"$0\" \"$@\"");
        let mut command = Command::new("bash");
        command.args(["-c", &script]).arg(ringblk()).args(args).stdin(Stdio::from(first));
        command.stdout(second.map_or_else(Stdio::null, Stdio::from));
        Self(command.spawn().unwrap())
    }

    fn end(mut self) -> bool {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.0.wait().unwrap().success()
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|&a| a.to_owned()).collect()
}

/// Writes, reads back, and looks into the file.
fn use_disk(disk: &mut Disk, image: &Path, byte: u8) {
    disk.write(512, &[byte; 1024]).unwrap();
    assert_eq!(disk.read(512, 1024).unwrap(), [byte; 1024]);
    assert_eq!(ringblk_scenarios::read_at(image, 512, 1024), [byte; 1024]);
}

#[test]
fn socket_path_and_blk_file_are_a_whole_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let disk = image(&path);
    let socket = folder.path().join("socket");
    for args in [
        vec![format!("--socket-path={}", socket.display()), format!("--blk-file={disk}")],
        strings(&["--socket-path", &socket.display().to_string(), "--blk-file", &disk]),
    ] {
        let mut daemon = Launch::new(ringblk()).args(args).spawn().unwrap();
        let connection = daemon.connect(&socket).unwrap();
        let setup = Setup::default();
        let session = Session::establish(connection, Guest::new(&setup).unwrap(), &setup, &[]).unwrap();
        assert_eq!(
            session.guest.features & client::wire::feature::VERSION_1,
            client::wire::feature::VERSION_1
        );
        let mut disk = Disk::new(session);
        assert_eq!(disk.session().config.capacity, 2048);
        use_disk(&mut disk, &path, 7);
        drop(disk);
        assert!(daemon.terminate(LIMIT).unwrap().success(), "{}", daemon.stderr());
        assert!(!socket.exists());
    }
}

#[test]
fn read_only_is_told_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let image = image(&path);
    let socket = folder.path().join("socket");
    let args = ["--socket-path", &socket.display().to_string(), "--blk-file", &image, "--read-only"]
        .map(str::to_owned);
    let mut daemon = Launch::new(ringblk()).args(args).spawn().unwrap();
    drop(daemon.connect(&socket).unwrap());
    let mut disk = Disk::connect(&socket, &Setup::default()).unwrap();
    assert_ne!(disk.session().guest.features & blk::feature::RO, 0, "VIRTIO_BLK_F_RO");
    let request = disk::Request::new(blk::op::OUT, 0, disk::Payload::Out(vec![1; 512]));
    assert_eq!(disk.run(0, &request).unwrap().status, blk::status::IOERR);
    assert_eq!(disk.read(0, 512).unwrap(), [0; 512]);
    assert_eq!(ringblk_scenarios::read_at(&path, 0, 512), [0; 512]);
}

#[test]
fn an_inherited_listening_socket_serves_one_front_end_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let image = image(&path);
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let heir = Heir::start(listener.into(), None, "", &strings(&["--fd=3", &format!("--blk-file={image}")]));
    for round in 1..4 {
        // Connects before the program is up, too: the socket listens already.
        let mut disk = Disk::connect(&socket, &Setup::default()).unwrap();
        use_disk(&mut disk, &path, round);
    }
    assert!(heir.end());
    assert!(socket.exists(), "whoever made the path removes it");
}

#[test]
fn an_inherited_connection_is_the_one_front_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let image = image(&path);
    let listener = UnixListener::bind(folder.path().join("pair")).unwrap();
    let connection = Connection::connect(&folder.path().join("pair"), LIMIT).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    let heir = Heir::start(theirs.into(), None, "", &strings(&["--fd=3", &format!("--blk-file={image}")]));
    let setup = Setup::default();
    let session = Session::establish(connection, Guest::new(&setup).unwrap(), &setup, &[]).unwrap();
    let mut disk = Disk::new(session);
    use_disk(&mut disk, &path, 9);
    assert!(heir.end());
}

#[test]
fn socket_activation_passes_sockets_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let disk = image(&path);
    let (vhost, control) = (folder.path().join("vhost"), folder.path().join("qmp"));
    let sockets = [&control, &vhost].map(|p| OwnedFd::from(UnixListener::bind(p).unwrap()));
    let [first, second] = sockets;
    let environment = "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=qmp:vhost";
    let args = strings(&[
        "--blockdev",
        &format!("file,node-name=n,filename={disk}"),
        "--export",
        "vhost-user-blk,id=e,node-name=n,writable=on,addr.type=fd,addr.str=vhost",
        "--chardev",
        "socket,id=c,fd=qmp,server=on,wait=off",
        "--monitor",
        "c",
    ]);
    let mut heir = Heir::start(first, Some(second), environment, &args);
    let mut client = qmp::Client::connect(&control).unwrap();
    assert_eq!(client.execute("query-block-exports", json!({})).unwrap()[0]["id"], "e");
    let mut disk = Disk::connect(&vhost, &Setup::default()).unwrap();
    use_disk(&mut disk, &path, 5);
    client.execute("quit", json!({})).unwrap();
    assert!(heir.0.wait().unwrap().success());
    assert!(vhost.exists() && control.exists(), "whoever made the paths removes them");
}

#[test]
fn variables_for_another_process_are_not_ours() {
    let folder = tempfile::tempdir().unwrap();
    let disk = image(&folder.path().join("disk"));
    let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
    let args = strings(&["--fd=vhost", &format!("--blk-file={disk}")]);
    let mut heir =
        Heir::start(listener.into(), None, "LISTEN_PID=1 LISTEN_FDS=1 LISTEN_FDNAMES=vhost", &args);
    assert_eq!(heir.0.wait().unwrap().code(), Some(1));
    // And a number that is no socket.
    let file = std::fs::File::open(&disk).unwrap();
    let args = strings(&["--fd=3", &format!("--blk-file={disk}")]);
    let mut heir = Heir::start(file.into(), None, "", &args);
    assert_eq!(heir.0.wait().unwrap().code(), Some(1));
}

#[test]
fn a_monitor_can_connect_to_its_client() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("client");
    let listener = UnixListener::bind(&path).unwrap();
    let args = strings(&["--chardev", &format!("socket,id=c,path={}", path.display()), "--monitor", "c"]);
    let mut daemon = Launch::new(ringblk()).args(args).spawn().unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    use std::io::{BufRead, BufReader, Write};
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut lines = BufReader::new(UnixStream::try_clone(&stream).unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("{\"QMP\""));
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "{\"return\":{}}");
    assert_eq!(lines.next().unwrap().unwrap(), "{\"return\":{}}");
    assert!(daemon.wait(LIMIT).unwrap().success(), "{}", daemon.stderr());
}
