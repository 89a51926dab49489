//! The control channel: QMP sessions, the command registry, events, the one error table, and the schema that parsing,
//! introspection and the reference page are made from.
//!
//! ```text
//! socket ─► adapter ─► session (framing, negotiation, queue) ─► server (who runs when) ─► command table ─► handler
//!                                                                  ▲
//! command line ─► keyval / JSON ─► schema.check ───────────────────┘        handler, graph, exports ─► events ─► sessions
//! ```
//!
//! * **I/O model.** Everything runs on the main thread. [`session`] and [`server`] touch no descriptor and no clock;
//!   [`adapter`] connects them to sockets under `event-manager`. A handler is a future that the server polls; it may wait
//!   for iothreads and is woken from any thread.
//! * **Who validates.** The JSON reader bounds size and depth; [`schema::Schema::check`] refuses what the command's
//!   type does not allow. A handler gets a struct that fits its type and checks the rest (names that exist, values that fit
//!   together).
//! * **Errors.** [`error::QmpError`] only, with QEMU's words where QEMU has some.
//!
//! # Adding a command
//!
//! ```
//! use ringblk_qmp::command::{Commands, Version};
//! use ringblk_qmp::error::QmpError;
//!
//! #[derive(Clone)]
//! struct Process; // shared state: usually an Rc
//!
//! /// Arguments: doc comments become the reference.
//! #[derive(serde::Deserialize, schemars::JsonSchema)]
//! #[serde(rename_all = "kebab-case", deny_unknown_fields)]
//! struct Resize {
//!     /// The node.
//!     node_name: String,
//!     /// Its new length in bytes.
//!     #[schemars(extend("format" = "size"))]
//!     size: u64,
//! }
//!
//! let mut commands = Commands::new(Version::default(), |_: &Process| {});
//! commands.register("block_resize", "Changes the length of a node.", |_process: Process, args: Resize| async move {
//!     if args.size % 512 != 0 {
//!         return Err(QmpError::generic("The new size must be a multiple of 512"));
//!     }
//!     Ok(())
//! });
//! let table = commands.finish();
//! assert!(table.schema().problems().is_empty());
//! // The same command from the command line:
//! let call = table.call_option(Process, "block_resize", "disk,size=10G", "node-name");
//! assert!(call.is_ok());
//! ```
//!
//! Must not know rings, drivers or exports: those register themselves.
#![forbid(unsafe_code)]

pub mod adapter;
pub mod command;
pub mod error;
pub mod event;
pub mod json;
pub mod keyval;
pub mod options;
pub mod schema;
pub mod server;
pub mod session;
pub mod socket;

pub use command::{CommandTable, Commands, HandlerFuture, Version};
pub use error::{ErrorClass, QmpError};
pub use event::{Event, Events};
