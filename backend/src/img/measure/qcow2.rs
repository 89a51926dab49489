//! How much of a qcow2 file is not data: header, tables and refcounts of an image whose clusters are all there.
//!
//! Arithmetic of the format (docs/interop/qcow2.rst), called by `measure` alone.

use super::super::failure::Failure;
use super::super::layout::Options;
use super::super::size;

/// Largest active L1 table, bytes.
const MAX_L1: u64 = 32 << 20;
/// Bytes of a LUKS header with its key slots, for 64-byte keys.
const LUKS_HEADER: u64 = 2_068_480;

/// What matters of the options.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Bytes of a cluster.
    pub cluster: u64,
    /// All clusters are there from the start.
    pub preallocated: bool,
    /// There is an image below.
    pub backed: bool,
    /// Bitmaps can be stored.
    pub has_bitmaps: bool,
    l2_entry: u64,
    refcount_bits: u64,
    encrypted: bool,
}

impl Layout {
    /// From the options of the image.
    ///
    /// # Errors
    /// One of them has a value there cannot be.
    pub fn new(options: &Options) -> Result<Layout, Failure> {
        let on = |name: &str| matches!(options.get(name), Some("on" | "yes" | "true"));
        let number = |name: &str, default: u64| match options.get(name) {
            None => Ok(default),
            Some(text) => {
                size::parse(text).ok_or_else(|| Failure::new(format!("Parameter '{name}' expects a number")))
            }
        };
        let cluster = number("cluster-size", 65536)?;
        if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
            return Err(Failure::new("Cluster size must be a power of two between 512 and 2048k"));
        }
        let refcount_bits = number("refcount-bits", 16)?;
        if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
            return Err(Failure::new("Refcount width must be a power of two and may not exceed 64 bits"));
        }
        let old = matches!(options.get("compat"), Some("0.10" | "v2"));
        if old && refcount_bits != 16 {
            return Err(Failure::new(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
            ));
        }
        let extended = on("extended-l2");
        if extended && cluster < 16 << 10 {
            return Err(Failure::new(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
        let preallocated = match options.get("preallocation") {
            None | Some("off" | "metadata") => false,
            Some("falloc" | "full") => true,
            Some(other) => return Err(Failure::new(format!("Invalid parameter value: {other}"))),
        };
        Ok(Layout {
            cluster,
            preallocated,
            backed: options.get("backing-file").is_some(),
            has_bitmaps: !old,
            l2_entry: if extended { 16 } else { 8 },
            refcount_bits,
            encrypted: options.get("encrypt.format") == Some("luks"),
        })
    }

    /// Bytes of everything but data, for a disk of `size` bytes (whole clusters). `None`: no L1 table is long enough.
    pub fn metadata(&self, size: u64) -> Option<u64> {
        let cluster = self.cluster;
        let clusters = size / cluster;
        let l2 = clusters.checked_next_multiple_of(cluster / self.l2_entry)?.checked_mul(self.l2_entry)?;
        let l1_bytes = (l2 / cluster).checked_mul(8)?;
        if l1_bytes > MAX_L1 {
            return None;
        }
        let l1 = l1_bytes.next_multiple_of(cluster);
        let tables = cluster.checked_add(l2)?.checked_add(l1)?;
        let counted = tables.checked_add(size)? / cluster;
        let encryption = if self.encrypted { LUKS_HEADER.next_multiple_of(cluster) } else { 0 };
        tables.checked_add(self.refcounts(counted)?)?.checked_add(encryption)
    }

    /// Bytes of the refcount structures for so many clusters, which count themselves too.
    fn refcounts(&self, clusters: u64) -> Option<u64> {
        let per_block = self.cluster * 8 / self.refcount_bits;
        let per_table = self.cluster / 8;
        let (mut blocks, mut table) = (0u64, 0u64);
        loop {
            let all = clusters.checked_add(blocks)?.checked_add(table)?;
            let (more_blocks, more_table) =
                (all.div_ceil(per_block), all.div_ceil(per_block).div_ceil(per_table));
            if (more_blocks, more_table) == (blocks, table) {
                return (blocks + table).checked_mul(self.cluster);
            }
            (blocks, table) = (more_blocks, more_table);
        }
    }
}
