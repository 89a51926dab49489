//! Images of many sorts, made by QEMU's tools: what the comparisons run over.

use std::fs::File;
use std::os::unix::fs::FileExt;

use ringblk_scenarios::Rng;

use crate::Folder;

/// An image: (file name, format).
pub type Image = (&'static str, &'static str);

/// Size of their disks, bytes.
pub const SIZE: u64 = 8 << 20;

/// Raw images: empty, sparse, full.
pub const RAW: [Image; 3] = [("empty.raw", "raw"), ("sparse.raw", "raw"), ("dense.raw", "raw")];

/// qcow2 images of many shapes.
pub const QCOW2: [Image; 13] = [
    ("plain.qcow2", "qcow2"),
    ("old.qcow2", "qcow2"),
    ("small.qcow2", "qcow2"),
    ("large.qcow2", "qcow2"),
    ("sub.qcow2", "qcow2"),
    ("wide.qcow2", "qcow2"),
    ("lazy.qcow2", "qcow2"),
    ("meta.qcow2", "qcow2"),
    ("zlib.qcow2", "qcow2"),
    ("zstd.qcow2", "qcow2"),
    ("ext.qcow2", "qcow2"),
    ("over.qcow2", "qcow2"),
    ("top.qcow2", "qcow2"),
];

/// All of them.
pub fn all() -> impl Iterator<Item = Image> {
    RAW.into_iter().chain(QCOW2)
}

/// Makes them.
pub fn make(folder: &Folder) {
    raw(folder);
    let size = SIZE.to_string();
    let create = |name: &str, options: &str, more: &[&str]| {
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend(more);
        args.push(name);
        if !more.contains(&"-b") {
            args.push(&size);
        }
        folder.qemu("qemu-img", &args);
    };
    create("plain.qcow2", "", &[]);
    create("old.qcow2", "compat=0.10", &[]);
    create("small.qcow2", "cluster_size=512", &[]);
    create("large.qcow2", "cluster_size=2M", &[]);
    create("sub.qcow2", "extended_l2=on,cluster_size=128k", &[]);
    create("wide.qcow2", "refcount_bits=64", &[]);
    create("lazy.qcow2", "lazy_refcounts=on", &[]);
    create("meta.qcow2", "preallocation=metadata", &[]);
    create("ext.qcow2", "data_file=ext.data", &[]);
    for (index, (name, _)) in QCOW2.iter().enumerate().take(8) {
        scribble(folder, name, index as u64);
    }
    scribble(folder, "ext.qcow2", 99);
    for kind in ["zlib", "zstd"] {
        let option = format!("compression_type={kind}");
        let name = format!("{kind}.qcow2");
        folder.qemu(
            "qemu-img",
            &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option, "sparse.raw", &name],
        );
    }
    create("over.qcow2", "", &["-b", "sparse.raw", "-F", "raw"]);
    scribble(folder, "over.qcow2", 7);
    // Longer than what lies below it.
    create("top.qcow2", "", &["-b", "over.qcow2", "-F", "qcow2"]);
    folder.qemu("qemu-img", &["resize", "-q", "-f", "qcow2", "top.qcow2", "+1M"]);
    scribble(folder, "top.qcow2", 8);
}

/// The raw ones alone.
pub fn raw(folder: &Folder) {
    let mut rng = Rng::new(1);
    for (name, _) in RAW {
        File::create(folder.path().join(name)).unwrap().set_len(SIZE).unwrap();
    }
    let sparse = File::options().write(true).open(folder.path().join("sparse.raw")).unwrap();
    for _ in 0..12 {
        let at = rng.below(SIZE / 4096 - 32) * 4096;
        let len = 4096 * (1 + rng.below(16)) as usize;
        sparse.write_all_at(&rng.bytes(len), at).unwrap();
    }
    let dense = File::options().write(true).open(folder.path().join("dense.raw")).unwrap();
    for at in (0..SIZE).step_by(1 << 20) {
        dense.write_all_at(&rng.bytes(1 << 20), at).unwrap();
    }
}

/// Writes, zeroes and discards here and there with qemu-io; the same for the same seed.
pub fn scribble(folder: &Folder, name: &str, seed: u64) {
    let mut rng = Rng::new(0x1000 + seed);
    let mut args = vec!["-f".to_owned(), "qcow2".to_owned(), "-d".to_owned(), "unmap".to_owned()];
    for _ in 0..24 {
        let at = rng.below(SIZE / 512 - 512) * 512;
        let len = 512 * (1 + rng.below(300));
        let command = match rng.below(8) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -zu {at} {len}"),
            2 => format!("discard {at} {len}"),
            _ => format!("write -P {} {at} {len}", 1 + rng.below(255)),
        };
        args.extend(["-c".to_owned(), command]);
    }
    args.push(name.to_owned());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    folder.qemu("qemu-io", &args);
}
