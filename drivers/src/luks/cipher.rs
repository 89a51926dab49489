//! Ciphers over 512-byte sectors: block cipher × mode × IV generator, as QEMU and dm-crypt combine them.
//!
//! Called by `volume` with keys that are already known, and by the qcow2 driver through it. Pure computation: no I/O, no
//! header. A sector is always 512 bytes, whatever the disk's own block size.

use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use cipher::array::Array;
use cipher::common::BlockSizeUser;
use cipher::consts::{U8, U16};
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use graph::{BlockError, Result};
use serpent::Serpent;

use super::SECTOR;
use super::spec::{CipherAlg, CipherMode, CipherSpec, Family, HashAlg, IvGen};
use super::twofish::Twofish;

/// Sectors whose tweaks are computed in one go.
const BATCH: usize = 8;
/// Blocks of 16 bytes in a sector.
const BLOCKS: usize = SECTOR / 16;
/// Longest IV, bytes.
const MAX_IV: usize = 16;

/// A block cipher with its key, over whole blocks that follow each other.
trait BlockCipher: Send + Sync {
    fn block_len(&self) -> usize;
    fn encrypt(&self, data: &mut [u8]);
    fn decrypt(&self, data: &mut [u8]);
}

/// A cipher with 16-byte blocks.
struct Wide<C>(C);
/// A cipher with 8-byte blocks.
struct Narrow<C>(C);

impl<C> BlockCipher for Wide<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn block_len(&self) -> usize {
        16
    }

    fn encrypt(&self, data: &mut [u8]) {
        self.0.encrypt_blocks(Array::cast_slice_from_core_mut(data.as_chunks_mut::<16>().0));
    }

    fn decrypt(&self, data: &mut [u8]) {
        self.0.decrypt_blocks(Array::cast_slice_from_core_mut(data.as_chunks_mut::<16>().0));
    }
}

impl<C> BlockCipher for Narrow<C>
where
    C: BlockSizeUser<BlockSize = U8> + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn block_len(&self) -> usize {
        8
    }

    fn encrypt(&self, data: &mut [u8]) {
        self.0.encrypt_blocks(Array::cast_slice_from_core_mut(data.as_chunks_mut::<8>().0));
    }

    fn decrypt(&self, data: &mut [u8]) {
        self.0.decrypt_blocks(Array::cast_slice_from_core_mut(data.as_chunks_mut::<8>().0));
    }
}

impl BlockCipher for Twofish {
    fn block_len(&self) -> usize {
        16
    }

    fn encrypt(&self, data: &mut [u8]) {
        data.as_chunks_mut().0.iter_mut().for_each(|block| self.encrypt_block(block));
    }

    fn decrypt(&self, data: &mut [u8]) {
        data.as_chunks_mut().0.iter_mut().for_each(|block| self.decrypt_block(block));
    }
}

/// How the IV of a sector comes about.
enum Ivs {
    /// The low 32 bits of the sector's number, little-endian.
    Plain,
    /// The sector's number, little-endian.
    Plain64,
    /// The same, encrypted with a key that is the hash of the data key.
    Essiv(Box<dyn BlockCipher>),
}

impl Ivs {
    /// Fills `iv` (8 or 16 bytes).
    fn fill(&self, sector: u64, iv: &mut [u8]) {
        let number = match self {
            Ivs::Plain => sector & u64::from(u32::MAX),
            Ivs::Plain64 | Ivs::Essiv(_) => sector,
        };
        let mut block = [0u8; MAX_IV];
        if let Some(low) = block.first_chunk_mut() {
            *low = number.to_le_bytes();
        }
        if let Ivs::Essiv(cipher) = self {
            let len = cipher.block_len().min(MAX_IV);
            cipher.encrypt(&mut block[..len]);
            block[len..].fill(0);
        }
        let len = iv.len().min(MAX_IV);
        iv[..len].copy_from_slice(&block[..len]);
    }
}

/// Encrypts and decrypts whole sectors in place.
trait Sectors: Send + Sync {
    fn encrypt(&self, first: u64, data: &mut [u8]);
    fn decrypt(&self, first: u64, data: &mut [u8]);
}

/// Every block by itself; there is no IV.
struct Ecb<C>(C);
/// Cipher block chaining, restarted in every sector.
struct Cbc<C>(C, Ivs);
/// A counter that starts at the IV in every sector.
struct Ctr<C>(C, Ivs);
/// XTS without ciphertext stealing: sectors are whole blocks.
struct Xts<C> {
    data: C,
    tweak: C,
    ivs: Ivs,
}

fn xor(to: &mut [u8], with: &[u8]) {
    to.iter_mut().zip(with).for_each(|(a, b)| *a ^= b);
}

impl<C: BlockCipher> Sectors for Ecb<C> {
    fn encrypt(&self, _: u64, data: &mut [u8]) {
        self.0.encrypt(data);
    }

    fn decrypt(&self, _: u64, data: &mut [u8]) {
        self.0.decrypt(data);
    }
}

impl<C: BlockCipher> Sectors for Cbc<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        let block = self.0.block_len();
        for (number, sector) in (first..).zip(data.chunks_exact_mut(SECTOR)) {
            let mut chain = [0u8; MAX_IV];
            let chain = &mut chain[..block];
            self.1.fill(number, chain);
            for piece in sector.chunks_exact_mut(block) {
                xor(piece, chain);
                self.0.encrypt(piece);
                chain.copy_from_slice(piece);
            }
        }
    }

    fn decrypt(&self, first: u64, data: &mut [u8]) {
        let block = self.0.block_len();
        let mut before = [0u8; MAX_IV + SECTOR];
        for (number, sector) in (first..).zip(data.chunks_exact_mut(SECTOR)) {
            // The IV and all ciphertext but the last block: what each decrypted block is xored with.
            self.1.fill(number, &mut before[..block]);
            before[block..block + SECTOR].copy_from_slice(sector);
            self.0.decrypt(sector);
            xor(sector, &before[..SECTOR]);
        }
    }
}

impl<C: BlockCipher> Sectors for Ctr<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        let block = self.0.block_len();
        for (number, sector) in (first..).zip(data.chunks_exact_mut(SECTOR)) {
            let mut counter = [0u8; MAX_IV];
            let counter = &mut counter[..block];
            self.1.fill(number, counter);
            let mut stream = [0u8; SECTOR];
            for piece in stream.chunks_exact_mut(block) {
                piece.copy_from_slice(counter);
                // Big-endian, over the whole block.
                for byte in counter.iter_mut().rev() {
                    *byte = byte.wrapping_add(1);
                    if *byte != 0 {
                        break;
                    }
                }
            }
            self.0.encrypt(&mut stream);
            xor(sector, &stream);
        }
    }

    fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.encrypt(first, data);
    }
}

impl<C: BlockCipher> Xts<C> {
    /// Calls `work` with pieces of at most [`BATCH`] sectors, whitened before and after.
    #[inline]
    fn whitened(&self, first: u64, data: &mut [u8], work: impl Fn(&mut [u8])) {
        let mut tweaks = [0u128; BATCH * BLOCKS];
        for (start, piece) in (first..).step_by(BATCH).zip(data.chunks_mut(BATCH * SECTOR)) {
            let mut ivs = [[0u8; 16]; BATCH];
            let count = (piece.len() / SECTOR).min(BATCH);
            for (number, iv) in (start..).zip(&mut ivs[..count]) {
                self.ivs.fill(number, iv);
            }
            self.tweak.encrypt(ivs[..count].as_flattened_mut());
            for (iv, tweaks) in ivs.iter().zip(tweaks.chunks_exact_mut(BLOCKS)).take(count) {
                let mut t = u128::from_le_bytes(*iv);
                for tweak in tweaks {
                    *tweak = t;
                    // Times α in GF(2^128), little-endian (IEEE 1619, 5.2).
                    t = (t << 1) ^ (0x87 & (t >> 127).wrapping_neg());
                }
            }
            whiten(piece, &tweaks);
            work(piece);
            whiten(piece, &tweaks);
        }
    }
}

#[inline]
fn whiten(data: &mut [u8], tweaks: &[u128]) {
    for (block, tweak) in data.as_chunks_mut::<16>().0.iter_mut().zip(tweaks) {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
    }
}

impl<C: BlockCipher> Sectors for Xts<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        self.whitened(first, data, |piece| self.data.encrypt(piece));
    }

    fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.whitened(first, data, |piece| self.data.decrypt(piece));
    }
}

/// A cipher with its keys, ready for sectors. The keys are wiped when it is dropped.
pub(crate) struct SectorCipher {
    sectors: Box<dyn Sectors>,
    fast: bool,
}

impl SectorCipher {
    /// Sets up `spec` with `key`, whose length is [`CipherSpec::key_len`].
    ///
    /// # Errors
    /// A key of another length, a combination that does not exist.
    pub(super) fn new(spec: &CipherSpec, key: &[u8]) -> Result<SectorCipher> {
        if key.len() != spec.key_len() {
            return Err(BlockError::invalid(format!(
                "Cipher key length {} should be {}",
                key.len(),
                spec.key_len()
            )));
        }
        let ivs = make_ivs(spec, key)?;
        let sectors = match spec.alg {
            CipherAlg::Aes128 => sectors(spec.mode, key, ivs, wide::<Aes128>),
            CipherAlg::Aes192 => sectors(spec.mode, key, ivs, wide::<Aes192>),
            CipherAlg::Aes256 => sectors(spec.mode, key, ivs, wide::<Aes256>),
            CipherAlg::Serpent128 | CipherAlg::Serpent192 | CipherAlg::Serpent256 => {
                sectors(spec.mode, key, ivs, wide::<Serpent>)
            }
            CipherAlg::Twofish128 | CipherAlg::Twofish192 | CipherAlg::Twofish256 => {
                sectors(spec.mode, key, ivs, twofish)
            }
            CipherAlg::Cast5 => sectors(spec.mode, key, ivs, narrow::<Cast5>),
        }?;
        Ok(SectorCipher { sectors, fast: spec.alg.family() == Family::Aes && has_aes() })
    }

    /// Encrypts whole sectors in place; `first` is the number of the first one. A rest shorter than a sector is left alone.
    pub(super) fn encrypt(&self, first: u64, data: &mut [u8]) {
        let whole = data.len() - data.len() % SECTOR;
        self.sectors.encrypt(first, &mut data[..whole]);
    }

    /// Decrypts as [`SectorCipher::encrypt`] encrypts.
    pub(super) fn decrypt(&self, first: u64, data: &mut [u8]) {
        let whole = data.len() - data.len() % SECTOR;
        self.sectors.decrypt(first, &mut data[..whole]);
    }

    /// Whether the processor has instructions for it: gigabytes a second rather than a hundred megabytes.
    pub(super) fn is_fast(&self) -> bool {
        self.fast
    }
}

fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("aes")
    }
    #[cfg(target_arch = "aarch64")]
    {
        std::arch::is_aarch64_feature_detected!("aes")
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        false
    }
}

fn keyed<C: KeyInit>(key: &[u8]) -> Result<C> {
    C::new_from_slice(key).map_err(|_| misfit(key))
}

fn misfit(key: &[u8]) -> BlockError {
    BlockError::invalid(format!("A key of {} bytes does not fit", key.len()))
}

fn wide<C: KeyInit>(key: &[u8]) -> Result<Wide<C>> {
    keyed(key).map(Wide)
}

fn narrow<C: KeyInit>(key: &[u8]) -> Result<Narrow<C>> {
    keyed(key).map(Narrow)
}

fn twofish(key: &[u8]) -> Result<Twofish> {
    Twofish::new(key).ok_or_else(|| misfit(key))
}

/// The cipher `make` makes of a key, in this mode.
fn sectors<C: BlockCipher + 'static>(
    mode: CipherMode,
    key: &[u8],
    ivs: Ivs,
    make: impl Fn(&[u8]) -> Result<C>,
) -> Result<Box<dyn Sectors>> {
    Ok(match mode {
        CipherMode::Ecb => Box::new(Ecb(make(key)?)),
        CipherMode::Cbc => Box::new(Cbc(make(key)?, ivs)),
        CipherMode::Ctr => Box::new(Ctr(make(key)?, ivs)),
        CipherMode::Xts => {
            let (data, tweak) = key.split_at(key.len() / 2);
            let (data, tweak) = (make(data)?, make(tweak)?);
            if data.block_len() != 16 {
                return Err(BlockError::unsupported("Unsupported cipher mode xts"));
            }
            Box::new(Xts { data, tweak, ivs })
        }
    })
}

fn make_ivs(spec: &CipherSpec, key: &[u8]) -> Result<Ivs> {
    Ok(match spec.ivgen {
        IvGen::Plain => Ivs::Plain,
        IvGen::Plain64 => Ivs::Plain64,
        IvGen::Essiv => {
            let hash = spec.essiv_hash()?;
            let salt = hash.digest(&[key]);
            Ivs::Essiv(essiv_cipher(spec.alg, hash, &salt)?)
        }
    })
}

/// The cipher that encrypts sector numbers: the data's family, with a key as long as the hash.
fn essiv_cipher(alg: CipherAlg, hash: HashAlg, salt: &[u8]) -> Result<Box<dyn BlockCipher>> {
    let family = alg.family();
    let Some(sized) = CipherAlg::find(family, hash.len()) else {
        return Err(BlockError::unsupported(format!(
            "No {} cipher with key size {} available",
            family.name(),
            hash.len()
        )));
    };
    Ok(match sized {
        CipherAlg::Aes128 => Box::new(wide::<Aes128>(salt)?),
        CipherAlg::Aes192 => Box::new(wide::<Aes192>(salt)?),
        CipherAlg::Aes256 => Box::new(wide::<Aes256>(salt)?),
        CipherAlg::Serpent128 | CipherAlg::Serpent192 | CipherAlg::Serpent256 => {
            Box::new(wide::<Serpent>(salt)?)
        }
        CipherAlg::Twofish128 | CipherAlg::Twofish192 | CipherAlg::Twofish256 => Box::new(twofish(salt)?),
        CipherAlg::Cast5 => Box::new(narrow::<Cast5>(salt)?),
    })
}
