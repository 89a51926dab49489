//! Tests of the parts that need no graph: published vectors, headers that lie, and a volume made and opened again.
//!
//! The ciphers and the whole format are held against QEMU in `tests/luks.rs` of the package.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::AtomicBool;

use graph::{Errno, Secret};
use proptest::prelude::*;

use super::cipher::SectorCipher;
use super::format::{self, Created, LuksParams};
use super::header::{HEADER_LEN, Header, MATERIAL, Place, SLOTS};
use super::spec::{CipherAlg, CipherMode, CipherSpec, HashAlg, IvGen};
use super::twofish::Twofish;
use super::volume::{Loaded, Volume};
use super::{SECTOR, af};

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

fn spec(alg: CipherAlg, mode: CipherMode, ivgen: IvGen) -> CipherSpec {
    let ivgen_hash = (ivgen == IvGen::Essiv).then_some(HashAlg::Sha256);
    CipherSpec { alg, mode, ivgen, ivgen_hash }
}

/// IEEE 1619-2007, annex B, vectors 4 and 10 (the first two blocks and the last one of each).
#[test]
fn xts_gives_what_ieee_1619_says() {
    let data: Vec<u8> = (0..512).map(|i| i as u8).collect();
    let check = |alg, key: &str, sector: u64, start: &str, end: &str| {
        let cipher = SectorCipher::new(&spec(alg, CipherMode::Xts, IvGen::Plain64), &unhex(key)).unwrap();
        let mut out = data.clone();
        cipher.encrypt(sector, &mut out);
        assert_eq!(out[..32], unhex(start), "{alg:?}");
        assert_eq!(out[496..], unhex(end), "{alg:?}");
        cipher.decrypt(sector, &mut out);
        assert_eq!(out, data);
    };
    check(
        CipherAlg::Aes128,
        "27182818284590452353602874713526 31415926535897932384626433832795",
        0,
        "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
        "0a282df920147beabe421ee5319d0568",
    );
    check(
        CipherAlg::Aes256,
        "2718281828459045235360287471352662497757247093699959574966967627
         3141592653589793238462643383279502884197169399375105820974944592",
        0xff,
        "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
        "c4f36ffda9fcea70b9c6e693e148c151",
    );
}

/// Against the crate of that name, and a vector of the paper's.
#[test]
fn twofish_is_twofish() {
    use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};

    let mut block = [0; 16];
    Twofish::new(&[0; 16]).unwrap().encrypt_block(&mut block);
    assert_eq!(block.to_vec(), unhex("9f589f5cf6122c32b6bfec2f2ae8c35a"));
    assert!(Twofish::new(&[0; 15]).is_none());
    let mut rng: u32 = 1;
    let mut byte = || {
        rng = rng.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (rng >> 24) as u8
    };
    for len in [16, 24, 32] {
        for _ in 0..50 {
            let key: Vec<u8> = (0..len).map(|_| byte()).collect();
            let plain: [u8; 16] = std::array::from_fn(|_| byte());
            let (ours, theirs) =
                (Twofish::new(&key).unwrap(), twofish::Twofish::new_from_slice(&key).unwrap());
            let (mut one, mut other) = (plain, plain.into());
            ours.encrypt_block(&mut one);
            theirs.encrypt_block(&mut other);
            assert_eq!(one[..], other[..], "{len}");
            ours.decrypt_block(&mut one);
            assert_eq!(one, plain, "{len}");
            // Blocks that are no ciphertext of anything seen before.
            ours.decrypt_block(&mut one);
            other = plain.into();
            theirs.decrypt_block(&mut other);
            assert_eq!(one[..], other[..], "{len}");
        }
    }
}

/// Batches, their rests and single sectors agree, for every combination.
#[test]
fn sectors_are_independent_of_how_many_come_at_once() {
    let algs = [
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
    for alg in algs {
        for mode in [CipherMode::Ecb, CipherMode::Cbc, CipherMode::Xts, CipherMode::Ctr] {
            for ivgen in [IvGen::Plain, IvGen::Plain64, IvGen::Essiv] {
                let spec = spec(alg, mode, ivgen);
                if spec.check().is_err() {
                    assert_eq!(alg, CipherAlg::Cast5, "everything else goes together");
                    continue;
                }
                let key: Vec<u8> = (0..spec.key_len()).map(|i| (i * 7) as u8).collect();
                let cipher = SectorCipher::new(&spec, &key).unwrap();
                let data: Vec<u8> = (0..21 * SECTOR).map(|i| (i / 3) as u8).collect();
                let first = (1 << 32) - 5;
                let mut all = data.clone();
                cipher.encrypt(first, &mut all);
                assert_ne!(all, data);
                for (i, (cipher_text, plain)) in all.chunks(SECTOR).zip(data.chunks(SECTOR)).enumerate() {
                    let mut one = plain.to_vec();
                    cipher.encrypt(first + i as u64, &mut one);
                    assert_eq!(one, cipher_text, "{spec:?}, sector {i}");
                    cipher.decrypt(first + i as u64, &mut one);
                    assert_eq!(one, plain, "{spec:?}, sector {i}");
                }
                cipher.decrypt(first, &mut all);
                assert_eq!(all, data, "{spec:?}");
            }
        }
    }
}

/// RFC 6070 (SHA-1) and RFC 7914, 11 (SHA-256).
#[test]
fn pbkdf2_gives_what_the_rfcs_say() {
    let derive = |hash: HashAlg, password: &str, salt: &str, rounds, len| {
        let mut out = vec![0; len];
        assert!(hash.pbkdf2(password.as_bytes(), salt.as_bytes(), rounds, &mut out, &mut |_| true));
        out
    };
    assert_eq!(
        derive(HashAlg::Sha1, "passwordPASSWORDpassword", "saltSALTsaltSALTsaltSALTsaltSALTsalt", 4096, 25),
        unhex("3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038")
    );
    assert_eq!(
        derive(HashAlg::Sha256, "passwd", "salt", 1, 64),
        unhex(
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
        )
    );
}

#[test]
fn pbkdf2_stops_when_told() {
    let mut asked = 0u64;
    let done = HashAlg::Sha256.pbkdf2(b"p", b"s", u32::MAX, &mut [0; 32], &mut |rounds| {
        asked += u64::from(rounds);
        asked < 10_000
    });
    assert!(!done);
    assert!(asked < 20_000, "{asked} rounds after it was told to stop at 10,000");
}

#[test]
fn hashes_are_as_long_as_they_say() {
    for hash in HashAlg::ALL {
        assert_eq!(hash.digest(&[b"a", b"bc"]).len(), hash.len(), "{hash:?}");
        assert_eq!(hash.digest(&[b"a", b"bc"]), hash.digest(&[b"abc"]), "{hash:?}");
        assert_eq!(HashAlg::find(hash.name()), Some(hash));
    }
}

#[test]
fn what_was_split_merges_for_every_hash_and_length() {
    for hash in HashAlg::ALL {
        for len in [16, 24, 32, 48, 64] {
            let key: Vec<u8> = (0..len).map(|i| i as u8 ^ 0x5a).collect();
            let mut stripes: Vec<u8> = (0..len * 50).map(|i| (i * 31 % 251) as u8).collect();
            af::split(hash, &key, &mut stripes);
            assert_eq!(*af::merge(hash, len, &stripes), key, "{hash:?} {len}");
            stripes[3] ^= 1;
            assert_ne!(*af::merge(hash, len, &stripes), key, "a flipped bit anywhere loses the key");
        }
    }
}

fn quick() -> LuksParams {
    LuksParams { iter_time: Some(1), ..LuksParams::default() }
}

fn made(params: &LuksParams, place: Place) -> Created {
    format::create(params, &Secret::new(b"passphrase".to_vec()), place).unwrap()
}

fn unlock(bytes: &[u8], passphrase: &str) -> Result<Volume, graph::BlockError> {
    let header = Header::parse(bytes.first_chunk().unwrap(), Place::Attached)?;
    let material = header
        .material()
        .map(|(slot, at, len)| {
            let mut all = bytes[at as usize..].to_vec();
            all.resize(len, 0);
            (slot, all)
        })
        .collect();
    let loaded = Loaded { header, place: Place::Attached, material };
    loaded.unlock(&Secret::new(passphrase.as_bytes().to_vec()), &AtomicBool::new(false))
}

#[test]
fn a_new_volume_opens_with_its_passphrase_alone() {
    let created = made(&quick(), Place::Attached);
    assert_eq!(created.area_len, 2_068_480, "as QEMU lays it out");
    let (one, other) = [(); 2].map(|()| unlock(&created.bytes, "passphrase").unwrap()).into();
    let mut data = vec![0x11; 3 * SECTOR];
    one.encrypt(7, &mut data);
    assert_ne!(data, vec![0x11; 3 * SECTOR]);
    other.decrypt(7, &mut data);
    assert_eq!(data, vec![0x11; 3 * SECTOR]);
    let error = unlock(&created.bytes, "Passphrase").unwrap_err();
    assert_eq!(error.errno(), Errno::EPERM);
    assert_eq!(error.to_string(), "Invalid password, cannot unlock any keyslot");
    let header = Header::parse(created.bytes.first_chunk().unwrap(), Place::Attached).unwrap();
    let info = Loaded { header, place: Place::Attached, material: Vec::new() }.info();
    assert_eq!(info["payload-offset"], 2_068_480);
    assert_eq!(info["slots"].as_array().unwrap().len(), SLOTS);
    assert_eq!(info["slots"][7]["key-offset"], 4096 + 7 * 504 * 512);
    let uuid = info["uuid"].as_str().unwrap();
    assert_eq!((uuid.len(), &uuid[14..15]), (36, "4"), "{uuid}");
    assert!("89ab".contains(&uuid[19..20]), "{uuid}");
}

#[test]
fn two_volumes_share_nothing() {
    let (a, b) = (made(&quick(), Place::Attached), made(&quick(), Place::Attached));
    assert_ne!(a.bytes[112..132], b.bytes[112..132], "digest");
    assert_ne!(a.bytes[132..164], b.bytes[132..164], "salt");
    assert_ne!(a.bytes[4096..], b.bytes[4096..], "material");
}

#[test]
fn an_unlock_nobody_waits_for_ends() {
    let mut created = made(&quick(), Place::Attached);
    // 2^32 - 1 rounds: hours.
    created.bytes[208 + 4..208 + 8].copy_from_slice(&[0xff; 4]);
    let header = Header::parse(created.bytes.first_chunk().unwrap(), Place::Attached).unwrap();
    let material = vec![(0, created.bytes[4096..].to_vec())];
    let loaded = Loaded { header, place: Place::Attached, material };
    let error = loaded.unlock(&Secret::new(b"x".to_vec()), &AtomicBool::new(true)).unwrap_err();
    assert_eq!(error.errno(), Errno::ETIMEDOUT);
}

#[test]
fn combinations_that_do_not_exist_are_refused() {
    let refused = |params: LuksParams| params.check().unwrap_err().to_string();
    assert_eq!(
        refused(LuksParams { cipher_alg: Some(CipherAlg::Cast5), ..quick() }),
        "Unsupported cipher mode xts"
    );
    assert_eq!(
        refused(LuksParams { ivgen_alg: Some(IvGen::Essiv), ivgen_hash_alg: Some(HashAlg::Sha1), ..quick() }),
        "No aes cipher with key size 20 available"
    );
    assert!(
        refused(LuksParams {
            cipher_alg: Some(CipherAlg::Aes192),
            cipher_mode: Some(CipherMode::Cbc),
            ..quick()
        })
        .contains("QEMU cannot open them")
    );
    assert_eq!(
        refused(LuksParams { iter_time: Some(0), ..LuksParams::default() }),
        "iteration time must be greater than zero"
    );
}

/// A good header with some bytes changed.
fn changed(changes: &[(usize, &[u8])]) -> String {
    let mut raw: [u8; HEADER_LEN] = *made(&quick(), Place::Attached).bytes.first_chunk().unwrap();
    for (at, bytes) in changes {
        raw[*at..*at + bytes.len()].copy_from_slice(bytes);
    }
    match Header::parse(&raw, Place::Attached) {
        Ok(_) => "accepted".to_owned(),
        Err(e) => e.to_string(),
    }
}

#[test]
fn headers_that_lie_are_refused_in_qemus_words() {
    let be = u32::to_be_bytes;
    let slot = |i: usize| 208 + 48 * i;
    assert_eq!(changed(&[]), "accepted");
    assert_eq!(changed(&[(0, b"l")]), "Volume is not in LUKS format");
    assert_eq!(changed(&[(6, &[0, 2])]), "LUKS version 2 is not supported");
    assert_eq!(changed(&[(8, &[b'a'; 32])]), "LUKS header cipher name is not NUL terminated");
    assert_eq!(changed(&[(40, &[b'x'; 32])]), "LUKS header cipher mode is not NUL terminated");
    assert_eq!(changed(&[(72, &[b's'; 32])]), "LUKS header hash spec is not NUL terminated");
    assert_eq!(changed(&[(8, b"rot13\0")]), "Cipher 'rot13' is not recognized");
    assert_eq!(changed(&[(40, b"xts\0")]), "Unexpected cipher mode string format 'xts'");
    assert_eq!(changed(&[(40, b"cfb-plain\0")]), "Cipher mode 'cfb' is not recognized");
    assert_eq!(changed(&[(40, b"xts-benbi\0")]), "IV generator 'benbi' is not recognized");
    assert_eq!(changed(&[(40, b"xts-essiv\0")]), "Missing IV generator hash specification");
    assert_eq!(changed(&[(40, b"xts-plain64:nosuch\0")]), "accepted");
    assert_eq!(changed(&[(72, b"crc32\0")]), "Hash algorithm 'crc32' is not recognized");
    for len in [0, 1, 33, 65, 128, u32::MAX] {
        assert_eq!(
            changed(&[(108, &be(len))]),
            format!("Algorithm 'aes' with key size {len} bytes not supported")
        );
    }
    assert_eq!(changed(&[(104, &be(7))]), "LUKS payload is overlapping with the header");
    assert_eq!(changed(&[(104, &be(4039))]), "accepted");
    assert_eq!(changed(&[(104, &be(4035))]), "Keyslot 7 is overlapping with the encrypted payload");
    assert_eq!(changed(&[(164, &be(0))]), "LUKS key iteration count is zero");
    assert_eq!(changed(&[(slot(0), &be(1))]), "Keyslot 0 state (active/disable) is corrupted");
    assert_eq!(changed(&[(slot(0) + 4, &be(0))]), "Keyslot 0 iteration count is zero");
    assert_eq!(changed(&[(slot(3) + 44, &be(1))]), "Keyslot 3 is corrupted (stripes 1 != 4000)");
    assert_eq!(changed(&[(slot(0) + 40, &be(7))]), "Keyslot 0 is overlapping the LUKS header");
    assert_eq!(changed(&[(slot(3) + 40, &be(8))]), "Keyslots 0 and 3 are overlapping in the header");
    assert_eq!(
        changed(&[(slot(3) + 40, &be(u32::MAX))]),
        "Keyslot 3 is overlapping with the encrypted payload"
    );
    assert_eq!(changed(&[(slot(1) + 40, &be(8 + 499))]), "Keyslots 0 and 1 are overlapping in the header");
}

#[test]
fn a_detached_header_has_no_payload() {
    let created = made(&quick(), Place::Detached);
    let raw = created.bytes.first_chunk().unwrap();
    let header = Header::parse(raw, Place::Detached).unwrap();
    assert_eq!(header.payload_offset(), 0);
    let error = Header::parse(raw, Place::Attached).unwrap_err();
    assert_eq!(error.to_string(), "LUKS payload is overlapping with the header");
}

proptest! {
    /// Any bytes are an answer, and what is accepted comes out as it went in.
    #[test]
    fn headers_of_any_bytes(
        bytes in proptest::collection::vec(any::<u8>(), HEADER_LEN),
        mask in proptest::collection::vec(0u8..40, HEADER_LEN),
    ) {
        let mut raw: [u8; HEADER_LEN] = *template().first_chunk().unwrap();
        for ((to, byte), mask) in raw.iter_mut().zip(bytes).zip(mask) {
            if mask == 0 {
                *to = byte;
            }
        }
        for place in [Place::Attached, Place::Detached] {
            if let Ok(header) = Header::parse(&raw, place) {
                let again = Header::parse(&header.serialise(), place).unwrap();
                prop_assert_eq!(&again, &header);
                prop_assert!(header.material().all(|(_, at, len)| at >= MATERIAL && len <= 256_512));
            }
        }
    }
}

/// One header for all cases: making one takes a while.
fn template() -> &'static [u8] {
    static ONE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    ONE.get_or_init(|| made(&quick(), Place::Attached).bytes)
}
