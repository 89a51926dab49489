//! What `block-export-add` and `--export` take. The structs here are the parser, the schema and the reference text.
//! Read by `export::add`; must not check anything that needs a node or an iothread.

use schemars::JsonSchema;
use serde::Deserialize;

/// An export of type `vhost-user-blk`: the options QEMU has, and ours (`iothread-vq-mapping`, `queue-size`, `serial`,
/// `physical-block-size`, `share-rw`, `pin-memory`).
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VhostUserBlkOptions {
    /// Name of the export, unique in the process; letters, digits, `-`, `.`, `_`, a letter first.
    pub id: String,
    /// The node to serve.
    pub node_name: String,
    /// Socket to listen on: `unix` with a path, or `fd` with an inherited descriptor.
    pub addr: SocketAddress,
    /// Whether the guest may write. Default: off.
    #[serde(default)]
    pub writable: bool,
    /// Tell the guest that there is no write cache, and make each write durable before it completes. Default: off.
    #[serde(default)]
    pub writethrough: bool,
    /// The iothread that serves all queues. Not together with `iothread-vq-mapping`. Default: one of the process's own.
    pub iothread: Option<String>,
    /// Accepted for QEMU's sake: queues never leave the iothread they were given. Default: off.
    #[serde(default)]
    #[expect(dead_code, reason = "always so: there is nothing to do for it")]
    pub fixed_iothread: bool,
    /// Whether the node may stay inactive; this type of export cannot have that: it makes the node active. Default: off.
    #[serde(default)]
    pub allow_inactive: bool,
    /// Which iothread serves which queue.
    pub iothread_vq_mapping: Option<Vec<IoThreadVirtQueueMapping>>,
    /// Number of request queues, 1 to 256. Default: 1.
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Largest ring a front end may set up, a power of two from 4 to 1024. Default: 1024. When given, requests of up to
    /// `queue-size - 2` segments are announced; else 126, which fits the front ends' default of 128.
    pub queue_size: Option<u16>,
    /// Logical block size in bytes, a power of two from 512 to 2 MiB. Default: the node's.
    pub logical_block_size: Option<u32>,
    /// Physical block size in bytes, a power of two not below the logical one. Default: the node's.
    pub physical_block_size: Option<u32>,
    /// What the guest reads as the disk's serial, at most 20 bytes. Default: the export's id, cut to 20 bytes.
    pub serial: Option<String>,
    /// Whether other users may write to the node while this export uses it. Default: off.
    #[serde(default)]
    pub share_rw: bool,
    /// Whether all guest memory stays pinned while a front end is connected: an eighth less processor time per request
    /// on images with `cache.direct=on`. The memory is brought in at once and counts against RLIMIT_MEMLOCK. Not for
    /// guests whose memory shrinks while they run (balloon, free page reporting, unplugging): pages given up and taken back
    /// would not be the pinned ones, and data would be lost. Without effect where io_uring is refused. Default: off.
    #[serde(default)]
    pub pin_memory: bool,
}

fn one() -> u16 {
    1
}

/// Queues given to an iothread.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct IoThreadVirtQueueMapping {
    /// Id of the iothread object.
    pub iothread: String,
    /// Queues it serves. In all entries or in none; none deals the queues out in turn.
    pub vqs: Option<Vec<u16>>,
}

/// Where a socket is.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum SocketAddress {
    /// A path in the file system, at most 107 bytes. A socket that nobody serves is replaced, a live one refused.
    Unix {
        /// The path.
        path: String,
    },
    /// A descriptor that this process inherited: listening, or connected already.
    Fd {
        /// Its number, or its name in LISTEN_FDNAMES.
        str: String,
    },
}

/// `block-export-add`'s union, by `type`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ExportOptions {
    /// A vhost-user-blk device on a socket.
    VhostUserBlk(VhostUserBlkOptions),
}

/// How `block-export-del` treats an export that is in use.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum RemoveMode {
    /// Refuse while a front end is connected.
    #[default]
    Safe,
    /// Disconnect it.
    Hard,
}
