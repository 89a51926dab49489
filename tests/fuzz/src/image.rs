//! Small valid images to start from, made in memory.
//!
//! Used by the header and check targets; QEMU's checker finds nothing in them (`--oracle` shows it).

use drivers::image::qcow2::format::bitmap::{self, DirEntry};
use drivers::image::qcow2::format::snapshot::Snapshot;
use drivers::image::qcow2::format::{
    AUTOCLEAR_BITMAPS, BitmapsExt, COPIED, Compression, Geometry, Header, UnknownExt, entry, refcount,
};

use crate::mutate::Random;

/// Shapes: cluster bits, refcount order, extended L2, version 3, data file.
const SHAPES: [(u32, u32, bool, bool, bool); 8] = [
    (9, 4, false, true, false),
    (9, 6, false, true, false),
    (9, 0, false, true, false),
    (10, 4, false, false, false),
    (12, 2, false, true, false),
    (14, 4, true, true, false),
    (9, 4, false, true, true),
    (16, 4, false, true, false),
];

/// How many there are.
pub const COUNT: usize = SHAPES.len() * 2;

struct Builder {
    bytes: Vec<u8>,
    counts: Vec<u64>,
    geo: Geometry,
}

impl Builder {
    fn alloc(&mut self, clusters: usize) -> u64 {
        let at = self.counts.len() as u64;
        self.counts.resize(self.counts.len() + clusters, 1);
        let size = self.geo.cluster_size();
        self.bytes.resize(self.counts.len() * size as usize, 0);
        at * size
    }

    fn put(&mut self, at: u64, data: &[u8]) {
        self.bytes[at as usize..at as usize + data.len()].copy_from_slice(data);
    }
}

/// The `which`-th image; `None` for a shape that is not valid.
pub fn build(which: usize) -> Option<Vec<u8>> {
    let (bits, order, extended, v3, data_file) = SHAPES[which % SHAPES.len()];
    let rich = which >= SHAPES.len() && !data_file && order != 0;
    let geo = Geometry::new(bits, order, extended, v3, data_file)?;
    let size = geo.cluster_size() * 40;
    let mut h = Header::new(if v3 { 3 } else { 2 }, geo, size);
    let mut b = Builder { bytes: Vec::new(), counts: Vec::new(), geo };
    b.alloc(1);
    h.reftable_clusters = 1;
    h.reftable_offset = b.alloc(1);
    let blocks: Vec<u64> = (0..2).map(|_| b.alloc(1)).collect();
    h.l1_size = geo.l1_entries_for(size) as u32;
    h.l1_offset = b.alloc(geo.clusters(h.l1_bytes()) as usize);
    let l2 = b.alloc(1);
    b.put(h.l1_offset, &(l2 | COPIED).to_be_bytes());
    let step = geo.l2_entry_size();
    for i in 0..6u64 {
        let host = if data_file { i * geo.cluster_size() } else { b.alloc(1) };
        b.put(l2 + i * step, &(host | COPIED).to_be_bytes());
        if extended {
            b.put(l2 + i * step + 8, &(0x0000_ff00_00ff_00ffu64).to_be_bytes());
        }
    }
    if v3 && !extended {
        b.put(l2 + 7 * step, &1u64.to_be_bytes());
    }
    if !data_file {
        let packed = b.alloc(1);
        b.put(l2 + 8 * step, &entry::compressed_word(packed + 3, 300, geo).to_be_bytes());
    }
    if data_file {
        h.data_file = Some(b"data.raw".to_vec());
    } else {
        h.backing_file = Some(b"base.img".to_vec());
        h.backing_format = Some(b"raw".to_vec());
    }
    h.unknown_extensions.push(UnknownExt { magic: 0x1234_5678, data: vec![7; 9] });
    if rich {
        snapshot(&mut b, &mut h, l2)?;
        if v3 {
            bitmaps(&mut b, &mut h);
        }
    }
    if bits == 12 {
        h.compression = Compression::Zstd;
    }
    finish(b, &h, &blocks)
}

fn snapshot(b: &mut Builder, h: &mut Header, l2: u64) -> Option<()> {
    let l1 = b.alloc(b.geo.clusters(h.l1_bytes()) as usize);
    b.put(l1, &l2.to_be_bytes());
    let s = Snapshot {
        l1_offset: l1,
        l1_size: h.l1_size,
        id: b"1".to_vec(),
        name: b"one".to_vec(),
        date_sec: 1,
        date_nsec: 2,
        vm_clock_nsec: 3,
        vm_state_size: 0,
        disk_size: Some(h.size),
        icount: None,
        extra_size: 24,
        unknown_extra: Vec::new(),
    };
    let mut table = Vec::new();
    s.serialise(h.size, &mut table).ok()?;
    h.snapshot_count = 1;
    h.snapshots_offset = b.alloc(1);
    b.put(h.snapshots_offset, &table);
    // Everything below the shared table counts once more, and nothing is COPIED.
    let bits = b.geo.cluster_bits();
    b.counts[(l2 >> bits) as usize] += 1;
    b.put(h.l1_offset, &l2.to_be_bytes());
    for i in 0..9 {
        let at = (l2 + i * b.geo.l2_entry_size()) as usize;
        let word = u64::from_be_bytes(b.bytes.get(at..at + 8)?.try_into().ok()?);
        if word & (1 << 62) != 0 {
            let (offset, _) = entry::compressed_range(word, b.geo);
            b.counts[(offset >> bits) as usize] += 1;
        } else if word & !1 != 0 {
            b.put(at as u64, &(word & !COPIED).to_be_bytes());
            b.counts[((word & !COPIED) >> bits) as usize] += 1;
        }
    }
    Some(())
}

fn bitmaps(b: &mut Builder, h: &mut Header) {
    let data = b.alloc(1);
    let table = b.alloc(1);
    b.put(table, &data.to_be_bytes());
    let entry = DirEntry {
        table_offset: table,
        table_size: bitmap::table_entries(h.size, 16, b.geo) as u32,
        flags: bitmap::FLAG_AUTO,
        granularity_bits: 16,
        name: b"dirty".to_vec(),
    };
    let directory = bitmap::serialise_directory(&[entry]);
    let at = b.alloc(1);
    b.put(at, &directory);
    h.autoclear |= AUTOCLEAR_BITMAPS;
    h.bitmaps = Some(BitmapsExt { count: 1, directory_size: directory.len() as u64, directory_offset: at });
}

fn finish(mut b: Builder, h: &Header, blocks: &[u64]) -> Option<Vec<u8>> {
    let per_block = b.geo.refblock_entries() as usize;
    for (i, &block) in blocks.iter().enumerate() {
        b.put(h.reftable_offset + i as u64 * 8, &block.to_be_bytes());
        let mut bytes = vec![0; b.geo.cluster_size() as usize];
        for j in 0..per_block {
            let n = b.counts.get(i * per_block + j).copied().unwrap_or(0);
            refcount::set(&mut bytes, b.geo.refcount_order(), j, n);
        }
        b.put(block, &bytes);
    }
    let first = h.serialise().ok()?;
    b.put(0, &first);
    Some(b.bytes)
}

/// One of them.
pub fn any(r: &mut Random, all: &[Vec<u8>]) -> Vec<u8> {
    all[r.below(all.len())].clone()
}

/// All of them.
pub fn all() -> Vec<Vec<u8>> {
    (0..COUNT).filter_map(build).collect()
}
