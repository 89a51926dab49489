//! Command lines that print something, and those that are refused: by one line that names the option and the mend.

use std::os::unix::net::UnixListener;

use serde_json::Value;

use crate::{image, refused, run, text};

#[test]
fn bad_command_lines_are_refused_in_one_line_that_names_the_option() {
    let folder = tempfile::tempdir().unwrap();
    let disk = image(&folder.path().join("disk"));
    let at = |name: &str| folder.path().join(name).display().to_string();
    let socket = at("socket");
    let control = format!("socket,id=c,path={},server=on,wait=off", at("qmp"));
    let node = format!("file,node-name=n,filename={disk}");
    let export =
        |more: &str| format!("vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={socket}{more}");
    let long = at(&"x".repeat(120));
    let cases: Vec<(Vec<String>, Vec<&str>)> = [
        (vec!["--nonsense"], vec!["--nonsense", "--help"]),
        (vec!["--block", "x"], vec!["--block", "--blockdev"]),
        (vec!["-x"], vec!["'x'", "--help"]),
        (vec!["disk.img"], vec!["disk.img", "--"]),
        (vec!["--blockdev"], vec!["--blockdev", "requires an argument"]),
        (vec!["--daemonize=yes"], vec!["--daemonize", "argument"]),
        (vec!["--blockdev", "file,node-name=n"], vec!["--blockdev n", "'filename' is missing"]),
        (vec!["--blockdev", "nope,node-name=n"], vec!["--blockdev n", "'nope'"]),
        (vec!["--blockdev", "null-co"], vec!["--blockdev", "'node-name'"]),
        (vec!["--blockdev", "null-co,node-name=n,siez=1"], vec!["--blockdev n", "'siez' is unexpected"]),
        (vec!["--blockdev", "null-co,node-name=n,size=big"], vec!["--blockdev n", "'size' expects"]),
        (vec!["--blockdev", "null-co,node-name=n,read-only=maybe"], vec!["--blockdev n", "'read-only'"]),
        (vec!["--blockdev", "{\"driver\":"], vec!["--blockdev", "JSON parse error"]),
        (
            vec!["--blockdev", "file,node-name=n,filename=/no/such/file"],
            vec!["--blockdev n", "/no/such/file", "No such"],
        ),
        (vec!["--export", &export("")], vec!["--export e", "'n'"]),
        (
            vec!["--blockdev", &node, "--export", &export(",num-queues=0")],
            vec!["--export e", "'num-queues'", "1 to 256"],
        ),
        (vec!["--blockdev", &node, "--export", &export(",iothread=t")], vec!["--export e", "\"t\""]),
        (vec!["--blockdev", &node, "--export", &export(",write=on")], vec!["--export e", "'write'"]),
        (vec!["--blockdev", &node, "--export", &export(","), "--export", &export("")], vec!["--export e"]),
        (
            vec!["--blockdev", "null-co,node-name=n,read-only=on", "--export", &export(",writable=on")],
            vec!["--export e", "'n'", "read-only", "writable=off"],
        ),
        (vec!["--object", "iothread"], vec!["--object", "'id'"]),
        (vec!["--object", "iothread,id=0"], vec!["--object", "'id' expects an identifier"]),
        (vec!["--object", "secret,id=s"], vec!["--object s", "'data'"]),
        (vec!["--object", "tls-creds-psk,id=s"], vec!["--object s", "'tls-creds-psk'"]),
        (vec!["--object", "iothread,id=t,poll-max-ns=-1"], vec!["--object t", "poll-max-ns", "range"]),
        (vec!["--object", "iothread,id=t", "--object", "iothread,id=t"], vec!["--object t", "duplicate"]),
        (vec!["--monitor", "c"], vec!["--monitor", "\"c\" not found", "--chardev"]),
        (vec!["--chardev", &control, "--monitor", "c", "--monitor", "c"], vec!["--monitor", "'c'", "in use"]),
        (vec!["--chardev", &control, "--chardev", &control], vec!["--chardev", "Duplicate ID 'c'"]),
        (vec!["--chardev", "stdio,id=c"], vec!["--chardev", "'stdio'", "socket"]),
        (vec!["--chardev", "socket,id=c,port=4444"], vec!["--chardev", "'port'", "path="]),
        (vec!["--chardev", "socket,path=x"], vec!["--chardev", "id="]),
        (vec!["--monitor", "c,mode=readline", "--chardev", &control], vec!["--monitor"]),
        (vec!["--nbd-server", "addr.type=unix,addr.path=x"], vec!["--nbd-server", "vhost-user-blk"]),
        (vec!["--pidfile", "/no/such/folder/pid"], vec!["--pidfile", "/no/such/folder/pid"]),
        (vec!["--pidfile", ""], vec!["--pidfile", "empty"]),
        (vec!["--blk-file", &disk], vec!["--blk-file", "--socket-path"]),
        (vec!["--read-only"], vec!["--read-only", "--socket-path"]),
        (vec!["--socket-path", &socket], vec!["--socket-path", "--blk-file"]),
        (vec!["--socket-path", &socket, "--fd", "3", "--blk-file", &disk], vec!["--fd", "--socket-path"]),
        (vec!["--socket-path", &long, "--blk-file", &disk], vec!["--socket-path", "too long", "107"]),
        (vec!["--socket-path", &socket, "--blk-file", "/no/such/file"], vec!["--blk-file", "/no/such/file"]),
        (vec!["--fd", "77", "--blk-file", &disk], vec!["--fd", "'77'", "not passed"]),
        (vec!["--fd", "1", "--blk-file", &disk], vec!["--fd", "standard stream", "3 or above"]),
        (vec!["--fd", "vhost", "--blk-file", &disk], vec!["--fd", "'vhost'", "LISTEN_FDNAMES"]),
    ]
    .into_iter()
    .map(|(args, parts): (Vec<&str>, _)| (args.into_iter().map(str::to_owned).collect(), parts))
    .collect();
    for (args, parts) in cases {
        let line = refused(&args);
        for part in parts {
            assert!(line.contains(part), "{args:?} is answered with '{line}', which lacks '{part}'");
        }
    }
    for left in ["socket", "qmp"] {
        assert!(!folder.path().join(left).exists(), "a refused start leaves '{left}' behind");
    }
}

#[test]
fn a_socket_in_use_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let disk = image(&folder.path().join("disk"));
    let socket = folder.path().join("socket");
    let held = UnixListener::bind(&socket).unwrap();
    held.set_nonblocking(true).unwrap();
    let path = socket.display().to_string();
    let line = refused(&["--socket-path", &path, "--blk-file", &disk]);
    assert!(line.contains(&path) && line.contains("another process serves it"), "{line}");
    let line =
        refused(&["--chardev", &format!("socket,id=c,path={path},server=on,wait=off"), "--monitor", "c"]);
    assert!(line.contains(&path) && line.contains("another process serves it"), "{line}");
    std::os::unix::net::UnixStream::connect(&socket).expect("it is still there");
    // What is no socket is not touched either.
    let line = refused(&["--socket-path", &disk, "--blk-file", &disk]);
    assert!(line.contains("not a socket"), "{line}");
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 1 << 20);
}

#[test]
fn help_and_version_go_to_stdout() {
    for (args, parts) in [
        (
            vec!["--help"],
            vec!["Usage: ringblk", "--blockdev", "--export", "--socket-path", "RINGBLK_LOG", "Exit status"],
        ),
        (vec!["-h"], vec!["Usage: ringblk"]),
        (vec!["--version"], vec!["ringblk version"]),
        (vec!["-V"], vec!["ringblk version"]),
        (vec!["--blockdev", "help"], vec!["file", "host_device", "null-co", "raw"]),
        (vec!["--blockdev", "raw,help"], vec!["offset", "size", "read-only", "node-name"]),
        (vec!["--blockdev", "driver=file,help"], vec!["filename", "(required)"]),
        (vec!["--export", "help"], vec!["vhost-user-blk"]),
        (vec!["--export", "vhost-user-blk,help"], vec!["num-queues", "iothread-vq-mapping", "writethrough"]),
        (vec!["--object", "help"], vec!["iothread", "secret"]),
        (vec!["--object", "iothread,help"], vec!["poll-max-ns"]),
        (vec!["--chardev", "help"], vec!["socket"]),
        (vec!["--trace", "help"], vec!["ringblk"]),
        // Nothing before it takes effect, nothing after it matters.
        (vec!["--pidfile", "/no/such/folder/pid", "--help", "--nonsense"], vec!["Usage: ringblk"]),
    ] {
        let output = run(&args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "", "{args:?}");
        let said = text(&output.stdout);
        for part in parts {
            assert!(said.contains(part), "{args:?} lacks '{part}': {said}");
        }
        assert!(said.ends_with('\n') && !said.contains("::\n"), "{args:?}: {said}");
    }
    for args in [["--blockdev", "nope,help"], ["--export", "nbd,help"], ["--object", "tls-creds-psk,help"]] {
        let line = refused(&args);
        assert!(line.contains(args[0]) && line.contains("help"), "{line}");
    }
}

#[test]
fn the_capabilities_are_json_whatever_else_is_said() {
    for args in [
        &["--print-capabilities"][..],
        &["--print-capabilities", "--nonsense"],
        &["x", "--print-capabilities"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0));
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(said["type"], "block");
        let features: Vec<&str> =
            said["features"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()).collect();
        assert!(features.contains(&"read-only") && features.contains(&"blk-file"), "{said}");
    }
}
