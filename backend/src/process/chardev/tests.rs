//! Tests of `--chardev` and `--monitor`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn refused(text: &str) -> String {
    Chardev::parse(text).unwrap_err().0
}

#[test]
fn a_listening_socket() {
    let c = Chardev::parse("socket,id=qmp,path=/run/a,,b.sock,server=on,wait=off").unwrap();
    assert_eq!(
        c,
        Chardev {
            id: "qmp".into(),
            address: ChardevAddress::Path("/run/a,b.sock".into()),
            server: true,
            wait: false
        }
    );
}

#[test]
fn defaults_are_qemus() {
    let server = Chardev::parse("socket,id=a,path=/x,server=on").unwrap();
    assert!(server.wait);
    let client = Chardev::parse("socket,id=a,path=/x").unwrap();
    assert!(!client.server && !client.wait);
}

#[test]
fn the_older_flags_still_work() {
    let c = Chardev::parse("socket,id=a,path=/x,server,nowait").unwrap();
    assert!(c.server && !c.wait);
}

#[test]
fn an_inherited_descriptor_by_number_or_name() {
    for fd in ["5", "qmp"] {
        let c = Chardev::parse(&format!("socket,id=a,fd={fd},server=on,wait=off")).unwrap();
        assert_eq!(c.address, ChardevAddress::Fd(fd.into()));
    }
}

#[test]
fn refusals_name_the_member_and_the_mend() {
    assert!(refused("socket,path=/x").contains("id"));
    assert!(refused("socket,id=1,path=/x").contains("identifier"));
    assert!(refused("id=a").contains("missing backend"));
    assert!(refused("stdio,id=a").contains("'stdio' is not supported: use socket"));
    assert!(refused("nosuch,id=a").contains("'nosuch' is not a valid char driver name"));
    assert!(refused("socket,id=a").contains("path=PATH"));
    assert!(refused("socket,id=a,path=/x,fd=3").contains("exclude"));
    assert!(refused("socket,id=a,path=/x,wait=off").contains("server=on"));
    assert!(refused("socket,id=a,host=::1,port=4").contains("'host' is not supported"));
    assert!(refused("socket,id=a,path=/x,reconnect=1").contains("'reconnect' is not supported"));
    assert!(refused("socket,id=a,path=/x,bogus=1").contains("Invalid parameter 'bogus'"));
    assert!(refused("socket,id=a,path=/x,server=maybe").contains("'server' expects 'on' or 'off'"));
    assert!(refused("socket,id=a,path=").contains("empty"));
}

#[test]
fn socket_paths_end_at_sun_path() {
    assert!(check_socket_path(&"a".repeat(MAX_SOCKET_PATH)).is_ok());
    let e = check_socket_path(&"a".repeat(MAX_SOCKET_PATH + 1)).unwrap_err();
    assert!(e.0.contains("too long"));
}

#[test]
fn a_monitor_speaks_on_a_chardev_of_its_own() {
    let m = Monitor::parse("qmp,pretty=on,id=m", &["qmp"], &[]).unwrap();
    assert_eq!(m, Monitor { chardev: "qmp".into(), id: Some("m".into()), pretty: true });
    let j = Monitor::parse(r#"{"chardev":"qmp","id":"m","mode":"control","pretty":true}"#, &["qmp"], &[])
        .unwrap();
    assert_eq!(m, j);
    let e = |text, known: &[&str], taken: &[&str]| Monitor::parse(text, known, taken).unwrap_err().0;
    assert!(e("nope", &["qmp"], &[]).contains("chardev \"nope\" not found"));
    assert!(e("qmp", &["qmp"], &["qmp"]).contains("chardev 'qmp' is already in use"));
    assert!(e("qmp,mode=readline", &["qmp"], &[]).contains("Only QMP is supported"));
    assert!(e("qmp,mode=x", &["qmp"], &[]).contains("'mode' does not accept value 'x'"));
    assert!(e("mode=control", &["qmp"], &[]).contains("'chardev' is missing"));
    assert!(e("qmp,bogus=1", &["qmp"], &[]).contains("'bogus' is unexpected"));
    assert!(e("qmp,pretty", &["qmp"], &[]).contains("Expected '=' after parameter 'pretty'"));
    assert!(e(r#"{"chardev":3}"#, &["3"], &[]).contains("'chardev', expected: string"));
    assert!(e(r#"{"chardev":"qmp","pretty":"on"}"#, &["qmp"], &[]).contains("expected: boolean"));
    assert!(e(r#"{"chardev":"qmp","x":1}"#, &["qmp"], &[]).contains("'x' is unexpected"));
    assert!(e("{", &["qmp"], &[]).contains("JSON parse error"));
}
