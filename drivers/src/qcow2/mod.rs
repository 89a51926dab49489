//! `qcow2`: QEMU's image format, versions 2 and 3.
//!
//! Memory is the truth while an image is open; the disk follows in commits that leave it consistent at every point of a crash.
//!
//! | folder | subject |
//! |---|---|
//! | `format/` | the format on disk, as pure functions |
//! | `open.rs`, `settings.rs`, `options.rs`, `crypt.rs`, `reopen.rs` | opening, and opening again |
//! | `node.rs` | the open image |
//! | `table/` | where guest data lies: L1 and L2 in memory |
//! | `io/` | requests |
//! | `alloc/` | host clusters |
//! | `commit/` | the order in which changes reach the disk |
//! | `create.rs` | new images |
//! | `check/` | checking and repairing |
//! | `snapshot/` | internal snapshots |
//! | `bitmap/` | persistent dirty bitmaps |
//! | `codec.rs` | compressed clusters |
//! | `cleaning.rs` | memory of the caches, given back |
//!
//! Called by the graph; must not reach anything but its children.

mod alloc;
mod bitmap;
pub mod check;
mod cleaning;
pub mod codec;
mod commit;
mod create;
mod crypt;
pub mod format;
mod io;
mod node;
mod open;
mod options;
mod reopen;
mod settings;
mod snapshot;
mod table;

use graph::{CreateDef, DriverDef, DriverKind};

use options::Qcow2Options;

/// `qcow2`.
pub(crate) const QCOW2: DriverDef = DriverDef {
    name: "qcow2",
    kind: DriverKind::Format,
    schema: || schemars::schema_for!(Qcow2Options),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: Some(CreateDef {
        schema: || schemars::schema_for!(create::Qcow2CreateOptions),
        create: |cx, value| Box::pin(create::create(cx, value)),
    }),
};
