//! A small random number generator with a seed (SplitMix64), so that a failure can be replayed without knowing a library.

/// The generator.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed; any number will do.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 for 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.bits() % n }
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// `len` bytes, none of them 0, so that data is told from zeroes.
    pub fn data(&mut self, len: u64) -> Vec<u8> {
        let mut data = Vec::with_capacity(len as usize + 8);
        while data.len() < len as usize {
            data.extend_from_slice(&(self.bits() | 0x0101_0101_0101_0101).to_le_bytes());
        }
        data.truncate(len as usize);
        data
    }

    /// A range inside `size`: mostly short, sometimes aligned, sometimes up to the end.
    pub fn range(&mut self, size: u64) -> (u64, u64) {
        let units = [1, 1, 512, 4096, 65536];
        let unit = units[self.below(units.len() as u64) as usize].min(size.max(1));
        let offset = self.below(size / unit + 1) * unit;
        let offset = offset.min(size.saturating_sub(1));
        let room = size - offset;
        let longest = [700, 5000, 70_000, 300_000][self.below(4) as usize];
        let len = match self.below(10) {
            0 => room.min(longest),
            _ => (1 + self.below(longest)).next_multiple_of(unit).min(room),
        };
        (offset, len)
    }
}
