//! What the queries are told of an image; QEMU's names.
//!
//! Called on the main thread. Must not wait.

use graph::{DriverInfo, SnapshotInfo};
use serde_json::{Map, Value, json};

use crate::qcow2::format::{Compression, CryptMethod};
use crate::qcow2::node::Qcow2;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Qcow2 {
    /// `ImageInfo` and what goes with it.
    pub(super) fn driver_info(&self) -> DriverInfo {
        let header = self.header();
        DriverInfo {
            cluster_size: Some(self.geo.cluster_size() as u32),
            encrypted: header.crypt != CryptMethod::None,
            dirty: header.dirty(),
            backing_file: header.backing_file.as_deref().map(text),
            backing_format: header.backing_format.as_deref().map(text),
            format_specific: {
                let crypt = header.crypt;
                let mut data = self.specific(&header);
                if crypt != CryptMethod::None {
                    data.insert("encrypt".into(), self.encrypt_info(crypt));
                }
                Some(json!({"type": "qcow2", "data": data}))
            },
            ..DriverInfo::default()
        }
    }

    fn specific(&self, header: &crate::qcow2::format::Header) -> Map<String, Value> {
        let mut data = Map::new();
        let mut put = |name: &str, value: Value| data.insert(name.to_owned(), value);
        put("compat", json!(if header.version >= 3 { "1.1" } else { "0.10" }));
        put(
            "compression-type",
            json!(match header.compression {
                Compression::Deflate => "zlib",
                Compression::Zstd => "zstd",
            }),
        );
        put("refcount-bits", json!(1u32 << self.geo.refcount_order()));
        if header.version >= 3 {
            put("lazy-refcounts", json!(header.lazy_refcounts()));
            put("corrupt", json!(header.corrupt()));
            put("extended-l2", json!(self.geo.extended_l2()));
            if header.has_data_file() {
                if let Some(name) = header.data_file.as_deref() {
                    put("data-file", json!(text(name)));
                }
                put("data-file-raw", json!(self.settings.data_file_raw));
            }
        }
        if let Some(bitmaps) = self.bitmaps.info() {
            data.insert("bitmaps".to_owned(), bitmaps);
        }
        data
    }

    fn encrypt_info(&self, method: CryptMethod) -> Value {
        let mut info = self.crypt_info.clone();
        info.insert("format".into(), json!(if method == CryptMethod::Luks { "luks" } else { "aes" }));
        Value::Object(info)
    }

    /// The internal snapshots.
    pub(crate) fn snapshot_list(&self) -> Vec<SnapshotInfo> {
        let size = self.size();
        let snapshots = self.snapshots();
        let info = |s: &crate::qcow2::format::snapshot::Snapshot| SnapshotInfo {
            id: text(&s.id),
            name: text(&s.name),
            vm_state_size: s.vm_state_size,
            date_sec: s.date_sec,
            date_nsec: s.date_nsec,
            vm_clock_nsec: s.vm_clock_nsec,
            icount: s.icount,
            disk_size: s.disk_size.unwrap_or(size),
        };
        snapshots.iter().map(info).collect()
    }
}
