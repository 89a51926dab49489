//! Which queue goes to which iothread, and what an id may look like.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn entry(iothread: &str, vqs: Option<&[u16]>) -> IoThreadVirtQueueMapping {
    IoThreadVirtQueueMapping { iothread: iothread.to_owned(), vqs: vqs.map(<[u16]>::to_vec) }
}

#[test]
fn queues_are_dealt_out_in_turn() {
    let m = [entry("a", None), entry("b", None)];
    assert_eq!(place(&m, 5).unwrap(), [0, 1, 0, 1, 0]);
    assert_eq!(place(&m[..1], 3).unwrap(), [0, 0, 0]);
}

#[test]
fn queues_go_where_they_are_told() {
    let m = [entry("a", Some(&[2, 0])), entry("b", Some(&[1]))];
    assert_eq!(place(&m, 3).unwrap(), [0, 1, 0]);
}

#[test]
fn wrong_mappings_say_what_is_wrong() {
    let refused = |m: &[IoThreadVirtQueueMapping], queues| place(m, queues).unwrap_err().desc;
    assert!(refused(&[], 1).contains("at least one"));
    assert!(refused(&[entry("a", None), entry("a", None)], 2).contains("'a' twice"));
    assert!(refused(&[entry("a", Some(&[0])), entry("b", None)], 1).contains("all entries or in none"));
    assert!(refused(&[entry("a", Some(&[0, 1]))], 1).contains("vq 1"));
    assert!(refused(&[entry("a", Some(&[0, 0]))], 1).contains("vq 0 twice"));
    assert!(refused(&[entry("a", Some(&[0]))], 2).contains("vq 1 without"));
}

#[test]
fn ids_follow_the_rule_for_identifiers() {
    for good in ["a", "disk0", "a-b.c_d", &"x".repeat(127)] {
        assert!(valid_id(good), "{good}");
    }
    for bad in ["", "0a", "-a", "a b", "a/b", "ä", "#a", &"x".repeat(128)] {
        assert!(!valid_id(bad), "{bad}");
    }
}

/// Options as a client writes them.
fn parsed(more: serde_json::Value) -> VhostUserBlkOptions {
    let mut text =
        serde_json::json!({"id": "disk", "node-name": "n", "addr": {"type": "unix", "path": "/x"}});
    for (name, value) in more.as_object().unwrap() {
        text[name.as_str()] = value.clone();
    }
    serde_json::from_value(text).unwrap()
}

#[test]
fn segments_follow_the_ring_size_only_if_it_is_given() {
    let device = |more| device_options(&parsed(more)).unwrap();
    let plain = device(serde_json::json!({}));
    assert_eq!((plain.queue_size, plain.seg_max, plain.num_queues), (1024, 126, 1));
    let small = device(serde_json::json!({"queue-size": 64, "num-queues": 256}));
    assert_eq!((small.queue_size, small.seg_max, small.num_queues), (64, 62, 256));
    assert!(!plain.writable && !plain.writethrough);
}

#[test]
fn the_serial_is_given_or_the_id_and_has_twenty_bytes() {
    let serial = |more| device_options(&parsed(more)).map(|o| o.serial).map_err(|e| e.desc);
    assert_eq!(&serial(serde_json::json!({})).unwrap(), b"disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    // An id may be longer: it is cut. A serial that was asked for is not changed in silence.
    let long = "abcdefghijklmnopqrstuvwxyz";
    assert_eq!(&serial(serde_json::json!({"id": long})).unwrap(), b"abcdefghijklmnopqrst");
    assert_eq!(&serial(serde_json::json!({"serial": &long[..20]})).unwrap(), b"abcdefghijklmnopqrst");
    assert!(serial(serde_json::json!({"serial": &long[..21]})).unwrap_err().contains("21 bytes"));
}

#[test]
fn sizes_out_of_range_are_refused_by_name() {
    for (more, name) in [
        (serde_json::json!({"num-queues": 0}), "'num-queues'"),
        (serde_json::json!({"num-queues": 257}), "'num-queues'"),
        (serde_json::json!({"queue-size": 0}), "'queue-size'"),
        (serde_json::json!({"queue-size": 2}), "'queue-size'"),
        (serde_json::json!({"queue-size": 96}), "'queue-size'"),
        (serde_json::json!({"queue-size": 2048}), "'queue-size'"),
    ] {
        let said = device_options(&parsed(more)).map(drop).unwrap_err().desc;
        assert!(said.contains(name), "{said}");
    }
}

#[test]
fn the_graphs_name_of_an_export_leads_back_to_its_id() {
    assert_eq!(id_in_description("block export 'disk'"), Some("disk"));
    for other in ["block export 'disk", "block job 'disk'", "disk", ""] {
        assert_eq!(id_in_description(other), None);
    }
}
