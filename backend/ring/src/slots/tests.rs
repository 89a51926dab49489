//! Slots: who may touch a request when, and how long its memory stays. The operations themselves go through a real
//! iothread.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::io::Write;

use host::{IoThread, IoThreadOptions, OpenOptions, Source};

use super::*;
use crate::testing::{DATA, Driver, NEXT, WRITE};
use crate::{AccessError, SplitQueue};

/// A ring with `n` chains offered: a 16-byte header, 512 bytes to write, a status byte.
fn offered(n: u16) -> (Driver, SplitQueue) {
    let mut driver = Driver::new(64);
    for i in 0..n {
        let at = DATA + 0x1000 * u64::from(i);
        driver.desc(3 * i, (at, 16, NEXT, 3 * i + 1));
        driver.desc(3 * i + 1, (at + 0x200, 512, NEXT | WRITE, 3 * i + 2));
        driver.desc(3 * i + 2, (at + 16, 1, WRITE, 0));
        driver.offer(3 * i);
    }
    let queue = driver.queue();
    (driver, queue)
}

fn take<T>(slots: &mut Slots<T>, queue: &mut SplitQueue) -> Option<u32> {
    queue.fetch().unwrap();
    slots.take(|chain| queue.pop(chain).unwrap())
}

#[test]
fn slots_are_bounded_and_come_back() {
    let (driver, mut queue) = offered(4);
    let mut slots = Slots::<u32>::new(2, driver.memory.clone());
    let (a, b) = (take(&mut slots, &mut queue).unwrap(), take(&mut slots, &mut queue).unwrap());
    assert_ne!(a, b);
    assert_eq!((take(&mut slots, &mut queue), slots.in_flight()), (None, 2));
    assert!(queue.has_work(), "a chain was taken without a slot");
    assert!(slots.release(a).is_none());
    assert!(slots.get(a).is_none() && slots.get_mut(a).is_none() && slots.parts(a).is_none());
    assert!(slots.release(a).is_none());
    assert_eq!(slots.in_flight(), 1);
    assert_eq!(take(&mut slots, &mut queue), Some(a));
    assert!(slots.get(99).is_none() && slots.release(99).is_none() && !slots.returned(99));
}

#[test]
fn an_old_epoch_stays_until_its_last_request_is_released() {
    let (driver, mut queue) = offered(3);
    let first = Arc::downgrade(&driver.memory);
    let mut slots = Slots::<()>::new(8, driver.memory.clone());
    let (a, b) = (take(&mut slots, &mut queue).unwrap(), take(&mut slots, &mut queue).unwrap());

    let second = Arc::new(Memory::anonymous(&[(0, crate::testing::USER, 2 << 20)]).unwrap());
    queue.rebase(second.clone()).unwrap();
    assert!(slots.set_memory(second.clone()).is_none(), "in use");
    drop(driver);
    assert_eq!(slots.epoch_of(a).unwrap().epoch(), slots.epoch_of(b).unwrap().epoch());
    assert_ne!(slots.epoch_of(a).unwrap().epoch(), second.epoch());
    let (memory, chain, ()) = slots.parts(a).unwrap();
    assert_eq!(chain.take_header(memory, &mut [0; 16]), Ok(()));
    assert_eq!(chain.take_header(&second, &mut []), Err(AccessError::WrongEpoch));

    assert!(slots.release(a).is_none());
    assert!(first.upgrade().is_some());
    let retired = slots.release(b).expect("the last user");
    assert!(first.upgrade().is_some(), "dropped here instead of by the caller");
    drop(retired);
    assert!(first.upgrade().is_none());
    // Without users the table hands it over at once.
    let third = Arc::new(Memory::anonymous(&[]).unwrap());
    assert!(slots.set_memory(third).is_some());
}

#[test]
fn a_list_that_outlives_its_slot_keeps_its_memory() {
    let (driver, mut queue) = offered(1);
    let first = Arc::downgrade(&driver.memory);
    let mut slots = Slots::<()>::new(2, driver.memory.clone());
    let slot = take(&mut slots, &mut queue).unwrap();
    let list = slots.io_vecs(slot, Part::Writable).unwrap();
    assert_eq!(list.len(), 513);
    slots.release(slot);
    assert!(slots.io_vecs(slot, Part::Writable).is_none());
    drop((driver, queue, slots));
    list.fill(0x55);
    assert!(first.upgrade().is_some());
    drop(list);
    assert!(first.upgrade().is_none());
}

#[test]
fn chains_of_another_epoch_are_not_taken_in() {
    let (driver, mut queue) = offered(2);
    let other = Driver::new(64);
    let mut slots = Slots::<()>::new(2, other.memory.clone());
    assert_eq!((take(&mut slots, &mut queue), slots.in_flight()), (None, 0));
    // Changing over to the queue's epoch makes it right again.
    drop(slots.set_memory(driver.memory.clone()));
    assert!(take(&mut slots, &mut queue).is_some());
}

/// What the test below lets the iothread do with a slot.
struct Reader {
    local: Local,
    id: Cell<Option<SourceId>>,
    file: Arc<File>,
    slots: RefCell<Slots<()>>,
    results: RefCell<Vec<(u32, i32)>>,
}

impl Reader {
    fn submit(&self, slot: u32) -> Option<i32> {
        let source = self.id.get().unwrap();
        self.slots.borrow_mut().submit(
            slot,
            Part::Writable,
            FastOp::Readv,
            &self.local,
            source,
            &self.file,
            512,
        )
    }
}

impl Source for Reader {
    fn poll(&self) -> bool {
        false
    }
    fn complete(&self, slot: u32, result: i32) {
        assert!(self.slots.borrow_mut().returned(slot));
        self.results.borrow_mut().push((slot, result));
    }
    fn end_batch(&self) {}
    fn has_work(&self) -> bool {
        false
    }
    fn arm(&self) -> bool {
        false
    }
    fn disarm(&self) {}
}

#[test]
#[cfg_attr(miri, ignore = "threads and files")]
fn the_kernel_reads_into_guest_memory_and_nobody_touches_the_slot_meanwhile() {
    let path = std::env::temp_dir().join(format!("ringblk-slots-{}", std::process::id()));
    let content: Vec<u8> = (0..2048_u32).map(|i| (i / 3) as u8).collect();
    std::fs::File::create(&path).unwrap().write_all(&content).unwrap();
    let file = File::open(&path, &OpenOptions::default()).unwrap();
    std::fs::remove_file(&path).unwrap();

    let thread = IoThread::start(IoThreadOptions::default()).unwrap();
    let got = thread
        .call_blocking(move |local| async move {
            // Else a read from the page cache may be done on the spot, and the kernel never holds the slot.
            local.set_inline(false);
            let (driver, mut queue) = offered(1);
            let mut slots = Slots::new(4, driver.memory.clone());
            let slot = take(&mut slots, &mut queue).unwrap();
            slots.get_mut(slot).unwrap().0.reserve_last().unwrap();
            let reader = Rc::new(Reader {
                local: local.clone(),
                id: Cell::new(None),
                file,
                slots: RefCell::new(slots),
                results: RefCell::new(Vec::new()),
            });
            let id = local.add_source(reader.clone());
            reader.id.set(Some(id));
            // A slot that nobody took goes nowhere.
            assert_eq!(reader.submit(3), Some(-libc::EINVAL));
            // Neither does a chain of another epoch, wherever the owner got it from.
            let (foreign, mut other) = offered(1);
            let mut chain = Chain::new();
            other.fetch().unwrap();
            assert!(other.pop(&mut chain).unwrap());
            std::mem::swap(reader.slots.borrow_mut().get_mut(slot).unwrap().0, &mut chain);
            assert_eq!(reader.submit(slot), Some(-libc::EINVAL));
            std::mem::swap(reader.slots.borrow_mut().get_mut(slot).unwrap().0, &mut chain);
            drop((foreign, other));

            assert_eq!(reader.submit(slot), None);
            assert!(reader.slots.borrow_mut().get_mut(slot).is_none(), "lent while the kernel has it");
            assert!(reader.slots.borrow_mut().parts(slot).is_none(), "lent while the kernel has it");
            assert!(reader.slots.borrow_mut().release(slot).is_none());
            assert_eq!(reader.slots.borrow().in_flight(), 1);
            assert_eq!(reader.submit(slot), Some(-libc::EINVAL));
            while reader.results.borrow().is_empty() {
                local.yield_now().await;
            }
            let result = reader.results.borrow()[0].1;
            assert!(!reader.slots.borrow_mut().returned(slot));
            local.remove_source(id);
            reader.slots.borrow_mut().release(slot);
            assert_eq!(reader.slots.borrow().in_flight(), 0);
            let mut data = vec![0; 514];
            driver.memory.read(DATA + 0x200, &mut data).unwrap();
            (result, data)
        })
        .unwrap();
    thread.stop();
    assert_eq!((got.0, &got.1[..512], &got.1[512..]), (512, &content[512..1024], &[0, 0][..]));
}
