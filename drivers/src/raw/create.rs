//! "Creating" a raw image: its file gets the size, which is all the format there is.
//!
//! Called by the create job, where QEMU has nothing for this format.

use graph::options::{BlockdevRef, parse_options};
use graph::{BlockError, CreateContext, Perm, PermPair, Prealloc, Result, Truncate};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Options for the creation of a raw image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RawCreateOptions {
    /// The node that is to hold the data.
    pub file: BlockdevRef,
    /// Size in bytes.
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub size: i64,
    /// How space is set aside, by `file`. Default: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preallocation: Option<Prealloc>,
}

/// Gives the file its size; what it holds stays.
pub(super) async fn create(mut cx: CreateContext, value: Value) -> Result<()> {
    let options: RawCreateOptions = parse_options(value)?;
    let size = u64::try_from(options.size)
        .map_err(|_| BlockError::invalid("Parameter 'size' expects a non-negative value"))?;
    let hold = PermPair { perm: Perm::WRITE | Perm::RESIZE, shared: Perm::ALL - Perm::RESIZE };
    let file = cx.open(options.file, hold).await?;
    let prealloc = options.preallocation.unwrap_or_default();
    let result = cx.truncate(file, size, Truncate { exact: true, prealloc, zero: false }).await;
    cx.close().await;
    result
}
