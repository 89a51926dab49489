//! The names of ciphers, modes, IV generators and hashes, on the wire and in the header, and which go together.
//!
//! Used by `header`, `cipher`, `kdf` and by the options of creation. Plain values: no keys, no I/O.

use graph::{BlockError, Result};
use hmac::{EagerHash, Hmac, KeyInit, Mac};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::Digest;
use zeroize::Zeroizing;

/// A block cipher and the length of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) enum CipherAlg {
    /// AES with a key of 128 bits.
    #[serde(rename = "aes-128")]
    Aes128,
    /// AES with a key of 192 bits.
    #[serde(rename = "aes-192")]
    Aes192,
    /// AES with a key of 256 bits.
    #[serde(rename = "aes-256")]
    Aes256,
    /// CAST5 (blocks of 64 bits) with a key of 128 bits.
    #[serde(rename = "cast5-128")]
    Cast5,
    /// Serpent with a key of 128 bits.
    #[serde(rename = "serpent-128")]
    Serpent128,
    /// Serpent with a key of 192 bits.
    #[serde(rename = "serpent-192")]
    Serpent192,
    /// Serpent with a key of 256 bits.
    #[serde(rename = "serpent-256")]
    Serpent256,
    /// Twofish with a key of 128 bits.
    #[serde(rename = "twofish-128")]
    Twofish128,
    /// Twofish with a key of 192 bits.
    #[serde(rename = "twofish-192")]
    Twofish192,
    /// Twofish with a key of 256 bits.
    #[serde(rename = "twofish-256")]
    Twofish256,
}

/// A block cipher whatever its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Aes,
    Cast5,
    Serpent,
    Twofish,
}

impl Family {
    const ALL: [Family; 4] = [Family::Aes, Family::Cast5, Family::Serpent, Family::Twofish];

    /// The name in the header.
    pub(super) fn name(self) -> &'static str {
        match self {
            Family::Aes => "aes",
            Family::Cast5 => "cast5",
            Family::Serpent => "serpent",
            Family::Twofish => "twofish",
        }
    }
}

impl CipherAlg {
    const ALL: [CipherAlg; 10] = [
        CipherAlg::Aes128,
        CipherAlg::Aes192,
        CipherAlg::Aes256,
        CipherAlg::Cast5,
        CipherAlg::Serpent128,
        CipherAlg::Serpent192,
        CipherAlg::Serpent256,
        CipherAlg::Twofish128,
        CipherAlg::Twofish192,
        CipherAlg::Twofish256,
    ];

    pub(super) fn family(self) -> Family {
        match self {
            CipherAlg::Aes128 | CipherAlg::Aes192 | CipherAlg::Aes256 => Family::Aes,
            CipherAlg::Cast5 => Family::Cast5,
            CipherAlg::Serpent128 | CipherAlg::Serpent192 | CipherAlg::Serpent256 => Family::Serpent,
            CipherAlg::Twofish128 | CipherAlg::Twofish192 | CipherAlg::Twofish256 => Family::Twofish,
        }
    }

    /// Length of one key, bytes.
    pub(super) fn key_len(self) -> usize {
        match self {
            CipherAlg::Aes128 | CipherAlg::Cast5 | CipherAlg::Serpent128 | CipherAlg::Twofish128 => 16,
            CipherAlg::Aes192 | CipherAlg::Serpent192 | CipherAlg::Twofish192 => 24,
            CipherAlg::Aes256 | CipherAlg::Serpent256 | CipherAlg::Twofish256 => 32,
        }
    }

    /// The member of a family with this key length.
    pub(super) fn find(family: Family, key_len: usize) -> Option<CipherAlg> {
        CipherAlg::ALL.into_iter().find(|a| a.family() == family && a.key_len() == key_len)
    }

    /// Its name on the wire.
    pub(super) fn wire_name(self) -> &'static str {
        match self {
            CipherAlg::Aes128 => "aes-128",
            CipherAlg::Aes192 => "aes-192",
            CipherAlg::Aes256 => "aes-256",
            CipherAlg::Cast5 => "cast5-128",
            CipherAlg::Serpent128 => "serpent-128",
            CipherAlg::Serpent192 => "serpent-192",
            CipherAlg::Serpent256 => "serpent-256",
            CipherAlg::Twofish128 => "twofish-128",
            CipherAlg::Twofish192 => "twofish-192",
            CipherAlg::Twofish256 => "twofish-256",
        }
    }
}

/// How blocks of one sector depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum CipherMode {
    /// Not at all, which shows patterns; for reading old images.
    Ecb,
    /// Cipher block chaining.
    Cbc,
    /// XTS (IEEE 1619), with two keys; for ciphers with blocks of 128 bits.
    Xts,
    /// Counter mode, which is unsafe for disks; for reading old images.
    Ctr,
}

impl CipherMode {
    const ALL: [CipherMode; 4] = [CipherMode::Ecb, CipherMode::Cbc, CipherMode::Xts, CipherMode::Ctr];

    /// Its name, on the wire and in the header.
    pub(super) fn name(self) -> &'static str {
        match self {
            CipherMode::Ecb => "ecb",
            CipherMode::Cbc => "cbc",
            CipherMode::Xts => "xts",
            CipherMode::Ctr => "ctr",
        }
    }
}

/// Where a sector's initialisation vector comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum IvGen {
    /// The low 32 bits of its number.
    Plain,
    /// Its number.
    Plain64,
    /// Its number, encrypted with a hash of the key.
    Essiv,
}

impl IvGen {
    const ALL: [IvGen; 3] = [IvGen::Plain, IvGen::Plain64, IvGen::Essiv];

    /// Its name, on the wire and in the header.
    pub(super) fn name(self) -> &'static str {
        match self {
            IvGen::Plain => "plain",
            IvGen::Plain64 => "plain64",
            IvGen::Essiv => "essiv",
        }
    }
}

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HashAlg {
    /// MD5; for reading old images.
    Md5,
    /// SHA-1.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
    /// SM3.
    Sm3,
}

/// Runs `$body` with `$d` standing for the hash's type.
macro_rules! with_hash {
    ($hash:expr, $d:ident => $body:expr) => {
        match $hash {
            HashAlg::Md5 => {
                type $d = md5::Md5;
                $body
            }
            HashAlg::Sha1 => {
                type $d = sha1::Sha1;
                $body
            }
            HashAlg::Sha224 => {
                type $d = sha2::Sha224;
                $body
            }
            HashAlg::Sha256 => {
                type $d = sha2::Sha256;
                $body
            }
            HashAlg::Sha384 => {
                type $d = sha2::Sha384;
                $body
            }
            HashAlg::Sha512 => {
                type $d = sha2::Sha512;
                $body
            }
            HashAlg::Ripemd160 => {
                type $d = ripemd::Ripemd160;
                $body
            }
            HashAlg::Sm3 => {
                type $d = sm3::Sm3;
                $body
            }
        }
    };
}

impl HashAlg {
    /// All of them.
    pub(super) const ALL: [HashAlg; 8] = [
        HashAlg::Md5,
        HashAlg::Sha1,
        HashAlg::Sha224,
        HashAlg::Sha256,
        HashAlg::Sha384,
        HashAlg::Sha512,
        HashAlg::Ripemd160,
        HashAlg::Sm3,
    ];

    /// Its name, on the wire and in the header.
    pub(super) fn name(self) -> &'static str {
        match self {
            HashAlg::Md5 => "md5",
            HashAlg::Sha1 => "sha1",
            HashAlg::Sha224 => "sha224",
            HashAlg::Sha256 => "sha256",
            HashAlg::Sha384 => "sha384",
            HashAlg::Sha512 => "sha512",
            HashAlg::Ripemd160 => "ripemd160",
            HashAlg::Sm3 => "sm3",
        }
    }

    /// By its name.
    pub(super) fn find(name: &str) -> Option<HashAlg> {
        HashAlg::ALL.into_iter().find(|h| h.name() == name)
    }

    /// Length of its digest, bytes.
    pub(super) fn len(self) -> usize {
        match self {
            HashAlg::Md5 => 16,
            HashAlg::Sha1 | HashAlg::Ripemd160 => 20,
            HashAlg::Sha224 => 28,
            HashAlg::Sha256 | HashAlg::Sm3 => 32,
            HashAlg::Sha384 => 48,
            HashAlg::Sha512 => 64,
        }
    }

    /// The digest of these parts one after the other.
    pub(super) fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        with_hash!(self, D => {
            let mut hash = D::new();
            parts.iter().for_each(|p| hash.update(p));
            Zeroizing::new(hash.finalize().to_vec())
        })
    }

    /// PBKDF2 (RFC 8018, 5.2) with HMAC over this hash, into `out`. Every few thousand rounds `go_on` is asked, with the
    /// number of rounds since it was asked last; once it says no, so does this.
    pub(super) fn pbkdf2(
        self,
        password: &[u8],
        salt: &[u8],
        rounds: u32,
        out: &mut [u8],
        go_on: &mut dyn FnMut(u32) -> bool,
    ) -> bool {
        with_hash!(self, D => derive::<D>(password, salt, rounds, out, go_on))
    }
}

/// Rounds between two questions whether to go on.
const ROUNDS: u32 = 4096;

fn derive<D: EagerHash>(
    password: &[u8],
    salt: &[u8],
    rounds: u32,
    out: &mut [u8],
    go_on: &mut dyn FnMut(u32) -> bool,
) -> bool {
    // A key of any length will do for HMAC.
    let Ok(keyed) = <Hmac<D> as KeyInit>::new_from_slice(password) else { return false };
    let len = keyed.clone().finalize().into_bytes().len();
    for (number, block) in (1u32..).zip(out.chunks_mut(len)) {
        let mut mac = keyed.clone();
        mac.update(salt);
        mac.update(&number.to_be_bytes());
        let mut last = mac.finalize().into_bytes();
        let mut sum = last.clone();
        let mut left = rounds.saturating_sub(1);
        loop {
            let some = left.min(ROUNDS);
            for _ in 0..some {
                let mut mac = keyed.clone();
                mac.update(&last);
                last = mac.finalize().into_bytes();
                sum.iter_mut().zip(&last).for_each(|(a, b)| *a ^= b);
            }
            left -= some;
            if !go_on(some) {
                return false;
            }
            if left == 0 {
                break;
            }
        }
        block.copy_from_slice(&sum[..block.len()]);
    }
    true
}

/// What data is encrypted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CipherSpec {
    pub(super) alg: CipherAlg,
    pub(super) mode: CipherMode,
    pub(super) ivgen: IvGen,
    /// Written behind the IV generator; means something to ESSIV only.
    pub(super) ivgen_hash: Option<HashAlg>,
}

impl CipherSpec {
    /// From the names in a header and the length of the key; QEMU's words for what is refused.
    ///
    /// # Errors
    /// A name that is not known, a combination that does not exist.
    pub(super) fn parse(cipher: &str, mode_spec: &str, key_len: u32) -> Result<CipherSpec> {
        let Some((mode, ivs)) = mode_spec.split_once('-') else {
            return Err(BlockError::invalid(format!("Unexpected cipher mode string format '{mode_spec}'")));
        };
        let (ivgen, hash) = match ivs.split_once(':') {
            Some((ivgen, hash)) => (ivgen, Some(hash)),
            None => (ivs, None),
        };
        let unknown =
            |what: &str, name: &str| BlockError::unsupported(format!("{what} '{name}' is not recognized"));
        let mode = CipherMode::ALL
            .into_iter()
            .find(|m| m.name() == mode)
            .ok_or_else(|| unknown("Cipher mode", mode))?;
        let ivgen = IvGen::ALL
            .into_iter()
            .find(|i| i.name() == ivgen)
            .ok_or_else(|| unknown("IV generator", ivgen))?;
        let family =
            Family::ALL.into_iter().find(|f| f.name() == cipher).ok_or_else(|| unknown("Cipher", cipher))?;
        // A hash behind `plain` is ignored, known or not, as dm-crypt does.
        let ivgen_hash = match (ivgen, hash) {
            (IvGen::Essiv, None) => {
                return Err(BlockError::invalid("Missing IV generator hash specification"));
            }
            (IvGen::Essiv, Some(name)) => {
                Some(HashAlg::find(name).ok_or_else(|| unknown("IV generator hash", name))?)
            }
            (_, name) => name.and_then(HashAlg::find),
        };
        let one = if mode == CipherMode::Xts { key_len / 2 } else { key_len };
        let odd = mode == CipherMode::Xts && key_len % 2 == 1;
        let alg = CipherAlg::find(family, one as usize).filter(|_| !odd).ok_or_else(|| {
            BlockError::unsupported(format!(
                "Algorithm '{cipher}' with key size {key_len} bytes not supported"
            ))
        })?;
        let spec = CipherSpec { alg, mode, ivgen, ivgen_hash };
        spec.check()?;
        Ok(spec)
    }

    /// Whether the parts go together.
    ///
    /// # Errors
    /// They do not.
    pub(super) fn check(&self) -> Result<()> {
        if self.alg == CipherAlg::Cast5 && self.mode == CipherMode::Xts {
            return Err(BlockError::unsupported("Unsupported cipher mode xts"));
        }
        if self.ivgen == IvGen::Essiv {
            let (hash, family) = (self.essiv_hash()?, self.alg.family());
            if CipherAlg::find(family, hash.len()).is_none() {
                return Err(BlockError::unsupported(format!(
                    "No {} cipher with key size {} available",
                    family.name(),
                    hash.len()
                )));
            }
        }
        Ok(())
    }

    /// Length of the key for the data, bytes: two keys for XTS.
    pub(super) fn key_len(&self) -> usize {
        if self.mode == CipherMode::Xts { 2 * self.alg.key_len() } else { self.alg.key_len() }
    }

    /// The hash of ESSIV.
    ///
    /// # Errors
    /// It is missing.
    pub(super) fn essiv_hash(&self) -> Result<HashAlg> {
        self.ivgen_hash.ok_or_else(|| BlockError::invalid("Missing IV generator hash specification"))
    }

    /// The mode as it is written in the header.
    pub(super) fn mode_name(&self) -> String {
        match self.ivgen_hash {
            Some(hash) => format!("{}-{}:{}", self.mode.name(), self.ivgen.name(), hash.name()),
            None => format!("{}-{}", self.mode.name(), self.ivgen.name()),
        }
    }
}
