//! Permissions of a node made known to other processes: OFD locks on single bytes of the image, as QEMU sets them.
//!
//! Byte 100 + i is read-locked by everyone who *uses* permission i, byte 200 + i by everyone who does *not share* it
//! (i = 0 consistent read, 1 write, 2 write unchanged, 3 resize). Whether somebody else holds a byte is asked by testing
//! for a write lock, which nobody ever takes. Byte 0 belongs to libvirt, 104 and 204 to old versions of QEMU.
//!
//! Called by the driver's permission methods on the main thread. A change is prepared (locks for before *and* after, then
//! the check), and committed or aborted (what is not needed is given back): at no moment is a byte free that either state
//! needs. Locking first and checking after is what makes two processes that start at the same time see each other; both may
//! then fail, never both succeed.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use graph::{BlockError, Errno, Perm, PermPair, Result};
use host::File;

/// First of the bytes that say what is used.
const USED: u64 = 100;
/// First of the bytes that say what is not shared.
const UNSHARED: u64 = 200;

/// What the locks are put on; the file, or a stand-in in tests.
pub(super) trait LockBytes {
    /// Read-locks a byte.
    fn lock(&self, byte: u64) -> io::Result<()>;
    /// Gives a byte back.
    fn unlock(&self, byte: u64) -> io::Result<()>;
    /// Whether nobody else holds the byte.
    fn is_free(&self, byte: u64) -> io::Result<bool>;
}

impl LockBytes for Arc<File> {
    fn lock(&self, byte: u64) -> io::Result<()> {
        self.lock_byte(byte)
    }

    fn unlock(&self, byte: u64) -> io::Result<()> {
        self.unlock_byte(byte)
    }

    fn is_free(&self, byte: u64) -> io::Result<bool> {
        self.byte_is_free_for_write_lock(byte)
    }
}

struct State {
    /// What was committed last.
    held: PermPair,
    /// What the bytes say now: wider than `held` between prepare and its end.
    locked: PermPair,
    /// Bytes that could not be given back: tried again with the next that are.
    stuck: Vec<u64>,
}

/// The lock bytes of one node.
pub(super) struct Locks<F> {
    /// `None` with `locking=off`.
    file: Option<F>,
    state: Mutex<State>,
}

/// The permissions of a set one by one: (index of the bit, bit).
fn bits(perm: Perm) -> impl Iterator<Item = (u64, Perm)> {
    perm.iter().map(|bit| (u64::from(bit.bits().trailing_zeros()), bit))
}

/// The bytes that stand for a pair.
fn bytes(pair: PermPair) -> impl Iterator<Item = u64> {
    let used = bits(pair.perm).map(|(i, _)| USED + i);
    used.chain(bits(!pair.shared).map(|(i, _)| UNSHARED + i))
}

impl<F: LockBytes> Locks<F> {
    /// Nothing locked. Without a file nothing ever is.
    pub(super) fn new(file: Option<F>) -> Locks<F> {
        Locks {
            file,
            state: Mutex::new(State { held: PermPair::IDLE, locked: PermPair::IDLE, stuck: Vec::new() }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Only the main thread comes here, and nothing in between can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what `perm` and `shared` need, keeps what is held, and looks for others who stand against it. On failure
    /// only what was held before is.
    ///
    /// # Errors
    /// `EAGAIN` with QEMU's words when somebody else uses the image; other numbers when the file system cannot lock.
    pub(super) fn prepare(&self, perm: Perm, shared: Perm, path: &str) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut state = self.state();
        let new = PermPair { perm, shared };
        if state.held.relaxes_to(new) && state.locked == state.held {
            return Ok(());
        }
        let both = state.held.join(new);
        let result = take(file, state.locked, both).and_then(|()| check(file, new, path));
        state.locked = both;
        if result.is_err() {
            let held = state.held;
            give_back(file, &mut state, held);
        }
        result
    }

    /// Hands everything held over to another descriptor of the same file. The bytes are locked twice for a moment and never
    /// free; what is held is not looked at for conflicts, since it has been.
    ///
    /// # Errors
    /// The other descriptor cannot lock; all is here as before.
    pub(super) fn hand_over(&self, to: &Locks<F>) -> Result<()> {
        let (Some(old), Some(new)) = (&self.file, &to.file) else { return Ok(()) };
        let (mut from, mut to) = (self.state(), to.state());
        let (held, locked) = (from.held, from.locked);
        if let Err(e) = take(new, to.locked, locked) {
            to.locked = locked;
            give_back(new, &mut to, PermPair::IDLE);
            return Err(e);
        }
        *to = State { held, locked, stuck: Vec::new() };
        give_back(old, &mut from, PermPair::IDLE);
        from.held = PermPair::IDLE;
        Ok(())
    }

    /// Gives back what `perm` and `shared` do not need.
    pub(super) fn commit(&self, perm: Perm, shared: Perm) {
        let Some(file) = &self.file else { return };
        let mut state = self.state();
        let new = PermPair { perm, shared };
        if !state.locked.relaxes_to(new) {
            // The contract says this does not happen. A byte that cannot be had now would only be reported, and the
            // others would not have been looked for; still, say what is true.
            let locked = state.locked;
            if let Err(e) = take(file, locked, new) {
                log::error!("lock bytes taken late: {e}");
            }
            state.locked = locked.join(new);
        }
        state.held = new;
        give_back(file, &mut state, new);
    }

    /// Back to what was committed last.
    pub(super) fn abort(&self) {
        let Some(file) = &self.file else { return };
        let mut state = self.state();
        let held = state.held;
        give_back(file, &mut state, held);
    }
}

/// Locks the bytes of `to` that `from` has not.
fn take<F: LockBytes>(file: &F, from: PermPair, to: PermPair) -> Result<()> {
    for byte in bytes(to).filter(|b| !bytes(from).any(|have| have == *b)) {
        file.lock(byte).map_err(|e| {
            // Not a conflict, as a rule, but a file system without locks.
            BlockError::io(format!("Failed to lock byte {byte}"), e)
                .context("The image cannot be locked (locking=off does without)")
        })?;
    }
    Ok(())
}

/// Looks for others whose bytes stand against `new`.
fn check<F: LockBytes>(file: &F, new: PermPair, path: &str) -> Result<()> {
    let mut against = bits(new.perm)
        .map(|(i, bit)| (UNSHARED + i, "", bit))
        .chain(bits(!new.shared).map(|(i, bit)| (USED + i, "shared ", bit)));
    against.try_for_each(|(byte, how, bit)| {
        let what = || format!("Failed to get {how}\"{}\" lock", bit.names());
        match file.is_free(byte) {
            Ok(true) => Ok(()),
            Ok(false) => Err(BlockError::new(
                Errno::EAGAIN,
                format!(
                    "{}\nIs another process using the image [{path}]?\nWay out: {}.",
                    what(),
                    way_out(byte, bit)
                ),
            )),
            Err(e) => Err(BlockError::io(what(), e)),
        }
    })
}

/// What helps against somebody who holds `byte`, for the end of the message. Who it is the kernel does not tell.
fn way_out(byte: u64, bit: Perm) -> &'static str {
    match (byte < UNSHARED, bit) {
        // They do not share what is needed here.
        (false, Perm::WRITE) => {
            "end the other process, or let it share writing (share-rw=on) if the image is raw, or use the image with \
             read-only=on"
        }
        (false, _) => "end the other process",
        // They do what is not shared here.
        (true, Perm::WRITE) => {
            "end the other process, or share writing with it (share-rw=on) if the image is raw, or read what it may \
             be changing with read-only=on,force-share=on"
        }
        (true, _) => {
            "end the other process, or read what it may be changing with read-only=on,force-share=on"
        }
    }
}

/// Unlocks what `locked` has beyond `keep`. An error leaves others locked out for longer than needed, which is no reason
/// to fail anything.
fn give_back<F: LockBytes>(file: &F, state: &mut State, keep: PermPair) {
    let needed = |byte: &u64| bytes(keep).any(|k| k == *byte);
    let mut unlock: Vec<u64> = std::mem::take(&mut state.stuck);
    unlock.extend(bytes(state.locked));
    unlock.retain(|b| !needed(b));
    unlock.sort_unstable();
    unlock.dedup();
    for byte in unlock {
        if let Err(e) = file.unlock(byte) {
            log::warn!("cannot give back lock byte {byte}: {e}");
            state.stuck.push(byte);
        }
    }
    state.locked = keep;
}

#[cfg(test)]
#[path = "lock_tests.rs"]
mod tests;
