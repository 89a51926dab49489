//! Turns: pieces that were numbered in one order are let through in that order, whichever thread they are on.
//!
//! Used by the lanes for writes. A piece that fails opens the gate for everybody, so that nobody waits for it.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

#[derive(Default)]
struct State {
    /// Everything below has had its turn.
    turn: u64,
    waiting: BTreeMap<u64, Waker>,
}

/// See the module's words.
#[derive(Default)]
pub(super) struct Order(Mutex<State>);

impl Order {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until every number below `seq` is done.
    pub(super) async fn wait(&self, seq: u64) {
        poll_fn(|cx| {
            let mut state = self.state();
            if state.turn >= seq {
                return Poll::Ready(());
            }
            state.waiting.insert(seq, cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The piece `seq` is done.
    pub(super) fn done(&self, seq: u64) {
        let next = {
            let mut state = self.state();
            state.turn = state.turn.max(seq.saturating_add(1));
            let turn = state.turn;
            state.waiting.remove(&turn)
        };
        if let Some(waker) = next {
            waker.wake();
        }
    }

    /// Nobody waits any more.
    pub(super) fn open(&self) {
        let all = {
            let mut state = self.state();
            state.turn = u64::MAX;
            std::mem::take(&mut state.waiting)
        };
        all.into_values().for_each(Waker::wake);
    }
}
