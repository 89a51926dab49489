//! The block graph of ringblk: nodes, edges, permissions, transactions, drain, and the way of a request through them.
//!
//! | word | meaning |
//! |---|---|
//! | *node* | a driver under a name ([`Node`]) |
//! | *edge* | a parent's use of a node, with [`Roles`] and a pair of permissions ([`PermPair`]) |
//! | *root* | an edge whose parent is not a node: an export, a job ([`Root`]) |
//! | *source* | where a root's requests come from ([`RequestSource`]) |
//! | *view* | what an iothread knows of the graph below a root ([`View`]) |
//! | *drain* | no request runs above a node until the guard goes ([`DrainGuard`]) |
//!
//! Two sides. The **control side** ([`Graph`], main thread, not `Send`) is the only writer. The **data side** ([`View`],
//! [`NodeIo`], any iothread) reads snapshots that are exchanged while their root is drained: no lock is taken to find the
//! way. Drivers implement [`Driver`] and are known by name through a [`Registry`]; this crate names none.
//!
//! A request is first offered to [`View::resolve`]; if every node on the way answers, it becomes one operation on a host
//! file. Otherwise it runs through [`NodeIo`], which does for every node what drivers would repeat: bounds, alignment,
//! splitting, zero detection, statistics.
//!
//! Locks, all leaves, none held across waiting: `io::tracked::Tracker::list`, `stats::NodeStats::state`, `drain::Fan`,
//! `pins::Pins::claims`, `node::Node::options`, `node::Node::driver`,
//! `epoch::Epochs::participants` (and in it `epoch::Participant::grace`), `bitmap::BitmapSet::list` (and in it `bitmap::Bitmap::bits`).

#![forbid(unsafe_code)]

pub mod bitmap;
mod control;
mod create;
mod debug;
mod drain;
mod driver;
mod edge;
pub mod epoch;
mod error;
mod events;
mod ids;
mod image;
mod io;
mod node;
mod objects;
pub mod options;
pub mod perm;
mod pins;
mod reopen;
mod role;
mod secret;
mod standing;
pub mod stats;
mod transaction;
mod view;

pub use bitmap::{Bitmap, BitmapSet};
pub use control::actions::{
    AbortAction, Action, ActionContext, BitmapAddAction, BitmapClearAction, BitmapMergeAction,
    BitmapRecordAction, BitmapRemoveAction, InternalSnapshotAction, NewOverlay, OverlayMode, SnapshotAction,
    SnapshotSyncAction,
};
pub use control::bitmaps::{BitmapRef, NewBitmap};
pub use control::query;
pub use control::snapshots::SnapshotQuery;
pub use control::surgery::{Insertion, Replacing};
pub use control::{Change, FreezeGuard, Graph, IoThreadSource, MAX_NODES, Root};
pub use create::{CreateContext, CreateDef, JobControl};
pub use debug::DebugEvent;
pub use drain::{DrainGuard, NoSource, RequestSource};
pub use driver::{
    BlockStatus, BoxFut, Driver, DriverDef, DriverInfo, DriverKind, Limits, Location, Map, Op, OpenContext,
    Opened, OverlayPlace, Prealloc, Registry, StatusFlags, Truncate, WriteFlags, ZeroFlags, not_supported,
};
pub use edge::{RootOptions, WaysOut};
pub use epoch::{Epochs, Stay, Stays, Ticket};
pub use error::{BlockError, Errno, ErrorKind, Result};
pub use events::{EventSink, GraphEvent, NodeEvents, QuorumOp};
pub use ids::{EdgeId, MAX_NODE_NAME, NodeId, check_node_name};
pub use image::{CheckFix, CheckReport, CheckStep, NewSnapshot, OnlineCheck, SnapshotInfo, SnapshotRef};
pub use io::{ChainStatus, NodeIo};
pub use node::Node;
pub use objects::Objects;
pub use options::{
    BlockdevRef, CommonOptions, DetectZeroes, DiscardOption, NodeOptions, Purpose, parse_options,
};
pub use perm::{Perm, PermPair, default_child_perm};
pub use pins::{Pin, Pins};
pub use reopen::{Reopen, ReopenContext, Replacement, cannot_change, refuse_changes};
pub use role::Roles;
pub use secret::{Secret, Secrets};
pub use standing::Standing;
pub use stats::ShardSet;
pub use view::{MAX_HOPS, PATH_NODES, Path, Resolved, Target, View, ViewNode};
