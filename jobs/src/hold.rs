//! A job's use of a node: a root whose requests a drain can stop and wait for.
//!
//! Made by jobs and by the copy engine, on the main thread. A drain pauses the work through its [`Control`] and waits until no
//! piece of it is under way; when it ends, the hold has the new view and the work goes on. Must not send requests itself.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use graph::{BlockError, BoxFut, Errno, Graph, Node, RequestSource, Result, Root, RootOptions, View};

use crate::control::Control;

/// See the module's words.
pub struct Hold {
    root: Root,
    source: Rc<Source>,
}

struct Source {
    control: Arc<Control>,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    view: Option<Arc<View>>,
    /// This source has paused the work.
    paused: bool,
}

impl RequestSource for Source {
    fn quiesce(&self) -> BoxFut<'_, ()> {
        let first = !std::mem::replace(&mut self.state.borrow_mut().paused, true);
        if first {
            self.control.pause();
        }
        Box::pin(async move {
            self.control.idle().await;
            // The view must not be in use any more when this resolves.
            let old = self.state.borrow_mut().view.take();
            drop(old);
            Ok(())
        })
    }

    fn resume(&self, view: Arc<View>) {
        let paused = {
            let mut state = self.state.borrow_mut();
            state.view = Some(view);
            std::mem::take(&mut state.paused)
        };
        if paused {
            self.control.resume();
        }
    }

    fn resized(&self, _size: u64) {}
}

impl Source {
    /// Gone: whoever waited for its resume would wait for ever.
    fn release(&self) {
        if std::mem::take(&mut self.state.borrow_mut().paused) {
            self.control.resume();
        }
    }
}

impl Hold {
    /// Uses a node for the work of `control`.
    ///
    /// # Errors
    /// No such node, or the permissions conflict with those of other users.
    pub async fn attach(
        graph: &Graph,
        node: &str,
        options: RootOptions,
        control: &Arc<Control>,
    ) -> Result<Hold> {
        // Attached while a drain is on it starts quiet: paused until its first view comes.
        let source = Rc::new(Source { control: Arc::clone(control), state: RefCell::new(State::default()) });
        source.state.borrow_mut().paused = true;
        control.pause();
        let attached = graph.attach(node, options, Rc::clone(&source) as Rc<dyn RequestSource>).await;
        match attached {
            Ok(root) => Ok(Hold { root, source }),
            Err(e) => {
                source.release();
                Err(e)
            }
        }
    }

    /// The view of now. Only to be used between [`Control::enter`] and the end of that piece of work.
    ///
    /// # Errors
    /// A drain is on: the work has no view.
    pub fn view(&self) -> Result<Arc<View>> {
        let view = self.source.state.borrow().view.clone();
        view.ok_or_else(|| BlockError::new(Errno::EBUSY, "The node is drained"))
    }

    /// The node.
    ///
    /// # Errors
    /// It is gone (never, while this exists).
    pub fn node(&self) -> Result<Arc<Node>> {
        self.root.node()
    }

    /// The root, for permissions and the like.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Gives the node back and closes it if nobody else uses it. No request is in flight any more.
    pub async fn detach(self) {
        let Hold { root, source } = self;
        source.state.borrow_mut().view = None;
        root.detach().await;
        source.release();
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hold({:?})", self.root)
    }
}
