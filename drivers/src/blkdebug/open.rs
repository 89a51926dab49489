//! Opening a blkdebug node: its rules, its child, and limits that fit it.
//!
//! Called by the graph on the main thread; the configuration file is read on the worker pool.

use std::io::Read;

use graph::options::{BlockdevRef, parse_options};
use graph::{BlockError, Limits, OpenContext, Opened, Result, Roles};
use serde_json::Value;

use super::options::{BlkdebugOptions, Permission};
use super::rules::Rules;
use super::{Blkdebug, IMAGE, config};
use crate::child_size::ChildSize;

/// Limits end here, bytes.
const MOST: u64 = i32::MAX as u64;

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: BlkdebugOptions = parse_options(value)?;
    let (mut inject, mut set) = match options.config.clone() {
        Some(path) => config::parse(&host::pool::run(move || read(&path)).await?)?,
        None => Default::default(),
    };
    inject.extend(options.inject_error.iter().cloned());
    set.extend(options.set_state.iter().cloned());
    let rules = Rules::new(&inject, set)?;
    let image: BlockdevRef = options.image.clone();
    let index = cx.open_child("image", Roles::FILTER, image).await?;
    debug_assert_eq!(index, IMAGE);
    let child = cx.child(index)?;
    let limits = limits(&options, child.driver().limits().request_alignment)?;
    Ok(Opened::new(Blkdebug {
        rules,
        limits,
        take: Permission::all(&options.take_child_perms),
        unshare: Permission::all(&options.unshare_child_perms),
        size: ChildSize::new(child.size()),
    }))
}

/// The text of a configuration file.
fn read(path: &str) -> Result<String> {
    let fail = |e| BlockError::io("Could not read blkdebug config file", e);
    let file = std::fs::File::open(path).map_err(fail)?;
    if !file.metadata().map_err(fail)?.is_file() {
        return Err(BlockError::invalid("Could not read blkdebug config file: it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(config::MAX_FILE + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > config::MAX_FILE {
        return Err(BlockError::invalid("Could not read blkdebug config file: it is longer than 1 MiB"));
    }
    String::from_utf8(bytes)
        .map_err(|_| BlockError::invalid("Could not read blkdebug config file: it is not text"))
}

/// The limits the options ask for, over a child with this alignment.
pub(super) fn limits(options: &BlkdebugOptions, child_align: u32) -> Result<Limits> {
    let bytes = |name: &str, value: Option<i64>, unit: u64| {
        let value = value.unwrap_or(0);
        match u64::try_from(value) {
            Ok(n) if n < MOST && n.is_multiple_of(unit) => Ok(n),
            _ => Err(BlockError::invalid(format!("Cannot meet constraints with {name} {value}"))),
        }
    };
    let own_align = bytes("align", options.align, 1)?;
    if own_align != 0 && !own_align.is_power_of_two() {
        return Err(BlockError::invalid(format!("Cannot meet constraints with align {own_align}")));
    }
    let align = own_align.max(child_align.into());
    let max_transfer = bytes("max-transfer", options.max_transfer, align)?;
    let opt_write_zero = bytes("opt-write-zero", options.opt_write_zero, align)?;
    let max_write_zeroes = bytes("max-write-zero", options.max_write_zero, align.max(opt_write_zero))?;
    let opt_discard = bytes("opt-discard", options.opt_discard, align)?;
    let max_discard = bytes("max-discard", options.max_discard, align.max(opt_discard))?;
    Ok(Limits {
        request_alignment: own_align.max(1) as u32,
        max_transfer,
        write_zeroes_alignment: opt_write_zero as u32,
        max_write_zeroes,
        discard_alignment: opt_discard as u32,
        max_discard,
        ..Limits::default()
    })
}
