//! Names of points that drivers pass while they work, for the `blkdebug` driver: it fails requests once such a point has
//! been reached. The names are QEMU's `BlkdebugEvent`.
//!
//! Told by format drivers to their child ([`crate::NodeIo::debug_event`]), and by the asynchronous path of requests for the
//! stages of a write to the node itself (`pwritev` and its kin) and for flushes to the child, on any thread. Costs a virtual
//! call that does nothing where the node is not `blkdebug`. The path of mapped requests tells none: a `blkdebug` node with
//! rules sees to it that requests are driven.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A point a driver passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names are the documentation: QEMU gives no other")]
pub enum DebugEvent {
    L1Update,
    L1GrowAllocTable,
    L1GrowWriteTable,
    L1GrowActivateTable,
    L2Load,
    L2Update,
    L2UpdateCompressed,
    L2AllocCowRead,
    L2AllocWrite,
    ReadAio,
    ReadBackingAio,
    ReadCompressed,
    WriteAio,
    WriteCompressed,
    VmstateLoad,
    VmstateSave,
    CowRead,
    CowWrite,
    ReftableLoad,
    ReftableGrow,
    ReftableUpdate,
    RefblockLoad,
    RefblockUpdate,
    RefblockUpdatePart,
    RefblockAlloc,
    RefblockAllocHookup,
    RefblockAllocWrite,
    RefblockAllocWriteBlocks,
    RefblockAllocWriteTable,
    RefblockAllocSwitchTable,
    ClusterAlloc,
    ClusterAllocBytes,
    ClusterFree,
    FlushToOs,
    FlushToDisk,
    PwritevRmwHead,
    PwritevRmwAfterHead,
    PwritevRmwTail,
    PwritevRmwAfterTail,
    Pwritev,
    PwritevZero,
    PwritevDone,
    EmptyImagePrepare,
    L1ShrinkWriteTable,
    L1ShrinkFreeL2Clusters,
    CorWrite,
    ClusterAllocSpace,
    None,
}
