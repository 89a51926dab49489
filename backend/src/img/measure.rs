//! `ringblk img measure`: how large the file of an image would be.
//!
//! Pure arithmetic over what is known about the source's ranges. Reads no data, writes nothing.

mod qcow2;

use serde_json::{Map, Value, json};

use super::cli::{MeasureArgs, Output};
use super::failure::{Failure, Outcome};
use super::image::{How, Image, Spec};
use super::layout::{self, Given, Options};
use super::output;
use super::session::Session;
use super::{size, status};

/// Longest range that is asked about at once.
const STEP: u64 = 1 << 30;

/// The answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Measured {
    required: u64,
    fully_allocated: u64,
    bitmaps: Option<u64>,
}

/// Runs the command.
///
/// # Errors
/// Arguments that make no sense together, a format that cannot be measured, an image that cannot be opened.
pub async fn run(session: Session, args: MeasureArgs) -> Outcome {
    let options = match layout::parse(&args.options)? {
        Given::Options(options) => options,
        Given::Help => {
            output::print(&session.format(&args.target_format)?.help(&session)?)?;
            return Ok(0);
        }
    };
    if args.snapshot.is_some() && args.filename.is_none() {
        return Err(Failure::new("--image-opts, -f, or -l can only be used with a filename argument."));
    }
    if args.filename.is_some() == args.size.is_some() {
        return Err(Failure::new(match args.size {
            Some(_) => "--size N cannot be used together with a filename.",
            None => "Either --size N or one filename must be specified.",
        }));
    }
    session.objects(&args.source.objects).await?;
    let image = match &args.filename {
        Some(name) => {
            let spec = Spec::new(name, args.source.format.as_deref(), args.source.image_opts)?;
            let how = How::read(args.share.force_share);
            Some(match &args.snapshot {
                Some(snapshot) => session.open_snapshot(&spec, how, snapshot).await?,
                None => session.open(&spec, how).await?,
            })
        }
        None => None,
    };
    let bytes = match (&args.size, &image) {
        (Some(text), _) => size::parse(text)
            .filter(|n| *n <= i64::MAX as u64)
            .ok_or_else(|| Failure::new(format!("Invalid image size specified: '{text}'.")))?,
        (None, Some(image)) => image.size()?,
        (None, None) => 0,
    };
    let measured = match args.target_format.as_str() {
        "raw" => raw(bytes)?,
        "qcow2" => into_qcow2(image.as_ref(), bytes, &options).await?,
        other => {
            // Says so if there is no such format.
            session.format(other)?;
            return Err(Failure::new(format!("Block driver '{other}' does not support size measurement")));
        }
    };
    output::print(&match args.output {
        Output::Human => human(&measured),
        Output::Json => output::json(&members(&measured)),
    })?;
    if let Some(image) = image {
        image.close().await?;
    }
    Ok(0)
}

fn raw(bytes: u64) -> Result<Measured, Failure> {
    let whole = bytes.checked_next_multiple_of(512).ok_or_else(too_large)?;
    Ok(Measured { required: whole, fully_allocated: whole, bitmaps: None })
}

fn too_large() -> Failure {
    Failure::new("The image size is too large (try using a larger cluster size)")
}

async fn into_qcow2(image: Option<&Image>, bytes: u64, options: &Options) -> Result<Measured, Failure> {
    let layout = qcow2::Layout::new(options)?;
    let cluster = layout.cluster;
    let size = bytes.checked_next_multiple_of(cluster).ok_or_else(too_large)?;
    let data = match image {
        _ if layout.preallocated => size,
        // How much of the chain below is shared is not known.
        Some(_) if layout.backed => size,
        Some(image) => image.io(move |io| async move { data_bytes(&io, cluster).await }).await?,
        None => 0,
    };
    let metadata = layout.metadata(size).ok_or_else(too_large)?;
    let bitmaps = match image {
        Some(image) if layout.has_bitmaps => bitmap_bytes(image, cluster)?,
        _ => None,
    };
    let sum = |data: u64| metadata.checked_add(data).ok_or_else(too_large);
    Ok(Measured { required: sum(data)?, fully_allocated: sum(size)?, bitmaps })
}

/// Bytes of the clusters that have data.
async fn data_bytes(io: &graph::NodeIo, cluster: u64) -> graph::Result<u64> {
    let (mut at, end) = (0, io.size());
    let mut total: u64 = 0;
    while at < end {
        let status = status::of_chain(io, at, (end - at).min(STEP)).await?;
        let mut next = at + status.len;
        if !status.zero {
            // A cluster that has data in it is needed as a whole.
            let first = at / cluster * cluster;
            next = next.next_multiple_of(cluster);
            total += next - first;
        }
        at = next;
    }
    Ok(total)
}

/// What the bitmaps of the source would need; `None` where there can be none.
fn bitmap_bytes(image: &Image, cluster: u64) -> Result<Option<u64>, Failure> {
    let node = image.node()?;
    if node.driver().make_bitmap_persistent_ok("bitmap", 65536).is_err() && node.bitmaps().list().is_empty() {
        return Ok(None);
    }
    let (mut total, mut directory) = (0u64, 0u64);
    for bitmap in node.bitmaps().list().into_iter().filter(|b| b.persistent() && !b.inconsistent()) {
        let bits = node.size().div_ceil(u64::from(bitmap.granularity()));
        let clusters = bits.div_ceil(8).div_ceil(cluster);
        total += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory += (24 + bitmap.name().len() as u64).next_multiple_of(8);
    }
    Ok(Some(total + directory.next_multiple_of(cluster)))
}

fn human(measured: &Measured) -> String {
    let mut out =
        format!("required size: {}\nfully allocated size: {}\n", measured.required, measured.fully_allocated);
    if let Some(bytes) = measured.bitmaps {
        out.push_str(&format!("bitmaps size: {bytes}\n"));
    }
    out
}

fn members(measured: &Measured) -> Value {
    let mut all = Map::new();
    all.insert("required".to_owned(), json!(measured.required));
    all.insert("fully-allocated".to_owned(), json!(measured.fully_allocated));
    if let Some(bytes) = measured.bitmaps {
        all.insert("bitmaps".to_owned(), json!(bytes));
    }
    Value::Object(all)
}
