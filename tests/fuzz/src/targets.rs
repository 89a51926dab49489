//! What is run on an input, and what must hold whatever the input is.
//!
//! A target answers an error text when an invariant is broken; panics are caught by `main`. Targets write nothing and
//! open nothing.

use drivers::image::luks::header as luks;
use drivers::image::qcow2::check::{self, Limits, Memory, check_memory};
use drivers::image::qcow2::codec;
use drivers::image::qcow2::format::bitmap::{self, TableEntry};
use drivers::image::qcow2::format::snapshot::{Snapshot, Step};
use drivers::image::qcow2::format::{
    Compression, Geometry, Header, L1Entry, L2Entry, Policy, RtEntry, SubBitmap,
};
use drivers::image::qcow2::format::{INCOMPAT_KNOWN, MAX_L1_BYTES, MAX_REFTABLE_BYTES, MAX_SNAPSHOT_EXTRA};
use drivers::image::qcow2::format::{entry, refcount};
use graph::CheckFix;

use crate::image;
use crate::mutate::{Random, mutate};

/// What a target says: nothing, or what is wrong.
pub type Verdict = Result<(), String>;

/// What is run.
pub trait Target {
    /// One execution. Answers the input where it was an image, for an oracle.
    fn run(&mut self, r: &mut Random) -> (Option<Vec<u8>>, Verdict);
    /// Most memory one execution may take above what was allocated before, bytes.
    fn memory(&self) -> usize;
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(what()) }
}

/// `qcow2-header`: the first cluster.
pub struct HeaderTarget {
    seeds: Vec<Vec<u8>>,
}

impl HeaderTarget {
    /// With what `corpus` holds.
    pub fn new(corpus: Vec<Vec<u8>>) -> HeaderTarget {
        let mut seeds = image::all();
        for s in &mut seeds {
            s.truncate(64 << 10);
        }
        seeds.extend(corpus);
        HeaderTarget { seeds }
    }
}

impl Target for HeaderTarget {
    fn run(&mut self, r: &mut Random) -> (Option<Vec<u8>>, Verdict) {
        let mut bytes = image::any(r, &self.seeds);
        mutate(&mut bytes, 600, r);
        let policy = Policy { writable: r.below(2) == 0, check: r.below(2) == 0, inspect: r.below(2) == 0 };
        let verdict = header(&bytes, policy);
        (None, verdict)
    }

    fn memory(&self) -> usize {
        // The input, the cluster made whole (2 MiB), extensions out of it, the serialised one.
        10 << 20
    }
}

fn header(bytes: &[u8], policy: Policy) -> Verdict {
    let h = match Header::parse(bytes, policy) {
        Ok(h) => h,
        Err(e) => return ensure(!e.message.is_empty(), || format!("an error without words: {e:?}")),
    };
    let g = h.geometry();
    ensure((9..=21).contains(&g.cluster_bits()) && g.refcount_order() <= 6, || format!("shape {g:?}"))?;
    ensure(h.incompatible & !INCOMPAT_KNOWN == 0, || format!("features {:#x}", h.incompatible))?;
    ensure(h.l1_bytes() <= MAX_L1_BYTES && h.reftable_bytes() <= MAX_REFTABLE_BYTES, || {
        format!("tables {h:?}")
    })?;
    ensure(h.virtual_size() <= i64::MAX as u64, || "size".into())?;
    ensure(u64::from(h.l1_size) >= g.l1_entries_for(h.size), || "L1 too small".into())?;
    ensure(h.l1_offset.checked_add(h.l1_bytes()).is_some(), || "L1 past 2^64".into())?;
    ensure(policy.check || h.reftable_clusters != 0, || "no refcount table".into())?;
    // What is written is what was read.
    let Ok(out) = h.serialise() else { return Ok(()) };
    let mut again = Header::parse(&out, policy).map_err(|e| format!("our own header is refused: {e}"))?;
    let mut first = h;
    again.feature_names.clear();
    first.feature_names.clear();
    ensure(again == first, || format!("{first:?}\nbecame\n{again:?}"))
}

/// `qcow2-tables`: entries, snapshot table, bitmap directory, compressed clusters.
pub struct TablesTarget {
    snapshots: Vec<u8>,
    directory: Vec<u8>,
    streams: Vec<(Compression, Vec<u8>)>,
}

impl TablesTarget {
    /// With seeds of its own.
    pub fn new() -> TablesTarget {
        let mut snapshots = Vec::new();
        for n in 0..3u8 {
            let s = Snapshot {
                l1_offset: 0x10000 * u64::from(n),
                l1_size: 4,
                id: vec![b'1' + n],
                name: b"a name".to_vec(),
                date_sec: 1,
                date_nsec: 2,
                vm_clock_nsec: 3,
                vm_state_size: 1 << 33,
                disk_size: Some(1 << 20),
                icount: Some(5),
                extra_size: 24,
                unknown_extra: vec![n; usize::from(n) * 3],
            };
            // Cannot fail: short names.
            let _ = s.serialise(0, &mut snapshots);
        }
        let entries: Vec<bitmap::DirEntry> = (1..4)
            .map(|n| bitmap::DirEntry {
                table_offset: n << 16,
                table_size: 1,
                flags: n as u32 & 3,
                granularity_bits: 16,
                name: format!("bitmap {n}").into_bytes(),
            })
            .collect();
        let plain: Vec<u8> = (0..4096u32).map(|i| ((i * i) >> 7) as u8).collect();
        let streams = [Compression::Deflate, Compression::Zstd]
            .into_iter()
            .filter_map(|kind| codec::compress(kind, &plain).map(|c| (kind, c)))
            .collect();
        TablesTarget { snapshots, directory: bitmap::serialise_directory(&entries), streams }
    }
}

impl Target for TablesTarget {
    fn run(&mut self, r: &mut Random) -> (Option<Vec<u8>>, Verdict) {
        let g = loop {
            let new = Geometry::new(
                9 + r.below(13) as u32,
                r.below(7) as u32,
                r.below(2) == 0,
                r.below(4) != 0,
                r.below(4) == 0,
            );
            if let Some(g) = new {
                break g;
            }
        };
        let verdict = match r.below(16) {
            0..=3 => self.snapshots(r),
            4..=7 => self.directory(g, r),
            8..=9 => self.stream(r),
            _ => words(g, r),
        };
        (None, verdict)
    }

    fn memory(&self) -> usize {
        // A Zstandard frame may ask for a window of 8 MiB, which its thread keeps.
        24 << 20
    }
}

impl TablesTarget {
    fn snapshots(&self, r: &mut Random) -> Verdict {
        let mut bytes = self.snapshots.clone();
        let near = bytes.len();
        mutate(&mut bytes, near, r);
        let mut at = 0;
        for i in 0..8 {
            let Some(rest) = bytes.get(at..) else { return Ok(()) };
            match Snapshot::parse(rest, i, 0, MAX_SNAPSHOT_EXTRA) {
                Ok(Step::Entry(s, used)) => {
                    ensure(used <= rest.len().next_multiple_of(8) && used >= 40, || format!("used {used}"))?;
                    at += used;
                    let mut out = Vec::new();
                    if s.serialise(7, &mut out).is_err() {
                        continue;
                    }
                    match Snapshot::parse(&out, i, 0, u32::MAX) {
                        Ok(Step::Entry(again, len)) => {
                            ensure(len == out.len(), || "length".into())?;
                            let mut want = *s.clone();
                            want.disk_size = Some(s.disk_size.unwrap_or(7));
                            want.extra_size = again.extra_size;
                            ensure(*again == want, || format!("{want:?}\nbecame\n{again:?}"))?;
                        }
                        other => return Err(format!("our own entry: {other:?}")),
                    }
                }
                Ok(Step::Need(n)) => {
                    return ensure(n > rest.len(), || format!("needs {n} of {}", rest.len()));
                }
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }

    fn directory(&self, g: Geometry, r: &mut Random) -> Verdict {
        let mut bytes = self.directory.clone();
        let near = bytes.len();
        mutate(&mut bytes, near, r);
        let count = if r.below(8) == 0 { r.next() as u32 } else { 3 };
        let Ok(all) = bitmap::parse_directory(&bytes, count, 1 << 20, g) else { return Ok(()) };
        ensure(all.len() == count as usize, || "count".into())?;
        for e in &all {
            ensure(u64::from(e.table_size) * g.cluster_size() <= bitmap::MAX_DATA_BYTES, || {
                format!("{e:?}")
            })?;
            let _ = e.check_table_size(1 << 40, g);
        }
        let again = bitmap::parse_directory(&bitmap::serialise_directory(&all), count, 1 << 20, g);
        ensure(again.as_ref() == Ok(&all), || format!("{all:?}\nbecame\n{again:?}"))
    }

    fn stream(&self, r: &mut Random) -> Verdict {
        let (kind, seed) = &self.streams[r.below(self.streams.len())];
        let mut bytes = seed.clone();
        let near = bytes.len();
        mutate(&mut bytes, near, r);
        let mut out = vec![0xee; 4096 + 16];
        let _ = codec::decompress(*kind, &bytes, &mut out[..4096]);
        ensure(out[4096..].iter().all(|&b| b == 0xee), || "wrote past the cluster".into())
    }
}

/// Single entries of all tables.
fn words(g: Geometry, r: &mut Random) -> Verdict {
    let word = match r.below(3) {
        0 => r.next(),
        1 => r.next() & 0x80ff_ffff_ffff_0001 & !(g.cluster_size() - 2),
        _ => r.next() & r.next(),
    };
    let bitmap = SubBitmap(if r.below(2) == 0 { r.next() & r.next() } else { r.next() & 0xffff_ffff });
    if let Ok(e) = L2Entry::decode(word, bitmap.0, g) {
        if let Some((host, len)) = e.host_range(g) {
            ensure(host.checked_add(len).is_some() && len <= 2 * g.cluster_size(), || {
                format!("range of {e:?}")
            })?;
        }
        let again = L2Entry::decode(e.encode(g), bitmap.0, g);
        let same = again == Ok(e) || matches!(e, L2Entry::Zero { host: None, copied: true });
        ensure(same, || format!("{e:?} became {again:?}"))?;
        let mut at = 0;
        while at < 32 {
            let (kind, n) = bitmap.run(e, at);
            ensure(n >= 1 && at + n <= 32, || format!("run of {n} at {at}"))?;
            ensure((at..at + n).all(|i| bitmap.kind(e, i) == kind), || format!("mixed run {kind:?}"))?;
            at += n;
        }
    }
    let _ = L2Entry::decode_at(word, bitmap.0, r.next() & !(g.cluster_size() - 1), g)
        .map_err(|e| e.l2_message(0, 0));
    let _ = L1Entry(word).table(g).map_err(|e| e.l1_message(3));
    let _ = RtEntry(word).block(g);
    let _ = TableEntry::decode(word, g);
    let (offset, len) = (r.next() & g.compressed_offset_mask() >> 1, 1 + r.next() % g.cluster_size());
    let (o, l) = entry::compressed_range(entry::compressed_word(offset, len, g), g);
    ensure(o == offset && l >= len && l < len + 512, || format!("compressed {offset} {len}: {o} {l}"))?;
    let order = g.refcount_order();
    let mut block = [0u8; 64];
    let n = 512 >> order;
    let (i, j) = (r.below(n), r.below(n));
    let value = r.next() & refcount::max(order);
    refcount::set(&mut block, order, i, value);
    let elsewhere = refcount::get(&block, order, j);
    ensure(refcount::get(&block, order, i) == value, || "refcount".into())?;
    ensure(i == j || elsewhere == 0, || "refcount of a neighbour".into())
}

/// `qcow2-check`: checking and repairing a whole small image.
pub struct CheckTarget {
    seeds: Vec<Vec<u8>>,
}

impl CheckTarget {
    /// With what `corpus` holds.
    pub fn new(corpus: Vec<Vec<u8>>) -> CheckTarget {
        let mut seeds = image::all();
        seeds.extend(corpus);
        CheckTarget { seeds }
    }
}

/// What an image in memory may grow to.
const GROWTH: u64 = 4 << 20;

impl Target for CheckTarget {
    fn run(&mut self, r: &mut Random) -> (Option<Vec<u8>>, Verdict) {
        let mut bytes = image::any(r, &self.seeds);
        let near = if r.below(4) == 0 { 112 } else { bytes.len() };
        mutate(&mut bytes, near, r);
        let verdict = self.check(&bytes, r);
        (Some(bytes), verdict)
    }

    fn memory(&self) -> usize {
        // L1 32 MiB as bytes and words, refcount table the same way 8 MiB, counters, blocks, snapshots, the image twice.
        128 << 20
    }
}

impl CheckTarget {
    fn check(&self, bytes: &[u8], r: &mut Random) -> Verdict {
        let limits = Limits { counters: 16 << 20 };
        let memory = Memory::new(bytes.to_vec(), GROWTH);
        let looked = check_memory(&memory, CheckFix::NONE, limits);
        ensure(memory.into_inner() == bytes, || "a look has written".into())?;
        let fix = CheckFix { leaks: true, errors: r.below(4) != 0 };
        let memory = Memory::new(bytes.to_vec(), GROWTH);
        let repaired = check_memory(&memory, fix, limits);
        let after = memory.into_inner();
        let clean = |r: &Result<_, check::CheckFailed>| {
            matches!(r, Ok(graph::CheckReport { check_errors: 0, corruptions: 0, .. }))
        };
        if clean(&looked) {
            ensure(clean(&repaired), || format!("repair of a good image: {repaired:?}"))?;
        }
        if let Ok(report) = &repaired
            && report.check_errors == 0
            && report.corruptions == 0
        {
            let again = check_memory(&Memory::new(after, GROWTH), CheckFix::NONE, limits);
            match again {
                Ok(a) if a.check_errors == 0 && a.corruptions == 0 && a.leaks == 0 => {}
                other => return Err(format!("after a repair: {report:#?}\nthe next look says {other:#?}")),
            }
        }
        Ok(())
    }
}

/// `luks-header`: the header of an encrypted image.
pub struct LuksTarget {
    seed: Vec<u8>,
}

impl LuksTarget {
    /// With a good header of our own making.
    pub fn new() -> LuksTarget {
        let mut seed = vec![0; luks::HEADER_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(to) = seed.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        };
        put(0, &luks::MAGIC);
        put(6, &1u16.to_be_bytes());
        for (at, name) in [(8, "aes"), (40, "xts-plain64"), (72, "sha256"), (168, "1b4e28ba-2fa1-41d2")] {
            put(at, name.as_bytes());
        }
        for (at, number) in [(104, 4040u32), (108, 64), (164, 1000)] {
            put(at, &number.to_be_bytes());
        }
        for slot in 0..8u32 {
            let at = 208 + 48 * slot as usize;
            put(at, &if slot == 0 { 0x00AC_71F3u32 } else { 0x0000_DEAD }.to_be_bytes());
            put(at + 4, &1000u32.to_be_bytes());
            put(at + 40, &(8 + 504 * slot).to_be_bytes());
            put(at + 44, &4000u32.to_be_bytes());
        }
        LuksTarget { seed }
    }
}

impl Target for LuksTarget {
    fn run(&mut self, r: &mut Random) -> (Option<Vec<u8>>, Verdict) {
        /// What else the names may be, so that mutations get past them.
        const NAMES: [(usize, &str); 10] = [
            (8, "serpent"),
            (8, "twofish"),
            (8, "cast5"),
            (40, "cbc-essiv:sha256"),
            (40, "cbc-plain"),
            (40, "ecb-plain64"),
            (40, "xts-plain64:nothing"),
            (40, "cbc-essiv:md5"),
            (72, "sha1"),
            (72, "ripemd160"),
        ];
        let mut bytes = self.seed.clone();
        for _ in 0..r.below(3) {
            let Some((at, name)) = NAMES.get(r.below(NAMES.len())) else { continue };
            if let Some(field) = bytes.get_mut(*at..*at + 32) {
                field.fill(0);
                field.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
            }
        }
        if r.below(2) == 0 {
            let len = [16u32, 24, 32, 48, 64].get(r.below(5)).copied().unwrap_or(16);
            if let Some(field) = bytes.get_mut(108..112) {
                field.copy_from_slice(&len.to_be_bytes());
            }
        }
        if r.below(8) != 0 {
            mutate(&mut bytes, luks::HEADER_LEN, r);
        }
        bytes.resize(luks::HEADER_LEN, 0);
        let verdict = match bytes.first_chunk() {
            Some(raw) => [luks::Place::Attached, luks::Place::Detached]
                .into_iter()
                .try_for_each(|place| luks_header(raw, place)),
            None => Err("a header of another length".to_owned()),
        };
        (None, verdict)
    }

    fn memory(&self) -> usize {
        64 << 10
    }
}

fn luks_header(raw: &[u8; luks::HEADER_LEN], place: luks::Place) -> Verdict {
    let h = match luks::Header::parse(raw, place) {
        Ok(h) => h,
        Err(e) => return ensure(!e.to_string().is_empty(), || "an error without words".into()),
    };
    let material: Vec<(u64, u64)> = h.material().map(|(_, at, len)| (at, at + len as u64)).collect();
    for (i, (start, end)) in material.iter().enumerate() {
        ensure(*start >= 4096 && end - start <= 256_512, || format!("material at {start}..{end}"))?;
        let inside = place == luks::Place::Detached || *end <= h.payload_offset();
        ensure(inside, || format!("material {start}..{end} over the data at {}", h.payload_offset()))?;
        let alone = material.iter().skip(i + 1).all(|(s, e)| s >= end || start >= e);
        ensure(alone, || format!("two slots at {start}..{end}"))?;
    }
    let again = luks::Header::parse(&h.serialise(), place).map_err(|e| format!("our own is refused: {e}"))?;
    ensure(again == h, || format!("{h:?}\nbecame\n{again:?}"))
}
