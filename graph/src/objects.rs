//! Objects by name that several nodes share and that are no nodes: throttle groups. What they are is a matter between
//! the process, which makes them, and the drivers, which ask for them while they open or reopen.
//!
//! Filled by the process (`object-add`), read through `OpenContext::object`, on the main thread. An object is in use while
//! somebody else holds it ([`Objects::in_use`]). Must not know what it holds.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use crate::error::{BlockError, Errno, Result};

type Shared = Arc<dyn Any + Send + Sync>;

/// All shared objects of a graph; a handle, cheap to clone.
#[derive(Clone, Default)]
pub struct Objects {
    by_id: Rc<RefCell<BTreeMap<String, Shared>>>,
}

impl Objects {
    /// Adds one.
    ///
    /// # Errors
    /// There is one of that name.
    pub fn add<T: Any + Send + Sync>(&self, id: &str, object: Arc<T>) -> Result<()> {
        let mut all = self.by_id.borrow_mut();
        if all.contains_key(id) {
            return Err(BlockError::new(Errno::EEXIST, format!("attempt to add duplicate property '{id}'")));
        }
        all.insert(id.to_owned(), object);
        Ok(())
    }

    /// Takes one out; whether it was there. Nodes that hold it keep it.
    pub fn remove(&self, id: &str) -> bool {
        let gone = self.by_id.borrow_mut().remove(id);
        gone.is_some()
    }

    /// Whether there is an object of that name that somebody besides this table holds.
    pub fn in_use(&self, id: &str) -> bool {
        self.by_id.borrow().get(id).is_some_and(|o| Arc::strong_count(o) > 1)
    }

    /// The object of that name, if it is of this type.
    pub fn get<T: Any + Send + Sync>(&self, id: &str) -> Option<Arc<T>> {
        let found = self.by_id.borrow().get(id).cloned();
        found.and_then(|o| o.downcast().ok())
    }
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.by_id.borrow().keys()).finish()
    }
}
