//! Every driver, in the set-ups that make it take different ways, through the conformance suite.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{LoopDevice, registry};
use conformance::{Content, Discarded, DriverCase};
use serde_json::{Value, json};

const SIZE: u64 = 3 << 19;

fn check(case: &DriverCase) {
    if let Err(e) = conformance::run(case) {
        panic!("{e}");
    }
}

/// A node over the file `image` in the test's directory; `options` get the path where they say `IMAGE`.
fn file_case(name: &str, length: u64, options: Value) -> DriverCase {
    fn put(value: &mut Value, path: &str) {
        match value {
            Value::String(s) if s == "IMAGE" => *s = path.to_owned(),
            Value::Object(members) => members.values_mut().for_each(|v| put(v, path)),
            _ => {}
        }
    }
    DriverCase::new(
        name,
        registry(),
        length,
        move |dir| {
            let file = std::fs::File::create_new(dir.join("image")).map_err(|e| e.to_string())?;
            file.set_len(length).map_err(|e| e.to_string())
        },
        move |dir| {
            let mut options = options.clone();
            put(&mut options, dir.join("image").to_str().unwrap());
            options
        },
    )
}

fn null(name: &str, options: Value, content: Content) -> DriverCase {
    let case = DriverCase::new(name, registry(), SIZE, |_| Ok(()), move |_| options.clone());
    DriverCase { content, ..case }
}

#[test]
fn null_that_leaves_buffers_alone() {
    check(&null("null-co", json!({"driver": "null-co", "size": SIZE}), Content::Untouched));
}

#[test]
fn null_that_reads_zeroes() {
    let options = json!({"driver": "null-aio", "size": SIZE, "read-zeroes": true});
    check(&null("null-aio read-zeroes", options, Content::Zeroes));
}

#[test]
fn null_that_takes_its_time() {
    let options = json!({"driver": "null-co", "size": SIZE, "read-zeroes": true, "latency-ns": 1000});
    check(&null("null-co latency-ns", options, Content::Zeroes));
}

#[test]
fn file_as_it_comes() {
    let case = file_case("file", SIZE, json!({"driver": "file", "filename": "IMAGE"}));
    check(&DriverCase { resizable: true, ..case });
}

#[test]
fn file_that_gives_space_back() {
    let options =
        json!({"driver": "file", "filename": "IMAGE", "discard": "unmap", "detect-zeroes": "unmap"});
    let case = file_case("file discard=unmap", SIZE, options);
    check(&DriverCase { resizable: true, discarded: Discarded::Zeroes, ..case });
}

#[test]
fn file_past_the_page_cache() {
    let options =
        json!({"driver": "file", "filename": "IMAGE", "discard": "unmap", "cache": {"direct": true}});
    let case = file_case("file cache.direct=on", SIZE, options);
    check(&DriverCase { resizable: true, discarded: Discarded::Zeroes, ..case });
}

#[test]
fn file_on_worker_threads() {
    let options = json!({"driver": "file", "filename": "IMAGE", "aio": "threads"});
    check(&DriverCase { resizable: true, ..file_case("file aio=threads", SIZE, options) });
}

#[test]
fn file_that_opens_for_writing_late() {
    let options = json!({"driver": "file", "filename": "IMAGE", "auto-read-only": true, "locking": "on"});
    check(&DriverCase { resizable: true, ..file_case("file auto-read-only=on", SIZE, options) });
}

#[test]
fn raw_over_a_file() {
    let options = json!({"driver": "raw", "file": {"driver": "file", "filename": "IMAGE"}});
    check(&DriverCase { resizable: true, ..file_case("raw", SIZE, options) });
}

#[test]
fn raw_that_shows_a_window() {
    let window = json!({"driver": "raw", "offset": 4096, "size": SIZE, "discard": "unmap",
                        "file": {"driver": "file", "filename": "IMAGE"}});
    let case = file_case("raw offset=,size=", SIZE + (1 << 20), window);
    check(&DriverCase { size: SIZE, discarded: Discarded::Zeroes, ..case });
}

#[test]
fn raw_that_begins_at_an_odd_place_of_a_direct_file() {
    let options = json!({"driver": "raw", "offset": 100, "size": SIZE, "cache": {"direct": true},
                         "file": {"driver": "file", "filename": "IMAGE"}});
    let case = file_case("raw offset=100 cache.direct=on", SIZE + 4096, options);
    check(&DriverCase { size: SIZE, ..case });
}

#[test]
fn raw_to_the_end_of_a_file() {
    let options = json!({"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "IMAGE"}});
    check(&DriverCase { size: SIZE, resizable: true, ..file_case("raw offset=", SIZE + 512, options) });
}

#[test]
fn host_device_buffered_and_direct() {
    for direct in [false, true] {
        let Some(device) = LoopDevice::new(SIZE) else { return };
        let path = device.path().to_owned();
        let case = DriverCase::new(
            format!("host_device cache.direct={direct}"),
            registry(),
            SIZE,
            {
                let path = path.clone();
                // One device serves all parts: what the last one left goes first.
                move |_| std::fs::write(&path, vec![0; SIZE as usize]).map_err(|e| e.to_string())
            },
            move |_| json!({"driver": "host_device", "filename": path, "discard": "unmap", "cache": {"direct": direct}}),
        );
        check(&DriverCase { discarded: Discarded::Anything, ..case });
    }
}

/// A cache over `image`, with room for few blocks, so that they come and go; `swap` is there for those who want it.
fn cache_case(name: &str, more: Value) -> DriverCase {
    let case = DriverCase::new(
        name,
        registry(),
        SIZE,
        |dir| {
            for (name, len) in [("image", SIZE), ("swap", 256 << 10)] {
                let file = std::fs::File::create_new(dir.join(name)).map_err(|e| e.to_string())?;
                file.set_len(len).map_err(|e| e.to_string())?;
            }
            Ok(())
        },
        move |dir| {
            let file = |name: &str| json!({"driver": "file", "filename": dir.join(name).to_str().unwrap()});
            let mut options =
                json!({"driver": "cache", "size": 200 << 10, "block-size": 4096, "discard": "unmap"});
            let members = options.as_object_mut().unwrap();
            members.insert("file".into(), file("image"));
            members.extend(more.as_object().unwrap().clone());
            if members.get("swap").is_some() {
                let mut swap = file("swap");
                swap["read-only"] = json!(false);
                members.insert("swap".into(), swap);
            }
            options
        },
    );
    DriverCase { resizable: true, discarded: Discarded::Anything, ..case }
}

#[test]
fn cache_written_through() {
    check(&cache_case("cache", json!({})));
}

#[test]
fn cache_written_back() {
    check(&cache_case("cache mode=writeback", json!({"mode": "writeback", "block-size": 16384})));
}

#[test]
fn cache_with_a_swap_node() {
    check(&cache_case(
        "cache mode=writeback swap=",
        json!({"mode": "writeback", "size": 64 << 10, "swap": "there"}),
    ));
}

#[test]
fn cache_that_reads_pass() {
    check(&cache_case("cache reads=bypass", json!({"mode": "writeback", "reads": "bypass"})));
}

#[test]
fn cache_without_memory() {
    check(&cache_case("cache size=0", json!({"size": 0})));
}
