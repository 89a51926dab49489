//! Twofish (Schneier et al., "Twofish: A 128-Bit Block Cipher", 1998) with fully keyed tables: what a disk needs, where one key
//! encrypts everything.
//!
//! Called by `cipher`. The crate of that name computes its S-boxes anew for every byte, a thousandth of this speed; the tests hold
//! the two against each other. As in every table-driven implementation (Linux, libgcrypt) the time of a look-up depends on
//! the cache.

use zeroize::Zeroize;

/// The 4-bit tables t0 to t3 of q0 and q1 (4.3.5).
const NIBBLES: [[[u8; 16]; 4]; 2] = [
    [
        [8, 1, 7, 13, 6, 15, 3, 2, 0, 11, 5, 9, 14, 12, 10, 4],
        [14, 12, 11, 8, 1, 2, 3, 5, 15, 4, 10, 6, 7, 0, 9, 13],
        [11, 10, 5, 14, 6, 13, 9, 0, 12, 8, 15, 3, 2, 4, 7, 1],
        [13, 7, 15, 4, 1, 2, 6, 14, 9, 11, 3, 0, 8, 5, 12, 10],
    ],
    [
        [2, 8, 11, 13, 15, 7, 6, 14, 3, 1, 9, 4, 0, 10, 12, 5],
        [1, 14, 2, 11, 4, 12, 3, 7, 6, 13, 10, 5, 15, 9, 0, 8],
        [4, 12, 7, 5, 1, 6, 9, 10, 0, 14, 13, 8, 2, 11, 3, 15],
        [11, 9, 5, 1, 12, 3, 13, 14, 6, 4, 7, 15, 2, 0, 8, 10],
    ],
];

/// Which permutation each byte of a word passes, from the first (keys of 256 bits only) to the last (4.3.2).
const ORDER: [[usize; 5]; 4] = [[1, 1, 0, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 0, 1, 1, 0]];

/// The columns of the MDS matrix (4.3.2).
const MDS: [[u8; 4]; 4] =
    [[0x01, 0x5b, 0xef, 0xef], [0xef, 0xef, 0x5b, 0x01], [0x5b, 0xef, 0x01, 0xef], [0x5b, 0x01, 0xef, 0x5b]];

/// The rows of the RS matrix (4.3.1).
const RS: [[u8; 8]; 4] = [
    [0x01, 0xa4, 0x55, 0x87, 0x5a, 0x58, 0xdb, 0x9e],
    [0xa4, 0x56, 0x82, 0xf3, 0x1e, 0xc6, 0x68, 0xe5],
    [0x02, 0xa1, 0xfc, 0xc1, 0x47, 0xae, 0x3d, 0x19],
    [0xa4, 0x55, 0x87, 0x5a, 0x58, 0xdb, 0x9e, 0x03],
];

/// q0 and q1.
const Q: [[u8; 256]; 2] = [permutation(0), permutation(1)];

const fn permutation(which: usize) -> [u8; 256] {
    let t = NIBBLES[which];
    let mut q = [0; 256];
    let mut x = 0;
    while x < 256 {
        let (a0, b0) = (x >> 4, x & 15);
        let (a1, b1) = (a0 ^ b0, (a0 ^ (b0 << 3 | b0 >> 1) ^ (a0 << 3)) & 15);
        let (a2, b2) = (t[0][a1] as usize, t[1][b1] as usize);
        let (a3, b3) = (a2 ^ b2, (a2 ^ (b2 << 3 | b2 >> 1) ^ (a2 << 3)) & 15);
        q[x] = t[3][b3] << 4 | t[2][a3];
        x += 1;
    }
    q
}

/// Multiplies in GF(2^8) modulo `polynomial` (without its highest bit).
fn times(mut a: u8, mut b: u8, polynomial: u8) -> u8 {
    let mut product = 0;
    while a != 0 {
        if a & 1 != 0 {
            product ^= b;
        }
        a >>= 1;
        b = (b << 1) ^ if b & 0x80 != 0 { polynomial } else { 0 };
    }
    product
}

/// What one byte of a word contributes to h: `list` holds that byte of each word of L, L0 first (4.3.2).
fn column(index: usize, x: u8, list: &[u8]) -> u32 {
    let order = ORDER[index % 4];
    let mut y = x;
    for (key, which) in list.iter().rev().zip(&order[4 - list.len()..]) {
        y = Q[*which][usize::from(y)] ^ key;
    }
    y = Q[order[4]][usize::from(y)];
    u32::from_le_bytes(MDS[index % 4].map(|m| times(m, y, 0x69)))
}

/// The function h (4.3.2).
fn h(x: u32, list: &[[u8; 4]]) -> u32 {
    let mut z = 0;
    for (index, byte) in x.to_le_bytes().into_iter().enumerate() {
        z ^= column(index, byte, &bytes(list, index)[..list.len()]);
    }
    z
}

/// Byte `index` of each word.
fn bytes(list: &[[u8; 4]], index: usize) -> [u8; 4] {
    let mut out = [0; 4];
    out.iter_mut().zip(list).for_each(|(to, word)| *to = word[index % 4]);
    out
}

/// A key, expanded. Wiped when dropped.
pub(super) struct Twofish {
    /// S-boxes and MDS matrix in one, per byte of a word.
    tables: Box<[[u32; 256]; 4]>,
    subkeys: [u32; 40],
}

impl Drop for Twofish {
    fn drop(&mut self) {
        self.tables.iter_mut().for_each(Zeroize::zeroize);
        self.subkeys.zeroize();
    }
}

impl Twofish {
    /// Expands a key of 16, 24 or 32 bytes; `None` for any other.
    pub(super) fn new(key: &[u8]) -> Option<Twofish> {
        if ![16, 24, 32].contains(&key.len()) {
            return None;
        }
        let words = key.as_chunks::<4>().0;
        let count = words.len() / 2;
        let pick = |odd: usize| {
            let mut list = [[0; 4]; 4];
            list.iter_mut().zip(words.iter().skip(odd).step_by(2)).for_each(|(to, word)| *to = *word);
            list
        };
        let (even, odd) = (pick(0), pick(1));
        let mut subkeys = [0; 40];
        for (i, pair) in (0u32..).zip(subkeys.as_chunks_mut::<2>().0) {
            let rho = 0x0101_0101u32;
            let a = h(rho.wrapping_mul(2 * i), &even[..count]);
            let b = h(rho.wrapping_mul(2 * i + 1), &odd[..count]).rotate_left(8);
            *pair = [a.wrapping_add(b), a.wrapping_add(b).wrapping_add(b).rotate_left(9)];
        }
        // S, in reverse order: its last word is L0.
        let mut list = [[0; 4]; 4];
        for (to, part) in list[..count].iter_mut().rev().zip(key.as_chunks::<8>().0) {
            *to = RS.map(|row| row.iter().zip(part).fold(0, |sum, (r, m)| sum ^ times(*r, *m, 0x4d)));
        }
        let mut tables = Box::new([[0; 256]; 4]);
        for (index, table) in tables.iter_mut().enumerate() {
            let keys = bytes(&list, index);
            for (x, to) in (0u8..=255).zip(table) {
                *to = column(index, x, &keys[..count]);
            }
        }
        Some(Twofish { tables, subkeys })
    }

    #[inline]
    fn g(&self, x: u32) -> u32 {
        let [a, b, c, d] = x.to_le_bytes();
        let [ta, tb, tc, td] = &*self.tables;
        ta[usize::from(a)] ^ tb[usize::from(b)] ^ tc[usize::from(c)] ^ td[usize::from(d)]
    }

    /// The function F of one round: what the other half is mixed with.
    #[inline]
    fn f(&self, r0: u32, r1: u32, keys: [u32; 2]) -> (u32, u32) {
        let (t0, t1) = (self.g(r0), self.g(r1.rotate_left(8)));
        let sum = t0.wrapping_add(t1);
        (sum.wrapping_add(keys[0]), sum.wrapping_add(t1).wrapping_add(keys[1]))
    }

    /// Subkeys: those of input and output whitening, and two for each round.
    fn keys(&self) -> ([u32; 4], [u32; 4], &[[u32; 2]]) {
        let k = &self.subkeys;
        ([k[0], k[1], k[2], k[3]], [k[4], k[5], k[6], k[7]], k[8..].as_chunks().0)
    }

    /// Encrypts a block in place.
    #[inline]
    pub(super) fn encrypt_block(&self, block: &mut [u8; 16]) {
        let (before, after, rounds) = self.keys();
        let [mut a, mut b, mut c, mut d] = load(block, before);
        for keys in rounds {
            let (f0, f1) = self.f(a, b, *keys);
            let (e, f) = ((c ^ f0).rotate_right(1), d.rotate_left(1) ^ f1);
            (a, b, c, d) = (e, f, a, b);
        }
        // The last swap is undone.
        store(block, [c, d, a, b], after);
    }

    /// Decrypts a block in place.
    #[inline]
    pub(super) fn decrypt_block(&self, block: &mut [u8; 16]) {
        let (before, after, rounds) = self.keys();
        let [mut c, mut d, mut a, mut b] = load(block, after);
        for keys in rounds.iter().rev() {
            let (e, f) = (c, d);
            let (f0, f1) = self.f(e, f, *keys);
            (c, d) = (a.rotate_left(1) ^ f0, (b ^ f1).rotate_right(1));
            (a, b) = (e, f);
        }
        store(block, [a, b, c, d], before);
    }
}

#[inline]
fn load(block: &[u8; 16], keys: [u32; 4]) -> [u32; 4] {
    let mut words = keys;
    words.iter_mut().zip(block.as_chunks::<4>().0).for_each(|(w, b)| *w ^= u32::from_le_bytes(*b));
    words
}

#[inline]
fn store(block: &mut [u8; 16], words: [u32; 4], keys: [u32; 4]) {
    for ((to, word), key) in block.as_chunks_mut::<4>().0.iter_mut().zip(words).zip(keys) {
        *to = (word ^ key).to_le_bytes();
    }
}
