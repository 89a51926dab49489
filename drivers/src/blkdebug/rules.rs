//! Rules, the state, and which request fails: the state machine of `blkdebug`. Pure.
//!
//! Points are told and requests are judged on any thread. Must not know requests beyond kind and range.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use graph::{BlockError, DebugEvent, Errno, Result};

use super::options::{InjectError, IoType, SetState};

/// Most rules of each sort.
pub(super) const MAX_RULES: usize = 1024;
/// The state of a fresh node.
const FIRST_STATE: i64 = 1;
/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Kinds of request a rule without one is about.
const USUAL: u8 = bit(IoType::Read)
    | bit(IoType::Write)
    | bit(IoType::WriteZeroes)
    | bit(IoType::Discard)
    | bit(IoType::Flush);

const fn bit(kind: IoType) -> u8 {
    1 << kind as u8
}

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) errno: Errno,
    /// At once, not a turn later.
    pub(super) immediately: bool,
}

struct Inject {
    event: DebugEvent,
    /// 0: any.
    state: i64,
    kinds: u8,
    /// `None`: the request passes, later rules unseen.
    errno: Option<Errno>,
    /// Byte the request must touch.
    at: Option<u64>,
    once: bool,
    immediately: bool,
    /// Its event has come, and no other rule's since.
    active: bool,
}

struct Inner {
    state: i64,
    inject: Vec<Inject>,
    set: Vec<SetState>,
}

/// All rules of a node, and its state.
pub(super) struct Rules {
    /// Whether there are rules at all: what the hot path looks at.
    any: AtomicBool,
    /// A leaf.
    inner: Mutex<Inner>,
}

impl Rules {
    /// In the order of the lists; the event `none` is passed at once.
    ///
    /// # Errors
    /// Too many rules, or a number out of its range.
    pub(super) fn new(inject: &[InjectError], set: Vec<SetState>) -> Result<Rules> {
        if inject.len() > MAX_RULES || set.len() > MAX_RULES {
            return Err(BlockError::invalid(format!("There are more than {MAX_RULES} rules")));
        }
        let inject: Vec<Inject> = inject.iter().map(Inject::new).collect::<Result<_>>()?;
        let any = AtomicBool::new(!inject.is_empty());
        let rules = Rules { any, inner: Mutex::new(Inner { state: FIRST_STATE, inject, set }) };
        rules.pass(DebugEvent::None);
        Ok(rules)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any request can ever fail.
    #[inline]
    pub(super) fn any(&self) -> bool {
        // Relaxed: whoever sees the last rule go late drives a request for nothing.
        self.any.load(Relaxed)
    }

    /// A point is passed.
    pub(super) fn pass(&self, event: DebugEvent) {
        if !self.any() {
            return;
        }
        let inner = &mut *self.inner();
        let state = inner.state;
        let holds = |of: i64| of == 0 || of == state;
        if inner.inject.iter().any(|r| r.event == event && holds(r.state)) {
            for rule in &mut inner.inject {
                rule.active = rule.event == event && holds(rule.state);
            }
        }
        // QEMU goes through them from the last to the first, and the last one it meets counts.
        let new = inner.set.iter().find(|r| r.event == event && holds(r.state.unwrap_or(0)));
        inner.state = new.map_or(state, |r| r.new_state);
    }

    /// Whether a request fails. A length of 0 touches no byte.
    pub(super) fn check(&self, kind: IoType, offset: u64, len: u64) -> Option<Failure> {
        if !self.any() {
            return None;
        }
        let inner = &mut *self.inner();
        let touches = |at: u64| at >= offset && at - offset < len;
        let index = inner
            .inject
            .iter()
            .position(|r| r.active && r.kinds & bit(kind) != 0 && r.at.is_none_or(touches))?;
        let rule = inner.inject.get(index)?;
        let failure = Failure { errno: rule.errno?, immediately: rule.immediately };
        if rule.once {
            inner.inject.remove(index);
            self.any.store(!inner.inject.is_empty(), Relaxed);
        }
        Some(failure)
    }
}

impl Inject {
    fn new(rule: &InjectError) -> Result<Inject> {
        let errno = rule.errno.unwrap_or(Errno::EIO.raw().into());
        let errno = i32::try_from(errno)
            .ok()
            .filter(|n| (0..4096).contains(n))
            .ok_or_else(|| BlockError::invalid("Parameter 'errno' expects a value between 0 and 4095"))?;
        let at = match rule.sector {
            None | Some(-1) => None,
            Some(sector) => {
                let at = u64::try_from(sector).ok().and_then(|s| s.checked_mul(SECTOR));
                Some(at.ok_or_else(|| {
                    BlockError::invalid("Parameter 'sector' expects the number of a sector, or -1 for any")
                })?)
            }
        };
        Ok(Inject {
            event: rule.event,
            state: rule.state.unwrap_or(0),
            kinds: rule.iotype.map_or(USUAL, bit),
            errno: (errno != 0).then(|| Errno::from_raw(errno)),
            at,
            once: rule.once.unwrap_or_default(),
            immediately: rule.immediately.unwrap_or_default(),
            active: false,
        })
    }
}
