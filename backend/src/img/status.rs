//! What is known about a range of an image, through its whole backing chain: who decides it, and where its bytes lie.
//!
//! Called by `map`, `compare` and `measure` on the iothread. Asks each node of the chain in turn and follows locations down to
//! the node that ends the graph. Must not read data.

use graph::{BlockError, DriverKind, Errno, Location, NodeIo, Result, StatusFlags};

/// Deepest way down that is followed.
const MAX_DEPTH: usize = 1024;

/// What holds for all of a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Bytes; not 0, not more than asked.
    pub len: u64,
    /// Has data.
    pub data: bool,
    /// Reads as zeroes.
    pub zero: bool,
    /// Some image of the chain decides it.
    pub present: bool,
    /// Stored compressed.
    pub compressed: bool,
    /// How far down the chain the image that decides it lies; 0 is the top.
    pub depth: u64,
    /// Where the bytes are: in which file, and where in it.
    pub place: Option<Place>,
}

/// A place in a file of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file's name as its node was given it.
    pub file: String,
    /// Bytes.
    pub offset: u64,
}

/// What is known about the first part of a range of the image.
///
/// # Errors
/// What the drivers say.
pub async fn of_chain(io: &NodeIo, offset: u64, len: u64) -> Result<Status> {
    let mut node = io.clone();
    let mut len = len;
    for depth in 0..MAX_DEPTH as u64 {
        let status = node.block_status(offset, len).await?;
        len = len.min(status.len);
        let flags = status.flags;
        let below = backing(&node)?;
        let past_end = offset >= node.size();
        if !past_end && flags.intersects(StatusFlags::DATA | StatusFlags::ZERO) {
            let mut zero = flags.contains(StatusFlags::ZERO);
            if let (Some(Location::Child { child, offset }), false) = (status.location, zero)
                && flags.contains(StatusFlags::OFFSET_VALID)
                && node.node()?.kind() == DriverKind::Format
            {
                // A cluster that was set aside and not written is a hole in the file.
                let below = node.child(child).block_status(offset, len).await?;
                zero = below.flags.contains(StatusFlags::ZERO);
                len = len.min(below.len);
            }
            let place = match status.location {
                Some(location) if flags.contains(StatusFlags::OFFSET_VALID) => Some(place(&node, location)?),
                _ => None,
            };
            return Ok(Status {
                len,
                data: flags.contains(StatusFlags::DATA),
                zero,
                present: flags.contains(StatusFlags::ALLOCATED),
                compressed: flags.contains(StatusFlags::COMPRESSED),
                depth,
                place,
            });
        }
        let nothing = |depth| Status {
            len,
            data: false,
            zero: true,
            present: false,
            compressed: false,
            depth,
            place: None,
        };
        // Past the end of an image lie zeroes, which the image above it shows.
        let Some(below) = below else { return Ok(nothing(depth)) };
        if offset >= below.size() {
            return Ok(nothing(depth));
        }
        node = below;
    }
    Err(BlockError::new(Errno::EINVAL, "The backing chain is too long"))
}

/// The image below a node; filters show through.
pub fn backing(node: &NodeIo) -> Result<Option<NodeIo>> {
    let driver = node.node()?.driver();
    Ok(driver.backing_child().filter(|child| node.has_child(*child)).map(|child| node.child(child)))
}

/// Follows a location down to the node that ends the graph.
fn place(node: &NodeIo, location: Location) -> Result<Place> {
    let (child, offset) = match location {
        Location::File { offset } => return Ok(Place { file: filename(node)?, offset }),
        Location::Child { child, offset } => (node.child(child), offset),
    };
    Ok(Place { file: filename(&child)?, offset })
}

/// The name of the file a node ends in: that of its first child that has one.
pub fn filename(node: &NodeIo) -> Result<String> {
    let mut node = node.clone();
    for _ in 0..MAX_DEPTH {
        let name = node.node()?.driver().info().filename;
        if !name.is_empty() || !node.has_child(0) {
            return Ok(name);
        }
        node = node.child(0);
    }
    Ok(String::new())
}
