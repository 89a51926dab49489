//! qcow2 through the conformance suite, in many shapes; every image is checked by `qemu-img` when the suite is done with it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{registry, tool};
use conformance::{Discarded, DriverCase};
use serde_json::{Value, json};

const SIZE: u64 = 3 << 19;

/// Makes an image with `qemu-img create`. In `options`, DIR is its directory.
fn create(path: &Path, options: &str, size: u64) -> Result<(), String> {
    let size = size.to_string();
    let dir = path.parent().unwrap().to_str().unwrap();
    if options.contains("DIR/base") {
        // A backing file that reads as zeroes, of another size.
        create(&path.with_file_name("base"), "cluster_size=4096", SIZE / 2 + 512)?;
    }
    let options = options.replace("DIR", dir);
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", &options]);
    }
    args.extend([path.to_str().unwrap(), &size]);
    let output = tool("qemu-img", &args).ok_or("no qemu-img")?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn have_tool() -> bool {
    tool("qemu-img", &["--version"]).is_some()
}

/// Runs the suite over images of `size` bytes made with `options`; `node` joins the node's options.
fn shape(name: &str, options: &'static str, size: u64, node: Value) {
    if !have_tool() {
        return;
    }
    let discard = node.get("discard") == Some(&json!("unmap"));
    let case = DriverCase::new(
        format!("qcow2 {name}"),
        registry(),
        size,
        move |dir| create(&dir.join("image"), options, size),
        move |dir| {
            let mut all = json!({"driver": "qcow2", "file": {"driver": "file",
                                 "filename": dir.join("image").to_str().unwrap()}});
            all.as_object_mut().unwrap().extend(node.as_object().unwrap().clone());
            all
        },
    );
    let discarded = if discard { Discarded::Anything } else { Discarded::Kept };
    if let Err(e) = conformance::run(&DriverCase { resizable: true, discarded, ..case }) {
        panic!("{e}");
    }
}

#[test]
fn as_it_comes() {
    shape("as it comes", "", SIZE, json!({}));
}

#[test]
fn smallest_clusters() {
    shape("512", "cluster_size=512", SIZE, json!({"discard": "unmap"}));
}

#[test]
fn small_clusters_in_a_small_cache() {
    shape(
        "4k, small cache",
        "cluster_size=4096",
        SIZE,
        json!({"l2-cache-size": 4096, "l2-cache-entry-size": 512, "discard": "unmap", "detect-zeroes": "unmap"}),
    );
}

#[test]
fn largest_clusters() {
    shape("2M", "cluster_size=2M", 5 << 20, json!({"discard": "unmap"}));
}

#[test]
fn version_2() {
    shape("v2", "compat=0.10", SIZE, json!({"discard": "unmap"}));
}

#[test]
fn lazy_refcounts() {
    shape("lazy", "lazy_refcounts=on", SIZE, json!({}));
}

#[test]
fn subclusters() {
    shape("extended L2", "extended_l2=on,cluster_size=16k", SIZE, json!({"discard": "unmap"}));
}

#[test]
fn narrow_refcounts() {
    shape("1-bit refcounts", "refcount_bits=1,cluster_size=4k", SIZE, json!({"discard": "unmap"}));
}

#[test]
fn space_set_aside() {
    shape("prealloc", "preallocation=metadata,cluster_size=8k", SIZE, json!({"discard": "unmap"}));
}

#[test]
fn clusters_that_keep_their_place() {
    shape("discard-no-unref", "cluster_size=4k", SIZE, json!({"discard": "unmap", "discard-no-unref": true}));
}

#[test]
fn past_the_page_cache() {
    shape("cache.direct", "", SIZE, json!({"discard": "unmap", "cache": {"direct": true}}));
}

#[test]
fn over_a_backing_file() {
    shape("backing", "backing_file=DIR/base,backing_fmt=qcow2", SIZE, json!({"discard": "unmap"}));
}

#[test]
fn data_in_another_file() {
    shape("data file", "data_file=DIR/data,cluster_size=8k", SIZE, json!({"discard": "unmap"}));
}
