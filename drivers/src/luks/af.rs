//! The anti-forensic splitter (LUKS On-Disk Format Specification 1.2.3, 3.2): a key spread over so many sectors that
//! destroying any of them destroys the key.
//!
//! Called by `volume`. Pure computation.

use zeroize::Zeroizing;

use super::spec::HashAlg;

/// Spreads every bit over all of the block: each digest-sized piece is replaced by the hash of its number and itself.
fn diffuse(hash: HashAlg, block: &mut [u8]) {
    for (number, piece) in (0u32..).zip(block.chunks_mut(hash.len())) {
        let digest = hash.digest(&[&number.to_be_bytes(), piece]);
        let len = piece.len();
        piece.copy_from_slice(&digest[..len]);
    }
}

fn xor(to: &mut [u8], with: &[u8]) {
    to.iter_mut().zip(with).for_each(|(a, b)| *a ^= b);
}

/// The key out of its stripes, which lie one after the other.
pub(super) fn merge(hash: HashAlg, key_len: usize, stripes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0u8; key_len]);
    let mut left = stripes.chunks_exact(key_len.max(1)).peekable();
    while let Some(stripe) = left.next() {
        xor(&mut block, stripe);
        if left.peek().is_some() {
            diffuse(hash, &mut block);
        }
    }
    block
}

/// Fills `stripes`, which hold random bytes, so that they merge into `key`.
pub(super) fn split(hash: HashAlg, key: &[u8], stripes: &mut [u8]) {
    let Some(last) = stripes.len().checked_sub(key.len()) else { return };
    let (random, last) = stripes.split_at_mut(last);
    let mut block = Zeroizing::new(vec![0u8; key.len()]);
    for stripe in random.chunks_exact(key.len().max(1)) {
        xor(&mut block, stripe);
        diffuse(hash, &mut block);
    }
    last.copy_from_slice(&block);
    xor(last, key);
}
