//! From a descriptor chain to a request: the 16-byte header, the ranges of discard and write zeroes, and every check
//! that needs no I/O.
//!
//! Called by `worker` on copies of guest memory; pure, so that it can be fuzzed. Must not touch a ring or a node.
//! Layouts: virtio 1.3 §5.2.6 (Device Operation).

use virtio_bindings::bindings::virtio_blk as b;

use super::config::{DeviceConfig, MAX_RANGE_SEGMENTS, SECTOR};

/// Bytes of the request header: type, reserved, sector.
pub const HEADER_LEN: usize = 16;
/// Bytes of one discard or write-zeroes segment.
pub const RANGE_LEN: usize = 16;
/// Bytes of the answer to GET_ID.
pub const ID_LEN: usize = 20;

/// Completion status, written to the last byte of a request (virtio 1.3 §5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoErr = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported = 2,
}

/// What a guest asks for, after all checks that need no I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read `len` bytes at byte `offset`.
    Read {
        /// Bytes from the start of the disk.
        offset: u64,
        /// Bytes, may be zero.
        len: u64,
    },
    /// Write `len` bytes at byte `offset`.
    Write {
        /// Bytes from the start of the disk.
        offset: u64,
        /// Bytes, may be zero.
        len: u64,
    },
    /// Make completed writes durable.
    Flush,
    /// Tell the serial.
    GetId,
    /// Ranges follow in the readable part.
    Discard,
    /// Ranges follow in the readable part.
    WriteZeroes,
}

/// One range of a discard or write-zeroes request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// Bytes from the start of the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Write zeroes: deallocation is welcome.
    pub unmap: bool,
}

/// Checks a request's header against the device and the sizes of its buffers (without header and status byte).
///
/// # Errors
/// The status to complete the request with.
#[inline]
pub fn parse(
    header: [u8; HEADER_LEN],
    readable: u64,
    writable: u64,
    config: &DeviceConfig,
) -> Result<Kind, Status> {
    let [t0, t1, t2, t3, _, _, _, _, s @ ..] = header;
    let sector = u64::from_le_bytes(s);
    let writes = || if config.options().writable { Ok(()) } else { Err(Status::IoErr) };
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        b::VIRTIO_BLK_T_IN => {
            let offset = check(sector, writable, config)?;
            Ok(Kind::Read { offset, len: writable })
        }
        b::VIRTIO_BLK_T_OUT => {
            writes()?;
            let offset = check(sector, readable, config)?;
            Ok(Kind::Write { offset, len: readable })
        }
        b::VIRTIO_BLK_T_FLUSH => Ok(Kind::Flush),
        b::VIRTIO_BLK_T_GET_ID => Ok(Kind::GetId),
        b::VIRTIO_BLK_T_DISCARD => writes().map(|()| Kind::Discard),
        b::VIRTIO_BLK_T_WRITE_ZEROES => writes().map(|()| Kind::WriteZeroes),
        _ => Err(Status::Unsupported),
    }
}

/// A range of the disk in bytes: aligned to logical blocks, inside the capacity.
#[inline]
fn check(sector: u64, len: u64, config: &DeviceConfig) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoErr)?;
    let end = offset.checked_add(len).ok_or(Status::IoErr)?;
    let block = u64::from(config.logical_block_size());
    // The block size is a power of two; offset and length are checked in one go.
    if (offset | len) & (block - 1) != 0 || end > config.capacity() {
        return Err(Status::IoErr);
    }
    Ok(offset)
}

/// How many ranges `readable` bytes are.
///
/// # Errors
/// IOERR for a torn range, none, or more than were announced.
pub fn range_count(readable: u64) -> Result<usize, Status> {
    let count = readable / RANGE_LEN as u64;
    if !readable.is_multiple_of(RANGE_LEN as u64) || count == 0 || count > u64::from(MAX_RANGE_SEGMENTS) {
        return Err(Status::IoErr);
    }
    Ok(count as usize)
}

/// Parses one range (`struct virtio_blk_discard_write_zeroes`).
///
/// # Errors
/// UNSUPP for unknown flags, and for `unmap` on a discard; IOERR for a range that is too long, not aligned or outside.
pub fn parse_range(bytes: [u8; RANGE_LEN], kind: Kind, config: &DeviceConfig) -> Result<Range, Status> {
    let [a @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let unmap = flags & b::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    if flags & !b::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (unmap && kind == Kind::Discard) {
        return Err(Status::Unsupported);
    }
    if sectors > config.max_range_sectors() {
        return Err(Status::IoErr);
    }
    let len = u64::from(sectors) * SECTOR;
    let offset = check(u64::from_le_bytes(a), len, config)?;
    Ok(Range { offset, len, unmap })
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
