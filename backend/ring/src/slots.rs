//! Requests in flight: the one place where a guest's buffers meet the kernel.
//!
//! A queue's owner takes a slot per request, unpacks the chain into it and hands the chain's segments to the host
//! layer, either as a raw operation ([`Slots::submit`]) or as a list that keeps its memory alive
//! ([`Slots::io_vecs`]). The table sees to it that a segment list neither moves nor changes while the kernel may use
//! it, and that the memory epoch it points into stays mapped. It must not know what a request means.

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;

use host::{FastOp, File, IoVecs, Local, SourceId};

use crate::chain::Chain;
use crate::iov::GuestIov;
use crate::memory::Memory;

#[cfg(test)]
mod tests;

/// Which part of a chain an operation works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What the driver wrote for us.
    Readable,
    /// What we write for the driver.
    Writable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Taken; nobody but the owner holds pointers.
    Owned,
    /// The kernel may use the chain's segment list and the memory behind it.
    Kernel,
}

/// A request's place.
#[derive(Debug)]
pub struct Slot<T> {
    chain: Chain,
    state: State,
    /// The epoch this slot is counted with as a user; its chain is handed to the kernel only while it points there.
    epoch: u64,
    /// What the owner keeps with the request.
    pub data: T,
}

impl<T> Slot<T> {
    /// The request's buffers.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }
}

/// The one atomic reference to an epoch, counted without atomics: the segment lists of driven requests share it. The outer
/// count is the point: it costs no locked instruction.
type Counted = Rc<Arc<Memory>>;

#[derive(Debug)]
struct Epoch {
    memory: Counted,
    /// Slots taken while this was the current epoch and not released yet.
    users: u32,
}

/// A fixed number of slots, and the memory epochs that the taken ones point into.
#[derive(Debug)]
pub struct Slots<T> {
    slots: Box<[Slot<T>]>,
    free: Vec<u32>,
    current: Epoch,
    /// Former epochs that still have users, oldest first.
    former: Vec<Epoch>,
    in_kernel: u32,
}

impl<T: Default> Slots<T> {
    /// `count` free slots; requests taken from now on lie in `memory`.
    pub fn new(count: u16, memory: Arc<Memory>) -> Self {
        let slot = || Slot { chain: Chain::new(), state: State::Free, epoch: 0, data: T::default() };
        Slots {
            slots: std::iter::repeat_with(slot).take(count.into()).collect(),
            // Last in, first out: the slot used last is the one still in the cache.
            free: (0..u32::from(count)).rev().collect(),
            current: Epoch { memory: Rc::new(memory), users: 0 },
            former: Vec::new(),
            in_kernel: 0,
        }
    }
}

impl<T> Slots<T> {
    /// Requests in flight.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        self.slots.len() as u32 - self.free.len() as u32
    }

    /// The current epoch.
    #[inline]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.current.memory
    }

    /// The memory table changed. Requests in flight keep the old one; it is returned (for the caller to drop where
    /// unmapping may take its time) here or by the [`Slots::release`] of its last request.
    pub fn set_memory(&mut self, memory: Arc<Memory>) -> Option<Retired> {
        let old = std::mem::replace(&mut self.current, Epoch { memory: Rc::new(memory), users: 0 });
        if old.users == 0 {
            return Retired::new(old.memory);
        }
        self.former.push(old);
        None
    }

    /// Offers a free slot's chain to `fill`; takes the slot if that says so.
    ///
    /// `None`: no slot is free, `fill` declined, or it made a chain of another epoch than the table's current one (the
    /// queue and this table must change over together).
    #[inline]
    pub fn take(&mut self, fill: impl FnOnce(&mut Chain) -> bool) -> Option<u32> {
        let index = *self.free.last()?;
        let slot = self.slots.get_mut(index as usize)?;
        if !fill(&mut slot.chain) || slot.chain.epoch() != self.current.memory.epoch() {
            return None;
        }
        slot.epoch = slot.chain.epoch();
        slot.state = State::Owned;
        self.free.pop();
        self.current.users += 1;
        Some(index)
    }

    /// The slot, unless it is free.
    #[inline]
    pub fn get(&self, index: u32) -> Option<&Slot<T>> {
        self.slots.get(index as usize).filter(|s| s.state != State::Free)
    }

    /// The slot and its chain for changing, unless the kernel has it.
    #[inline]
    pub fn get_mut(&mut self, index: u32) -> Option<(&mut Chain, &mut T)> {
        let s = self.slots.get_mut(index as usize).filter(|s| s.state == State::Owned)?;
        Some((&mut s.chain, &mut s.data))
    }

    /// The memory a slot's request lies in, its chain and its data, unless the kernel has it.
    #[inline]
    pub fn parts(&mut self, index: u32) -> Option<(&Memory, &mut Chain, &mut T)> {
        let s = self.slots.get_mut(index as usize).filter(|s| s.state == State::Owned)?;
        let number = s.chain.epoch();
        let memory = match number == self.current.memory.epoch() {
            true => &self.current.memory,
            false => self.former.iter().map(|e| &e.memory).find(|m| m.epoch() == number)?,
        };
        Some((memory, &mut s.chain, &mut s.data))
    }

    /// The memory epoch that a taken slot points into.
    #[inline]
    pub fn epoch_of(&self, index: u32) -> Option<&Arc<Memory>> {
        self.rc_of(index).map(|rc| &**rc)
    }

    #[inline]
    fn rc_of(&self, index: u32) -> Option<&Counted> {
        let number = self.get(index)?.chain.epoch();
        if number == self.current.memory.epoch() {
            return Some(&self.current.memory);
        }
        self.former.iter().map(|e| &e.memory).find(|m| m.epoch() == number)
    }

    /// Starts one raw operation on the request's segments; its completion arrives at the source's `complete` with
    /// this slot's number, whereupon [`Slots::returned`] must be called (and never otherwise: it says that the kernel is
    /// done). `Some`: it was done at once, with this result. The caller keeps `file` until then.
    ///
    /// A slot that is not taken, or that the kernel has already, gives `-EINVAL`; nothing happens then.
    #[expect(clippy::too_many_arguments, reason = "the hot path: one call, everything in registers")]
    #[inline]
    pub fn submit(
        &mut self,
        index: u32,
        part: Part,
        op: FastOp,
        local: &Local,
        source: SourceId,
        file: &Arc<File>,
        offset: u64,
    ) -> Option<i32> {
        // The owner may have put another chain into the slot (`get_mut` lends it): then its epoch is not the one the
        // slot keeps alive.
        let ours = |s: &&mut Slot<T>| s.state == State::Owned && s.chain.epoch() == s.epoch;
        let Some(slot) = self.slots.get_mut(index as usize).filter(ours) else {
            return Some(-libc::EINVAL);
        };
        let list = match part {
            Part::Readable => slot.chain.readable(),
            Part::Writable => slot.chain.writable(),
        };
        let iov = GuestIov::as_iovecs(list);
        // SAFETY: the list lies in the slot's chain, whose storage neither moves nor changes while the state is
        // `Kernel`: `take` offers only free slots, `get_mut` only owned ones, `release` refuses, and `drop` leaks the
        // table. The bytes it names are mapped while their epoch lives, which is `slot.epoch` (checked): this slot is
        // one of the users for whose sake the table holds it, until `release`. That `file` stays open, and that
        // `returned` is called by the completion alone, is asked of the caller above.
        let done =
            unsafe { local.submit_fast(source, index, file, op, iov.as_ptr(), iov.len() as u32, offset) };
        if done.is_none() {
            slot.state = State::Kernel;
            self.in_kernel += 1;
        }
        done
    }

    /// The kernel is done with a slot that [`Slots::submit`] gave it. False if it did not have it.
    #[inline]
    pub fn returned(&mut self, index: u32) -> bool {
        match self.slots.get_mut(index as usize) {
            Some(slot) if slot.state == State::Kernel => {
                slot.state = State::Owned;
                self.in_kernel -= 1;
                true
            }
            _ => false,
        }
    }

    /// The request's segments as a list that keeps their memory alive by itself.
    pub fn io_vecs(&self, index: u32, part: Part) -> Option<IoVecs> {
        let keep: Rc<dyn Any> = self.rc_of(index)?.clone();
        let chain = &self.get(index)?.chain;
        let list = match part {
            Part::Readable => chain.readable(),
            Part::Writable => chain.writable(),
        };
        // SAFETY: each segment lies inside a mapping of the epoch that `keep` holds alive, readable and writable
        // (regions are mapped that way).
        Some(unsafe { IoVecs::from_raw(GuestIov::as_iovecs(list), keep) })
    }

    /// The request is complete: its slot is free again. Returns a former epoch that lost its last user.
    #[inline]
    pub fn release(&mut self, index: u32) -> Option<Retired> {
        let slot = self.slots.get_mut(index as usize).filter(|s| s.state == State::Owned)?;
        let number = slot.epoch;
        slot.state = State::Free;
        slot.epoch = 0;
        slot.chain.clear();
        self.free.push(index);
        if number == self.current.memory.epoch() {
            self.current.users -= 1;
            return None;
        }
        self.retire(number)
    }

    #[cold]
    fn retire(&mut self, number: u64) -> Option<Retired> {
        let at = self.former.iter().position(|e| e.memory.epoch() == number)?;
        let epoch = self.former.get_mut(at)?;
        epoch.users = epoch.users.saturating_sub(1);
        if epoch.users > 0 {
            return None;
        }
        Retired::new(self.former.remove(at).memory)
    }
}

impl<T> Drop for Slots<T> {
    fn drop(&mut self) {
        if self.in_kernel == 0 {
            return;
        }
        // The owner broke its promise to wait. The kernel may still write: the lists and the mappings stay for good.
        for slot in &mut self.slots {
            std::mem::forget(std::mem::take(&mut slot.chain));
        }
        for epoch in self.former.drain(..) {
            std::mem::forget(epoch.memory);
        }
        std::mem::forget(self.current.memory.clone());
    }
}

/// A memory epoch that nothing in this table uses any more. Dropping it may unmap many gigabytes: do that elsewhere.
#[derive(Debug)]
#[must_use = "dropping it here may unmap guest memory on an iothread"]
pub struct Retired(#[expect(dead_code, reason = "held only to be dropped elsewhere")] Arc<Memory>);

impl Retired {
    fn new(memory: Counted) -> Option<Self> {
        // A driven request's list may still hold the Rc; the epoch then goes with that list.
        Rc::into_inner(memory).map(Retired)
    }
}
