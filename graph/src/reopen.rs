//! What a driver has at hand and gives back when its options change while it is open.
//!
//! Used by `control` for `blockdev-reopen`, which prepares every node of the list, changes edges and permissions, and then
//! commits or takes back all of it. Main thread, inside a drained section.

use std::any::Any;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::bitmap::BitmapSet;
use crate::control::Graph;
use crate::driver::{BoxFut, Driver};
use crate::epoch::Epochs;
use crate::error::{BlockError, Errno, Result};
use crate::events::NodeEvents;
use crate::io::NodeIo;
use crate::node::Node;
use crate::options::NodeOptions;
use crate::role::Roles;
use crate::secret::Secret;

/// A prepared change of a driver's options. In order: [`Reopen::apply`], then, when permissions and edges are those of
/// after, [`Reopen::finish`] and [`Reopen::commit`]; or, when something was refused, [`Reopen::restore`] and
/// [`Reopen::abort`]. Whatever is dropped in between was taken back as far as the graph is concerned.
pub trait Reopen {
    /// Another driver object that serves the node from the commit on, where the change is more than a few fields: the node
    /// keeps its name, bitmaps, statistics and users. It is asked for permissions from [`Reopen::apply`] on.
    fn replacement(&self) -> Option<Arc<dyn Driver>> {
        None
    }

    /// Whether the node is to be read-only although that was not asked for, as `Opened::read_only`.
    fn read_only(&self) -> bool {
        false
    }

    /// What children are to the node from now on, by index, where that changes.
    fn roles(&self) -> Vec<(usize, Roles)> {
        Vec::new()
    }

    /// Before permissions are prepared for the graph as it will be: from here on `child_perm` answers for the options of
    /// after, and what is held outside the graph for the users (locks) is held by the replacement, if there is one.
    ///
    /// # Errors
    /// Nothing has changed then.
    fn apply(&mut self) -> Result<()> {
        Ok(())
    }

    /// Still drained, with the permissions of after: I/O that needs them (marking an image as in use). An error is told to
    /// the client; the driver sees to it that nothing is lost by it.
    fn finish<'a>(&'a mut self, _cx: &'a ReopenContext) -> BoxFut<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Makes it final. Cannot fail.
    fn commit(self: Box<Self>);

    /// Still drained, with the permissions of before: puts back on disk what the preparation has changed there. What
    /// [`Reopen::apply`] did is taken back by [`Reopen::unapply`] by then.
    fn restore<'a>(&'a mut self, _cx: &'a ReopenContext) -> BoxFut<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Takes [`Reopen::apply`] back. Cannot fail.
    fn unapply(&mut self) {}

    /// Takes it back: the driver goes on as before.
    fn abort(self: Box<Self>) {}
}

/// Nothing to do but the common options.
impl Reopen for () {
    fn commit(self: Box<Self>) {}
}

/// Another driver object, and nothing else: for drivers that hold nothing outside the graph.
pub struct Replacement(Arc<dyn Driver>);

impl Replacement {
    /// The driver that serves the node from now on.
    pub fn of(driver: impl Driver) -> Box<dyn Reopen> {
        Box::new(Replacement(Arc::new(driver)))
    }
}

impl Reopen for Replacement {
    fn replacement(&self) -> Option<Arc<dyn Driver>> {
        Some(Arc::clone(&self.0))
    }

    fn commit(self: Box<Self>) {}
}

/// What a driver has at hand while it prepares.
pub struct ReopenContext {
    graph: Graph,
    node: Arc<Node>,
    before: Map<String, Value>,
    after: NodeOptions,
    children: Vec<Option<(Arc<Node>, NodeOptions)>>,
}

impl ReopenContext {
    pub(crate) fn new(
        graph: Graph,
        node: Arc<Node>,
        before: Map<String, Value>,
        after: NodeOptions,
        children: Vec<Option<(Arc<Node>, NodeOptions)>>,
    ) -> ReopenContext {
        ReopenContext { graph, node, before, after, children }
    }

    /// The node's name.
    pub fn node_name(&self) -> &str {
        self.node.name()
    }

    /// The driver's name.
    pub fn driver_name(&self) -> &'static str {
        self.node.driver_name()
    }

    /// The common options it runs with now.
    pub fn before(&self) -> NodeOptions {
        self.node.options()
    }

    /// The common options it will run with.
    pub fn after(&self) -> NodeOptions {
        self.after
    }

    /// The driver's own options as they were given last, without the children that may be replaced.
    pub fn own_before(&self) -> &Map<String, Value> {
        &self.before
    }

    /// The common options a child will run with; `None` where there will be none.
    pub fn child_options(&self, child: usize) -> Option<NodeOptions> {
        self.children.get(child)?.as_ref().map(|(_, options)| *options)
    }

    /// The node a child will be; `None` where there will be none.
    pub fn child(&self, child: usize) -> Option<&Arc<Node>> {
        self.children.get(child)?.as_ref().map(|(node, _)| node)
    }

    /// The dirty bitmaps of the node.
    pub fn bitmaps(&self) -> Arc<BitmapSet> {
        Arc::clone(self.node.bitmaps())
    }

    /// The grace periods of the node, where its driver asked for them when it opened.
    pub fn epochs(&self) -> Option<Arc<Epochs>> {
        self.node.epochs().cloned()
    }

    /// Where the node tells its news.
    pub fn events(&self) -> Arc<NodeEvents> {
        let hub = Arc::clone(&self.graph.inner.events);
        Arc::new(NodeEvents::new(self.node.name().to_owned(), hub))
    }

    /// The secret of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn secret(&self, id: &str) -> Result<Secret> {
        self.graph.secrets().get(id)
    }

    /// The shared object of that name and type.
    ///
    /// # Errors
    /// There is none.
    pub fn object<T: Any + Send + Sync>(&self, id: &str) -> Result<Arc<T>> {
        let found = self.graph.objects().get(id);
        found.ok_or_else(|| BlockError::new(Errno::ENOENT, format!("'{id}' not found")))
    }

    /// Runs requests on this node, as its driver sees itself, on an iothread: `io.child(index)` leads to the children.
    ///
    /// # Errors
    /// There is no iothread, or what `work` returns.
    pub async fn on_io<R, F, Fut>(&self, work: F) -> Result<R>
    where
        R: Send + 'static,
        F: FnOnce(NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = Result<R>> + 'static,
    {
        self.graph.on_iothread(self.node.id(), work).await
    }
}

/// Refuses the first option that differs: `Cannot change the option 'x'`. Of an option that is absent now and was given
/// before, the words are QEMU's for that, too. Null counts as absent.
///
/// # Errors
/// See above.
pub fn refuse_changes(before: &Map<String, Value>, after: &Map<String, Value>, fixed: &[&str]) -> Result<()> {
    for name in fixed {
        let value = |map: &Map<String, Value>| map.get(*name).filter(|v| !v.is_null()).cloned();
        match (value(before), value(after)) {
            (old, new) if old == new => {}
            (Some(_), None) => {
                let text = format!("Option '{name}' cannot be reset to its default value");
                return Err(BlockError::invalid(text));
            }
            _ => return Err(cannot_change(name)),
        }
    }
    Ok(())
}

/// QEMU's words for an option that stays as it is.
pub fn cannot_change(option: &str) -> BlockError {
    BlockError::invalid(format!("Cannot change the option '{option}'"))
}

impl std::fmt::Debug for ReopenContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReopenContext({:?} to {:?})", self.node, self.after)
    }
}
