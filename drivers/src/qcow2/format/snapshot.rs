//! The snapshot table ("Snapshots"): entries of changing length, 8-aligned, read one after the other.
//!
//! Used by opening, snapshot operations and the checker. Extra data that is not understood is kept.

use super::{Geometry, MAX_L1_BYTES, MAX_SNAPSHOT_EXTRA, ParseError, be16, be32, be64, validate_table};

/// Bytes of the fixed part of an entry.
pub const FIXED: usize = 40;
/// Extra data QEMU writes: VM state size, disk size, icount.
const KNOWN_EXTRA: usize = 24;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table is, bytes.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_size: u32,
    /// Id as stored; decimal digits by convention.
    pub id: Vec<u8>,
    /// Name as stored.
    pub name: Vec<u8>,
    /// Time it was taken, seconds since the epoch.
    pub date_sec: u32,
    /// … and nanoseconds.
    pub date_nsec: u32,
    /// Guest time since start, ns.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state stored with it.
    pub vm_state_size: u64,
    /// Virtual size then, bytes; `None` in old entries without it.
    pub disk_size: Option<u64>,
    /// Instruction count, if it was recorded.
    pub icount: Option<u64>,
    /// Bytes of extra data as found; what is missing of [16 in version 3] the checker reports.
    pub extra_size: u32,
    /// Extra data beyond what is understood.
    pub unknown_extra: Vec<u8>,
}

/// What looking at an entry gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// An entry and how many bytes it took, padding included.
    Entry(Box<Snapshot>, usize),
    /// The slice has to be at least this long to say more.
    Need(usize),
}

impl Snapshot {
    /// Parses the entry at the start of `bytes` (which is 8-aligned in its table). `table_at` is only for the error.
    ///
    /// # Errors
    /// "Too much extra metadata in snapshot table entry": more than `max_extra` bytes (1024, or what a repair takes).
    pub fn parse(bytes: &[u8], index: u32, table_at: u64, max_extra: u32) -> Result<Step, ParseError> {
        if bytes.len() < FIXED {
            return Ok(Step::Need(FIXED));
        }
        let w = |at| be32(bytes, at).unwrap_or(0);
        let d = |at| be64(bytes, at).unwrap_or(0);
        let h = |at| usize::from(be16(bytes, at).unwrap_or(0));
        let extra_size = w(36);
        if extra_size > max_extra {
            let text = format!("Too much extra metadata in snapshot table entry {index}");
            return Err(ParseError::invalid("extra_data_size", table_at + 36, text));
        }
        let (extra, id_len, name_len) = (extra_size as usize, h(12), h(14));
        let id_at = FIXED + extra;
        let end = id_at + id_len + name_len;
        let Some(whole) = bytes.get(..end) else { return Ok(Step::Need(end)) };
        let vm_state_size = if extra >= 8 { d(FIXED) } else { u64::from(w(32)) };
        let snapshot = Snapshot {
            l1_offset: d(0),
            l1_size: w(8),
            id: whole[id_at..id_at + id_len].to_vec(),
            name: whole[id_at + id_len..].to_vec(),
            date_sec: w(16),
            date_nsec: w(20),
            vm_clock_nsec: d(24),
            vm_state_size,
            disk_size: (extra >= 16).then(|| d(FIXED + 8)),
            icount: if extra >= KNOWN_EXTRA { Some(d(FIXED + 16)).filter(|&i| i != u64::MAX) } else { None },
            extra_size,
            unknown_extra: whole[FIXED + extra.min(KNOWN_EXTRA)..id_at].to_vec(),
        };
        Ok(Step::Entry(Box::new(snapshot), end.next_multiple_of(8)))
    }

    /// Whether the L1 table's place and length are within limits ("Snapshot L1 table").
    ///
    /// # Errors
    /// `EFBIG` too large, `EINVAL` unaligned or past 2^63.
    pub fn validate_l1(&self, g: &Geometry) -> Result<u64, ParseError> {
        let n = u64::from(self.l1_size);
        validate_table(g, ("l1_table_offset", 0), "Snapshot L1 table", self.l1_offset, n, 8, MAX_L1_BYTES)
    }

    /// Bytes the entry takes as [`Snapshot::serialise`] writes it, padding included.
    pub fn serialised_len(&self) -> usize {
        (FIXED + self.extra_out() + self.id.len() + self.name.len()).next_multiple_of(8)
    }

    /// Extra data is always written with VM state size, disk size and icount.
    fn extra_out(&self) -> usize {
        KNOWN_EXTRA + self.unknown_extra.len()
    }

    /// Appends the entry, padded to 8. `virtual_size` stands in where the entry has no disk size.
    ///
    /// # Errors
    /// An id or name longer than 65535 bytes, or more extra data than allowed.
    pub fn serialise(&self, virtual_size: u64, out: &mut Vec<u8>) -> Result<(), ParseError> {
        let long = |field| ParseError::invalid(field, 0, format!("Snapshot {field} is too long"));
        let id_len = u16::try_from(self.id.len()).map_err(|_| long("id_str"))?;
        let name_len = u16::try_from(self.name.len()).map_err(|_| long("name"))?;
        let extra = self.extra_out();
        if extra > MAX_SNAPSHOT_EXTRA as usize {
            return Err(long("extra_data"));
        }
        let len = self.serialised_len();
        let start = out.len();
        out.extend_from_slice(&self.l1_offset.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&id_len.to_be_bytes());
        out.extend_from_slice(&name_len.to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        // QEMU writes 0 here where the size does not fit; the extra data has it.
        out.extend_from_slice(&u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend_from_slice(&(extra as u32).to_be_bytes());
        out.extend_from_slice(&self.vm_state_size.to_be_bytes());
        out.extend_from_slice(&self.disk_size.unwrap_or(virtual_size).to_be_bytes());
        out.extend_from_slice(&self.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend_from_slice(&self.unknown_extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        out.resize(start + len, 0);
        Ok(())
    }
}

/// The entry after `bytes` have been skipped must stay below the limit; QEMU's words.
///
/// # Errors
/// "Snapshot table is too big".
pub fn check_table_len(len: u64, snapshots_offset: u64) -> Result<(), ParseError> {
    if len > super::MAX_SNAPSHOT_TABLE_BYTES {
        return Err(ParseError::too_big("snapshots_offset", snapshots_offset, "Snapshot table is too big"));
    }
    Ok(())
}
