//! Scatter lists over memory that others may change at any moment (guest memory), and owned buffers of the same shape.
//!
//! Passed from the backend through the graph and the drivers to the file operations. All access is by copy; nobody gets a
//! reference into the memory. It must not allocate for a view.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::io;
use std::ptr;
use std::rc::Rc;

use libc::iovec;

#[cfg(test)]
mod tests;

/// Block in which foreign memory is copied out before it is looked at. Small: it is cleared for every look, most of which end
/// with the first bytes.
const PEEK: usize = 512;

/// Scatter list over memory that is owned or kept alive by the list. `!Send`, cheap to clone. A view of a part shares everything.
#[derive(Clone)]
pub struct IoVecs {
    all: Rc<List>,
    start: usize,
    len: usize,
}

struct List {
    iov: Box<[iovec]>,
    total: usize,
    /// Holds the memory; dropped last of all views.
    _keep: Option<Rc<dyn Any>>,
}

/// Aligned, zeroed, owned memory.
struct Aligned {
    ptr: *mut u8,
    layout: Layout,
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with exactly this layout in `IoVecs::alloc`, and freed nowhere else.
        unsafe { dealloc(self.ptr, self.layout) }
    }
}

impl IoVecs {
    /// Zeroed memory of `len` bytes at a multiple of `align` (a power of two). The caller bounds `len`.
    ///
    /// Errors: `EINVAL` for an impossible alignment, `ENOMEM`.
    pub fn alloc(len: usize, align: usize) -> io::Result<IoVecs> {
        let layout = Layout::from_size_align(len.max(1), align.max(1))
            .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let keep: Rc<dyn Any> = Rc::new(Aligned { ptr, layout });
        Ok(IoVecs::build(Box::new([iovec { iov_base: ptr.cast(), iov_len: len }]), Some(keep)))
    }

    /// Takes a vector's memory over, without copying it.
    pub fn from_vec(v: Vec<u8>) -> IoVecs {
        let len = v.len();
        let mut owned = v.into_boxed_slice();
        let base = owned.as_mut_ptr();
        // From here on the memory is reached through the raw pointer alone, so that no unique reference is invalidated.
        let keep: Rc<dyn Any> = Rc::new(Owned(Box::into_raw(owned)));
        IoVecs::build(Box::new([iovec { iov_base: base.cast(), iov_len: len }]), Some(keep))
    }

    /// A list over memory of others.
    ///
    /// # Safety
    /// Every `iovec` is valid for reads and writes while `keep` lives. The memory may change and be written by others at any
    /// moment; it must not be referenced by Rust references meanwhile.
    pub unsafe fn from_raw(iov: &[iovec], keep: Rc<dyn Any>) -> IoVecs {
        IoVecs::build(iov.into(), Some(keep))
    }

    /// The parts one after the other. Shares their memory.
    pub fn concat(parts: &[IoVecs]) -> IoVecs {
        let mut iov = Vec::with_capacity(parts.iter().map(IoVecs::iov_count).sum());
        for part in parts {
            part.gather(usize::MAX, &mut iov);
        }
        IoVecs::build(iov.into(), Some(Rc::new(parts.to_vec())))
    }

    /// The empty list.
    pub fn empty() -> IoVecs {
        IoVecs::build(Box::new([]), None)
    }

    fn build(iov: Box<[iovec]>, keep: Option<Rc<dyn Any>>) -> IoVecs {
        // Saturating: a total beyond the address space cannot be backed by memory, so that nothing is ever reached there.
        let total = iov.iter().fold(0usize, |a, v| a.saturating_add(v.iov_len));
        IoVecs { all: Rc::new(List { iov, total, _keep: keep }), start: 0, len: total }
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part `start..start + len`, cut to what there is. Shares the memory.
    pub fn slice(&self, start: usize, len: usize) -> IoVecs {
        let start = start.min(self.len);
        let len = len.min(self.len - start);
        IoVecs { all: Rc::clone(&self.all), start: self.start + start, len }
    }

    /// Calls `f` with pieces of `at..at + len` (cut to what there is) in order, until it returns false.
    fn pieces(&self, at: usize, len: usize, mut f: impl FnMut(*mut u8, usize) -> bool) {
        let at = at.min(self.len);
        let mut left = len.min(self.len - at);
        let mut skip = self.start + at;
        for v in self.all.iov.iter() {
            if left == 0 {
                return;
            }
            if skip >= v.iov_len {
                skip -= v.iov_len;
                continue;
            }
            let n = (v.iov_len - skip).min(left);
            // SAFETY: skip < iov_len: the result lies inside of the iovec.
            let p = unsafe { v.iov_base.cast::<u8>().add(skip) };
            if !f(p, n) {
                return;
            }
            skip = 0;
            left -= n;
        }
    }

    /// Copies `dst.len()` bytes from offset `at` out of the list; bytes past its end stay as they are in `dst`.
    pub fn copy_to(&self, at: usize, dst: &mut [u8]) {
        let mut done = 0;
        self.pieces(at, dst.len(), |p, n| {
            if let Some(d) = dst.get_mut(done..done + n) {
                // SAFETY: p..p+n is valid for reads (from_raw's contract, or owned), `d` is exclusively ours and n long;
                // they cannot overlap, since no reference into the list's memory exists.
                unsafe { ptr::copy_nonoverlapping(p, d.as_mut_ptr(), n) };
            }
            done += n;
            true
        });
    }

    /// Copies `src` into the list at offset `at`; what does not fit is left out.
    pub fn copy_from(&self, at: usize, src: &[u8]) {
        let mut done = 0;
        self.pieces(at, src.len(), |p, n| {
            if let Some(s) = src.get(done..done + n) {
                // SAFETY: p..p+n is valid for writes, `s` is n bytes that nobody writes; no overlap as above.
                unsafe { ptr::copy_nonoverlapping(s.as_ptr(), p, n) };
            }
            done += n;
            true
        });
    }

    /// Copies as many bytes as both have. The two may overlap only where a guest made its own buffers overlap; the result
    /// there is unspecified, as it would be on hardware.
    pub fn copy_iov(&self, from: &IoVecs) {
        let mut done = 0;
        from.pieces(0, self.len, |src, n| {
            let mut inner = 0;
            self.pieces(done, n, |dst, m| {
                // SAFETY: both ranges are valid by the contract of their lists; `copy` bears overlap.
                unsafe { ptr::copy(src.add(inner), dst, m) };
                inner += m;
                true
            });
            done += n;
            true
        });
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        self.pieces(0, self.len, |p, n| {
            // SAFETY: p..p+n is valid for writes.
            unsafe { ptr::write_bytes(p, byte, n) };
            true
        });
    }

    /// True if every byte was zero at the moment it was looked at.
    pub fn is_zero(&self) -> bool {
        let mut zero = true;
        let mut block = [0u8; PEEK];
        self.pieces(0, self.len, |p, n| {
            // Data is rarely zero at both ends of a piece: that answers most calls with two loads.
            // SAFETY: n > 0, and p..p+n is valid for reads.
            let ends = unsafe { ptr::read_volatile(p) | ptr::read_volatile(p.add(n - 1)) };
            if ends != 0 {
                zero = false;
                return false;
            }
            let mut at = 0;
            while at < n {
                let m = (n - at).min(PEEK);
                // SAFETY: at + m <= n; the block is ours and PEEK >= m long.
                unsafe { ptr::copy_nonoverlapping(p.add(at), block.as_mut_ptr(), m) };
                if !all_zero(&block[..m]) {
                    zero = false;
                    return false;
                }
                at += m;
            }
            true
        });
        zero
    }

    /// Where the first byte is that differs, as far as both go; `None`: there is none.
    pub fn first_difference(&self, other: &IoVecs) -> Option<usize> {
        let (mut a, mut b) = ([0u8; PEEK], [0u8; PEEK]);
        let len = self.len.min(other.len);
        for at in (0..len).step_by(PEEK) {
            let n = (len - at).min(PEEK);
            let (a, b) = (&mut a[..n], &mut b[..n]);
            self.copy_to(at, a);
            other.copy_to(at, b);
            if a != b {
                return a.iter().zip(b.iter()).position(|(a, b)| a != b).map(|i| at + i);
            }
        }
        None
    }

    /// True if every piece starts at a multiple of `mem_align` (a power of two) and is a multiple of it long.
    pub fn is_aligned(&self, mem_align: usize) -> bool {
        self.fits(mem_align, mem_align)
    }

    /// True if every piece starts at a multiple of `mem` and is a multiple of `len` long.
    pub(crate) fn fits(&self, mem: usize, len: usize) -> bool {
        let (mem, len) = (mem.max(1) - 1, len.max(1) - 1);
        let mut ok = true;
        self.pieces(0, self.len, |p, n| {
            ok = (p as usize) & mem == 0 && n & len == 0;
            ok
        });
        ok
    }

    /// Number of pieces.
    pub fn iov_count(&self) -> usize {
        if self.start == 0 && self.len == self.all.total {
            return self.all.iov.len();
        }
        let mut n = 0;
        self.pieces(0, self.len, |_, _| {
            n += 1;
            true
        });
        n
    }

    /// A copy of the bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut v = vec![0; self.len];
        self.copy_to(0, &mut v);
        v
    }

    /// The whole list when this view is all of it: the kernel can be given it as it is.
    pub(crate) fn raw(&self) -> Option<&[iovec]> {
        (self.start == 0 && self.len == self.all.total).then_some(&self.all.iov)
    }

    /// Collects up to `max` pieces of the view into `out` and returns their total length.
    pub(crate) fn gather(&self, max: usize, out: &mut Vec<iovec>) -> usize {
        let mut total = 0;
        self.pieces(0, self.len, |p, n| {
            if out.len() >= max {
                return false;
            }
            out.push(iovec { iov_base: p.cast(), iov_len: n });
            total += n;
            true
        });
        total
    }
}

/// Memory of a vector that is reached through pointers only.
struct Owned(*mut [u8]);

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: came out of Box::into_raw in `from_vec`, and is given back once.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

fn all_zero(b: &[u8]) -> bool {
    // An OR over whole words compiles to vector code; a short-circuiting `all` does not.
    let (head, words, tail) = (b.chunks_exact(64), 64, b.len() % 64);
    let rest = &b[b.len() - tail..];
    for c in head {
        if c.iter().take(words).fold(0u8, |a, x| a | x) != 0 {
            return false;
        }
    }
    rest.iter().fold(0u8, |a, x| a | x) == 0
}
