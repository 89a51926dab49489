//! Opening a quorum: its children, and whether the options fit them.
//!
//! Called by the graph on the main thread.

use std::sync::Arc;

use graph::options::parse_options;
use graph::{BlockError, OpenContext, Opened, Result, Roles};
use host::sync::Ranges;
use serde_json::Value;

use super::members::{Member, Members, child_name};
use super::options::{QuorumOptions, ReadPattern};
use super::{MAX_CHILDREN, Quorum, QuorumNode};

/// What the options say, checked as far as that goes without the children.
pub(super) struct Rules {
    pub(super) threshold: usize,
    pub(super) pattern: ReadPattern,
    pub(super) blkverify: bool,
    pub(super) rewrite: bool,
}

impl Rules {
    /// In QEMU's order and words.
    pub(super) fn new(options: &QuorumOptions) -> Result<Rules> {
        let children = options.children.len();
        if children == 0 {
            return Err(BlockError::invalid("Number of provided children must be 1 or more"));
        }
        if children > MAX_CHILDREN {
            return Err(too_many());
        }
        let threshold = usize::try_from(options.vote_threshold).unwrap_or(0);
        if threshold == 0 {
            return Err(BlockError::invalid("Parameter 'vote-threshold' expects a value >= 1"));
        }
        if threshold > children {
            return Err(BlockError::new(graph::Errno::ERANGE, "threshold may not exceed children count"));
        }
        let pattern = options.read_pattern.unwrap_or_default();
        // Without a vote there is nothing to verify or rewrite; QEMU does not look at these options then.
        let voting = pattern == ReadPattern::Quorum;
        let blkverify = voting && options.blkverify.unwrap_or_default();
        let rewrite = voting && options.rewrite_corrupted.unwrap_or_default();
        if blkverify && (children != 2 || threshold != 2) {
            return Err(BlockError::invalid(
                "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
            ));
        }
        if blkverify && rewrite {
            return Err(BlockError::invalid("rewrite-corrupted=on cannot be used with blkverify=on"));
        }
        Ok(Rules { threshold, pattern, blkverify, rewrite })
    }
}

/// QEMU's words for too many children.
pub(super) fn too_many() -> BlockError {
    BlockError::invalid("Too many children")
}

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: QuorumOptions = parse_options(value)?;
    let rules = Rules::new(&options)?;
    let mut members = Vec::new();
    for (number, child) in (0u32..).zip(options.children) {
        let index = cx.open_child(&child_name(number), Roles::DATA, child).await?;
        members.push(Member::new(index, number, cx.child(index)?));
    }
    let size = common_size(&members)?;
    Ok(Opened::new(QuorumNode(Arc::new(Quorum {
        name: cx.node_name().to_owned(),
        size,
        members: Members::new(members),
        threshold: rules.threshold,
        pattern: rules.pattern,
        blkverify: rules.blkverify,
        rewrite: rules.rewrite,
        events: cx.events(),
        ranges: Ranges::new(),
    }))))
}

fn common_size(members: &[Member]) -> Result<u64> {
    let Some(first) = members.first() else { return Ok(0) };
    let size = first.node.size();
    match members.iter().find(|m| m.node.size() != size) {
        None => Ok(size),
        // The part before the colon is QEMU's, which says "Input/output error" after it.
        Some(other) => Err(BlockError::new(
            graph::Errno::EIO,
            format!(
                "Could not refresh total sector count: children '{}' ({size} bytes) and '{}' ({} bytes) differ in size",
                first.node.name(),
                other.node.name(),
                other.node.size(),
            ),
        )),
    }
}
