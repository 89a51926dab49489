//! `ringblk img` beside `qemu-img`: the same arguments, and what comes out has to be the same. Both read each other's images.
//!
//! What differs on purpose: the format is never guessed, stderr begins with another name, and where qemu-img's output
//! depends on more than the image (a fresh UUID, the space a file takes) that is left out of the comparison.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod convert;
mod corpus;
mod report;
mod usage;
mod write;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use ringblk_scenarios::rig::ringblk;
use serde_json::Value;
use tempfile::TempDir;

/// A folder with images, in which both tools run.
struct Folder(TempDir);

impl Folder {
    /// An empty one; `None` where qemu-img is not installed.
    fn new() -> Option<Folder> {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("skipped: qemu-img is not installed");
            return None;
        }
        Some(Folder(tempfile::tempdir().unwrap()))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Runs a program in the folder.
    fn run(&self, program: &str, args: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        command.args(["-k", "1", "120", program]).args(args).current_dir(self.path()).stdin(Stdio::null());
        // Dates and numbers as the program's authors wrote them.
        command.env("LC_ALL", "C").output().unwrap()
    }

    /// qemu-img or qemu-io; has to succeed.
    fn qemu(&self, program: &str, args: &[&str]) -> String {
        let output = self.run(program, args);
        assert!(output.status.success(), "{program} {args:?}: {}", text(&output.stderr));
        text(&output.stdout).to_owned()
    }

    fn img(&self, args: &[&str]) -> Output {
        let mut all = vec!["img"];
        all.extend(args);
        self.run(ringblk().to_str().unwrap(), &all)
    }

    /// ringblk img; has to succeed without a word on stderr.
    fn ours(&self, args: &[&str]) -> String {
        let output = self.img(args);
        let err = text(&output.stderr);
        assert!(output.status.success(), "{args:?}: {:?}: {err}", output.status);
        assert_eq!(err, "", "{args:?}");
        text(&output.stdout).to_owned()
    }

    /// ringblk img; has to fail with this status and one line, which is returned.
    fn refused(&self, status: i32, args: &[&str]) -> String {
        let output = self.img(args);
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {err}");
        assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
        err.strip_prefix("ringblk img: ").unwrap_or_else(|| panic!("{args:?}: {err}")).trim_end().to_owned()
    }

    /// Both tools with the same arguments: status and stdout are the same, as text or, where it is that, as JSON. Returns
    /// ours.
    fn both(&self, args: &[&str]) -> String {
        self.both_but(args, |text| text)
    }

    /// As [`Folder::both`], after `clean` on both outputs.
    fn both_but(&self, args: &[&str], clean: impl Fn(String) -> String) -> String {
        let (theirs, ours) = (self.run("qemu-img", args), self.img(args));
        let errors = format!("qemu-img: {}\nours: {}", text(&theirs.stderr), text(&ours.stderr));
        assert_eq!(ours.status.code(), theirs.status.code(), "{args:?}: {errors}");
        let (theirs, out) = (text(&theirs.stdout).to_owned(), text(&ours.stdout).to_owned());
        let (theirs, ours) = (clean(theirs), clean(out));
        let json = |text: &str| serde_json::from_str::<Value>(text);
        match (json(&theirs), json(&ours)) {
            (Ok(theirs), Ok(ours)) => assert_eq!(ours, theirs, "{args:?}: {errors}"),
            _ => assert_eq!(ours, theirs, "{args:?}: {errors}"),
        }
        ours
    }

    /// qemu-img finds nothing wrong with an image.
    fn check(&self, image: &str) {
        let output = self.run("qemu-img", &["check", "-f", "qcow2", image]);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{image}: {out}{err}");
    }

    /// qemu-img says that two images show the same.
    fn same(&self, a: (&str, &str), b: (&str, &str)) {
        let output = self.run("qemu-img", &["compare", "-f", a.1, "-F", b.1, a.0, b.0]);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{a:?} {b:?}: {out}{err}");
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}
