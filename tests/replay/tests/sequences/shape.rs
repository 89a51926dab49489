//! Sorts of images, by a seed: cluster sizes, versions, refcount widths, everything `qemu-img create` offers.

use std::path::Path;

use conformance::rng::Rng;
use ringblk_replay::qemu::must;
use ringblk_replay::scenario::{PASSPHRASE, SECRET};
use serde_json::{Value, json};

/// An image that will be made.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Cluster size, bytes.
    pub cluster: u64,
    /// Size of the disk, bytes.
    pub size: u64,
    /// Version 2.
    pub version_2: bool,
    /// Every request is in sectors.
    pub sectors: bool,
    create: String,
    /// Few refcount bits: snapshots meet their end soon.
    narrow: bool,
    data: bool,
    raw_data: bool,
    luks: bool,
    backing: Option<(&'static str, u64)>,
    open: Value,
}

impl Shape {
    /// Any.
    pub fn random(rng: &mut Rng) -> Shape {
        let mut pick = |n: u64| rng.below(n);
        let mut create = Vec::new();
        let extended = pick(4) == 0;
        let bits =
            if extended { 14 + pick(4) } else { [9, 9, 10, 12, 12, 13, 14, 16, 16, 21][pick(10) as usize] };
        let cluster = 1u64 << bits;
        let version_2 = !extended && pick(6) == 0;
        let size = match bits {
            ..12 => (64 << 10) + pick(1000) * 512,
            _ => (256 << 10) + pick(6000) * 512,
        };
        create.push(format!("cluster_size={cluster},compat={}", if version_2 { "0.10" } else { "1.1" }));
        let (mut data, mut raw_data, mut narrow) = (false, false, false);
        if extended {
            create.push("extended_l2=on".to_owned());
        }
        if !version_2 {
            let width = [16, 16, 16, 1, 2, 4, 8, 32, 64][pick(9) as usize];
            narrow = width < 8;
            create.push(format!("refcount_bits={width}"));
            if pick(4) == 0 {
                create.push("lazy_refcounts=on".to_owned());
            }
            data = pick(6) == 0;
            if !data && pick(4) == 0 {
                create.push("compression_type=zstd".to_owned());
            }
        }
        let luks = !data && pick(14) == 0;
        let backing = (pick(3) == 0).then(|| {
            let format = ["raw", "qcow2"][pick(2) as usize];
            (format, 512 * (1 + pick(2 * size / 512)))
        });
        if data {
            raw_data = backing.is_none() && pick(2) == 0;
            create.push("data_file=data.raw".to_owned());
            if raw_data {
                create.push("data_file_raw=on".to_owned());
            }
        }
        if luks {
            create.push("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1".to_owned());
        }
        // Encrypted and preallocated disks begin with noise.
        if backing.is_none() && !luks && pick(6) == 0 {
            create.push(format!("preallocation={}", ["metadata", "falloc", "full"][pick(3) as usize]));
        }
        if let Some((format, _)) = backing {
            create.push(format!("backing_file=backing.img,backing_fmt={format}"));
        }
        let mut open = json!({});
        if pick(3) == 0 {
            // Small caches: slices come and go.
            let slice = cluster.min(512 << pick(4));
            open = json!({"l2-cache-entry-size": slice, "l2-cache-size": 2 * cluster.max(slice)});
        }
        if pick(5) == 0 && !version_2 {
            open["discard-no-unref"] = json!(true);
        }
        let create = create.join(",");
        Shape { cluster, size, version_2, sectors: luks, create, narrow, data, raw_data, luks, backing, open }
    }

    /// Whether clusters may be compressed.
    pub fn compress(&self) -> bool {
        !self.data && !self.luks
    }

    /// Whether a discard changes nothing.
    pub fn never_unmaps(&self) -> bool {
        self.version_2 && self.backing.is_some()
    }

    /// Whether there may be snapshots.
    pub fn snapshots(&self) -> bool {
        !self.data && !self.narrow
    }

    /// Whether the size may change.
    pub fn resize(&self) -> bool {
        // Version 2 has no way to hide what a longer backing file has there.
        !self.raw_data && !self.never_unmaps()
    }

    /// Makes the files; what the disk holds then.
    pub fn make(&self, dir: &Path) -> Result<Vec<u8>, String> {
        let mut content = vec![0; self.size as usize];
        if let Some((format, size)) = self.backing {
            let below: Vec<u8> =
                (0..size).map(|i| if i / 4096 % 3 == 0 { 0 } else { (1 + i / 512 % 255) as u8 }).collect();
            let n = below.len().min(content.len());
            content[..n].copy_from_slice(&below[..n]);
            std::fs::write(dir.join("below.raw"), below).map_err(ringblk_replay::words)?;
            must(dir, "qemu-img", &["convert", "-f", "raw", "-O", format, "below.raw", "backing.img"])?;
            std::fs::copy(dir.join("backing.img"), dir.join("backing.copy"))
                .map_err(ringblk_replay::words)?;
        }
        let object = format!("secret,id=key,data={PASSPHRASE}");
        let size = self.size.to_string();
        let args =
            ["create", "-q", "--object", &object, "-f", "qcow2", "-o", &self.create, "image.qcow2", &size];
        must(dir, "qemu-img", &args)?;
        Ok(content)
    }

    /// The backing file is what it was.
    pub fn backing_untouched(&self, dir: &Path) -> Result<(), String> {
        let read = |name: &str| std::fs::read(dir.join(name)).unwrap_or_default();
        let same = self.backing.is_none() || read("backing.img") == read("backing.copy");
        if same { Ok(()) } else { Err("the backing file has been changed".to_owned()) }
    }

    /// `blockdev-add` of ringblk.
    pub fn options(&self, dir: &Path) -> Value {
        let image = dir.join("image.qcow2");
        let mut options = json!({
            "driver": "qcow2", "discard": "unmap",
            "file": {"driver": "file", "filename": image.to_str()},
        });
        if let (Value::Object(to), Value::Object(from)) = (&mut options, &self.open) {
            to.extend(from.clone());
        }
        if self.luks {
            options["encrypt"] = json!({"format": "luks", "key-secret": SECRET});
        }
        options
    }

    /// Arguments of QEMU's tools for the image.
    pub fn source(&self) -> Vec<String> {
        if !self.luks {
            return ["-f", "qcow2", "image.qcow2"].map(str::to_owned).to_vec();
        }
        let object = format!("secret,id=key,data={PASSPHRASE}");
        let image = "driver=qcow2,encrypt.key-secret=key,file.filename=image.qcow2";
        ["--object", &object, "--image-opts", image].map(str::to_owned).to_vec()
    }

    /// The passphrase, if it takes one.
    pub fn passphrase(&self) -> Option<&'static str> {
        self.luks.then_some(PASSPHRASE)
    }
}
