//! The content of one file: pages that copies share until they differ.
//!
//! Used for the files a workload runs on and for the thousands of crash states made of them: a copy costs pointers, a write
//! costs the pages it touches. Must not know what the bytes mean.

use std::sync::Arc;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Largest file anybody gets, bytes: an offset from a damaged table must not eat the machine's memory.
pub const MAX_LEN: u64 = 1 << 34;

type Page = Arc<[u8; PAGE]>;

/// The bytes of a file; holes read as zeroes.
#[derive(Clone, Default, Debug)]
pub struct Image {
    len: u64,
    pages: Vec<Option<Page>>,
}

impl Image {
    /// A file of these bytes; pages of zeroes become holes.
    pub fn from_bytes(bytes: &[u8]) -> Image {
        let mut image = Image::default();
        image.truncate(bytes.len() as u64);
        for (at, chunk) in bytes.chunks(PAGE).enumerate() {
            if chunk.iter().any(|b| *b != 0) {
                image.write((at * PAGE) as u64, chunk);
            }
        }
        image
    }

    /// Length, bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True without any byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        self.read(0, &mut bytes);
        bytes
    }

    /// Fills `buf` from `offset`; what is not there reads as zeroes.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            let into = (at % PAGE as u64) as usize;
            let n = (PAGE - into).min(buf.len() - done);
            let to = &mut buf[done..done + n];
            match self.pages.get((at / PAGE as u64) as usize) {
                Some(Some(page)) => to.copy_from_slice(&page[into..into + n]),
                _ => to.fill(0),
            }
            done += n;
        }
    }

    /// `len` bytes from `offset`.
    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Writes; the file grows where needed. False beyond [`MAX_LEN`].
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let Some(end) = offset.checked_add(data.len() as u64).filter(|e| *e <= MAX_LEN) else { return false };
        if end > self.len {
            self.truncate(end);
        }
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let into = (at % PAGE as u64) as usize;
            let n = (PAGE - into).min(data.len() - done);
            let slot = &mut self.pages[(at / PAGE as u64) as usize];
            let page = slot.get_or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[into..into + n].copy_from_slice(&data[done..done + n]);
            done += n;
        }
        true
    }

    /// A range reads as zeroes; the file grows where needed. False beyond [`MAX_LEN`].
    pub fn zero(&mut self, offset: u64, len: u64) -> bool {
        let Some(end) = offset.checked_add(len).filter(|e| *e <= MAX_LEN) else { return false };
        if end > self.len {
            self.truncate(end);
        }
        let mut at = offset;
        while at < end {
            let into = (at % PAGE as u64) as usize;
            let n = ((PAGE - into) as u64).min(end - at) as usize;
            let slot = &mut self.pages[(at / PAGE as u64) as usize];
            if n == PAGE {
                *slot = None;
            } else if let Some(page) = slot {
                Arc::make_mut(page)[into..into + n].fill(0);
            }
            at += n as u64;
        }
        true
    }

    /// Another length; new bytes are zero. False beyond [`MAX_LEN`].
    pub fn truncate(&mut self, len: u64) -> bool {
        if len > MAX_LEN {
            return false;
        }
        self.pages.resize(len.div_ceil(PAGE as u64) as usize, None);
        let into = (len % PAGE as u64) as usize;
        if len < self.len
            && into != 0
            && let Some(Some(page)) = self.pages.last_mut()
        {
            Arc::make_mut(page)[into..].fill(0);
        }
        self.len = len;
        true
    }

    /// How many of the `len` bytes from `offset` are alike, holes or not; and whether they are a hole.
    pub fn extent(&self, offset: u64, len: u64) -> (bool, u64) {
        let hole = |at: u64| !matches!(self.pages.get((at / PAGE as u64) as usize), Some(Some(_)));
        let (first, end) = (hole(offset), offset + len);
        let mut at = (offset / PAGE as u64 + 1) * PAGE as u64;
        while at < end && hole(at) == first {
            at += PAGE as u64;
        }
        (first, at.min(end) - offset)
    }

    /// Whether both hold the same bytes.
    pub fn same(&self, other: &Image) -> bool {
        if self.len != other.len {
            return false;
        }
        const ZERO: [u8; PAGE] = [0; PAGE];
        self.pages.iter().zip(&other.pages).all(|(a, b)| match (a, b) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
            (Some(a), None) | (None, Some(a)) => **a == ZERO,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use conformance::rng::Rng;

    #[test]
    fn behaves_like_a_vector_of_bytes() {
        let mut rng = Rng::new(1);
        let (mut image, mut model) = (Image::default(), Vec::new());
        for _ in 0..2000 {
            let (offset, len) = (rng.below(40_000), 1 + rng.below(10_000));
            let end = (offset + len) as usize;
            match rng.below(4) {
                0 => {
                    let to = rng.below(50_000);
                    assert!(image.truncate(to));
                    model.resize(to as usize, 0);
                }
                1 => {
                    assert!(image.zero(offset, len));
                    model.resize(model.len().max(end), 0);
                    model[offset as usize..end].fill(0);
                }
                _ => {
                    let data = rng.data(len);
                    assert!(image.write(offset, &data));
                    model.resize(model.len().max(end), 0);
                    model[offset as usize..end].copy_from_slice(&data);
                }
            }
            assert_eq!(image.len(), model.len() as u64);
            assert!(image.to_bytes() == model);
            assert!(image.same(&Image::from_bytes(&model)));
        }
    }

    #[test]
    fn copies_are_independent_and_absurd_offsets_refused() {
        let mut a = Image::from_bytes(&[1; 5000]);
        let b = a.clone();
        a.write(4999, &[9, 9]);
        assert_eq!((b.len(), b.bytes(4998, 3)), (5000, vec![1, 1, 0]));
        assert!(!a.same(&b));
        assert!(!a.write(u64::MAX - 1, &[0; 4]) && !a.zero(MAX_LEN, 1) && !a.truncate(u64::MAX));
    }
}
