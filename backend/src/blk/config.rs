//! The device's configuration space and feature bits, derived from the node's limits and the export's options.
//!
//! Built by the export when it opens, read by the vhost-user session. Must not know rings or requests.
//! Layout and meaning: virtio 1.3 §5.2.3 (feature bits) and §5.2.4 (`struct virtio_blk_config`).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use graph::Limits;
use virtio_bindings::bindings::virtio_blk as b;

/// Bytes of `struct virtio_blk_config` that we fill: up to and including `unused1` after
/// `write_zeroes_may_unmap` (virtio 1.3 §5.2.4). Front ends that ask for more read zeroes.
pub const CONFIG_LEN: usize = 60;
/// Offset of `writeback` (the cache mode), the only byte a driver may write (virtio 1.3 §5.2.4).
pub const WCE_OFFSET: u32 = 32;
/// A sector as the virtio-blk protocol counts: always 512 bytes (virtio 1.3 §5.2.4).
pub const SECTOR: u64 = 512;
/// Largest transfer of one segment that we announce (`size_max`), in bytes.
const SIZE_MAX: u32 = 1 << 30;
/// Sectors one discard or write-zeroes segment may cover: 1 GiB, so that one segment never holds a ring for long.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Segments of one discard or write-zeroes request that we accept.
pub const MAX_RANGE_SEGMENTS: u32 = 64;

/// Device feature bits, as masks.
pub mod feature {
    /// `VIRTIO_BLK_F_SIZE_MAX`
    pub const SIZE_MAX: u64 = 1 << super::b::VIRTIO_BLK_F_SIZE_MAX;
    /// `VIRTIO_BLK_F_SEG_MAX`
    pub const SEG_MAX: u64 = 1 << super::b::VIRTIO_BLK_F_SEG_MAX;
    /// `VIRTIO_BLK_F_RO`
    pub const RO: u64 = 1 << super::b::VIRTIO_BLK_F_RO;
    /// `VIRTIO_BLK_F_BLK_SIZE`
    pub const BLK_SIZE: u64 = 1 << super::b::VIRTIO_BLK_F_BLK_SIZE;
    /// `VIRTIO_BLK_F_FLUSH`
    pub const FLUSH: u64 = 1 << super::b::VIRTIO_BLK_F_FLUSH;
    /// `VIRTIO_BLK_F_TOPOLOGY`
    pub const TOPOLOGY: u64 = 1 << super::b::VIRTIO_BLK_F_TOPOLOGY;
    /// `VIRTIO_BLK_F_CONFIG_WCE`
    pub const CONFIG_WCE: u64 = 1 << super::b::VIRTIO_BLK_F_CONFIG_WCE;
    /// `VIRTIO_BLK_F_MQ`
    pub const MQ: u64 = 1 << super::b::VIRTIO_BLK_F_MQ;
    /// `VIRTIO_BLK_F_DISCARD`
    pub const DISCARD: u64 = 1 << super::b::VIRTIO_BLK_F_DISCARD;
    /// `VIRTIO_BLK_F_WRITE_ZEROES`
    pub const WRITE_ZEROES: u64 = 1 << super::b::VIRTIO_BLK_F_WRITE_ZEROES;
    /// `VIRTIO_F_INDIRECT_DESC` (virtio 1.3 §2.7.5.3)
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX` (virtio 1.3 §2.7.10)
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VHOST_USER_F_PROTOCOL_FEATURES`: the vhost-user protocol has feature bits of its own.
    pub const PROTOCOL: u64 = 1 << 30;
    /// `VIRTIO_F_VERSION_1` (virtio 1.3 §6)
    pub const VERSION_1: u64 = 1 << 32;
}

/// What the export's options say about the device, already checked.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Whether the guest may write.
    pub writable: bool,
    /// Number of queues, 1 to 256.
    pub num_queues: u16,
    /// Largest ring size a front end may set, a power of two from 4 to 1024.
    pub queue_size: u16,
    /// Segments of one request to announce, 1 to 1022.
    pub seg_max: u16,
    /// Logical block size in bytes, a power of two from 512 to 2 MiB; 0 takes the node's.
    pub logical_block_size: u32,
    /// Physical block size in bytes, a power of two not below the logical one; 0 takes the node's.
    pub physical_block_size: u32,
    /// Write-through: the guest is told that there is no cache, and every write is durable when it completes.
    pub writethrough: bool,
    /// Keep guest memory pinned for operations on O_DIRECT files.
    pub pin_memory: bool,
    /// Answer to GET_ID: up to 20 bytes, zero padded (virtio 1.3 §5.2.6).
    pub serial: [u8; 20],
}

/// Static facts of the device plus the two that change: capacity and cache mode.
#[derive(Debug)]
pub struct DeviceConfig {
    opts: DeviceOptions,
    logical: u32,
    physical_exp: u8,
    min_io: u16,
    opt_io: u32,
    seg_max: u32,
    discard_alignment: u32,
    max_range: u32,
    /// Bytes; changed by a resize on the main thread, read anywhere. Relaxed: it is one number, and whoever must
    /// see a new value is told by a message.
    capacity: AtomicU64,
    /// Whether the guest sees a volatile write cache. Relaxed for the same reason: queues read it once per request.
    write_cache: AtomicBool,
}

/// Why a configuration cannot be offered; the text names the option at fault.
pub type ConfigError = String;

impl DeviceConfig {
    /// Checks the options against the node's limits and derives the configuration space.
    ///
    /// # Errors
    /// Names the option that does not fit, and the mend.
    pub fn new(opts: DeviceOptions, limits: &Limits, capacity: u64) -> Result<Self, ConfigError> {
        let need = limits.request_alignment.max(512);
        let logical = match opts.logical_block_size {
            0 => limits.logical_block_size.max(512),
            n => n,
        };
        if !logical.is_power_of_two() || !(512..=2 << 20).contains(&logical) {
            return Err(format!(
                "Parameter 'logical-block-size' expects a power of 2 between 512 and 2097152, got {logical}"
            ));
        }
        if logical < need && opts.logical_block_size == 0 {
            // The driver below wants more than its own block size says; the request alignment is what counts.
            return Self::new(DeviceOptions { logical_block_size: need, ..opts }, limits, capacity);
        }
        let physical = match opts.physical_block_size {
            0 => limits.physical_block_size.max(logical),
            n => n,
        };
        if !physical.is_power_of_two() || physical < logical || physical > 64 << 20 {
            return Err(format!(
                "Parameter 'physical-block-size' expects a power of 2 not below the logical block size \
                 ({logical}), got {physical}"
            ));
        }
        let physical_exp = (physical / logical).trailing_zeros() as u8;
        let min_io_bytes = limits.min_transfer.max(u64::from(physical));
        let opt_io_bytes = limits.opt_transfer;
        let seg_max = u32::from(opts.seg_max);
        let discard = u64::from(limits.discard_alignment).max(u64::from(logical));
        let blocks = |bytes: u64| bytes / u64::from(logical);
        let align = u64::from(logical) / SECTOR;
        let max_range = (u64::from(MAX_RANGE_SECTORS) / align * align) as u32;
        Ok(DeviceConfig {
            logical,
            physical_exp,
            min_io: u16::try_from(blocks(min_io_bytes)).unwrap_or(u16::MAX),
            opt_io: u32::try_from(blocks(opt_io_bytes)).unwrap_or(0),
            seg_max,
            discard_alignment: u32::try_from(discard / SECTOR).unwrap_or(1),
            max_range,
            capacity: AtomicU64::new(capacity),
            write_cache: AtomicBool::new(!opts.writethrough),
            opts,
        })
    }

    /// The options this device was built from.
    pub fn options(&self) -> &DeviceOptions {
        &self.opts
    }

    /// Logical block size in bytes: every request starts and ends on a multiple of it.
    pub fn logical_block_size(&self) -> u32 {
        self.logical
    }

    /// Current capacity in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// Sets the capacity after a resize.
    pub fn set_capacity(&self, bytes: u64) {
        self.capacity.store(bytes, Ordering::Relaxed);
    }

    /// Largest number of sectors that one discard or write-zeroes segment may cover.
    pub fn max_range_sectors(&self) -> u32 {
        self.max_range
    }

    /// Whether a completed write may still sit in a cache, given what the driver negotiated.
    ///
    /// A driver that negotiated neither FLUSH nor CONFIG_WCE cannot flush, so there is no cache for it
    /// (virtio 1.3 §5.2.5.1): each of its writes is durable before it completes.
    pub fn write_cache(&self, acked: u64) -> bool {
        self.write_cache.load(Ordering::Relaxed) && acked & (feature::FLUSH | feature::CONFIG_WCE) != 0
    }

    /// Back to what the options say; a driver's choice lasts until the device is reset.
    pub fn reset_write_cache(&self) {
        self.write_cache.store(!self.opts.writethrough, Ordering::Relaxed);
    }

    /// The driver writes the `writeback` byte (virtio 1.3 §5.2.4).
    ///
    /// # Errors
    /// Anything but one byte 0 or 1 at its offset is refused.
    pub fn write(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigError> {
        match (offset, bytes) {
            (WCE_OFFSET, [v @ 0..=1]) => {
                self.write_cache.store(*v == 1, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(format!(
                "write of {} byte(s) at offset {offset} of the configuration space: only the write cache byte at \
                 {WCE_OFFSET} can be written",
                bytes.len()
            )),
        }
    }

    /// Device feature bits on offer.
    pub fn features(&self) -> u64 {
        let mut f = feature::SIZE_MAX
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | feature::PROTOCOL
            | feature::VERSION_1;
        if self.opts.num_queues > 1 {
            f |= feature::MQ;
        }
        if self.opts.writable {
            f |= feature::DISCARD | feature::WRITE_ZEROES;
        } else {
            f |= feature::RO;
        }
        f
    }

    /// `len` bytes of the configuration space from `offset`; zeroes beyond its end.
    pub fn read(&self, offset: u32, len: u32) -> Vec<u8> {
        let space = self.space();
        let mut out = vec![0; len as usize];
        if let Some(tail) = space.get(offset as usize..) {
            let n = tail.len().min(out.len());
            for (o, s) in out.iter_mut().zip(tail.iter().take(n)) {
                *o = *s;
            }
        }
        out
    }

    fn space(&self) -> Vec<u8> {
        let mut s = Vec::with_capacity(CONFIG_LEN);
        s.extend((self.capacity() / SECTOR).to_le_bytes()); // 0: capacity
        s.extend(SIZE_MAX.to_le_bytes()); // 8: size_max
        s.extend(self.seg_max.to_le_bytes()); // 12: seg_max
        s.extend([0; 4]); // 16: geometry (not offered)
        s.extend(self.logical.to_le_bytes()); // 20: blk_size
        s.push(self.physical_exp); // 24: physical_block_exp
        s.push(0); // 25: alignment_offset
        s.extend(self.min_io.to_le_bytes()); // 26: min_io_size
        s.extend(self.opt_io.to_le_bytes()); // 28: opt_io_size
        s.push(self.write_cache.load(Ordering::Relaxed).into()); // 32: writeback
        s.push(0); // 33: unused0
        s.extend(self.opts.num_queues.to_le_bytes()); // 34: num_queues
        let (sectors, segs) = match self.opts.writable {
            true => (self.max_range, MAX_RANGE_SEGMENTS),
            false => (0, 0),
        };
        s.extend(sectors.to_le_bytes()); // 36: max_discard_sectors
        s.extend(segs.to_le_bytes()); // 40: max_discard_seg
        s.extend(self.discard_alignment.to_le_bytes()); // 44: discard_sector_alignment
        s.extend(sectors.to_le_bytes()); // 48: max_write_zeroes_sectors
        s.extend(segs.to_le_bytes()); // 52: max_write_zeroes_seg
        s.push(self.opts.writable.into()); // 56: write_zeroes_may_unmap
        s.extend([0; 3]); // 57: unused1
        debug_assert_eq!(s.len(), CONFIG_LEN);
        s
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
