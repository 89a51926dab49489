//! Entries of a refcount block, 1 to 64 bits wide ("Refcount block").
//!
//! Used by the allocator and the checker on whole blocks in memory.

/// The refcount at `index`; 0 past the end of the block. `order` is 0…6 (log2 of the bits).
pub fn get(block: &[u8], order: u32, index: usize) -> u64 {
    let wide = |bytes: usize| -> u64 {
        let at = index.saturating_mul(bytes);
        let entry = block.get(at..at.saturating_add(bytes)).unwrap_or_default();
        entry.iter().fold(0, |v, &b| v << 8 | u64::from(b))
    };
    match order {
        0..=2 => {
            let bits = 1usize << order;
            let per_byte = 8 / bits;
            let byte = block.get(index / per_byte).copied().unwrap_or(0);
            // Little-endian within the byte: lowest bits, lowest index.
            u64::from(byte >> (index % per_byte * bits)) & ((1 << bits) - 1)
        }
        3..=6 => wide(1 << (order - 3)),
        _ => 0,
    }
}

/// Sets the refcount at `index`; nothing happens past the end or if `value` does not fit (answers `false`).
pub fn set(block: &mut [u8], order: u32, index: usize, value: u64) -> bool {
    if order > 6 || value > max(order) {
        return false;
    }
    if order <= 2 {
        let bits = 1usize << order;
        let per_byte = 8 / bits;
        let Some(byte) = block.get_mut(index / per_byte) else { return false };
        let shift = index % per_byte * bits;
        let mask = (max(order) as u8) << shift;
        *byte = *byte & !mask | (value as u8) << shift;
        return true;
    }
    let bytes = 1usize << (order - 3);
    let at = index.saturating_mul(bytes);
    let Some(entry) = block.get_mut(at..at.saturating_add(bytes)) else { return false };
    entry.copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    true
}

/// Largest value of a width; `order` is 0…6.
pub fn max(order: u32) -> u64 {
    u64::MAX >> (64 - (1u32 << order.min(6)))
}
