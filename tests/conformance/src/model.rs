//! What a node must hold: for each byte what a read may return.
//!
//! Usually one value; two while a write that failed or was given up may or may not have reached it; anything after a
//! discard whose result is open. A read settles a byte on what it returned.

use crate::{Check, ensure};

/// What a byte may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Byte {
    One(u8),
    Either(u8, u8),
    Any,
}

impl Byte {
    fn allows(self, value: u8) -> bool {
        match self {
            Byte::One(a) => a == value,
            Byte::Either(a, b) => a == value || b == value,
            Byte::Any => true,
        }
    }

    /// The byte after a write of `value` that may not have happened.
    fn or(self, value: u8) -> Byte {
        match self {
            Byte::One(a) if a == value => self,
            Byte::One(a) => Byte::Either(a, value),
            Byte::Either(a, b) if a == value || b == value => self,
            Byte::Either(..) | Byte::Any => Byte::Any,
        }
    }
}

/// The bytes of a node.
#[derive(Clone, Debug)]
pub struct Model {
    bytes: Vec<Byte>,
}

impl Model {
    /// A node of `size` bytes that reads as zeroes.
    pub fn zeroes(size: u64) -> Model {
        Model { bytes: vec![Byte::One(0); size as usize] }
    }

    /// Its size, bytes.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn range(&mut self, offset: u64, len: u64) -> &mut [Byte] {
        let start = (offset as usize).min(self.bytes.len());
        let end = (offset.saturating_add(len) as usize).min(self.bytes.len());
        self.bytes.get_mut(start..end).unwrap_or_default()
    }

    /// A write that succeeded.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (byte, value) in self.range(offset, data.len() as u64).iter_mut().zip(data) {
            *byte = Byte::One(*value);
        }
    }

    /// A write that failed or was given up: each byte is old or new.
    pub fn maybe_write(&mut self, offset: u64, data: &[u8]) {
        for (byte, value) in self.range(offset, data.len() as u64).iter_mut().zip(data) {
            *byte = byte.or(*value);
        }
    }

    /// Zeroes that were written.
    pub fn zero(&mut self, offset: u64, len: u64) {
        self.range(offset, len).fill(Byte::One(0));
    }

    /// Zeroes that may have been written.
    pub fn maybe_zero(&mut self, offset: u64, len: u64) {
        self.range(offset, len).iter_mut().for_each(|b| *b = b.or(0));
    }

    /// Content nobody knows.
    pub fn forget(&mut self, offset: u64, len: u64) {
        self.range(offset, len).fill(Byte::Any);
    }

    /// Another size; new bytes are zero.
    pub fn resize(&mut self, size: u64) {
        self.bytes.resize(size as usize, Byte::One(0));
    }

    /// Checks what a read returned, and settles on it.
    ///
    /// # Errors
    /// The first byte that cannot be.
    pub fn read(&mut self, offset: u64, data: &[u8]) -> Check {
        let len = data.len() as u64;
        let expected = self.range(offset, len);
        ensure!(expected.len() as u64 == len, "a read of {offset}+{len} past the end of the model");
        if let Some(at) = expected.iter().zip(data).position(|(byte, value)| !byte.allows(*value)) {
            return Err(format!(
                "read {offset}+{len}: byte {} is {:#04x}, must be {:?}",
                offset + at as u64,
                data[at],
                expected[at]
            ));
        }
        self.write(offset, data);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn tells_right_from_wrong() {
        let mut model = Model::zeroes(8);
        model.write(2, &[7, 8]);
        assert!(model.read(0, &[0, 0, 7, 8, 0, 0, 0, 0]).is_ok());
        assert!(model.read(2, &[7, 9]).unwrap_err().contains("byte 3 is 0x09"));
        assert!(model.read(7, &[0, 0]).is_err());
    }

    #[test]
    fn uncertain_bytes_settle_on_what_was_read() {
        let mut model = Model::zeroes(4);
        model.maybe_write(0, &[1, 1]);
        model.maybe_zero(0, 1);
        model.forget(3, 1);
        assert!(model.clone().read(0, &[2]).is_err());
        assert!(model.read(0, &[1, 0, 0, 99]).is_ok());
        assert!(model.read(0, &[0]).is_err());
        assert!(model.read(3, &[99]).is_ok());
        assert!(model.read(3, &[98]).is_err());
        model.resize(5);
        assert!(model.read(4, &[0]).is_ok());
    }
}
