//! What the options come to for one image: defaults, cache sizes, and what does not go together.
//!
//! Used by `open`. QEMU's defaults and words.

use graph::options::NodeOptions;
use graph::{BlockError, Result};

use super::alloc::{Kind, Kinds};
use super::format::Header;
use super::node::Settings;
use super::open::{data_file_raw, passes_discards};
use super::options::{OverlapCheck, OverlapFlags, OverlapMode, Qcow2Options};

/// The option that carries the images above down a chain that is being opened; not for users.
pub(super) const CHAIN: &str = "x-chain";
/// Most memory for L2 slices where nothing is said, bytes.
const MAX_L2_CACHE: u64 = 32 << 20;
/// Size of a slice where nothing is said, bytes.
const SLICE: u64 = 4096;
/// Refcount cache where nothing is said, clusters.
const REFCOUNT_CLUSTERS: u64 = 4;
/// After how many seconds unused parts of the caches go where nothing is said.
const CLEAN_INTERVAL: u64 = 600;
/// Most memory any cache is given, bytes: what is more than all tables there can be is as good as this.
const MOST: u64 = 1 << 40;

/// Decides.
///
/// # Errors
/// Options that contradict each other or the image.
pub(super) fn decide(
    options: &Qcow2Options,
    header: &Header,
    common: &NodeOptions,
    read_only: bool,
) -> Result<Settings> {
    let geo = header.geometry();
    let lazy = options.lazy_refcounts.unwrap_or(header.lazy_refcounts());
    if lazy && !geo.v3() {
        return Err(BlockError::invalid(
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
        ));
    }
    let no_unref = options.discard_no_unref.unwrap_or(false);
    if no_unref && !geo.v3() {
        return Err(BlockError::invalid("discard-no-unref is only supported since qcow2 version 3"));
    }
    let (l2, refcount, slice) = cache_sizes(options, header)?;
    Ok(Settings {
        read_only,
        lazy_refcounts: lazy,
        pass_discard_request: options.pass_discard_request.unwrap_or(passes_discards(common.discard)),
        pass_discard_snapshot: options.pass_discard_snapshot.unwrap_or(true),
        pass_discard_other: options.pass_discard_other.unwrap_or(false),
        discard_no_unref: no_unref,
        guarded: guarded(options.overlap_check.as_ref()),
        l2_cache_size: l2,
        l2_slice_size: slice,
        refcount_cache_size: refcount,
        cache_clean_interval: unsigned("cache-clean-interval", options.cache_clean_interval)?
            .unwrap_or(CLEAN_INTERVAL),
        data_file_raw: data_file_raw(header),
    })
}

/// What `overlap-check` comes to.
fn guarded(option: Option<&OverlapCheck>) -> Kinds {
    let flags = match option {
        None => OverlapFlags::default(),
        Some(OverlapCheck::Mode(mode)) => OverlapFlags { template: Some(*mode), ..OverlapFlags::default() },
        Some(OverlapCheck::Flags(flags)) => flags.clone(),
    };
    let constant = [
        Kind::Header,
        Kind::ActiveL1,
        Kind::RefcountTable,
        Kind::SnapshotTable,
        Kind::BitmapDirectory,
        // Without a flag of their own: they go with the cheapest template.
        Kind::Bitmap,
        Kind::Crypto,
    ];
    let cached = [Kind::ActiveL2, Kind::RefcountBlock, Kind::InactiveL1];
    let template = match flags.template.unwrap_or(OverlapMode::Cached) {
        OverlapMode::None => Kinds::NONE,
        OverlapMode::Constant => Kinds::of(&constant),
        OverlapMode::Cached => Kinds::of(&[&constant[..], &cached].concat()),
        OverlapMode::All => Kinds::ALL,
    };
    [
        (Kind::Header, flags.main_header),
        (Kind::ActiveL1, flags.active_l1),
        (Kind::ActiveL2, flags.active_l2),
        (Kind::RefcountTable, flags.refcount_table),
        (Kind::RefcountBlock, flags.refcount_block),
        (Kind::SnapshotTable, flags.snapshot_table),
        (Kind::InactiveL1, flags.inactive_l1),
        (Kind::InactiveL2, flags.inactive_l2),
        (Kind::BitmapDirectory, flags.bitmap_directory),
    ]
    .into_iter()
    .fold(template, |kinds, (kind, flag)| flag.map_or(kinds, |on| kinds.with(kind, on)))
}

fn unsigned(name: &str, value: Option<i64>) -> Result<Option<u64>> {
    match value {
        None => Ok(None),
        Some(n) => u64::try_from(n)
            .map(|n| Some(n.min(MOST)))
            .map_err(|_| BlockError::invalid(format!("Value '{n}' is out of range for parameter '{name}'"))),
    }
}

/// (L2 slices, refcount blocks, size of a slice), bytes.
fn cache_sizes(options: &Qcow2Options, header: &Header) -> Result<(u64, u64, u64)> {
    let cluster = header.geometry().cluster_size();
    let both = unsigned("cache-size", options.cache_size)?;
    let l2 = unsigned("l2-cache-size", options.l2_cache_size)?;
    let refcount = unsigned("refcount-cache-size", options.refcount_cache_size)?;
    let slice = match unsigned("l2-cache-entry-size", options.l2_cache_entry_size)? {
        None => SLICE.min(cluster),
        Some(n) if (512..=cluster).contains(&n) && n.is_power_of_two() => n,
        Some(_) => {
            return Err(BlockError::invalid(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
            )));
        }
    };
    // As much as all L2 tables of the disk take.
    let entries = header.virtual_size().div_ceil(cluster);
    let whole = (entries * header.geometry().l2_entry_size()).next_multiple_of(cluster);
    let least_refcount = REFCOUNT_CLUSTERS * cluster;
    let over = |what: &str| BlockError::invalid(format!("{what} may not exceed cache-size"));
    let (l2, refcount) = match (both, l2, refcount) {
        (Some(_), Some(_), Some(_)) => {
            return Err(BlockError::invalid(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ));
        }
        (Some(both), Some(l2), None) => (l2, both.checked_sub(l2).ok_or_else(|| over("l2-cache-size"))?),
        (Some(both), None, Some(rc)) => {
            (both.checked_sub(rc).ok_or_else(|| over("refcount-cache-size"))?, rc)
        }
        (Some(both), None, None) if both >= whole + least_refcount => (whole, both - whole),
        (Some(both), None, None) => (both - both.min(least_refcount), both.min(least_refcount)),
        (None, l2, refcount) => {
            (l2.unwrap_or(MAX_L2_CACHE).min(whole.max(cluster)), refcount.unwrap_or(least_refcount))
        }
    };
    // What the disk cannot fill is not set aside; a disk that grows keeps at least the default.
    Ok((l2.min(whole.max(MAX_L2_CACHE)), refcount, slice))
}
