//! virtio-blk numbers and the configuration space (virtio 1.3 §5.2).
//!
//! Used by `disk`, `session` and tests. Pure data.

use crate::wire::{u16_at, u32_at, u64_at};

/// Bytes of a logical sector in requests and in `capacity`, whatever the block size.
pub const SECTOR: u64 = 512;

/// Request types (§5.2.6).
#[allow(missing_docs)]
pub mod op {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const GET_LIFETIME: u32 = 10;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const SECURE_ERASE: u32 = 14;
}

/// Status bytes (§5.2.6).
#[allow(missing_docs)]
pub mod status {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
}

/// Feature bits as masks (§5.2.3).
#[allow(missing_docs)]
pub mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const GEOMETRY: u64 = 1 << 4;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const LIFETIME: u64 = 1 << 15;
    pub const SECURE_ERASE: u64 = 1 << 16;
    pub const ZONED: u64 = 1 << 17;
}

/// In a discard/write-zeroes segment: the sectors may be deallocated.
pub const SEGMENT_UNMAP: u32 = 1;

/// Offset of the `writeback` byte in the configuration space, the only one a driver may write.
pub const CONFIG_WRITEBACK: u32 = 32;

/// Bytes of the configuration space up to and including the zoned characteristics.
pub const CONFIG_SIZE: u32 = 96;

/// Bytes up to `write_zeroes_may_unmap` and its padding, what cloud-hypervisor reads.
pub const CONFIG_SIZE_CLOUD_HYPERVISOR: u32 = 60;

/// One segment of a discard, write-zeroes or secure-erase request.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// `SEGMENT_UNMAP` or reserved bits.
    pub flags: u32,
}

impl Segment {
    /// The 16 bytes of the request.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.sector.to_le_bytes().to_vec();
        out.extend_from_slice(&self.sectors.to_le_bytes());
        out.extend_from_slice(&self.flags.to_le_bytes());
        out
    }
}

/// `struct virtio_blk_config`; a field past the end of what was read is 0. Sectors are 512 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // field names are the specification's
pub struct Config {
    pub capacity: u64,
    pub size_max: u32,
    pub seg_max: u32,
    pub cylinders: u16,
    pub heads: u8,
    pub sectors: u8,
    pub blk_size: u32,
    pub physical_block_exp: u8,
    pub alignment_offset: u8,
    pub min_io_size: u16,
    pub opt_io_size: u32,
    pub writeback: u8,
    pub num_queues: u16,
    pub max_discard_sectors: u32,
    pub max_discard_seg: u32,
    pub discard_sector_alignment: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_write_zeroes_seg: u32,
    pub write_zeroes_may_unmap: u8,
    pub max_secure_erase_sectors: u32,
    pub max_secure_erase_seg: u32,
    pub secure_erase_sector_alignment: u32,
    pub zone_sectors: u32,
    pub max_open_zones: u32,
    pub max_active_zones: u32,
    pub max_append_sectors: u32,
    pub write_granularity: u32,
    pub zone_model: u8,
}

impl Config {
    /// Reads the structure from the bytes of GET_CONFIG.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let byte = |at: usize| bytes.get(at).copied().unwrap_or_default();
        let half = |at| u16_at(bytes, at).unwrap_or_default();
        let word = |at| u32_at(bytes, at).unwrap_or_default();
        Self {
            capacity: u64_at(bytes, 0).unwrap_or_default(),
            size_max: word(8),
            seg_max: word(12),
            cylinders: half(16),
            heads: byte(18),
            sectors: byte(19),
            blk_size: word(20),
            physical_block_exp: byte(24),
            alignment_offset: byte(25),
            min_io_size: half(26),
            opt_io_size: word(28),
            writeback: byte(32),
            num_queues: half(34),
            max_discard_sectors: word(36),
            max_discard_seg: word(40),
            discard_sector_alignment: word(44),
            max_write_zeroes_sectors: word(48),
            max_write_zeroes_seg: word(52),
            write_zeroes_may_unmap: byte(56),
            max_secure_erase_sectors: word(60),
            max_secure_erase_seg: word(64),
            secure_erase_sector_alignment: word(68),
            zone_sectors: word(72),
            max_open_zones: word(76),
            max_active_zones: word(80),
            max_append_sectors: word(84),
            write_granularity: word(88),
            zone_model: byte(92),
        }
    }
}
