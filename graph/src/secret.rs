//! Secrets by name: passphrases and keys that `secret` objects hold and drivers ask for while they open.
//!
//! Filled by the process (objects), read through `OpenContext::secret` and `CreateContext::secret`, on the main thread.
//! Must not be printed: neither type shows its bytes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use zeroize::Zeroizing;

use crate::error::{BlockError, Errno, Result};

/// The bytes of a secret; overwritten when dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// A secret of these bytes.
    pub fn new(bytes: Vec<u8>) -> Secret {
        Secret(Zeroizing::new(bytes))
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// All secrets of a graph; a handle, cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    by_id: Rc<RefCell<BTreeMap<String, Secret>>>,
}

impl Secrets {
    /// Adds one.
    ///
    /// # Errors
    /// There is one of that name.
    pub fn add(&self, id: &str, secret: Secret) -> Result<()> {
        let mut all = self.by_id.borrow_mut();
        if all.contains_key(id) {
            return Err(BlockError::new(Errno::EEXIST, format!("attempt to add duplicate property '{id}'")));
        }
        all.insert(id.to_owned(), secret);
        Ok(())
    }

    /// Takes one out; whether it was there. Images that are open keep what they took from it.
    pub fn remove(&self, id: &str) -> bool {
        self.by_id.borrow_mut().remove(id).is_some()
    }

    /// The secret of that name.
    ///
    /// # Errors
    /// `No secret with id 'x'`, QEMU's words.
    pub fn get(&self, id: &str) -> Result<Secret> {
        let found = self.by_id.borrow().get(id).cloned();
        found.ok_or_else(|| BlockError::new(Errno::ENOENT, format!("No secret with id '{id}'")))
    }
}
