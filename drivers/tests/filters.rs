//! The filters that show their child as it is, through the conformance suite: each in the set-ups that make it take different
//! ways.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{registry, tool};
use conformance::{Discarded, DriverCase};
use ringblk_drivers::throttle::{ThrottleGroup, ThrottleLimits};
use serde_json::{Value, json};

const SIZE: u64 = 3 << 19;

fn check(case: &DriverCase) {
    if let Err(e) = conformance::run(case) {
        panic!("{e}");
    }
}

fn have_tool() -> bool {
    tool("qemu-img", &["--version"]).is_some()
}

fn file(dir: &Path, more: Value) -> Value {
    let mut node = json!({"driver": "file", "filename": dir.join("image").to_str().unwrap()});
    node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    node
}

/// A case over a raw file of `SIZE` zeroes; `options` get the file's node.
fn over_file(name: &str, more: Value, options: impl Fn(Value) -> Value + 'static) -> DriverCase {
    DriverCase::new(
        name,
        registry(),
        SIZE,
        |dir| {
            let file = std::fs::File::create_new(dir.join("image")).map_err(|e| e.to_string())?;
            file.set_len(SIZE).map_err(|e| e.to_string())
        },
        move |dir| options(file(dir, more.clone())),
    )
}

fn qemu_img(args: &[&str]) -> Result<(), String> {
    let output = tool("qemu-img", args).ok_or("no qemu-img")?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Images `image` over `middle` over `bottom`, all reading as zeroes, the backing files shorter than the overlay.
fn chain(dir: &Path, options: &str) -> Result<(), String> {
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (bottom, middle, image) = (at("bottom"), at("middle"), at("image"));
    let create = |name: &str, size: u64, backing: Option<(&str, &str)>| {
        let size = size.to_string();
        let mut args = vec!["create", "-q"];
        match backing {
            Some((file, format)) => args.extend(["-f", "qcow2", "-o", options, "-b", file, "-F", format]),
            None => args.extend(["-f", "raw"]),
        }
        args.extend([name, &size]);
        qemu_img(&args)
    };
    create(&bottom, SIZE / 2, None)?;
    create(&middle, SIZE - 100 * 512, Some((&bottom, "raw")))?;
    create(&image, SIZE, Some((&middle, "qcow2")))
}

/// The chain as nodes: the overlay stays writable whatever is above it.
fn chain_nodes(dir: &Path) -> Value {
    let file = |name: &str| json!({"driver": "file", "filename": dir.join(name).to_str().unwrap()});
    let bottom = json!({"driver": "raw", "node-name": "bottom", "file": file("bottom")});
    let middle = json!({"driver": "qcow2", "node-name": "middle", "file": file("middle"), "backing": bottom});
    json!({"driver": "qcow2", "read-only": false, "file": {"driver": "file", "read-only": false,
           "filename": dir.join("image").to_str().unwrap()}, "backing": middle})
}

fn throttled(name: &str, told: Value) -> DriverCase {
    let case = over_file(
        name,
        json!({"discard": "unmap"}),
        |file| json!({"driver": "throttle", "throttle-group": "limits", "discard": "unmap", "file": file}),
    );
    let told: ThrottleLimits = serde_json::from_value(told).unwrap();
    let set_up = move |graph: &graph::Graph| {
        let group = ThrottleGroup::new(&told).unwrap();
        graph.objects().add("limits", Arc::new(group)).unwrap();
    };
    DriverCase { set_up: Box::new(set_up), resizable: true, discarded: Discarded::Zeroes, ..case }
}

#[test]
fn throttle_without_limits() {
    check(&throttled("throttle, idle", json!({})));
}

#[test]
fn throttle_with_limits_that_are_felt() {
    check(&throttled(
        "throttle",
        json!({"iops-total": 100_000, "bps-total": 2u64 << 30, "iops-size": 65536}),
    ));
}

#[test]
fn throttle_with_bursts() {
    check(&throttled(
        "throttle with bursts",
        json!({"iops-read": 50_000, "iops-read-max": 200_000, "iops-read-max-length": 3,
               "bps-write": 1u64 << 30, "bps-write-max": 3u64 << 30, "bps-write-max-length": 2}),
    ));
}

fn copying(name: &str, options: &'static str, more: Value) {
    if !have_tool() {
        return;
    }
    let case = DriverCase::new(
        name,
        registry(),
        SIZE,
        |dir| chain(dir, options),
        move |dir| {
            let mut node = json!({"driver": "copy-on-read", "file": chain_nodes(dir)});
            node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            node
        },
    );
    check(&DriverCase { resizable: true, ..case });
}

#[test]
fn copy_on_read_of_a_chain() {
    copying("copy-on-read", "cluster_size=64k", json!({}));
}

#[test]
fn copy_on_read_of_a_chain_down_to_a_node() {
    copying("copy-on-read bottom=", "cluster_size=4k", json!({"bottom": "middle"}));
}

#[test]
fn copy_on_read_of_subclusters() {
    copying("copy-on-read, extended_l2", "cluster_size=64k,extended_l2=on", json!({}));
}

#[test]
fn copy_on_read_of_what_has_nothing_below() {
    let case = over_file(
        "copy-on-read of a file",
        json!({"read-only": false}),
        |file| json!({"driver": "copy-on-read", "file": file}),
    );
    check(&DriverCase { resizable: true, ..case });
}

fn compressing(name: &str, options: &'static str) -> DriverCase {
    let case = DriverCase::new(
        name,
        registry(),
        SIZE,
        move |dir| {
            let image = dir.join("image");
            let size = SIZE.to_string();
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, image.to_str().unwrap(), &size])
        },
        |dir| json!({"driver": "compress", "file": {"driver": "qcow2", "file": file(dir, json!({}))}}),
    );
    DriverCase { resizable: true, ..case }
}

#[test]
fn compress_into_small_clusters() {
    if have_tool() {
        check(&compressing("compress 4k", "cluster_size=4k"));
    }
}

#[test]
fn compress_by_another_method() {
    if have_tool() {
        check(&compressing("compress zstd", "cluster_size=4k,compression_type=zstd"));
    }
}

#[test]
fn preallocate_below_a_guest() {
    let case = over_file(
        "preallocate",
        json!({"discard": "unmap"}),
        |file| json!({"driver": "preallocate", "file": file, "discard": "unmap"}),
    );
    check(&DriverCase { resizable: true, discarded: Discarded::Zeroes, ..case });
}

#[test]
fn preallocate_below_a_format() {
    if !have_tool() {
        return;
    }
    let case = DriverCase::new(
        "qcow2 over preallocate",
        registry(),
        SIZE,
        |dir| {
            let image = dir.join("image");
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "cluster_size=4k",
                image.to_str().unwrap(),
                &SIZE.to_string(),
            ])
        },
        |dir| {
            let below = json!({"driver": "preallocate", "file": file(dir, json!({})), "prealloc-size": 10_000,
                               "prealloc-align": 65536});
            json!({"driver": "qcow2", "file": below, "discard": "unmap"})
        },
    );
    check(&DriverCase { resizable: true, discarded: Discarded::Anything, ..case });
}
