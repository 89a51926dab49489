//! Pages of guest memory that vanish: what happens when a front end shortens a memory file that we have mapped.
//!
//! Touching such a page is SIGBUS, which would end the process, and with it the disks of other front ends. `region`
//! registers every file mapping here; the handler puts a zero page where the fault was and marks the mapping as lost,
//! whereupon its rings are stopped ([`crate::Memory::is_lost`]). A fault anywhere else is left to whoever handled
//! SIGBUS before. System calls on guest memory need none of this: they fail with EFAULT.
//!
//! The handler uses atomics and `mmap` only; it must not lock, allocate or log.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, OnceLock, PoisonError};

/// Mappings that can be registered at once: eight full tables of 509 regions. Those beyond are served without the net.
const MAX: usize = 4096;

/// One mapping. `start` is 0 in a free place; it is stored last and cleared first, so that a handler that sees it sees the
/// rest as well.
struct Place {
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    lost: AtomicBool,
}

static PLACES: [Place; MAX] = [const {
    Place {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; MAX];
/// Places from here on were never used.
static USED: AtomicUsize = AtomicUsize::new(0);
/// See [`any`].
static ANY: AtomicBool = AtomicBool::new(false);
/// Held while a place is taken. Never by the handler.
static TAKING: Mutex<()> = Mutex::new(());
/// What was in force before the handler.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// A registered mapping; drop it before the mapping.
#[derive(Debug)]
pub(crate) struct Watched(Option<usize>);

impl Watched {
    /// Not watched: memory without a file.
    pub const NOT: Self = Self(None);

    /// Watches `len` bytes at `start`, mapped from a file with pages of `page` bytes.
    pub fn new(start: *const u8, len: usize, page: usize) -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install);
        let _taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        let free = PLACES.iter().position(|p| p.start.load(Ordering::Relaxed) == 0);
        let Some((index, place)) = free.and_then(|i| Some((i, PLACES.get(i)?))) else { return Self::NOT };
        place.len.store(len, Ordering::Relaxed);
        place.page.store(page, Ordering::Relaxed);
        place.lost.store(false, Ordering::Relaxed);
        // Release: pairs with the handler's Acquire load, which reads the rest after it.
        place.start.store(start.addr(), Ordering::Release);
        USED.fetch_max(index + 1, Ordering::Release);
        Self(Some(index))
    }

    /// Whether a page of the mapping has vanished.
    #[inline]
    pub fn is_lost(&self) -> bool {
        // Relaxed: a flag that is only ever set; the next look will see it.
        self.0.and_then(|i| PLACES.get(i)).is_some_and(|p| p.lost.load(Ordering::Relaxed))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(place) = self.0.and_then(|i| PLACES.get(i)) {
            // Release: what was done in the mapping comes before.
            place.start.store(0, Ordering::Release);
        }
    }
}

/// Whether any mapping of this process ever lost pages: one load, for those who ask often.
#[inline]
pub(crate) fn any() -> bool {
    // Relaxed: as for the flags themselves.
    ANY.load(Ordering::Relaxed)
}

fn install() {
    let mut old = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: all-zero is a valid sigaction: no handler, no flags, an empty mask.
    let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only reads the present one into `old`, which is large enough.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), old.as_mut_ptr()) } != 0 {
        return;
    }
    // SAFETY: the call above succeeded and filled it.
    let _ = BEFORE.set(unsafe { old.assume_init() });
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    new.sa_sigaction = handler as *const () as usize;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `new` is complete; its handler has the signature that SA_SIGINFO asks for and is safe in a signal (see the
    // module's words).
    unsafe { libc::sigaction(libc::SIGBUS, &new, ptr::null_mut()) };
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo, whose address is set for SIGBUS.
    let (address, code) = unsafe { ((*info).si_addr().addr(), (*info).si_code) };
    // SAFETY: errno is this thread's own; whatever was interrupted must find it as it was.
    let errno = unsafe { *libc::__errno_location() };
    // Only pages that are not there. Memory that the hardware has lost is not to be read as zeroes.
    let mended = code == libc::BUS_ADRERR && mend(address);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if !mended && let Some(before) = BEFORE.get() {
        // Not ours: the instruction faults again, and meets who was responsible before.
        // SAFETY: `before` is what sigaction returned.
        unsafe { libc::sigaction(libc::SIGBUS, before, ptr::null_mut()) };
    }
}

/// Puts a zero page at a fault inside a watched mapping; false if it is in none.
fn mend(address: usize) -> bool {
    // Acquire: pairs with the store in `new`; the faulting thread got its mapping after that.
    let used = USED.load(Ordering::Acquire);
    for place in PLACES.iter().take(used) {
        let start = place.start.load(Ordering::Acquire);
        let inside = start != 0 && address.wrapping_sub(start) < place.len.load(Ordering::Relaxed);
        if !inside {
            continue;
        }
        let page = place.page.load(Ordering::Relaxed).max(1);
        let at = address - address % page;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the page lies in a mapping that the faulting thread is using, which is therefore alive; it starts and ends
        // on pages of this size. Its content is gone anyway; guest memory may change at any moment for all who use it.
        let r = unsafe { libc::mmap(ptr::with_exposed_provenance_mut(at), page, prot, flags, -1, 0) };
        place.lost.store(true, Ordering::Relaxed);
        ANY.store(true, Ordering::Relaxed);
        return r != libc::MAP_FAILED;
    }
    false
}

#[cfg(test)]
mod tests;
