//! Making a new header: keys, salts, iteration counts, the area that goes to disk.
//!
//! Called by the creation of `luks` and of encrypted qcow2 images, on the worker pool. No I/O: what it makes is bytes.

use graph::{BlockError, Result, Secret};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::cipher::SectorCipher;
use super::header::{
    DIGEST_LEN, Header, MATERIAL, Place, SALT_LEN, SLOTS, STRIPES, Slot, UUID_LEN, material_sectors,
};
use super::spec::{CipherAlg, CipherMode, CipherSpec, HashAlg, IvGen};
use super::volume::UNLOCK_LIMIT;
use super::{SECTOR, af};

/// Fewest PBKDF2 rounds, however slow the machine.
const MIN_ROUNDS: u32 = 1000;
/// Milliseconds of computation an unlock shall cost.
const ITER_TIME: u64 = 2000;
/// Longest computation that may be asked for, ms: half of what an unlock takes patiently.
const MAX_ITER_TIME: u64 = UNLOCK_LIMIT.as_millis() as u64 / 2;

/// How a new volume is encrypted; the names and defaults are QEMU's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct LuksParams {
    /// The `secret` object with the passphrase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key_secret: Option<String>,
    /// The cipher; default: aes-256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cipher_alg: Option<CipherAlg>,
    /// Its mode; default: xts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cipher_mode: Option<CipherMode>,
    /// Where initialisation vectors come from; default: plain64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ivgen_alg: Option<IvGen>,
    /// The hash of `essiv`; default: sha256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ivgen_hash_alg: Option<HashAlg>,
    /// The hash of the key derivation; default: sha256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hash_alg: Option<HashAlg>,
    /// How long an unlock shall compute on a machine like this one, milliseconds, 1 to 150000. Default: 2000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) iter_time: Option<u64>,
}

impl LuksParams {
    fn spec(&self) -> Result<CipherSpec> {
        let ivgen = self.ivgen_alg.unwrap_or(IvGen::Plain64);
        let default_hash = (ivgen == IvGen::Essiv).then_some(HashAlg::Sha256);
        let spec = CipherSpec {
            alg: self.cipher_alg.unwrap_or(CipherAlg::Aes256),
            mode: self.cipher_mode.unwrap_or(CipherMode::Xts),
            ivgen,
            ivgen_hash: self.ivgen_hash_alg.or(default_hash),
        };
        spec.check()?;
        if !(spec.key_len() * STRIPES as usize).is_multiple_of(SECTOR) {
            return Err(BlockError::unsupported(format!(
                "Cipher '{}' in mode '{}' is not offered for new images: QEMU cannot open them",
                spec.alg.wire_name(),
                spec.mode.name()
            )));
        }
        Ok(spec)
    }

    /// Checks everything that can be without the passphrase.
    ///
    /// # Errors
    /// What does not go together.
    pub(crate) fn check(&self) -> Result<()> {
        self.spec()?;
        match self.iter_time {
            Some(0) => Err(BlockError::invalid("iteration time must be greater than zero")),
            Some(ms) if ms > MAX_ITER_TIME => {
                Err(BlockError::invalid(format!("iteration time must not exceed {MAX_ITER_TIME} ms")))
            }
            _ => Ok(()),
        }
    }

    /// Length of the header with all its key slots, bytes: where the data begins, and the length of qcow2's header
    /// extension.
    ///
    /// # Errors
    /// As [`LuksParams::check`].
    pub(crate) fn area_len(&self) -> Result<u64> {
        let (start, slot) = layout(self.spec()?.key_len());
        Ok((start + slot * SLOTS as u64) * SECTOR as u64)
    }
}

/// Where the material begins and how much room a slot has, sectors.
fn layout(key_len: usize) -> (u64, u64) {
    let page = MATERIAL / SECTOR as u64;
    (page, material_sectors(key_len).next_multiple_of(page))
}

/// A volume that is not on disk yet.
pub(crate) struct Created {
    /// The first bytes of the header area; the rest of it is zeroes.
    pub(crate) bytes: Vec<u8>,
    /// Length of the header area, bytes.
    pub(crate) area_len: u64,
}

/// Makes keys and a header whose first slot opens with `passphrase`. Computes for seconds.
///
/// # Errors
/// As [`LuksParams::check`]; no random numbers.
pub(crate) fn create(params: &LuksParams, passphrase: &Secret, place: Place) -> Result<Created> {
    params.check()?;
    let spec = params.spec()?;
    let hash = params.hash_alg.unwrap_or(HashAlg::Sha256);
    let time = params.iter_time.unwrap_or(ITER_TIME);
    let key_len = spec.key_len();
    let (start, room) = layout(key_len);
    let area_len = params.area_len()?;

    let mut key = Zeroizing::new(vec![0u8; key_len]);
    random(&mut key)?;
    let mut header = Header {
        spec,
        hash,
        payload: if place == Place::Detached { 0 } else { (area_len / SECTOR as u64) as u32 },
        digest: [0; DIGEST_LEN],
        digest_salt: salt()?,
        // An eighth of the time goes to the check of the key, as QEMU has it.
        digest_iterations: rounds(hash, DIGEST_LEN, time / 8),
        uuid: uuid()?,
        slots: std::array::from_fn(|i| Slot {
            active: false,
            iterations: 0,
            salt: [0; SALT_LEN],
            offset: (start + room * i as u64) as u32,
            stripes: STRIPES,
        }),
    };
    hash.pbkdf2(&key, &header.digest_salt, header.digest_iterations, &mut header.digest, &mut |_| true);

    let mut stripes = Zeroizing::new(vec![0u8; key_len * STRIPES as usize]);
    random(&mut stripes)?;
    af::split(hash, &key, &mut stripes);
    if let Some(slot) = header.slots.first_mut() {
        slot.active = true;
        slot.salt = salt()?;
        slot.iterations = rounds(hash, key_len, time);
        let mut slot_key = Zeroizing::new(vec![0u8; key_len]);
        hash.pbkdf2(passphrase.bytes(), &slot.salt, slot.iterations, &mut slot_key, &mut |_| true);
        SectorCipher::new(&spec, &slot_key)?.encrypt(0, &mut stripes);
    }
    let mut bytes = header.serialise().to_vec();
    bytes.resize(MATERIAL as usize, 0);
    bytes.extend_from_slice(&stripes);
    Ok(Created { bytes, area_len })
}

fn random(to: &mut [u8]) -> Result<()> {
    getrandom::fill(to)
        .map_err(|e| BlockError::new(graph::Errno::EIO, format!("There are no random numbers: {e}")))
}

fn salt() -> Result<[u8; SALT_LEN]> {
    let mut salt = [0; SALT_LEN];
    random(&mut salt)?;
    Ok(salt)
}

/// A random UUID (RFC 9562, 5.4) as text.
fn uuid() -> Result<[u8; UUID_LEN]> {
    let mut raw = [0u8; 16];
    random(&mut raw)?;
    let n = u128::from_be_bytes(raw) & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{n:032x}");
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    let text = [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-");
    let mut field = [0; UUID_LEN];
    field.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    Ok(field)
}

/// Processor time of this thread: what others take from it does not count.
fn thread_time() -> std::time::Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    std::time::Duration::new(t.tv_sec.unsigned_abs(), t.tv_nsec.unsigned_abs() as u32)
}

/// How many PBKDF2 rounds take `ms` milliseconds of processor time here, for a key of this length.
fn rounds(hash: HashAlg, key_len: usize, ms: u64) -> u32 {
    let mut out = Zeroizing::new(vec![0u8; key_len]);
    let mut tried: u32 = 1 << 12;
    loop {
        let start = thread_time();
        hash.pbkdf2(b"password", b"salt", tried, &mut out, &mut |_| true);
        let took = thread_time().saturating_sub(start).as_micros() as u64;
        if took >= 20_000 || tried >= 1 << 28 {
            let rounds = u64::from(tried).saturating_mul(ms).saturating_mul(1000) / took.max(1);
            return u32::try_from(rounds).unwrap_or(u32::MAX).max(MIN_ROUNDS);
        }
        tried = tried.saturating_mul(2);
    }
}
