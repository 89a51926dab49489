//! Seeds into inputs: a small deterministic generator of changes that parsers of binary headers mind.
//!
//! Used by every target. The same seed and number give the same input.

/// A generator of numbers (xorshift*), not for secrets.
pub struct Random(u64);

impl Random {
    /// The stream of one execution.
    pub fn new(seed: u64, execution: u64) -> Random {
        let mut r = Random(seed ^ execution.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..3 {
            r.next();
        }
        r
    }

    /// 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Below `n` (0 for 0).
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { (self.next() % n as u64) as usize }
    }
}

/// Numbers at the edges of fields.
const EDGES: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    16,
    21,
    22,
    63,
    64,
    72,
    103,
    104,
    105,
    0x1ff,
    0x200,
    0xffff,
    0x1_0000,
    0x1_0001,
    0x7fff_ffff,
    0xffff_ffff,
    0x0001_0000_0000,
];

fn edge(r: &mut Random) -> u64 {
    match r.below(6) {
        0 => u64::MAX - r.next() % 4,
        1 => 1 << r.below(64),
        2 => (1u64 << r.below(64)).wrapping_sub(1),
        3 => r.next() >> r.below(64),
        _ => EDGES[r.below(EDGES.len())],
    }
}

/// Changes `bytes` at one to eight places, mostly within the first `near`.
pub fn mutate(bytes: &mut Vec<u8>, near: usize, r: &mut Random) {
    for _ in 0..=r.below(4) * r.below(3) {
        let len = bytes.len();
        if len == 0 {
            bytes.push(r.next() as u8);
            continue;
        }
        let limit = if r.below(4) == 0 { len } else { near.min(len) };
        let at = r.below(limit);
        match r.below(12) {
            0 => bytes[at] ^= 1 << r.below(8),
            1 => bytes[at] = r.next() as u8,
            2..=4 => put(bytes, at & !3, &(edge(r) as u32).to_be_bytes()),
            5..=8 => put(bytes, at & !7, &edge(r).to_be_bytes()),
            9 => {
                // One place's content at another.
                let from = r.below(limit) & !7;
                let n = 8 << r.below(4);
                let piece: Vec<u8> = bytes.iter().skip(from).take(n).copied().collect();
                put(bytes, at & !7, &piece);
            }
            10 if r.below(8) == 0 => bytes.truncate(at),
            _ => {
                // Close to what it was.
                let at = at & !7;
                if let Some(word) = bytes.get(at..at + 8).and_then(|w| <[u8; 8]>::try_from(w).ok()) {
                    let near = u64::from_be_bytes(word).wrapping_add(r.next() % 9).wrapping_sub(4);
                    put(bytes, at, &near.to_be_bytes());
                }
            }
        }
    }
}

fn put(bytes: &mut [u8], at: usize, data: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(data) {
        *to = *from;
    }
}
