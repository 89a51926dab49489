//! The LUKS1 header as it lies on disk (LUKS On-Disk Format Specification 1.2.3, 2): parsing, checks, writing.
//!
//! Called by `volume`. Bytes in, values out: no keys, no I/O. Whatever is in the bytes, nothing here panics or allocates.

use graph::{BlockError, Result};

use super::SECTOR;
use super::spec::{CipherSpec, HashAlg};

/// Length of the header proper, bytes: the phdr with its eight key slots.
pub const HEADER_LEN: usize = 592;
/// Key slots.
pub(super) const SLOTS: usize = 8;
/// Anti-forensic stripes of a key slot.
pub(super) const STRIPES: u32 = 4000;
/// Where the material of the first key slot lies, bytes.
pub(super) const MATERIAL: u64 = 4096;
/// Length of salts, bytes.
pub(super) const SALT_LEN: usize = 32;
/// Length of the master key's digest, bytes.
pub(super) const DIGEST_LEN: usize = 20;

/// `LUKS\xba\xbe`.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Length of the UUID's field, bytes.
pub(super) const UUID_LEN: usize = 40;
const VERSION: u16 = 1;
const SLOT_ACTIVE: u32 = 0x00AC_71F3;
const SLOT_INACTIVE: u32 = 0x0000_DEAD;
/// Where the key slots begin in the header, and how long one is.
const SLOT_TABLE: usize = 208;
const SLOT_LEN: usize = 48;

/// Where the data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Behind the header, or in clusters anywhere in the image that holds the header.
    Attached,
    /// In another file: the header may say that it begins at 0.
    Detached,
}

/// One key slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Whether it holds a key.
    pub(super) active: bool,
    /// PBKDF2 rounds.
    pub(super) iterations: u32,
    /// PBKDF2 salt.
    pub(super) salt: [u8; SALT_LEN],
    /// Where its material begins, sectors.
    pub(super) offset: u32,
    /// Anti-forensic stripes; always [`STRIPES`].
    pub(super) stripes: u32,
}

/// A header that has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What data and key material are encrypted with.
    pub(super) spec: CipherSpec,
    /// The hash of PBKDF2 and of the anti-forensic splitter.
    pub(super) hash: HashAlg,
    /// Where the data begins, sectors. Of no meaning in qcow2.
    pub(super) payload: u32,
    /// Digest of the master key.
    pub(super) digest: [u8; DIGEST_LEN],
    /// Salt of the digest.
    pub(super) digest_salt: [u8; SALT_LEN],
    /// PBKDF2 rounds of the digest.
    pub(super) digest_iterations: u32,
    /// The UUID as it is written: text, filled up with NULs.
    pub(super) uuid: [u8; UUID_LEN],
    /// The key slots.
    pub(super) slots: [Slot; SLOTS],
}

/// Sectors of the material of one slot.
pub(super) fn material_sectors(key_len: usize) -> u64 {
    (key_len as u64 * u64::from(STRIPES)).div_ceil(SECTOR as u64)
}

fn bytes<const N: usize>(raw: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    raw.get(at..).and_then(|r| r.first_chunk()).copied().unwrap_or([0; N])
}

fn be32(raw: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from_be_bytes(bytes(raw, at))
}

/// A string that ends inside of its field.
fn string<const N: usize>(raw: &[u8; HEADER_LEN], at: usize, what: &str) -> Result<String> {
    let field: [u8; N] = bytes(raw, at);
    let Some(end) = field.iter().position(|b| *b == 0) else {
        return Err(BlockError::invalid(format!("LUKS header {what} is not NUL terminated")));
    };
    Ok(String::from_utf8_lossy(field.get(..end).unwrap_or(&[])).into_owned())
}

impl Header {
    /// Reads a header and checks all of it.
    ///
    /// # Errors
    /// `EINVAL` for what contradicts the specification or itself, `ENOTSUP` for what is not known here; the words are
    /// QEMU's and name the field.
    pub fn parse(raw: &[u8; HEADER_LEN], place: Place) -> Result<Header> {
        if bytes::<6>(raw, 0) != MAGIC {
            return Err(BlockError::invalid("Volume is not in LUKS format"));
        }
        let version = u16::from_be_bytes(bytes(raw, 6));
        if version != VERSION {
            return Err(BlockError::unsupported(format!("LUKS version {version} is not supported")));
        }
        let cipher = string::<32>(raw, 8, "cipher name")?;
        let mode = string::<32>(raw, 40, "cipher mode")?;
        let hash_name = string::<32>(raw, 72, "hash spec")?;
        let (payload, key_len) = (be32(raw, 104), be32(raw, 108));
        let spec = CipherSpec::parse(&cipher, &mode, key_len)?;
        let hash = HashAlg::find(&hash_name).ok_or_else(|| {
            BlockError::unsupported(format!("Hash algorithm '{hash_name}' is not recognized"))
        })?;
        let slots = std::array::from_fn(|i| Slot::parse(raw, i));
        for (i, slot) in slots.iter().enumerate() {
            let state = be32(raw, SLOT_TABLE + i * SLOT_LEN);
            if !slot.active && state != SLOT_INACTIVE {
                return Err(BlockError::invalid(format!("Keyslot {i} state (active/disable) is corrupted")));
            }
        }
        let header = Header {
            spec,
            hash,
            payload,
            digest: bytes(raw, 112),
            digest_salt: bytes(raw, 132),
            digest_iterations: be32(raw, 164),
            uuid: bytes(raw, 168),
            slots,
        };
        header.check(place)?;
        Ok(header)
    }

    fn check(&self, place: Place) -> Result<()> {
        let invalid = |text: String| Err(BlockError::invalid(text));
        let first = MATERIAL / SECTOR as u64;
        let payload = u64::from(self.payload);
        if place == Place::Attached && payload < first {
            return invalid("LUKS payload is overlapping with the header".to_owned());
        }
        if self.digest_iterations == 0 {
            return invalid("LUKS key iteration count is zero".to_owned());
        }
        let length = material_sectors(self.spec.key_len());
        for (i, slot) in self.slots.iter().enumerate() {
            let start = u64::from(slot.offset);
            if slot.stripes != STRIPES {
                return invalid(format!("Keyslot {i} is corrupted (stripes {} != {STRIPES})", slot.stripes));
            }
            if start < first {
                return invalid(format!("Keyslot {i} is overlapping the LUKS header"));
            }
            if slot.active && slot.iterations == 0 {
                return invalid(format!("Keyslot {i} iteration count is zero"));
            }
            if place == Place::Attached && start + length > payload {
                return invalid(format!("Keyslot {i} is overlapping with the encrypted payload"));
            }
            for (j, other) in self.slots.iter().enumerate().skip(i + 1) {
                if start.abs_diff(u64::from(other.offset)) < length {
                    return invalid(format!("Keyslots {i} and {j} are overlapping in the header"));
                }
            }
        }
        Ok(())
    }

    /// The header's bytes.
    pub fn serialise(&self) -> [u8; HEADER_LEN] {
        let mut raw = [0u8; HEADER_LEN];
        let mut put = |at: usize, data: &[u8]| {
            if let Some(to) = raw.get_mut(at..at + data.len()) {
                to.copy_from_slice(data);
            }
        };
        // All names are much shorter than their fields, which end with NULs.
        put(0, &MAGIC);
        put(6, &VERSION.to_be_bytes());
        put(8, self.spec.alg.family().name().as_bytes());
        put(40, self.spec.mode_name().as_bytes());
        put(72, self.hash.name().as_bytes());
        put(104, &self.payload.to_be_bytes());
        put(108, &(self.spec.key_len() as u32).to_be_bytes());
        put(112, &self.digest);
        put(132, &self.digest_salt);
        put(164, &self.digest_iterations.to_be_bytes());
        put(168, &self.uuid);
        for (i, slot) in self.slots.iter().enumerate() {
            let at = SLOT_TABLE + i * SLOT_LEN;
            put(at, &if slot.active { SLOT_ACTIVE } else { SLOT_INACTIVE }.to_be_bytes());
            put(at + 4, &slot.iterations.to_be_bytes());
            put(at + 8, &slot.salt);
            put(at + 40, &slot.offset.to_be_bytes());
            put(at + 44, &slot.stripes.to_be_bytes());
        }
        raw
    }

    /// The UUID as text.
    pub(super) fn uuid(&self) -> String {
        let text = self.uuid.split(|b| *b == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }

    /// Where the data begins, bytes.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.payload) * SECTOR as u64
    }

    /// Where the material of the active slots lies: (slot, offset, length), bytes. A slot is some 250 KiB long at most.
    pub fn material(&self) -> impl Iterator<Item = (usize, u64, usize)> {
        let length = material_sectors(self.spec.key_len()) as usize * SECTOR;
        self.slots
            .iter()
            .enumerate()
            .filter(|(_, s)| s.active)
            .map(move |(i, s)| (i, u64::from(s.offset) * SECTOR as u64, length))
    }
}

impl Slot {
    fn parse(raw: &[u8; HEADER_LEN], index: usize) -> Slot {
        let at = SLOT_TABLE + index * SLOT_LEN;
        Slot {
            active: be32(raw, at) == SLOT_ACTIVE,
            iterations: be32(raw, at + 4),
            salt: bytes(raw, at + 8),
            offset: be32(raw, at + 40),
            stripes: be32(raw, at + 44),
        }
    }
}
