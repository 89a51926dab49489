//! A Linux guest on chains of qcow2: the image then goes to `qemu-img`, which must find what the guest left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use client::daemon::Launch;
use ringblk_scenarios::{Rig, Wanted, rig};
use serde_json::json;
use tempfile::TempDir;

use super::boot::{Boot, available, turn};
use super::{Image, MAPPED, PRINT_SHA256, SIZE, TWO_IOTHREADS, said, served};

fn sha256(path: &Path) -> String {
    let out = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(out.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

/// Runs `qemu-img`; its exit code and what it printed.
pub fn qemu_img(arguments: &[&str]) -> (i32, String) {
    let out = Command::new("qemu-img").args(arguments).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.code().unwrap_or(-1), text)
}

pub fn made(arguments: &[&str]) {
    let (code, text) = qemu_img(arguments);
    assert_eq!(code, 0, "qemu-img {arguments:?}: {text}");
}

/// An overlay over a qcow2 over a raw file, all of the guest's disk in the lowest.
struct Chain {
    base: Image,
    folder: TempDir,
}

impl Chain {
    /// `options` are those of the two qcow2 images, as `qemu-img create -o` takes them.
    fn new(options: &str) -> Self {
        let chain = Self { base: Image::new(), folder: tempfile::tempdir().unwrap() };
        let (base, middle, top) = (chain.base.path(), chain.middle(), chain.top());
        let below = [(&base, "raw", &middle), (&middle, "qcow2", &top)];
        for (backing, format, path) in below {
            let [backing, path] = [backing, path].map(|p| p.display().to_string());
            made(&["create", "-q", "-f", "qcow2", "-o", options, "-F", format, "-b", &backing, &path]);
        }
        // Something of its own in the middle, too.
        let text = middle.display().to_string();
        let out = Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 90 9M 3M", &text]).output();
        assert!(out.unwrap().status.success());
        chain
    }

    fn middle(&self) -> PathBuf {
        self.folder.path().join("middle.qcow2")
    }

    fn top(&self) -> PathBuf {
        self.folder.path().join("top.qcow2")
    }

    fn node(&self) -> String {
        format!(
            "qcow2,discard=unmap,file.driver=file,file.filename={},file.discard=unmap",
            self.top().display()
        )
    }

    /// What `qemu-img` says of the overlay: nothing wrong, and the content that the guest saw.
    fn judge(&self, content: &str, leaks_allowed: bool) {
        let top = self.top().display().to_string();
        let (code, text) = qemu_img(&["check", "-f", "qcow2", &top]);
        assert!(code == 0 || (leaks_allowed && code == 3), "exit code {code}: {text}");
        let copy = self.folder.path().join("copy.raw").display().to_string();
        made(&["convert", "-f", "qcow2", "-O", "raw", &top, &copy]);
        assert_eq!(sha256(Path::new(&copy)), content);
        made(&["compare", "-f", "qcow2", "-F", "raw", &top, &copy]);
    }
}

#[test]
fn an_overlay_over_qcow2_over_raw_on_two_queues_and_two_iothreads() {
    if !available() {
        return;
    }
    let _turn = turn();
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on,lazy_refcounts=on"] {
        let chain = Chain::new(options);
        let before = (chain.base.sha256(), sha256(&chain.middle()));
        let mut rig = Rig::start_with(&[Wanted::node("e", &chain.node()).options(MAPPED)], &TWO_IOTHREADS);
        let output = Boot::new(&rig.socket("e"))
            .arg("--queues", "2")
            .script("verify", "SIZE_MIB=8")
            .script("queues", "")
            .script("filesystem", "")
            .shell("blkdiscard -o 25165824 -l 4194304 $DISK")
            .shell(PRINT_SHA256)
            .run();
        for (id, requests) in served(&rig.command("query-iothreads", json!({}))) {
            assert!(requests > 100, "iothread {id} served {requests} requests");
        }
        rig.wait_disconnected("e");
        assert!(rig.daemon.terminate(Duration::from_secs(30)).unwrap().success(), "{}", rig.daemon.stderr());
        chain.judge(said(&output, "disk"), false);
        assert_eq!((chain.base.sha256(), sha256(&chain.middle())), before, "what lies below has changed");
    }
}

// Without a write cache: what a qcow2 node has not written of its tables when it is killed is gone, and a guest that did not
// flush would find old data where it was told that new data was written.
#[test]
fn kills_under_load_go_unnoticed_on_qcow2_without_a_write_cache() {
    if !available() {
        return;
    }
    let _turn = turn();
    let chain = Chain::new("cluster_size=64k");
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("disk");
    let line = format!(
        "--blockdev {},node-name=d --export type=vhost-user-blk,id=e,node-name=d,writable=on,num-queues=2,\
         writethrough=on,addr.type=unix,addr.path={}",
        chain.node(),
        socket.display()
    );
    let line: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let launch = Launch::new(rig::ringblk()).args(line).env("RINGBLK_LOG", "info");
    let mut daemon = launch.spawn().unwrap();
    drop(daemon.connect(&socket).unwrap());
    let boot =
        Boot::new(&socket).arg("--queues", "2").flag("--reconnect").script("outage", "ROUNDS=4 SIZE_MIB=4");
    let mut kills = 0;
    let output = boot.shell(PRINT_SHA256).run_with(|question| {
        assert_eq!(question, "outage");
        kills += 1;
        daemon.kill().unwrap();
        // The kernel lets go of the image's locks a little after the process.
        let (code, text) = loop {
            let (code, text) = qemu_img(&["check", "-f", "qcow2", &chain.top().display().to_string()]);
            if !(code == 1 && text.contains("lock")) {
                break (code, text);
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(code == 0 || code == 3, "after kill {kills}: exit code {code}: {text}");
        daemon = launch.spawn().unwrap();
        "ok".to_owned()
    });
    assert_eq!(kills, 4);
    assert!(daemon.terminate(Duration::from_secs(30)).unwrap().success(), "{}", daemon.stderr());
    chain.judge(said(&output, "disk"), true);
}

#[test]
fn a_qcow2_that_grows_under_the_guest() {
    if !available() {
        return;
    }
    let _turn = turn();
    let chain = Chain::new("cluster_size=4k");
    let mut rig = Rig::start_with(&[Wanted::node("e", &chain.node()).options(MAPPED)], &TWO_IOTHREADS);
    let mut sizes = [SIZE * 2, SIZE * 3, SIZE * 2].into_iter();
    let boot =
        Boot::new(&rig.socket("e")).arg("--queues", "2").script("resize", "ROUNDS=3").shell(PRINT_SHA256);
    let output = boot.run_with(|question| {
        assert_eq!(question, "resize");
        let size = sizes.next().expect("three rounds");
        rig.command("block_resize", json!({"node-name": "node-e", "size": size}));
        format!("ok {size}")
    });
    assert!(rig.daemon.terminate(Duration::from_secs(30)).unwrap().success(), "{}", rig.daemon.stderr());
    chain.judge(said(&output, "disk"), false);
}
