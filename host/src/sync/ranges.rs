//! Claims on ranges of bytes, shared or exclusive, first come first served.
//!
//! Used by drivers that do one request in several places (copies that must agree, a log beside the data): requests that
//! overlap and of which one writes are carried out one after the other. Must not know what the ranges are ranges of.

use std::future::poll_fn;
use std::task::{Poll, Waker};

use crate::primitive::{Mutex, lock};

/// See the module's page. Claims wait for earlier overlapping ones alone, so that they always end.
pub struct Ranges {
    /// A leaf: nothing is called while it is held.
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    next: u64,
    claims: Vec<Claim>,
}

struct Claim {
    number: u64,
    start: u64,
    end: u64,
    exclusive: bool,
    /// Of one that waits.
    waker: Option<Waker>,
}

impl Claim {
    fn excludes(&self, other: &Claim) -> bool {
        (self.exclusive || other.exclusive) && self.start < other.end && other.start < self.end
    }
}

impl List {
    /// Whether a claim has to wait for an earlier one.
    fn blocked(&self, number: u64) -> bool {
        let Some(own) = self.claims.iter().find(|c| c.number == number) else { return false };
        self.claims.iter().any(|c| c.number < number && c.excludes(own))
    }
}

impl Default for Ranges {
    fn default() -> Self {
        Self::new()
    }
}

impl Ranges {
    /// No claims.
    pub fn new() -> Self {
        Ranges { list: Mutex::new(List::default()) }
    }

    /// Claims `start..end` together with others who share it.
    pub async fn share(&self, start: u64, end: u64) -> RangeGuard<'_> {
        self.claim(start, end, false).await
    }

    /// Claims `start..end` alone.
    pub async fn take(&self, start: u64, end: u64) -> RangeGuard<'_> {
        self.claim(start, end, true).await
    }

    async fn claim(&self, start: u64, end: u64, exclusive: bool) -> RangeGuard<'_> {
        let number = {
            let mut list = lock(&self.list);
            let number = list.next;
            list.next += 1;
            list.claims.push(Claim { number, start, end, exclusive, waker: None });
            number
        };
        // Made before the wait: dropping the waiting future takes the claim back.
        let guard = RangeGuard { ranges: self, number };
        poll_fn(|cx| {
            let mut list = lock(&self.list);
            let blocked = list.blocked(number);
            let own = list.claims.iter_mut().find(|c| c.number == number);
            match own {
                Some(own) if blocked => {
                    own.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        })
        .await;
        guard
    }
}

/// A claim; given back when dropped.
#[must_use = "the claim goes with the guard"]
pub struct RangeGuard<'a> {
    ranges: &'a Ranges,
    number: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let woken: Vec<Waker> = {
            let mut list = lock(&self.ranges.list);
            let Some(at) = list.claims.iter().position(|c| c.number == self.number) else { return };
            let gone = list.claims.remove(at);
            // Whoever waited for this one; it looks for itself whether it waits for another one, too.
            list.claims
                .iter_mut()
                .filter(|c| c.number > gone.number && c.excludes(&gone))
                .filter_map(|c| c.waker.take())
                .collect()
        };
        woken.into_iter().for_each(Waker::wake);
    }
}
