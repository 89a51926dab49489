//! Opening a null node: checks the options.
//!
//! Called by the graph on the main thread. Must not wait for anything.

use graph::options::parse_options;
use graph::{BlockError, OpenContext, Opened, Result};
use serde_json::Value;

use super::Null;
use super::options::NullOptions;

/// QEMU's default.
const DEFAULT_SIZE: i64 = 1 << 30;
/// Deleting a node and ending the process wait for its requests, its last flush among them: ten seconds at most.
const MAX_LATENCY_NS: u64 = 10_000_000_000;
/// Sizes are shown in whole sectors.
const SECTOR: u64 = 512;

impl Null {
    /// Checks the options. `name` is the driver's name, for the file name shown in queries.
    pub(super) fn new(name: &str, options: &NullOptions) -> Result<Null> {
        let size = options.size.unwrap_or(DEFAULT_SIZE);
        let size = u64::try_from(size)
            .ok()
            .and_then(|s| s.checked_next_multiple_of(SECTOR))
            .filter(|s| *s <= i64::MAX as u64)
            .ok_or_else(|| {
                BlockError::invalid(format!("Value '{size}' is out of range for parameter 'size'"))
            })?;
        let latency_ns = u64::try_from(options.latency_ns.unwrap_or(0))
            .ok()
            .filter(|ns| *ns <= MAX_LATENCY_NS)
            .ok_or_else(|| {
                BlockError::invalid(format!(
                    "Parameter 'latency-ns' expects an integer from 0 to {MAX_LATENCY_NS}"
                ))
            })?;
        let filename = match options.size {
            None => format!("{name}://"),
            Some(size) => format!(r#"json:{{"driver": "{name}", "size": {size}}}"#),
        };
        Ok(Null { size, latency_ns, read_zeroes: options.read_zeroes.unwrap_or(false), filename })
    }
}

/// Opens a node.
pub(super) async fn open(name: &'static str, _cx: OpenContext, value: Value) -> Result<Opened> {
    Ok(Opened::new(Null::new(name, &parse_options(value)?)?))
}
