//! Claims on parts of an image by several nodes that read one file: an internal snapshot that is being read must not be
//! deleted, one that is being deleted must not be opened.
//!
//! Kept with the node both have in common (the file). Keys are the drivers' own: `snapshot 3`. Taken on any thread, never
//! waited for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How often a key is shared, or that somebody has it alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    Shared(usize),
    Alone,
}

/// The claims on one node.
#[derive(Debug, Default)]
pub struct Pins {
    claims: Mutex<BTreeMap<String, Claim>>,
}

/// A claim; given back when dropped.
#[derive(Debug)]
#[must_use = "the claim goes with the guard"]
pub struct Pin {
    pins: Arc<Pins>,
    key: String,
}

impl Pins {
    fn claims(&self) -> MutexGuard<'_, BTreeMap<String, Claim>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims `key` together with others who share it; `None` while somebody has it alone.
    pub fn share(self: &Arc<Self>, key: &str) -> Option<Pin> {
        match self.claims().entry(key.to_owned()).or_insert(Claim::Shared(0)) {
            Claim::Shared(count) => *count += 1,
            Claim::Alone => return None,
        }
        Some(Pin { pins: Arc::clone(self), key: key.to_owned() })
    }

    /// Claims `key` alone; `None` while anybody else has it.
    pub fn take(self: &Arc<Self>, key: &str) -> Option<Pin> {
        let mut claims = self.claims();
        if claims.contains_key(key) {
            return None;
        }
        claims.insert(key.to_owned(), Claim::Alone);
        Some(Pin { pins: Arc::clone(self), key: key.to_owned() })
    }

    /// Whether there is any claim at all: the file's metadata must not be rearranged (repair).
    pub fn any(&self) -> bool {
        !self.claims().is_empty()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut claims = self.pins.claims();
        match claims.get_mut(&self.key) {
            Some(Claim::Shared(count)) if *count > 1 => *count -= 1,
            _ => {
                claims.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn shared_and_alone_exclude_each_other() {
        let pins = Arc::new(Pins::default());
        let (first, second) = (pins.share("a").unwrap(), pins.share("a").unwrap());
        assert!(pins.take("a").is_none() && pins.any());
        let other = pins.take("b").unwrap();
        assert!(pins.share("b").is_none() && pins.take("b").is_none());
        drop(first);
        assert!(pins.take("a").is_none());
        drop(second);
        let alone = pins.take("a").unwrap();
        assert!(pins.share("a").is_none());
        drop((alone, other));
        assert!(!pins.any() && pins.share("a").is_some());
    }
}
