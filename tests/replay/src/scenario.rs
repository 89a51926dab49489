//! Sorts of images: how they are made and opened, and what may be done to them.
//!
//! Images come from `qemu-img`, so that the driver starts from what QEMU makes. Called by tests; a scenario knows nothing of
//! what will run on it.

use std::path::Path;
use std::sync::Arc;

use graph::Registry;
use serde_json::{Value, json};

use crate::disk::{Disk, registry};
use crate::image::Image;
use crate::qemu::{self, must};

/// The format of a subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// qcow2.
    Qcow2 {
        /// File of the guest data, where it is external.
        data: Option<String>,
        /// The passphrase, where there is one.
        secret: Option<String>,
    },
    /// A format of a test.
    Other,
}

/// Judge of a format of a test, over all files.
pub type Checker = fn(&[(String, Image)]) -> Result<(), String>;

/// What is under test.
#[derive(Clone)]
pub struct Subject {
    /// For messages.
    pub name: String,
    /// The drivers.
    pub registry: Registry,
    /// The files to begin with.
    pub files: Vec<(String, Image)>,
    /// The file of the topmost image.
    pub top: String,
    /// `blockdev-add` without a name.
    pub options: Arc<dyn Fn(&Disk) -> Value + Send + Sync>,
    /// Its format.
    pub format: Format,
    /// Further judge.
    pub checker: Option<Checker>,
    /// What the disk holds to begin with.
    pub initial: Vec<u8>,
    /// Content of the backing disk.
    pub backing: Option<Vec<u8>>,
    /// Cluster size in sectors.
    pub cluster: u64,
    /// Discards reach the place the data stays at: on a mean disk the guest sees junk where it discarded.
    pub discards_in_place: bool,
    /// What may be done.
    pub can: Can,
}

/// What a workload may do to a subject.
#[derive(Clone, Copy, Debug, Default)]
pub struct Can {
    /// Write zeroes.
    pub zero: bool,
    /// Discard.
    pub discard: bool,
    /// Internal snapshots.
    pub snapshot: bool,
    /// Resize.
    pub resize: bool,
    /// Persistent dirty bitmaps.
    pub bitmap: bool,
    /// Write compressed clusters.
    pub compress: bool,
}

/// A qcow2 image to be made.
#[derive(Clone, Debug)]
pub struct Qcow2 {
    /// For messages.
    pub name: &'static str,
    /// Cluster size, bytes.
    pub cluster: u64,
    /// Size of the disk, bytes.
    pub size: u64,
    /// Options for `qemu-img create -o`, without the cluster size.
    pub create: &'static str,
    /// Options for `blockdev-add`.
    pub open: Value,
    /// Format of the backing file, of this many bytes, if there is one.
    pub backing: Option<(&'static str, u64)>,
    /// A part of the disk is written by QEMU first: 64 KiB of each 256.
    pub filled: bool,
    /// What may be done.
    pub can: Can,
}

/// The passphrase of encrypted images.
pub const PASSPHRASE: &str = "open sesame";
/// The secret's name.
pub const SECRET: &str = "key";

impl Default for Qcow2 {
    fn default() -> Qcow2 {
        let can = Can { zero: true, discard: true, snapshot: false, resize: false, ..Can::default() };
        let open = json!({});
        Qcow2 {
            name: "",
            cluster: 4096,
            size: 256 << 10,
            create: "",
            open,
            backing: None,
            filled: false,
            can,
        }
    }
}

/// The images crash states are made of.
pub fn qcow2() -> Vec<Qcow2> {
    let base = Qcow2::default;
    let can = base().can;
    let snapshots = Can { snapshot: true, ..can };
    vec![
        Qcow2 { name: "plain", ..base() },
        Qcow2 { name: "plain, filled", filled: true, ..base() },
        Qcow2 { name: "plain, 512-byte clusters", cluster: 512, size: 128 << 10, ..base() },
        Qcow2 { name: "plain, 64 KiB clusters", cluster: 65536, size: 1 << 20, ..base() },
        Qcow2 { name: "version 2", create: "compat=0.10", ..base() },
        Qcow2 { name: "1-bit refcounts", create: "refcount_bits=1", ..base() },
        Qcow2 { name: "64-bit refcounts", cluster: 1024, create: "refcount_bits=64", ..base() },
        Qcow2 {
            name: "small caches",
            cluster: 512,
            size: 512 << 10,
            open: json!({"l2-cache-size": 1024, "l2-cache-entry-size": 512, "refcount-cache-size": 2048}),
            ..base()
        },
        Qcow2 { name: "lazy", create: "lazy_refcounts=on", filled: true, ..base() },
        Qcow2 { name: "subclusters", cluster: 16384, create: "extended_l2=on", ..base() },
        Qcow2 {
            name: "subclusters over raw",
            cluster: 16384,
            create: "extended_l2=on",
            backing: Some(("raw", 256 << 10)),
            ..base()
        },
        Qcow2 { name: "external data", create: "data_file=data.raw", ..base() },
        Qcow2 {
            name: "external raw data",
            create: "data_file=data.raw,data_file_raw=on",
            can: Can { resize: false, ..can },
            ..base()
        },
        Qcow2 { name: "backing raw", backing: Some(("raw", 256 << 10)), ..base() },
        Qcow2 { name: "backing qcow2, short", backing: Some(("qcow2", 100 << 10)), ..base() },
        Qcow2 { name: "discard-no-unref", open: json!({"discard-no-unref": true}), filled: true, ..base() },
        Qcow2 { name: "resize", can: Can { resize: true, ..can }, cluster: 512, size: 96 << 10, ..base() },
        Qcow2 { name: "snapshots", filled: true, can: snapshots, ..base() },
        Qcow2 {
            name: "snapshots, backing, 1 KiB clusters",
            cluster: 1024,
            size: 128 << 10,
            backing: Some(("raw", 128 << 10)),
            can: snapshots,
            ..base()
        },
        Qcow2 {
            name: "snapshots, subclusters",
            cluster: 16384,
            create: "extended_l2=on",
            can: snapshots,
            ..base()
        },
        Qcow2 {
            name: "LUKS",
            create: "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1",
            open: json!({"encrypt": {"format": "luks", "key-secret": SECRET}}),
            ..base()
        },
        Qcow2 { name: "bitmaps", can: Can { bitmap: true, ..can }, ..base() },
        Qcow2 { name: "compressed", can: Can { compress: true, ..can }, ..base() },
    ]
}

/// The scenario of that name.
///
/// # Errors
/// There is none.
pub fn named(name: &str) -> Result<Qcow2, String> {
    qcow2().into_iter().find(|q| q.name == name).ok_or_else(|| format!("there is no scenario '{name}'"))
}

/// Guest data for filled images and backing files: no stamps, so that it is told from what a workload writes.
fn filler(len: u64) -> Vec<u8> {
    (0..len).map(|i| (1 + i / 512 % 251) as u8 ^ (i % 7) as u8).collect()
}

impl Qcow2 {
    fn luks(&self) -> bool {
        self.create.contains("encrypt.format=luks")
    }

    /// What QEMU's tools need to be told to open the image as the source of a command.
    pub fn source(&self, name: &str) -> Vec<String> {
        let driver = if self.luks() {
            vec![
                "--image-opts".to_owned(),
                format!("driver=qcow2,encrypt.key-secret=key,file.filename={name}"),
            ]
        } else {
            vec!["-f".to_owned(), "qcow2".to_owned(), name.to_owned()]
        };
        let secret = ["--object".to_owned(), format!("secret,id=key,data={PASSPHRASE}")];
        secret.into_iter().filter(|_| self.luks()).chain(driver).collect()
    }

    /// Makes the image.
    ///
    /// # Errors
    /// What QEMU's tools say.
    pub fn make(&self) -> Result<Subject, String> {
        let dir = qemu::scratch()?;
        let at = dir.path();
        let backing = self.backing.map(|(format, size)| make_backing(at, format, size)).transpose()?;
        let mut options = format!("cluster_size={}", self.cluster);
        if !self.create.is_empty() {
            options = format!("{options},{}", self.create);
        }
        if let Some((format, _)) = self.backing {
            options = format!("{options},backing_file=backing.img,backing_fmt={format}");
        }
        let size = self.size.to_string();
        let secret = format!("secret,id=key,data={PASSPHRASE}");
        must(
            at,
            "qemu-img",
            &["create", "-q", "--object", &secret, "-f", "qcow2", "-o", &options, "image.qcow2", &size],
        )?;
        let mut initial = backing.clone().unwrap_or_default();
        initial.resize(self.size as usize, 0);
        if self.filled {
            let data = filler(self.size);
            std::fs::write(at.join("fill.raw"), &data).map_err(crate::words)?;
            let mut script = String::new();
            for start in (0..self.size).step_by(64 << 10) {
                let len = (16 << 10).min(self.size - start);
                script += &format!("write -q -s part.raw {start} {len}\n");
                let range = start as usize..(start + len) as usize;
                initial[range.clone()].copy_from_slice(&data[..range.len()]);
            }
            std::fs::write(at.join("part.raw"), &data[..16 << 10]).map_err(crate::words)?;
            let commands: Vec<&str> = script.lines().flat_map(|l| ["-c", l]).collect();
            must(at, "qemu-io", &[&["-f", "qcow2", "image.qcow2"], &commands[..]].concat())?;
        }
        if self.can.bitmap {
            for (name, granularity) in [("fine", "512"), ("coarse", "65536")] {
                must(at, "qemu-img", &["bitmap", "--add", "-g", granularity, "image.qcow2", name])?;
            }
        }
        let mut files = Vec::new();
        for name in ["image.qcow2", "data.raw", "backing.img"] {
            if at.join(name).exists() {
                files.push((name.to_owned(), qemu::load(&at.join(name))?));
            }
        }
        let data = self.create.contains("data_file=").then(|| "data.raw".to_owned());
        let open = self.open.clone();
        let options = move |disk: &Disk| {
            let mut options = json!({
                "driver": "qcow2", "discard": "unmap",
                "file": {"driver": "file", "filename": disk.path("image.qcow2")},
            });
            if let (Value::Object(options), Value::Object(open)) = (&mut options, &open) {
                options.extend(open.clone());
            }
            options
        };
        Ok(Subject {
            name: self.name.to_owned(),
            registry: registry(&[]),
            files,
            top: "image.qcow2".to_owned(),
            options: Arc::new(options),
            format: Format::Qcow2 { data, secret: self.luks().then(|| PASSPHRASE.to_owned()) },
            checker: None,
            initial,
            backing,
            cluster: self.cluster / 512,
            discards_in_place: self.create.contains("data_file=")
                || self.open.get("discard-no-unref").is_some(),
            can: self.can,
        })
    }
}

/// Makes `backing.img` and returns its content: half of it data.
fn make_backing(at: &Path, format: &str, size: u64) -> Result<Vec<u8>, String> {
    let mut content = filler(size);
    for (n, chunk) in content.chunks_mut(8 << 10).enumerate() {
        if n % 2 == 1 {
            chunk.fill(0);
        }
    }
    std::fs::write(at.join("content.raw"), &content).map_err(crate::words)?;
    must(at, "qemu-img", &["convert", "-f", "raw", "-O", format, "content.raw", "backing.img"])?;
    Ok(content)
}
