//! What a driver has at hand and gives back when its options change while it is open.
//!
//! Used by `control` for `blockdev-reopen`, which prepares every node of the list, changes edges and permissions, and then
//! commits or takes back all of it. Main thread, inside a drained section.

use std::any::Any;
use std::sync::Arc;

use crate::control::Graph;
use crate::error::{BlockError, Errno, Result};
use crate::io::NodeIo;
use crate::node::Node;
use crate::options::NodeOptions;
use crate::secret::Secret;

/// A prepared change of a driver's options; exactly one of its methods is called, or it is dropped, which is an abort.
pub trait Reopen {
    /// Makes it final. Cannot fail.
    fn commit(self: Box<Self>);

    /// Takes it back: the driver goes on as before.
    fn abort(self: Box<Self>) {}
}

/// Nothing to do but the common options.
impl Reopen for () {
    fn commit(self: Box<Self>) {}
}

/// What a driver has at hand while it prepares.
pub struct ReopenContext {
    graph: Graph,
    node: Arc<Node>,
    after: NodeOptions,
}

impl ReopenContext {
    #[allow(dead_code, reason = "the reopening of nodes is its caller")]
    pub(crate) fn new(graph: Graph, node: Arc<Node>, after: NodeOptions) -> ReopenContext {
        ReopenContext { graph, node, after }
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

impl std::fmt::Debug for ReopenContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReopenContext({:?} to {:?})", self.node, self.after)
    }
}
