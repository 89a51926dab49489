//! Opening nodes: from the options of `blockdev-add` to a node with its children, all or nothing.
//!
//! Called by the control channel and by jobs that need a node of their own. While a driver's `open` runs, its children are
//! held by *provisional roots* named after the coming node; when it is done these become the real child edges in one
//! transaction, so that locks are held all along. A failed or abandoned open leaves nothing behind.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::change::{add_edge, drop_edge, remove_edge};
use super::{Config, Graph, MAX_NODES, Slot, State, perms};
use crate::bitmap::BitmapSet;
use crate::drain::{NoSource, SourceGate};
use crate::driver::{BoxFut, Driver, DriverDef};
use crate::edge::{Edge, Parent, RootInfo, WaysOut};
use crate::epoch::Epochs;
use crate::error::{BlockError, Errno, Result};
use crate::events::NodeEvents;
use crate::ids::{EdgeId, NodeId, check_node_name};
use crate::io::NodeIo;
use crate::node::Node;
use crate::options::{BlockdevRef, CommonOptions, DiscardOption, NodeOptions, Purpose};
use crate::perm::{Perm, PermPair, default_child_perm};
use crate::role::Roles;
use crate::secret::Secret;
use crate::transaction::{Step, Transaction};

/// Deepest nesting of inline definitions.
const MAX_NESTING: usize = 64;

/// What a driver's `open` returns.
pub struct Opened {
    driver: Arc<dyn Driver>,
    read_only: bool,
}

impl Opened {
    /// An open node.
    pub fn new(driver: impl Driver) -> Opened {
        Opened { driver: Arc::new(driver), read_only: false }
    }

    /// The same, read-only whatever was asked: only where `OpenContext::options` says `auto_read_only`.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Opened {
        self.read_only = read_only;
        self
    }
}

/// What is being opened: dropped without `into_node`, it takes everything back.
struct Opening {
    graph: Graph,
    name: String,
    options: NodeOptions,
    depth: usize,
    /// The provisional edges by child index; empty places are for children to come.
    children: Vec<Option<EdgeId>>,
    /// Children that were defined inside this node's options.
    inline: Vec<NodeId>,
    config: Config,
    bitmaps: Arc<BitmapSet>,
    epochs: Option<Arc<Epochs>>,
    /// The node down to which the chain stays as it is.
    bottom: Option<NodeId>,
}

impl Drop for Opening {
    fn drop(&mut self) {
        let mut state = self.graph.state_mut();
        state.reserved.remove(&self.name);
        for id in self.children.drain(..).rev().flatten() {
            if let (Some(edge), _) = remove_edge(&mut state, id) {
                super::delete::relax(&mut state, edge.child);
            }
        }
    }
}

/// What a driver has at hand while it opens. Main thread.
pub struct OpenContext {
    opening: Rc<RefCell<Opening>>,
    name: String,
    options: NodeOptions,
}

impl OpenContext {
    /// The name of the node that is being opened.
    pub fn node_name(&self) -> &str {
        &self.name
    }

    /// The grace periods of the coming node: by asking for them, the driver has its users' requests counted.
    pub fn epochs(&self) -> Arc<Epochs> {
        Arc::clone(self.opening.borrow_mut().epochs.get_or_insert_default())
    }

    /// The dirty bitmaps of the coming node, for those that are stored in the image.
    pub fn bitmaps(&self) -> Arc<BitmapSet> {
        Arc::clone(&self.opening.borrow().bitmaps)
    }

    /// Where the coming node tells its news.
    pub fn events(&self) -> Arc<NodeEvents> {
        let hub = Arc::clone(&self.opening.borrow().graph.inner.events);
        Arc::new(NodeEvents::new(self.name.clone(), hub))
    }

    /// Keeps the links from the coming node down to `bottom` frozen as long as it lives: a driver that relies on the chain.
    ///
    /// # Errors
    /// No such node, or it is not in the chain of the child opened first.
    pub fn freeze_chain(&self, bottom: &str) -> Result<()> {
        let mut opening = self.opening.borrow_mut();
        let id = {
            let state = opening.graph.state();
            let id = state.find(bottom).ok_or_else(|| super::no_such_node(bottom))?;
            let first = opening.children.first().copied().flatten().and_then(|e| state.edges.get(&e));
            let first = first.ok_or_else(|| BlockError::invalid("This child has not been opened"))?;
            state.chain(first.child, id)?;
            id
        };
        opening.bottom = Some(id);
        Ok(())
    }

    /// The secret of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn secret(&self, id: &str) -> Result<Secret> {
        self.opening.borrow().graph.secrets().get(id)
    }

    /// The shared object of that name and type.
    ///
    /// # Errors
    /// There is none.
    pub fn object<T: std::any::Any + Send + Sync>(&self, id: &str) -> Result<Arc<T>> {
        let found = self.opening.borrow().graph.objects().get(id);
        found.ok_or_else(|| BlockError::new(Errno::ENOENT, format!("'{id}' not found")))
    }

    /// The effective common options.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }

    /// Opens or finds a child and holds it; returns its index, counted from 0 in the order of the calls. It is held with
    /// what `default_child_perm` says for a node without users.
    ///
    /// # Errors
    /// No such node, a bad definition, a permission conflict, whatever the child's driver says.
    pub async fn open_child(&self, name: &str, roles: Roles, reference: BlockdevRef) -> Result<usize> {
        let writable = !self.options.refuses_writes();
        let (perm, shared) = default_child_perm(roles, Perm::NONE, Perm::ALL, writable);
        let pair = perms::inactive(PermPair { perm, shared }, self.options.inactive);
        self.open_child_as(name, roles, reference, pair).await
    }

    /// As [`OpenContext::open_child`] with other permissions until the node is open.
    ///
    /// # Errors
    /// As there.
    pub async fn open_child_as(
        &self,
        name: &str,
        roles: Roles,
        reference: BlockdevRef,
        meanwhile: PermPair,
    ) -> Result<usize> {
        let (graph, depth) = {
            let opening = self.opening.borrow();
            (opening.graph.clone(), opening.depth)
        };
        let child = match reference {
            BlockdevRef::Reference(name) => {
                let found = graph.state().find(&name);
                found.ok_or_else(|| no_such_reference(&name))?
            }
            BlockdevRef::Inline(options) => {
                let inherited = inherit(&self.options, roles);
                let id = graph.open_node(options, inherited, depth + 1).await?;
                self.opening.borrow_mut().inline.push(id);
                id
            }
        };
        let info = Rc::new(RootInfo {
            description: format!("node '{}'", self.name),
            granularity: 1 << 30,
            gate: SourceGate::new(Rc::new(NoSource)),
            stay_at_node: true,
            opening: true,
            shared: Cell::new(meanwhile.shared),
            ways_out: WaysOut {
                share: None,
                need_less: Some(format!("add node '{}' with read-only=on", self.name)),
            },
        });
        graph.recall(child).await;
        let state = &mut *graph.state_mut();
        let pair = meanwhile;
        let id = EdgeId(state.fresh_id());
        let parent = Parent::Root(info);
        let edge = Edge { id, parent, child, name: name.to_owned(), roles, pair, frozen: Vec::new() };
        let mut tran = Transaction::new();
        add_edge(state, &mut tran, edge, None);
        let result = perms::refresh(state, &mut tran, &[child]);
        tran.finish(state, result)?;
        let mut opening = self.opening.borrow_mut();
        opening.children.push(Some(id));
        Ok(opening.children.len() - 1)
    }

    /// Keeps a place for a child that may be attached later (a backing file); returns its index. Until then there is no child
    /// at this index.
    pub fn reserve_child(&self) -> usize {
        let children = &mut self.opening.borrow_mut().children;
        children.push(None);
        children.len() - 1
    }

    /// The node of a child opened before.
    ///
    /// # Errors
    /// `EINVAL` for an index that was not opened.
    pub fn child(&self, child: usize) -> Result<Arc<Node>> {
        let opening = self.opening.borrow();
        let state = opening.graph.state();
        let edge = opening.children.get(child).copied().flatten().and_then(|e| state.edges.get(&e));
        let edge = edge.ok_or_else(|| BlockError::invalid("This child has not been opened"))?;
        Ok(Arc::clone(&state.slot(edge.child)?.node))
    }

    /// Runs requests on a child, on an iothread: reading headers. The child is used as by a parent that holds what it was
    /// opened with: past its end it reads as zeroes.
    ///
    /// # Errors
    /// There is no iothread, or what `work` returns.
    pub async fn child_io<R, F, Fut>(&self, child: usize, work: F) -> Result<R>
    where
        R: Send + 'static,
        F: FnOnce(NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = Result<R>> + 'static,
    {
        let node = self.child(child)?;
        let (graph, perm) = {
            let opening = self.opening.borrow();
            let state = opening.graph.state();
            let edge = opening.children.get(child).and_then(|e| state.edges.get(e.as_ref()?));
            (opening.graph.clone(), edge.map_or(Perm::NONE, |e| e.pair.perm))
        };
        graph.on_iothread_with(node.id(), perm, work).await
    }
}

/// QEMU's words for a child reference, which may mean a device there.
fn no_such_reference(name: &str) -> BlockError {
    BlockError::new(Errno::ENOENT, format!("Cannot find device='{name}' nor node-name='{name}'"))
}

/// Who freezes the edges a driver relies on.
pub(super) fn driver_owner(name: &str) -> Rc<str> {
    format!("node '{name}'").into()
}

/// What an inline child takes from its parent where the user said nothing.
pub(super) fn inherit(parent: &NodeOptions, roles: Roles) -> NodeOptions {
    let cow = roles.contains(Roles::COW);
    NodeOptions {
        read_only: cow || parent.read_only,
        auto_read_only: !cow && parent.auto_read_only,
        // Formats and filters decide themselves what they discard below.
        discard: DiscardOption::Unmap,
        direct: parent.direct,
        no_flush: parent.no_flush,
        force_share: parent.force_share,
        inactive: parent.inactive,
        ..NodeOptions::default()
    }
}

/// A node was added; its edges are steps of their own.
struct NodeAdded(NodeId);

impl Step<State> for NodeAdded {
    fn commit(&mut self, _: &mut State) {}
    fn abort(&mut self, state: &mut State) {
        if let Some(slot) = state.nodes.remove(&self.0) {
            state.names.remove(slot.node.name());
        }
    }
}

impl Graph {
    /// Creates a node from the arguments of `blockdev-add`. It belongs to the monitor: it stays until
    /// [`Graph::blockdev_del`].
    ///
    /// # Errors
    /// In QEMU's words, with nothing left behind.
    pub async fn blockdev_add(&self, options: Value) -> Result<()> {
        self.blockdev_add_for(options, Purpose::Use).await
    }

    /// As [`Graph::blockdev_add`], for tools that want something else of the node than requests.
    ///
    /// # Errors
    /// As there.
    pub async fn blockdev_add_for(&self, options: Value, purpose: Purpose) -> Result<()> {
        self.reap().await;
        let result = self.add_top(options, purpose).await;
        if result.is_err() {
            // Children that were opened for it are without users now.
            self.reap().await;
        }
        result
    }

    async fn add_top(&self, options: Value, purpose: Purpose) -> Result<()> {
        let Value::Object(options) = options else {
            return Err(BlockError::invalid("Invalid parameter type for 'options', expected: object"));
        };
        // As in QEMU the name is asked for after the driver.
        if options.contains_key("driver") && !options.contains_key("node-name") {
            return Err(BlockError::invalid("'node-name' must be specified for the root node"));
        }
        let top = NodeOptions { purpose, ..NodeOptions::default() };
        let id = self.open_node(options, top, 0).await?;
        let mut state = self.state_mut();
        for below in state.topological(&[id]) {
            if let Some(slot) = state.nodes.get_mut(&below) {
                slot.visible = true;
                slot.monitor_owned |= below == id;
            }
        }
        Ok(())
    }

    /// Opens a node and its children; invisible and without users at first.
    pub(crate) fn open_node(
        &self,
        options: Map<String, Value>,
        inherited: NodeOptions,
        depth: usize,
    ) -> BoxFut<'_, NodeId> {
        Box::pin(async move {
            if depth > MAX_NESTING {
                return Err(BlockError::invalid("Block device definitions are nested too deeply"));
            }
            let (common, own) = CommonOptions::split(Value::Object(options))?;
            let def = *self.registry().get(&common.driver).ok_or_else(|| {
                BlockError::invalid(format!("Parameter 'driver' does not accept value '{}'", common.driver))
            })?;
            let effective = common.effective(&inherited)?;
            let name = self.reserve(common.node_name.clone())?;
            let opening = Rc::new(RefCell::new(Opening {
                graph: self.clone(),
                name: name.clone(),
                options: effective,
                depth,
                children: Vec::new(),
                inline: Vec::new(),
                config: Config { common, own: own.clone(), inherited, parent: None },
                bitmaps: Arc::default(),
                epochs: None,
                bottom: None,
            }));
            let context = OpenContext { opening: Rc::clone(&opening), name, options: effective };
            let opened = (def.open)(context, Value::Object(own)).await?;
            self.finish_open(&def, &mut opening.borrow_mut(), opened)
        })
    }

    /// Takes a name for a node to come.
    fn reserve(&self, wanted: Option<String>) -> Result<String> {
        let mut state = self.state_mut();
        if state.nodes.len() + state.reserved.len() >= MAX_NODES {
            return Err(BlockError::new(Errno::ENOMEM, format!("There are {MAX_NODES} nodes already")));
        }
        let name = match wanted {
            Some(name) => {
                check_node_name(&name)?;
                name
            }
            None => state.generated_name(),
        };
        if state.names.contains_key(&name) || !state.reserved.insert(name.clone()) {
            return Err(BlockError::new(Errno::EEXIST, format!("Duplicate nodes with node-name='{name}'")));
        }
        Ok(name)
    }

    /// Turns the provisional roots into the node's child edges.
    fn finish_open(&self, def: &DriverDef, opening: &mut Opening, opened: Opened) -> Result<NodeId> {
        let mut options = opening.options;
        options.read_only |= opened.read_only && options.auto_read_only;
        let state = &mut *self.state_mut();
        let id = NodeId(state.fresh_id());
        let name = opening.name.clone();
        let shared = (Arc::clone(&opening.bitmaps), opening.epochs.clone());
        let node = Node::new(id, name.clone(), def.name, def.kind, opened.driver, options, shared);
        if node.size() > i64::MAX as u64 {
            return Err(BlockError::new(Errno::EFBIG, "The image is too large"));
        }
        let slot = Slot {
            node: Arc::new(node),
            children: Vec::new(),
            parents: Vec::new(),
            monitor_owned: false,
            visible: false,
            closing: false,
            held: PermPair::IDLE,
            freezes: Vec::new(),
            config: opening.config.clone(),
        };
        let mut tran = Transaction::new();
        state.nodes.insert(id, slot);
        state.names.insert(name, id);
        tran.add(NodeAdded(id));
        let mut moved = BTreeMap::new();
        for (index, provisional) in opening.children.iter().enumerate() {
            let provisional = provisional.and_then(|e| state.edges.get(&e).cloned());
            let Some(mut edge) = provisional else {
                // Nobody knows of the node yet: if it is not to be, its places go with it.
                if let Some(slot) = state.nodes.get_mut(&id) {
                    slot.children.push(None);
                }
                continue;
            };
            drop_edge(state, &mut tran, edge.id);
            edge.id = EdgeId(state.fresh_id());
            edge.parent = Parent::Node(id);
            moved.insert(index, edge.child);
            add_edge(state, &mut tran, edge, None);
        }
        let mut touched: Vec<NodeId> = vec![id];
        touched.extend(moved.into_values());
        let result = perms::refresh(state, &mut tran, &touched);
        let result = result.and_then(|()| opening.bottom.map_or(Ok(Vec::new()), |b| state.chain(id, b)));
        let freezes = tran.finish(state, result)?;
        super::freeze::freeze(state, &freezes, &driver_owner(&opening.name));
        if let Some(slot) = state.nodes.get_mut(&id) {
            slot.freezes = freezes;
        }
        for child in opening.inline.drain(..) {
            if let Some(slot) = state.nodes.get_mut(&child) {
                slot.config.parent = Some(id);
            }
        }
        opening.children.clear();
        Ok(id)
    }

    /// Runs something of a node's driver on the control side's iothread. The handle leads to the children, with what the edges
    /// hold; it changes nothing on the node itself.
    pub(crate) async fn on_iothread<R, F, Fut>(&self, node: NodeId, work: F) -> Result<R>
    where
        R: Send + 'static,
        F: FnOnce(NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = Result<R>> + 'static,
    {
        self.on_iothread_with(node, Perm::NONE, work).await
    }

    /// As [`Graph::on_iothread`], as a parent of the node that holds `perm` on it would use it.
    pub(crate) async fn on_iothread_with<R, F, Fut>(&self, node: NodeId, perm: Perm, work: F) -> Result<R>
    where
        R: Send + 'static,
        F: FnOnce(NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = Result<R>> + 'static,
    {
        let view = self.state().view(node, perm)?;
        let iothread = self.iothread()?;
        let call = iothread.call(move |local| work(view.io(&local).into_parent()));
        call.await.map_err(|_| BlockError::new(Errno::ENODEV, "The iothread is gone"))?
    }
}
