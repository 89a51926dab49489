//! Opening a raw node: its child, and whether the window fits in.
//!
//! Called by the graph on the main thread.

use graph::options::parse_options;
use graph::{BlockError, OpenContext, Opened, Result, Roles};
use serde_json::Value;

use super::options::RawOptions;
use super::{Raw, Window};

/// Sizes are whole sectors.
const SECTOR: u64 = 512;

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: RawOptions = parse_options(value)?;
    // Known before the child is opened, so that a slip costs nothing.
    let window = Window::new(&options)?;
    let index = cx.open_child("file", window.roles(), options.file).await?;
    debug_assert_eq!(index, super::FILE);
    let file_size = cx.child(index)?.size();
    window.check(file_size)?;
    Ok(Opened::new(Raw { window, file_size: file_size.into() }))
}

impl Window {
    /// Checks what can be without the child.
    pub(super) fn new(options: &RawOptions) -> Result<Window> {
        let unsigned = |name: &str, value: Option<i64>| match value.map(u64::try_from) {
            None => Ok(None),
            Some(Ok(value)) => Ok(Some(value)),
            Some(Err(_)) => Err(BlockError::invalid(format!(
                "Value '{}' is out of range for parameter '{name}'",
                value.unwrap_or_default()
            ))),
        };
        let size = unsigned("size", options.size)?;
        if size.is_some_and(|s| !s.is_multiple_of(SECTOR)) {
            return Err(BlockError::invalid("Specified size is not multiple of 512"));
        }
        Ok(Window { offset: unsigned("offset", options.offset)?.unwrap_or(0), size })
    }

    /// What the child is to the node: the same thing, or the place where its data lies.
    pub(super) fn roles(&self) -> Roles {
        if self.is_whole() { Roles::FILTER } else { Roles::DATA | Roles::PRIMARY }
    }

    /// Whether it shows all of the child.
    pub(super) fn is_whole(&self) -> bool {
        self.offset == 0 && self.size.is_none()
    }

    /// Checks it against the child's size.
    pub(super) fn check(&self, file_size: u64) -> Result<()> {
        let offset = self.offset;
        let Some(room) = file_size.checked_sub(offset) else {
            return Err(BlockError::invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({file_size})"
            )));
        };
        match self.size {
            Some(size) if size > room => Err(BlockError::invalid(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the actual size of \
                 the containing file ({file_size})"
            ))),
            _ => Ok(()),
        }
    }

    /// Size of the node over a child of this size, which may have shrunk since.
    #[inline]
    pub(super) fn visible(&self, file_size: u64) -> u64 {
        let room = file_size.saturating_sub(self.offset);
        self.size.map_or(room, |size| size.min(room))
    }
}
