//! Sessions: the greeting and the negotiation, ids, several clients, clients that do not read, and bytes that are no
//! request.

use std::time::Duration;

use client::{Setup, qmp};
use ringblk_scenarios::{Rig, Wanted};
use serde_json::{Value, json};

use crate::state::snapshot;

const LIMIT: Duration = Duration::from_secs(30);

fn start() -> Rig {
    Rig::start(&[Wanted::file("e", 1 << 20)])
}

/// One more client, in negotiation.
fn raw(rig: &Rig) -> qmp::Client {
    qmp::Client::connect_raw(&rig.folder().join("qmp")).unwrap()
}

/// One more client.
fn client(rig: &Rig) -> qmp::Client {
    qmp::Client::connect(&rig.folder().join("qmp")).unwrap()
}

fn desc(answer: &Value) -> &str {
    answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("no error: {answer}"))
}

#[test]
fn a_session_begins_with_a_greeting_and_one_negotiation() {
    let rig = start();
    let mut client = raw(&rig);
    let greeting = client.greeting()["QMP"].clone();
    assert!(greeting["version"]["qemu"]["major"].is_u64(), "{greeting}");
    assert!(greeting["version"]["package"].as_str().unwrap().starts_with("ringblk "), "{greeting}");
    assert_eq!(greeting["capabilities"], json!([]));
    let (class, text) = crate::refusal(&mut client, "query-version", json!({}));
    assert_eq!(class, "CommandNotFound");
    assert_eq!(text, "Expecting capabilities negotiation with 'qmp_capabilities'");
    // What was not offered cannot be enabled, and the negotiation is not over by the attempt.
    let (_, text) = crate::refusal(&mut client, "qmp_capabilities", json!({"enable": ["oob"]}));
    assert!(text.contains("oob"), "{text}");
    assert_eq!(client.execute("qmp_capabilities", json!({"enable": []})).unwrap(), json!({}));
    let (class, text) = crate::refusal(&mut client, "qmp_capabilities", json!({}));
    assert_eq!(class, "CommandNotFound");
    assert!(text.contains("already complete"), "{text}");
    let version = client.execute("query-version", json!({})).unwrap();
    assert_eq!(version, greeting["version"]);
}

#[test]
fn any_id_comes_back_as_it_was() {
    let rig = start();
    let mut client = client(&rig);
    for id in [json!(0), json!("x"), json!(null), json!([1, {"a": null}]), json!({"k": [true, -1, 0.5]})] {
        for (command, member) in [("query-version", "return"), ("no-such-command", "error")] {
            client.send_raw(json!({"execute": command, "id": id}).to_string().as_bytes()).unwrap();
            let answer = client.receive(LIMIT).unwrap();
            assert!(answer.get(member).is_some(), "{answer}");
            assert_eq!(answer["id"], id);
        }
    }
    client.send_raw(br#"{"execute": "query-version"}"#).unwrap();
    assert!(client.receive(LIMIT).unwrap().get("id").is_none(), "an id that was not sent");
}

#[test]
fn several_clients_work_at_once_and_all_hear_of_events() {
    let mut rig = start();
    let mut clients: Vec<_> = (0..5).map(|_| client(&rig)).collect();
    let asked: Vec<u64> =
        clients.iter_mut().map(|c| c.start("query-block-exports", json!({})).unwrap()).collect();
    for (client, id) in clients.iter_mut().zip(asked) {
        assert_eq!(client.finish("query-block-exports", id).unwrap()[0]["id"], "e");
    }
    // One adds a node, another uses it, a third removes it.
    clients[0].execute("blockdev-add", json!({"driver": "null-co", "node-name": "n"})).unwrap();
    let nodes = clients[1].execute("query-named-block-nodes", json!({})).unwrap();
    assert!(nodes.as_array().unwrap().iter().any(|n| n["node-name"] == "n"), "{nodes}");
    clients[2].execute("blockdev-del", json!({"node-name": "n"})).unwrap();
    let mut waiting = raw(&rig);
    rig.command("block-export-del", json!({"id": "e"}));
    for client in &mut clients {
        let event = client.wait_event("BLOCK_EXPORT_DELETED").unwrap();
        assert_eq!(event["data"], json!({"id": "e"}));
        let time = &event["timestamp"];
        assert!(time["seconds"].as_i64().unwrap() > 1_600_000_000, "{event}");
        assert!((0..1_000_000).contains(&time["microseconds"].as_i64().unwrap()), "{event}");
    }
    // Events are not for those who have not negotiated yet.
    assert_eq!(waiting.execute("qmp_capabilities", json!({})).unwrap(), json!({}));
    assert_eq!(waiting.take_events(), Vec::<Value>::new());
    // The end of one session is nothing to the others.
    drop(clients);
    rig.command("query-version", json!({}));
}

#[test]
fn bytes_that_are_no_request_get_one_error_each_and_change_nothing() {
    let mut rig = start();
    let mut disk = rig.disk("e", &Setup::default());
    let before = snapshot(&mut rig.qmp);
    let mut client = client(&rig);
    for (bytes, says) in [
        (&b"{\"execute\": \"query-version\"]"[..], "JSON parse error"),
        (b"}", "JSON parse error"),
        (b"{\"execute\": qwerty}", "JSON parse error"),
        (b"{\"execute\" \"query-version\"}", "JSON parse error"),
        (b"{\"execute\": \"query-version\",}", "JSON parse error"),
        (b"{'execute': 'quit' 'id': 1}", "JSON parse error"),
        (b"[]", "must be a JSON object"),
        (b"17", "must be a JSON object"),
        (b"{}", "lacks member 'execute'"),
        (b"{\"execute\": 5}", "'execute' must be a string"),
        (b"{\"execute\": \"quit\", \"arguments\": 5}", "'arguments' must be an object"),
        (b"{\"execute\": \"quit\", \"exec\": 5}", "'exec' is unexpected"),
        (b"{\"exec-oob\": \"quit\"}", "'exec-oob' is unexpected"),
        (b"{\"execute\": \"block-export-del\", \"arguments\": {\"id\": \"e\", \"id\": \"e\"}}", "duplicate"),
    ] {
        client.send_raw(bytes).unwrap();
        let answer = client.receive(LIMIT).unwrap_or_else(|e| panic!("{e} after {bytes:?}"));
        let text = desc(&answer).to_ascii_lowercase();
        assert!(
            text.contains(&says.to_ascii_lowercase()),
            "{answer} to {:?}",
            String::from_utf8_lossy(bytes)
        );
        // Exactly one answer: the next one is to the next question.
        client.execute("query-version", json!({})).unwrap();
    }
    // How often garbage is complained about is the parser's business; 0xff asks it to start over.
    for garbage in [
        &b"\x00\x01\x02\xfe"[..],
        &[0xff; 64],
        b"\x1b[31m",
        b"GET / HTTP/1.1\r\n\r\n",
        "\u{7f}äöü".as_bytes(),
    ] {
        client.send_raw(garbage).unwrap();
        client.send_raw(b"\xff{\"execute\": \"query-version\", \"id\": \"after\"}").unwrap();
        loop {
            let answer = client.receive(LIMIT).unwrap_or_else(|e| panic!("{e} after {garbage:?}"));
            if answer["id"] == "after" {
                assert!(answer.get("return").is_some(), "{answer}");
                break;
            }
            desc(&answer);
        }
    }
    assert_eq!(snapshot(&mut rig.qmp), before);
    disk.write(0, &[7; 4096]).unwrap();
    assert_eq!(disk.read(0, 4096).unwrap(), [7; 4096]);
}

#[test]
fn what_is_too_large_or_too_deep_is_refused_and_forgotten() {
    let mut rig = start();
    let before = snapshot(&mut rig.qmp);
    let mut client = client(&rig);
    let long = "x".repeat(8 << 20);
    let many = "0,".repeat(3 << 20);
    let deep = "[".repeat(100_000);
    let nested = format!("{}1{}", "{\"a\":".repeat(2000), "}".repeat(2000));
    for bytes in [
        format!("{{\"execute\": \"query-version\", \"id\": \"{long}\"}}"),
        format!("{{\"execute\": \"query-version\", \"id\": [{many}0]}}"),
        format!("{{\"execute\": \"query-version\", \"id\": {deep}"),
        format!("{{\"execute\": \"query-version\", \"id\": {nested}}}"),
    ] {
        client.send_raw(bytes.as_bytes()).unwrap();
        client.send_raw(b"\xff{\"execute\": \"query-version\", \"id\": \"after\"}").unwrap();
        let mut complaints = 0;
        loop {
            let answer = client.receive(LIMIT).unwrap();
            if answer["id"] == "after" {
                break;
            }
            desc(&answer);
            complaints += 1;
        }
        assert!(complaints > 0, "nothing was said about {}...", &bytes[..60]);
    }
    assert_eq!(snapshot(&mut rig.qmp), before);
    let resident = rig.daemon.resident().unwrap().anon;
    assert!(resident < 64 << 20, "{resident} bytes stay resident");
}

#[test]
fn a_request_may_come_in_pieces_and_several_at_once() {
    let rig = start();
    let mut slow = client(&rig);
    let mut other = client(&rig);
    let connection = client::Connection::connect(&rig.folder().join("qmp"), LIMIT).unwrap();
    let mut stream = connection.stream().try_clone().unwrap();
    use std::io::{BufRead, BufReader, Write};
    let mut lines = BufReader::new(connection.stream().try_clone().unwrap()).lines();
    lines.next().unwrap().unwrap();
    for byte in b"{\"execute\": \"qmp_capabilities\"} {\"execute\": \"query-version\", \"id\": 7" {
        stream.write_all(&[*byte]).unwrap();
    }
    // The unfinished request holds up nobody else.
    other.execute("query-version", json!({})).unwrap();
    stream.write_all(b"}").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "{\"return\":{}}");
    let answer: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(answer["id"], 7);
    // Three on one line are answered in order.
    slow.send_raw(b"{\"execute\":\"query-version\",\"id\":1}{\"execute\":\"nope\",\"id\":2} {\"execute\":\"query-version\",\"id\":3}")
        .unwrap();
    for id in 1..=3 {
        assert_eq!(slow.receive(LIMIT).unwrap()["id"], id);
    }
    // A client that stops in the middle of a request leaves nothing behind.
    stream.write_all(b"{\"execute\": \"quit\"").unwrap();
    drop((stream, lines, connection));
    other.execute("query-version", json!({})).unwrap();
}

#[test]
fn a_client_that_does_not_read_is_served_later_and_delays_nobody() {
    let mut rig = start();
    let mut slow = client(&rig);
    // Some 10 MiB of answers, far more than the socket holds; the requests themselves fit.
    const ASKED: u64 = 100;
    let mut started = Vec::new();
    for _ in 0..ASKED {
        started.push(slow.start("query-qmp-schema", json!({})).unwrap());
    }
    for _ in 0..50 {
        rig.command("query-version", json!({}));
    }
    rig.command("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    rig.command("blockdev-del", json!({"node-name": "n"}));
    let resident = rig.daemon.resident().unwrap().anon;
    assert!(resident < 32 << 20, "{resident} bytes are held for a client that does not read");
    for id in started {
        assert!(slow.finish("query-qmp-schema", id).unwrap().is_array());
    }
}
