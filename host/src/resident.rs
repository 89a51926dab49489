//! How much of the program itself is resident: start-up code is needed once.
//!
//! Called by the process when it has started and nothing has happened for a while. A page fault maps sixteen pages around the one that is needed, so that most of
//! the program is in the process's account afterwards; the pages are the page cache's and come back, shared, when they are
//! needed again.

use std::ffi::{CStr, c_int, c_void};

/// Takes the read-only parts of the program and its libraries out of the process's account.
pub fn forget_program_pages() {
    // SAFETY: the callback reads what it is given, for the time of the call only.
    unsafe { libc::dl_iterate_phdr(Some(each), std::ptr::null_mut()) };
}

/// One loaded object.
unsafe extern "C" fn each(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: valid and unchanged during the callback (dl_iterate_phdr(3)).
    let info = unsafe { &*info };
    // The program has an empty name, libraries have paths. What has another name is the kernel's (vDSO).
    // SAFETY: a C string, or null for none.
    let named = !info.dlpi_name.is_null() && unsafe { !CStr::from_ptr(info.dlpi_name).is_empty() };
    // SAFETY: as above.
    if named && unsafe { *info.dlpi_name } != b'/' as libc::c_char {
        return 0;
    }
    // SAFETY: that many headers are there.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    // SAFETY: asks a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(4096) as usize;
    for h in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0) {
        let start = (info.dlpi_addr as usize).wrapping_add(h.p_vaddr as usize);
        // Whole pages of this segment only: its neighbours' are not ours to judge.
        let from = start.next_multiple_of(page);
        let to = start.wrapping_add(h.p_memsz as usize) / page * page;
        if to <= from {
            continue;
        }
        // SAFETY: the range lies in a private mapping of a file that was never written (no PF_W, no text relocations), so that
        // every page comes back as it was. Failing is no harm.
        unsafe { libc::madvise(std::ptr::without_provenance_mut(from), to - from, libc::MADV_DONTNEED) };
    }
    0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    /// Resident pages of files, KiB.
    fn resident() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("RssFile:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn pages_of_the_program_go_and_come_back() {
        let before = resident();
        super::forget_program_pages();
        let after = resident();
        assert!(after < before, "{before} KiB before, {after} KiB after");
    }
}
