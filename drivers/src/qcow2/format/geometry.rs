//! What follows from cluster size, L2 entry size and refcount width: indexes, counts, masks.
//!
//! Used by every part of the driver; made only from validated numbers, so that no shift here can overflow.

use super::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};

/// The shape of an image. `Copy`, three bytes of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u8,
    refcount_order: u8,
    extended: bool,
    v3: bool,
    data_file: bool,
}

impl Geometry {
    /// `None` if a number is out of range: 9…21 cluster bits, at least 14 with extended L2 entries, refcount order 0…6.
    pub fn new(
        cluster_bits: u32,
        refcount_order: u32,
        extended: bool,
        v3: bool,
        data_file: bool,
    ) -> Option<Geometry> {
        let least = if extended { 14 } else { MIN_CLUSTER_BITS };
        if !(least..=MAX_CLUSTER_BITS).contains(&cluster_bits) || refcount_order > 6 {
            return None;
        }
        Some(Geometry {
            cluster_bits: cluster_bits as u8,
            refcount_order: refcount_order as u8,
            extended,
            v3,
            data_file,
        })
    }

    /// log2 of the cluster size, 9…21.
    pub fn cluster_bits(self) -> u32 {
        u32::from(self.cluster_bits)
    }

    /// Bytes, 512…2 MiB.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the width of a refcount in bits, 0…6.
    pub fn refcount_order(self) -> u32 {
        u32::from(self.refcount_order)
    }

    /// Largest refcount that can be stored.
    pub fn max_refcount(self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// Whether L2 entries are 16 bytes with a bitmap of 32 subclusters.
    pub fn extended_l2(self) -> bool {
        self.extended
    }

    /// Whether the image is of version 3 (ZERO flag allowed).
    pub fn v3(self) -> bool {
        self.v3
    }

    /// Whether guest data lies in an external data file.
    pub fn data_file(self) -> bool {
        self.data_file
    }

    /// Bytes of an L2 entry, 8 or 16.
    pub fn l2_entry_size(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// log2 of the entries of an L2 table.
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits() - if self.extended { 4 } else { 3 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// log2 of the guest bytes one L1 entry covers.
    pub fn l1_shift(self) -> u32 {
        self.cluster_bits() + self.l2_bits()
    }

    /// Guest bytes one L1 entry covers.
    pub fn bytes_per_l1_entry(self) -> u64 {
        1 << self.l1_shift()
    }

    /// L1 entries a disk of `size` bytes needs. Does not overflow.
    pub fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.bytes_per_l1_entry())
    }

    /// Which L1 entry covers a guest offset.
    pub fn l1_index(self, guest: u64) -> u64 {
        guest >> self.l1_shift()
    }

    /// Which entry of its L2 table covers a guest offset.
    pub fn l2_index(self, guest: u64) -> u64 {
        (guest >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// 32 with extended L2 entries, else 1.
    pub fn subclusters(self) -> u32 {
        if self.extended { 32 } else { 1 }
    }

    /// log2 of the subcluster size; the cluster's without extended L2.
    pub fn subcluster_bits(self) -> u32 {
        self.cluster_bits() - if self.extended { 5 } else { 0 }
    }

    /// Bytes of a subcluster.
    pub fn subcluster_size(self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// Which subcluster of its cluster an offset lies in.
    pub fn subcluster_index(self, offset: u64) -> u32 {
        (self.in_cluster(offset) >> self.subcluster_bits()) as u32
    }

    /// Offset within the cluster.
    pub fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Start of the cluster an offset lies in.
    pub fn start_of_cluster(self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// Clusters `bytes` need. Does not overflow.
    pub fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// `bytes` rounded up to clusters; `None` if that exceeds 64 bits.
    pub fn round_up(self, bytes: u64) -> Option<u64> {
        bytes.checked_next_multiple_of(self.cluster_size())
    }

    /// log2 of the refcounts of a refcount block.
    pub fn refblock_bits(self) -> u32 {
        self.cluster_bits() + 3 - self.refcount_order()
    }

    /// Refcounts of a refcount block.
    pub fn refblock_entries(self) -> u64 {
        1 << self.refblock_bits()
    }

    /// Which refcount table entry covers a host cluster.
    pub fn reftable_index(self, cluster: u64) -> u64 {
        cluster >> self.refblock_bits()
    }

    /// Which entry of its refcount block belongs to a host cluster.
    pub fn refblock_index(self, cluster: u64) -> u64 {
        cluster & (self.refblock_entries() - 1)
    }

    /// Refcount table entries of one cluster of the table.
    pub fn reftable_entries_per_cluster(self) -> u64 {
        self.cluster_size() / 8
    }

    /// Where the number of sectors begins in the descriptor of a compressed cluster ("Compressed Clusters Descriptor").
    pub fn csize_shift(self) -> u32 {
        62 - (self.cluster_bits() - 8)
    }

    /// Largest value of the "additional sectors" field.
    pub fn csize_mask(self) -> u64 {
        (1 << (self.cluster_bits() - 8)) - 1
    }

    /// Mask of the host offset of a compressed cluster.
    pub fn compressed_offset_mask(self) -> u64 {
        (1 << self.csize_shift()) - 1
    }
}
