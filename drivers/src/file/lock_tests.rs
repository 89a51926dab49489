//! Tests of the lock bytes against a table that stands for the kernel's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;

use graph::{Errno, Perm};

use super::{LockBytes, Locks};

/// One file's locks: byte -> the openers that hold it.
#[derive(Clone, Default)]
struct Table(Rc<RefCell<BTreeMap<u64, BTreeSet<u32>>>>);

/// One opener, and what was done through it.
#[derive(Clone)]
struct Opener {
    id: u32,
    table: Table,
    refuse: Rc<RefCell<Option<u64>>>,
    /// A byte that cannot be given back.
    keep: Rc<RefCell<Option<u64>>>,
    log: Rc<RefCell<Vec<String>>>,
}

impl Opener {
    fn new(id: u32, table: &Table) -> Opener {
        Opener { id, table: table.clone(), refuse: Rc::default(), keep: Rc::default(), log: Rc::default() }
    }

    fn held(&self) -> Vec<u64> {
        let table = self.table.0.borrow();
        table.iter().filter(|(_, who)| who.contains(&self.id)).map(|(b, _)| *b).collect()
    }
}

impl LockBytes for Opener {
    fn lock(&self, byte: u64) -> io::Result<()> {
        self.log.borrow_mut().push(format!("+{byte}"));
        if *self.refuse.borrow() == Some(byte) {
            return Err(io::Error::from_raw_os_error(37));
        }
        self.table.0.borrow_mut().entry(byte).or_default().insert(self.id);
        Ok(())
    }
    fn unlock(&self, byte: u64) -> io::Result<()> {
        self.log.borrow_mut().push(format!("-{byte}"));
        if *self.keep.borrow() == Some(byte) {
            return Err(io::Error::from_raw_os_error(5));
        }
        if let Some(who) = self.table.0.borrow_mut().get_mut(&byte) {
            who.remove(&self.id);
        }
        Ok(())
    }
    fn is_free(&self, byte: u64) -> io::Result<bool> {
        self.log.borrow_mut().push(format!("?{byte}"));
        Ok(self.table.0.borrow().get(&byte).is_none_or(|who| who.iter().all(|w| *w == self.id)))
    }
}

const RW: Perm = Perm::CONSISTENT_READ.union(Perm::WRITE);

#[test]
fn bytes_stand_for_what_is_used_and_what_is_not_shared() {
    let opener = Opener::new(1, &Table::default());
    let locks = Locks::new(Some(opener.clone()));
    // A qcow2 image opened for writing.
    let shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
    locks.prepare(RW | Perm::RESIZE, shared, "x").unwrap();
    locks.commit(RW | Perm::RESIZE, shared);
    assert_eq!(opener.held(), [100, 101, 103, 201, 203]);
    locks.prepare(Perm::NONE, Perm::ALL, "x").unwrap();
    locks.commit(Perm::NONE, Perm::ALL);
    assert_eq!(opener.held(), Vec::<u64>::new());
}

#[test]
fn taking_comes_before_asking_and_giving_back_last() {
    let opener = Opener::new(1, &Table::default());
    let locks = Locks::new(Some(opener.clone()));
    locks.prepare(Perm::CONSISTENT_READ, Perm::ALL - Perm::WRITE, "x").unwrap();
    locks.commit(Perm::CONSISTENT_READ, Perm::ALL - Perm::WRITE);
    opener.log.borrow_mut().clear();
    // From "reads, no writer beside" to "writes, anybody may".
    locks.prepare(Perm::WRITE, Perm::ALL, "x").unwrap();
    assert_eq!(opener.held(), [100, 101, 201], "both states are held in between");
    locks.commit(Perm::WRITE, Perm::ALL);
    assert_eq!(opener.held(), [101]);
    assert_eq!(opener.log.borrow().join(" "), "+101 ?201 -100 -201");
}

#[test]
fn a_conflict_is_told_in_qemus_words_and_leaves_what_was_held() {
    let table = Table::default();
    let other = Locks::new(Some(Opener::new(2, &table)));
    other.prepare(Perm::CONSISTENT_READ, Perm::ALL - Perm::WRITE, "x").unwrap();
    let opener = Opener::new(1, &table);
    let locks = Locks::new(Some(opener.clone()));
    locks.prepare(Perm::CONSISTENT_READ, Perm::ALL, "x").unwrap();
    locks.commit(Perm::CONSISTENT_READ, Perm::ALL);
    let e = locks.prepare(RW, Perm::ALL, "/img").unwrap_err();
    let words = "Failed to get \"write\" lock\nIs another process using the image [/img]?\nWay out: end the other process, or \
                 let it share writing (share-rw=on) if the image is raw, or use the image with read-only=on.";
    assert_eq!(e.to_string(), words);
    assert_eq!(e.errno(), Errno::EAGAIN);
    assert_eq!(opener.held(), [100]);
    let e = locks.prepare(Perm::CONSISTENT_READ, Perm::ALL - Perm::CONSISTENT_READ, "/img").unwrap_err();
    let words = "Failed to get shared \"consistent read\" lock\nIs another process using the image [/img]?\nWay out: ";
    assert!(e.to_string().starts_with(words), "{e}");
    assert_eq!(opener.held(), [100]);
}

#[test]
fn abort_restores() {
    let opener = Opener::new(1, &Table::default());
    let locks = Locks::new(Some(opener.clone()));
    locks.prepare(Perm::WRITE, Perm::ALL, "x").unwrap();
    locks.commit(Perm::WRITE, Perm::ALL);
    locks.prepare(Perm::RESIZE | Perm::WRITE, Perm::NONE, "x").unwrap();
    assert_eq!(opener.held(), [101, 103, 200, 201, 202, 203]);
    locks.abort();
    assert_eq!(opener.held(), [101]);
    locks.abort();
    assert_eq!(opener.held(), [101], "a second abort changes nothing");
}

#[test]
fn a_byte_that_cannot_be_given_back_fails_nothing_and_is_tried_again() {
    let table = Table::default();
    let opener = Opener::new(1, &table);
    let locks = Locks::new(Some(opener.clone()));
    locks.prepare(RW, Perm::ALL - Perm::WRITE, "x").unwrap();
    locks.commit(RW, Perm::ALL - Perm::WRITE);
    // In the middle of what is given back: the rest is given back all the same.
    *opener.keep.borrow_mut() = Some(101);
    locks.commit(Perm::CONSISTENT_READ, Perm::ALL);
    assert_eq!(opener.held(), [100, 101]);
    // What is held too long keeps others out, and is no obstacle here.
    let other = Locks::new(Some(Opener::new(2, &table)));
    let e = other.prepare(Perm::CONSISTENT_READ, Perm::ALL - Perm::WRITE, "x").unwrap_err();
    assert_eq!(e.errno(), Errno::EAGAIN);
    locks.prepare(RW, Perm::ALL, "x").unwrap();
    locks.abort();
    assert_eq!(opener.held(), [100, 101]);
    locks.prepare(RW, Perm::ALL, "x").unwrap();
    locks.commit(RW, Perm::ALL);
    assert_eq!(opener.held(), [100, 101]);
    locks.commit(Perm::CONSISTENT_READ, Perm::ALL);
    assert_eq!(opener.held(), [100, 101]);
    // Once it can be given back it is, with whatever comes next.
    *opener.keep.borrow_mut() = None;
    locks.commit(Perm::CONSISTENT_READ, Perm::ALL);
    assert_eq!(opener.held(), [100]);
    other.prepare(Perm::CONSISTENT_READ, Perm::ALL - Perm::WRITE, "x").unwrap();
}

#[test]
fn a_byte_that_cannot_be_locked_leaves_none_behind() {
    let opener = Opener::new(1, &Table::default());
    let locks = Locks::new(Some(opener.clone()));
    *opener.refuse.borrow_mut() = Some(201);
    let e = locks.prepare(RW, Perm::ALL - Perm::WRITE, "x").unwrap_err();
    assert_eq!(opener.held(), Vec::<u64>::new());
    assert_eq!(
        e.to_string(),
        "The image cannot be locked (locking=off does without): Failed to lock byte 201: No locks available"
    );
}

#[test]
fn loosening_asks_nobody() {
    let opener = Opener::new(1, &Table::default());
    let locks = Locks::new(Some(opener.clone()));
    locks.prepare(RW, Perm::NONE, "x").unwrap();
    locks.commit(RW, Perm::NONE);
    opener.log.borrow_mut().clear();
    locks.prepare(Perm::CONSISTENT_READ, Perm::ALL, "x").unwrap();
    assert!(opener.log.borrow().is_empty());
    locks.commit(Perm::CONSISTENT_READ, Perm::ALL);
    assert_eq!(opener.held(), [100]);
}

#[test]
fn without_locking_nothing_is_locked() {
    let locks: Locks<Opener> = Locks::new(None);
    locks.prepare(Perm::ALL, Perm::NONE, "x").unwrap();
    locks.commit(Perm::ALL, Perm::NONE);
    locks.abort();
}

#[test]
fn two_openers_in_every_pair_of_states_agree_with_the_rule() {
    // Whoever comes second is let in exactly if neither uses what the other does not share.
    for bits in 0u16..=0xffff {
        let at = |n: u16| Perm::from_bits_truncate((bits >> (4 * n)) as u8 & 15);
        let (perm_a, shared_a, perm_b, shared_b) = (at(0), at(1), at(2), at(3));
        let table = Table::default();
        let a = Locks::new(Some(Opener::new(1, &table)));
        let b = Locks::new(Some(Opener::new(2, &table)));
        a.prepare(perm_a, shared_a, "x").unwrap();
        a.commit(perm_a, shared_a);
        let fits = shared_a.contains(perm_b) && shared_b.contains(perm_a);
        assert_eq!(
            b.prepare(perm_b, shared_b, "x").is_ok(),
            fits,
            "{perm_a:?} {shared_a:?} {perm_b:?} {shared_b:?}"
        );
    }
}
