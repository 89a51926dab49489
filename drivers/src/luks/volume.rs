//! An unlocked volume: the cipher of its data, and how the key comes out of a header and a passphrase.
//!
//! Used by the `luks` driver and by encrypted qcow2 images. Unlocking costs seconds of computation and an image says how many:
//! it runs on the worker pool ([`Loaded::unlock_on_pool`]) and gives up after [`UNLOCK_LIMIT`]. Must not know where the
//! header came from.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use graph::{BlockError, Errno, NodeIo, Result, Secret};
use host::{IoVecs, Local};
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

use super::cipher::SectorCipher;
use super::header::{DIGEST_LEN, HEADER_LEN, Header, Place, STRIPES};
use super::spec::{CipherAlg, CipherMode, CipherSpec, IvGen};
use super::{SECTOR, af};

/// Longest an unlock may compute. QEMU spends two seconds on a slot by default, on the machine that made it.
pub(super) const UNLOCK_LIMIT: Duration = Duration::from_secs(300);
/// Bytes a processor with AES instructions does in the time a trip to another thread costs, generously.
const OFFLOAD_FAST: usize = 256 << 10;
/// The same without.
const OFFLOAD_SLOW: usize = 16 << 10;

/// A header and the key material of its active slots: all that has to be read to unlock.
pub(crate) struct Loaded {
    pub(super) header: Header,
    pub(super) place: Place,
    /// (slot, ciphertext)
    pub(super) material: Vec<(usize, Vec<u8>)>,
}

/// A volume whose key is known. Keys are wiped when it is dropped.
pub(crate) struct Volume {
    cipher: SectorCipher,
}

/// Ends an unlock that nobody waits for any more.
struct Abandon(Arc<AtomicBool>);

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

async fn read(io: &NodeIo, at: u64, len: usize) -> Result<Vec<u8>> {
    let buffer = IoVecs::alloc(len, 4096)?;
    io.read(at, &buffer).await?;
    Ok(buffer.to_vec())
}

impl Loaded {
    /// Reads a header that begins at `base` of a node and may take `room` bytes there (qcow2's header extension; the whole
    /// node otherwise). At most some 2 MiB are read.
    ///
    /// # Errors
    /// What [`Header::parse`] refuses, a header or slot that does not fit into `room`, errors of reading.
    pub(crate) async fn read(io: &NodeIo, base: u64, room: u64, place: Place) -> Result<Loaded> {
        let fits = |at: u64, len: u64| at.checked_add(len).is_some_and(|end| end <= room);
        if !fits(0, HEADER_LEN as u64) {
            return Err(BlockError::invalid("Unable to read LUKS header: it does not fit into its place"));
        }
        let raw = read(io, base, HEADER_LEN).await?;
        let raw = raw.first_chunk().ok_or(Errno::EIO)?;
        let header = Header::parse(raw, place)?;
        let mut material = Vec::new();
        for (slot, at, len) in header.material() {
            let start = base.checked_add(at).filter(|_| fits(at, len as u64));
            let start = start.ok_or_else(|| {
                BlockError::invalid(format!(
                    "Key material of keyslot {slot} lies outside of the LUKS header's place"
                ))
            })?;
            material.push((slot, read(io, start, len).await?));
        }
        Ok(Loaded { header, place, material })
    }

    /// The header.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// What `format-specific` of the image information says.
    pub(crate) fn info(&self) -> Map<String, Value> {
        describe(&self.header, self.place)
    }

    /// Unlocks on the worker pool. Dropping the future ends the work soon.
    ///
    /// # Errors
    /// As [`Loaded::unlock`].
    pub(crate) async fn unlock_on_pool(self, passphrase: Secret) -> Result<Volume> {
        let abandoned = Arc::new(AtomicBool::new(false));
        let guard = Abandon(Arc::clone(&abandoned));
        let result = host::pool::run(move || self.unlock(&passphrase, &abandoned)).await;
        drop(guard);
        result
    }

    /// Tries the passphrase on every active slot.
    ///
    /// # Errors
    /// `EPERM` when it opens none, `ETIMEDOUT` when the header asks for more work than anybody would.
    pub(super) fn unlock(mut self, passphrase: &Secret, abandoned: &AtomicBool) -> Result<Volume> {
        let deadline = Instant::now() + UNLOCK_LIMIT;
        let mut go_on = |_: u32| !abandoned.load(Relaxed) && Instant::now() < deadline;
        let too_slow = || {
            BlockError::new(
                Errno::ETIMEDOUT,
                format!(
                    "The LUKS header asks for more than {} seconds of key derivation",
                    UNLOCK_LIMIT.as_secs()
                ),
            )
        };
        let header = &self.header;
        let key_len = header.spec.key_len();
        for (index, material) in &mut self.material {
            let Some(slot) = header.slots.get(*index) else { continue };
            let mut slot_key = Zeroizing::new(vec![0u8; key_len]);
            let password = passphrase.bytes();
            if !header.hash.pbkdf2(password, &slot.salt, slot.iterations, &mut slot_key, &mut go_on) {
                return Err(too_slow());
            }
            // From here on it is as good as the key.
            let mut stripes = Zeroizing::new(std::mem::take(material));
            SectorCipher::new(&header.spec, &slot_key)?.decrypt(0, &mut stripes);
            let used = (key_len * STRIPES as usize).min(stripes.len());
            let key = af::merge(header.hash, key_len, &stripes[..used]);
            let mut digest = [0u8; DIGEST_LEN];
            let rounds = header.digest_iterations;
            if !header.hash.pbkdf2(&key, &header.digest_salt, rounds, &mut digest, &mut go_on) {
                return Err(too_slow());
            }
            if same(&digest, &header.digest) {
                let cipher = SectorCipher::new(&header.spec, &key)?;
                return Ok(Volume { cipher });
            }
        }
        Err(BlockError::new(Errno::EPERM, "Invalid password, cannot unlock any keyslot"))
    }
}

/// Compares without telling by its duration where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |acc, (a, b)| acc | (a ^ b)) == 0
}

impl Volume {
    /// qcow2's encryption of old (crypt method 1): AES-128 in CBC mode, the first 16 bytes of the passphrase are the key, the
    /// IV is the *guest's* sector number.
    ///
    /// # Errors
    /// None today.
    pub(crate) fn legacy_aes(passphrase: &Secret) -> Result<Volume> {
        let mut key = Zeroizing::new([0u8; 16]);
        key.iter_mut().zip(passphrase.bytes()).for_each(|(to, from)| *to = *from);
        let spec = CipherSpec {
            alg: CipherAlg::Aes128,
            mode: CipherMode::Cbc,
            ivgen: IvGen::Plain64,
            ivgen_hash: None,
        };
        Ok(Volume { cipher: SectorCipher::new(&spec, key.as_slice())? })
    }

    /// Encrypts whole sectors of 512 bytes in place; `first_sector` is the number the first one's IV is made of.
    pub(crate) fn encrypt(&self, first_sector: u64, data: &mut [u8]) {
        debug_assert!(data.len().is_multiple_of(SECTOR), "not whole sectors");
        self.cipher.encrypt(first_sector, data);
    }

    /// Decrypts as [`Volume::encrypt`] encrypts.
    pub(crate) fn decrypt(&self, first_sector: u64, data: &mut [u8]) {
        debug_assert!(data.len().is_multiple_of(SECTOR), "not whole sectors");
        self.cipher.decrypt(first_sector, data);
    }

    /// From how many bytes on it pays to leave the work to another thread.
    pub(crate) fn offload_from(&self) -> usize {
        if self.cipher.is_fast() { OFFLOAD_FAST } else { OFFLOAD_SLOW }
    }

    /// [`Volume::encrypt`], on the worker pool if that pays; the iothread serves others meanwhile.
    pub(crate) async fn encrypt_on(
        self: &Arc<Volume>,
        local: &Local,
        first_sector: u64,
        data: Vec<u8>,
    ) -> Vec<u8> {
        self.on(local, first_sector, data, Volume::encrypt).await
    }

    /// [`Volume::decrypt`] in the same way.
    pub(crate) async fn decrypt_on(
        self: &Arc<Volume>,
        local: &Local,
        first_sector: u64,
        data: Vec<u8>,
    ) -> Vec<u8> {
        self.on(local, first_sector, data, Volume::decrypt).await
    }

    async fn on(
        self: &Arc<Volume>,
        local: &Local,
        first_sector: u64,
        mut data: Vec<u8>,
        work: fn(&Volume, u64, &mut [u8]),
    ) -> Vec<u8> {
        if data.len() < self.offload_from() {
            work(self, first_sector, &mut data);
            return data;
        }
        let volume = Arc::clone(self);
        let job = move || {
            work(&volume, first_sector, &mut data);
            data
        };
        local.blocking(job).await
    }
}

/// The members of QEMU's `QCryptoBlockInfoLUKS`.
fn describe(header: &Header, place: Place) -> Map<String, Value> {
    let slots: Vec<Value> = header
        .slots
        .iter()
        .map(|slot| {
            let offset = u64::from(slot.offset) * SECTOR as u64;
            if slot.active {
                json!({"active": true, "iters": slot.iterations, "stripes": slot.stripes, "key-offset": offset})
            } else {
                json!({"active": false, "key-offset": offset})
            }
        })
        .collect();
    let mut info = Map::new();
    let mut put = |name: &str, value: Value| info.insert(name.to_owned(), value);
    put("cipher-alg", json!(header.spec.alg.wire_name()));
    put("cipher-mode", json!(header.spec.mode.name()));
    put("ivgen-alg", json!(header.spec.ivgen.name()));
    if header.spec.ivgen == IvGen::Essiv
        && let Some(hash) = header.spec.ivgen_hash
    {
        put("ivgen-hash-alg", json!(hash.name()));
    }
    put("hash-alg", json!(header.hash.name()));
    put("detached-header", json!(place == Place::Detached));
    put("payload-offset", json!(header.payload_offset()));
    put("master-key-iters", json!(header.digest_iterations));
    put("uuid", json!(header.uuid()));
    put("slots", json!(slots));
    info
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Volume")
    }
}
