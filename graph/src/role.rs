//! What a child is to its parent: a set of five bits, the same five as QEMU's `BdrvChildRole`.
//!
//! Named by drivers when they open their children; read by the permission defaults, the views and the queries.
//! Must not know permissions.

bitflags::bitflags! {
    /// The roles of one edge.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Roles: u8 {
        /// The child holds data the parent shows to its users.
        const DATA = 0x01;
        /// The child holds the parent's metadata.
        const METADATA = 0x02;
        /// The parent is a filter on this child: same size, same data.
        const FILTERED = 0x04;
        /// The child shows what the parent has not allocated (backing file).
        const COW = 0x08;
        /// The one child that speaks for the parent (file name, size).
        const PRIMARY = 0x10;
        /// A format driver's image file.
        const IMAGE = Self::DATA.bits() | Self::METADATA.bits() | Self::PRIMARY.bits();
        /// What a filter's child is.
        const FILTER = Self::FILTERED.bits() | Self::PRIMARY.bits();
    }
}
