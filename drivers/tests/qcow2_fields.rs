//! Every field of a qcow2 image set to what it must not be: what QEMU refuses to open or to read we refuse, and what it
//! reads we read the same. Where ours differs on purpose the line says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::rc::Rc;

use common::{registry, tool};
use graph::{Graph, NoSource, RootOptions};
use host::exec::block_on;
use host::{IoThread, IoThreadOptions, IoVecs};
use ringblk_drivers::image::qcow2::format::{Header, Policy};
use serde_json::json;

const SIZE: usize = 4 << 20;

/// What must hold beside QEMU.
#[derive(Clone, Copy, PartialEq)]
enum Expect {
    /// The same verdict, the same bytes.
    Same,
    /// QEMU takes it, we refuse to open it.
    Refused,
    /// QEMU opens it; we too, but the range in question gives an error.
    Unreadable,
    /// Ours is an error, and no file that the image names was opened; QEMU is not asked.
    Careful,
}
use Expect::{Careful, Refused, Same, Unreadable};

/// What became of an image.
#[derive(Debug, PartialEq)]
enum Outcome {
    NotOpened(String),
    NotRead(String),
    Read(Vec<u8>),
}

impl Outcome {
    fn stage(&self) -> u8 {
        match self {
            Outcome::NotOpened(_) => 0,
            Outcome::NotRead(_) => 1,
            Outcome::Read(_) => 2,
        }
    }

    fn words(&self) -> String {
        match self {
            Outcome::NotOpened(e) => format!("not opened: {e}"),
            Outcome::NotRead(e) => format!("not read: {e}"),
            Outcome::Read(_) => "read".into(),
        }
    }
}

struct Rig {
    dir: tempfile::TempDir,
    thread: IoThread,
    bytes: Vec<u8>,
    wrong: Vec<String>,
}

impl Rig {
    /// An image of QEMU's with something of everything, of these options.
    fn new(options: &str, commands: &[&[&str]]) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let base = dir.path().join("base");
        std::fs::write(&base, vec![0x5a; SIZE]).unwrap();
        let name = image.to_str().unwrap();
        let options = &options.replace("{dir}", dir.path().to_str().unwrap());
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([name, "4M"]);
        let made = |program, args: &[&str]| {
            let done = tool(program, args).expect("QEMU's tools");
            assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
        };
        made("env", &[&["-C", dir.path().to_str().unwrap(), "qemu-img"], &args[..]].concat());
        for c in commands {
            let mut all = c[1..].to_vec();
            all.push(name);
            made(c[0], &all);
        }
        let bytes = std::fs::read(&image).unwrap();
        let thread = IoThread::start(IoThreadOptions::default()).unwrap();
        Rig { dir, thread, bytes, wrong: Vec::new() }
    }

    fn header(&self) -> Header {
        Header::parse(&self.bytes, Policy { check: true, ..Policy::default() }).unwrap()
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes[at as usize..at as usize + 8].try_into().unwrap())
    }

    fn theirs(&self, path: &Path) -> Outcome {
        let name = path.to_str().unwrap();
        let done = tool("qemu-io", &["-r", "-f", "qcow2", "-c", "quit", name]).unwrap();
        if !done.status.success() {
            return Outcome::NotOpened(String::from_utf8_lossy(&done.stderr).into_owned());
        }
        let out = self.dir.path().join("theirs");
        let done =
            tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", name, out.to_str().unwrap()]).unwrap();
        if !done.status.success() {
            return Outcome::NotRead(String::from_utf8_lossy(&done.stderr).into_owned());
        }
        Outcome::Read(std::fs::read(out).unwrap())
    }

    fn ours(&self, path: &Path, read_only: bool) -> Outcome {
        let graph = Graph::new(registry(), Some(self.thread.clone()));
        let options = json!({"driver": "qcow2", "node-name": "disk", "read-only": read_only,
                             "file": {"driver": "file", "filename": path.to_str().unwrap()}});
        if let Err(e) = block_on(graph.blockdev_add(options)) {
            return Outcome::NotOpened(e.to_string());
        }
        let root =
            block_on(graph.attach("disk", RootOptions::new("a test", false), Rc::new(NoSource))).unwrap();
        let view = root.view().unwrap();
        let read = self.thread.call_blocking(move |local| async move {
            let io = view.io(&local);
            let bufs = IoVecs::from_vec(vec![0; io.size() as usize]);
            io.read(0, &bufs).await.map(|()| bufs.to_vec()).map_err(|e| e.to_string())
        });
        block_on(root.detach());
        block_on(graph.blockdev_del("disk")).unwrap();
        match read.unwrap() {
            Ok(bytes) => Outcome::Read(bytes),
            Err(e) => Outcome::NotRead(e),
        }
    }

    fn poke(&mut self, what: &str, pokes: &[(u64, &[u8])], expect: Expect) {
        let mut bytes = self.bytes.clone();
        for &(at, data) in pokes {
            let end = at as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[at as usize..end].copy_from_slice(data);
        }
        let path = self.dir.path().join("copy");
        std::fs::write(&path, &bytes).unwrap();
        // What QEMU makes of these names is its own affair: it asks the network, or opens an image in itself for minutes.
        let theirs = match expect {
            Careful => Outcome::NotOpened(String::new()),
            _ => self.theirs(&path),
        };
        let ours = self.ours(&path, true);
        if std::fs::read(&path).unwrap() != bytes {
            self.wrong.push(format!("{what}: a read-only image was written"));
        }
        let fine = match expect {
            Same => theirs.stage() == ours.stage() && (theirs.stage() < 2 || theirs == ours),
            Refused => theirs.stage() > 0 && ours.stage() == 0,
            Unreadable => theirs.stage() == 2 && ours.stage() == 1,
            Careful => ours.stage() == 0,
        };
        if !fine {
            let (a, b) = (theirs.words(), ours.words());
            self.wrong.push(format!("{what}: QEMU {a}; we {b}"));
        }
        // An image that is refused must not be touched by trying to write it either.
        if self.ours(&path, false).stage() == 0 && std::fs::read(&path).unwrap() != bytes {
            self.wrong.push(format!("{what}: a refused image was written"));
        }
    }

    fn done(self) {
        assert!(self.wrong.is_empty(), "{} differences\n{}", self.wrong.len(), self.wrong.join("\n"));
    }
}

fn usual() -> &'static [&'static [&'static str]] {
    &[
        &[
            "qemu-io",
            "-f",
            "qcow2",
            "-c",
            "write -P 1 0 256k",
            "-c",
            "write -P 2 2M 64k",
            "-c",
            "write -z 1M 64k",
        ],
        &["qemu-io", "-f", "qcow2", "-c", "write -c -P 5 3M 64k"],
    ]
}

fn be32(n: u32) -> [u8; 4] {
    n.to_be_bytes()
}

fn be64(n: u64) -> [u8; 8] {
    n.to_be_bytes()
}

#[test]
fn header_fields() {
    let mut rig = Rig::new("", usual());
    for n in [0, 72, 103, 105, 111, 113, 65536, 65537, 0x7fff_ffff, u32::MAX] {
        rig.poke(&format!("header_length {n}"), &[(100, &be32(n))], Same);
    }
    for n in [0, 8, 9, 15, 17, 22, 63, u32::MAX] {
        rig.poke(&format!("cluster_bits {n}"), &[(20, &be32(n))], Same);
    }
    for n in [0, 1, 4, u32::MAX] {
        rig.poke(&format!("version {n}"), &[(4, &be32(n))], Same);
    }
    rig.poke("magic", &[(3, b"a")], Same);
    for n in [7, 63, u32::MAX] {
        rig.poke(&format!("refcount_order {n}"), &[(96, &be32(n))], Same);
    }
    for n in [3, 255, u32::MAX] {
        rig.poke(&format!("crypt_method {n}"), &[(32, &be32(n))], Same);
    }
    rig.poke("LUKS without its extension", &[(32, &be32(2))], Same);
    rig.poke("type without its bit", &[(104, &[1])], Same);
    rig.poke("bit without its type", &[(79, &[8])], Same);
    rig.poke("compression type 2", &[(104, &[2]), (79, &[8])], Same);
    rig.poke("compression type 255", &[(104, &[255])], Same);
    for bit in 0..64u32 {
        let word = be64(1 << bit);
        // Bit 4 makes other entries of the L2 table, with bits where there must be none.
        let expect = match bit {
            2 => Careful,
            4 => Unreadable,
            _ => Same,
        };
        rig.poke(&format!("incompatible bit {bit}"), &[(72, &word)], expect);
    }
    for bit in [0, 1, 2, 17, 63] {
        rig.poke(&format!("compatible bit {bit}"), &[(80, &be64(1 << bit))], Same);
        rig.poke(&format!("autoclear bit {bit}"), &[(88, &be64(1 << bit))], Same);
    }
    for n in [0, 511, 513, (4 << 20) + 1, 1 << 40, (1 << 63) - 512, 1 << 63, u64::MAX] {
        rig.poke(&format!("size {n:#x}"), &[(24, &be64(n))], Same);
    }
    rig.done();
}

#[test]
fn names_and_extensions() {
    let mut rig = Rig::new("backing_file=base,backing_fmt=raw", usual());
    let name = rig.word(8);
    for n in [65536, 65537, u64::MAX, 1 << 63, 50, 112, 120] {
        rig.poke(
            &format!("backing offset {n:#x}"),
            &[(8, &be64(n))],
            if n == 112 || n == 120 { Careful } else { Same },
        );
    }
    for n in [1024, 65536, u32::MAX] {
        rig.poke(&format!("backing size {n}"), &[(16, &be32(n))], Same);
    }
    rig.poke("NUL in the name", &[(name + 2, &[0])], Same);
    rig.poke("no name", &[(16, &be32(0))], Same);
    for bad in ["json:{}", "nbd://localhost", "nbd:unix:x", "/dev/null/x", "http://x/y", "rbd:a/b", "fat:."] {
        rig.poke(
            &format!("backing '{bad}'"),
            &[(16, &be32(bad.len() as u32)), (name, bad.as_bytes())],
            Careful,
        );
    }
    rig.poke("backing '.'", &[(16, &be32(1)), (name, b".")], Careful);
    // Ours is in the chain already.
    rig.poke("backing itself", &[(16, &be32(4)), (name, b"copy"), (120, b"qcow2"), (116, &be32(5))], Careful);
    let ext = 112;
    rig.poke("extension length", &[(ext + 4, &be32(u32::MAX))], Same);
    rig.poke("extension past the name", &[(ext + 4, &be32(name as u32))], Same);
    rig.poke("backing format of 16", &[(ext + 4, &be32(16))], Same);
    rig.poke("unknown format", &[(ext + 8, b"rax")], Same);
    // No format, no opening: QEMU would probe.
    rig.poke("no backing format", &[(ext, &be32(0x1111_1111))], Refused);
    rig.poke("crypto extension without LUKS", &[(ext, &be32(0x0537_BE77))], Same);
    rig.poke("bitmaps extension of 3 bytes", &[(ext, &be32(0x2385_2875))], Same);
    rig.done();
}

#[test]
fn tables_of_the_header() {
    let mut rig = Rig::new("", usual());
    let h = rig.header();
    for n in [0u32, 4 << 20, (4 << 20) + 1, u32::MAX] {
        rig.poke(&format!("L1 entries {n}"), &[(36, &be32(n))], Same);
    }
    for n in [h.l1_offset + 1, h.l1_offset + 512, 1 << 40, u64::MAX << 16, (1 << 63) - (1 << 16), 0] {
        rig.poke(&format!("L1 at {n:#x}"), &[(40, &be64(n))], Same);
    }
    for n in [0, 2, 128, 129, 0x0002_0001, u32::MAX] {
        rig.poke(&format!("refcount table clusters {n}"), &[(56, &be32(n))], Same);
    }
    for n in [0, 1, h.reftable_offset + 512, 1 << 40, u64::MAX << 16] {
        rig.poke(&format!("refcount table at {n:#x}"), &[(48, &be64(n))], Same);
    }
    let rt = h.reftable_offset;
    for n in [0, 1, 0x200, h.l1_offset, rt, 1 << 40, u64::MAX] {
        rig.poke(&format!("refcount block at {n:#x}"), &[(rt, &be64(n))], Same);
    }
    rig.done();
}

#[test]
fn snapshot_tables() {
    let mut rig = Rig::new(
        "",
        &[usual()[0], &["qemu-img", "snapshot", "-c", "one"], &["qemu-img", "snapshot", "-c", "two"]],
    );
    let h = rig.header();
    let t = h.snapshots_offset;
    for n in [0, 1, 65537, u32::MAX] {
        rig.poke(&format!("{n} snapshots"), &[(60, &be32(n))], Same);
    }
    for n in [t + 1, t + 512, 1 << 40, u64::MAX << 16] {
        rig.poke(&format!("snapshots at {n:#x}"), &[(64, &be64(n))], Same);
    }
    let last = t + 72;
    for n in [0, 8, 16, 1025, u32::MAX] {
        rig.poke(&format!("extra data {n}"), &[(last + 36, &be32(n))], Same);
    }
    rig.poke("id of 65535", &[(last + 12, &[0xff; 2])], Same);
    rig.poke("name of 65535", &[(last + 14, &[0xff; 2])], Same);
    rig.poke("L1 unaligned", &[(last, &be64(0x10200))], Same);
    rig.poke("L1 too large", &[(last + 8, &be32(u32::MAX))], Same);
    rig.poke("L1 is the active one", &[(last, &be64(h.l1_offset))], Same);
    rig.done();
}

fn mapping(options: &str, rig: &mut Rig) {
    let h = rig.header();
    let g = h.geometry();
    let l1 = h.l1_offset;
    let l2 = rig.word(l1) & 0x00ff_ffff_ffff_fe00;
    let size = g.l2_entry_size();
    let first = rig.word(l2);
    let end = rig.bytes.len() as u64;
    let copied = 1u64 << 63;
    let mut l2_is = |what: &str, word: u64, expect| {
        rig.poke(&format!("[{options}] L2 {what}"), &[(l2, &be64(word))], expect)
    };
    // QEMU reads past bits that must be 0 and only its check complains; ours takes the entry for damaged.
    l2_is("reserved bits", first | 0x3f00_0000_0000_0002, Unreadable);
    l2_is("unaligned", first | 0x200, Same);
    l2_is("to the header", copied, Same);
    l2_is("to the L1", copied | l1, Same);
    l2_is("to the refcount table", copied | h.reftable_offset, Same);
    l2_is("to itself", copied | l2, Same);
    l2_is("past the end", copied | 1 << 40, Same);
    l2_is("at the end", copied | end.next_multiple_of(g.cluster_size()), Same);
    l2_is("above 2^56", copied | 0x00ff_ffff_ffff_0000, Same);
    let bit0 = if size == 16 { Unreadable } else { Same };
    l2_is("zero", first | 1, bit0);
    l2_is("zero unaligned", first | 0x201, Same);
    l2_is("plain zero", 1, Same);
    l2_is("compressed", 1 << 62 | first & !copied, Same);
    l2_is("compressed and copied", 1 << 62 | first, Same);
    l2_is("compressed past the end", 1 << 62 | 1 << 40, Same);
    let mut l1_is =
        |what: &str, word: u64| rig.poke(&format!("[{options}] L1 {what}"), &[(l1, &be64(word))], Same);
    l1_is("reserved bits", l2 | copied | 0x7f00_0000_0000_0001);
    l1_is("unaligned", l2 | copied | 0x200);
    l1_is("past the end", copied | 1 << 40);
    l1_is("to the header", copied);
    l1_is("to itself", copied | l1);
    if size == 16 {
        let mut bits_are = |what: &str, bits: u64| {
            rig.poke(&format!("[{options}] bitmap {what}"), &[(l2 + 8, &be64(bits))], Same);
        };
        bits_are("both", u64::MAX);
        bits_are("one both", 1 << 32 | 0xffff_ffff);
        bits_are("none", 0);
        bits_are("all zero", 0xffff_ffff << 32);
        rig.poke("bits without a cluster", &[(l2, &be64(0))], Same);
    }
}

#[test]
fn mapping_entries() {
    for options in ["", "cluster_size=4k", "extended_l2=on"] {
        let mut rig = Rig::new(options, usual());
        mapping(options, &mut rig);
        rig.done();
    }
    let commands: &[&[&str]] =
        &[&["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 256k", "-c", "write -c -P 5 3M 64k"]];
    let mut rig = Rig::new("compat=0.10", commands);
    mapping("compat=0.10", &mut rig);
    rig.done();
}

#[test]
fn compressed_streams() {
    for kind in ["zlib", "zstd"] {
        let options = format!("compression_type={kind}");
        let commands: &[&[&str]] = &[&["qemu-io", "-f", "qcow2", "-c", "write -c -P 5 0 64k"]];
        let mut rig = Rig::new(&options, commands);
        let h = rig.header();
        let l2 = rig.word(h.l1_offset) & 0x00ff_ffff_ffff_fe00;
        let word = rig.word(l2);
        let (offset, len) =
            ringblk_drivers::image::qcow2::format::entry::compressed_range(word, h.geometry());
        rig.poke(&format!("{kind} untouched"), &[], Same);
        rig.poke(&format!("{kind} of zeroes"), &[(offset, &vec![0; len as usize])], Same);
        rig.poke(&format!("{kind} of ones"), &[(offset, &vec![0xff; len as usize])], Same);
        rig.poke(&format!("{kind} first byte"), &[(offset, &[0x55])], Same);
        for at in 1..24u64 {
            rig.poke(&format!("{kind} byte {at}"), &[(offset + at, &[0x99])], Same);
        }
        rig.poke(&format!("{kind} longest"), &[(l2, &be64(word | 0xff << 54))], Same);
        rig.poke(&format!("{kind} trailing garbage"), &[(offset + len - 20, &[0xaa; 20])], Same);
        rig.done();
    }
}

#[test]
fn bitmaps() {
    let mut rig = Rig::new("", &[usual()[0]]);
    let image = rig.dir.path().join("image");
    let done = tool("qemu-img", &["bitmap", "--add", "-f", "qcow2", image.to_str().unwrap(), "b0"]).unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    rig.bytes = std::fs::read(&image).unwrap();
    let ext = rig.bytes.windows(4).position(|w| w == be32(0x2385_2875)).unwrap() as u64;
    let directory = rig.word(ext + 8 + 16);
    rig.poke("untouched", &[], Same);
    for n in [0, 2, 65536] {
        rig.poke(&format!("{n} bitmaps"), &[(ext + 8, &be32(n))], Same);
    }
    rig.poke("reserved", &[(ext + 12, &be32(1))], Same);
    rig.poke("directory unaligned", &[(ext + 24, &be64(directory + 512))], Same);
    for n in [0, 8, 40, 1 << 30] {
        rig.poke(&format!("directory of {n}"), &[(ext + 16, &be64(n))], Same);
    }
    for n in [8u8, 32] {
        rig.poke(&format!("granularity {n}"), &[(directory + 17, &[n])], Same);
    }
    for n in [0u16, 1024] {
        rig.poke(&format!("name of {n}"), &[(directory + 18, &n.to_be_bytes())], Same);
    }
    rig.poke("type 2", &[(directory + 16, &[2])], Same);
    rig.poke("extra data", &[(directory + 20, &be32(8))], Same);
    rig.poke("unknown flags", &[(directory + 12, &be32(4))], Same);
    rig.poke("in use", &[(directory + 12, &be32(1))], Same);
    rig.poke("table too long", &[(directory + 8, &be32(7))], Same);
    rig.poke("table of 0", &[(directory + 8, &be32(0))], Same);
    rig.poke("table unaligned", &[(directory, &be64(rig.word(directory) + 8))], Same);
    let table = rig.word(directory);
    rig.poke("table entry reserved", &[(table, &be64(2))], Same);
    rig.poke("table entry unaligned", &[(table, &be64(0x200))], Same);
    rig.done();
}

#[test]
fn data_files() {
    // QEMU looks for a relative name where it was started.
    let mut rig = Rig::new(
        "data_file={dir}/data,data_file_raw=on",
        &[&["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 256k"]],
    );
    rig.poke("untouched", &[], Same);
    let ext = rig.bytes.windows(4).position(|w| w == be32(0x4441_5441)).unwrap() as u64;
    rig.poke("no name", &[(ext, &be32(0x1111_1111))], Careful);
    for bad in ["json", "copy", "nbd:", "x\0ta", ".\0\0\0"] {
        rig.poke(&format!("data file '{bad:?}'"), &[(ext + 8, bad.as_bytes())], Careful);
    }
    let l2 = rig.word(rig.header().l1_offset) & 0x00ff_ffff_ffff_fe00;
    rig.poke("elsewhere", &[(l2, &be64(1 << 63 | 0x10000))], Same);
    rig.poke("compressed", &[(l2, &be64(1 << 62 | 0x10000))], Same);
    rig.poke("no entry", &[(l2, &be64(0))], Same);
    rig.poke("without COPIED", &[(l2 + 8, &be64(0x10000))], Same);
    rig.done();
}
