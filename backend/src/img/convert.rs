//! `ringblk img convert`: one or more images, put one after the other, into another image.
//!
//! Opens both sides, creates the target unless it is there, and lets the jobs' copy engine do the work. What cannot be read
//! ends the command, or with `--salvage` is reported and becomes zeroes.

use jobs::Control;
use jobs::copy::{CopyOptions, CopyReport, MAX_TASKS, TargetZero, copy};

use super::cli::ConvertArgs;
use super::failure::{Failure, Outcome};
use super::image::{How, Image, Spec};
use super::layout::{self, Given, Options};
use super::progress::Progress;
use super::session::Session;
use super::{bitmap, complain, create, output, size, status};

/// Longest request, bytes; clusters of compressed images are shorter.
const BUFFER: u64 = 2 << 20;
/// Longest run of zeroes that can be asked for, bytes.
const MAX_SPARSE: u64 = 16 << 20;
/// What is left out as zero unless something else is asked for, bytes.
const SPARSE: u64 = 4096;

/// What was asked for, checked as far as it can be without opening anything.
struct Wish {
    sources: Vec<Spec>,
    target: Spec,
    options: Options,
    copy: CopyOptions,
    rate: u64,
}

/// Runs the command.
///
/// # Errors
/// Arguments that make no sense together, an image that cannot be opened or created, reading or writing fails.
pub async fn run(session: Session, args: ConvertArgs) -> Outcome {
    let format = args.target_format.as_deref().unwrap_or("raw");
    let given = match layout::parse(&args.options)? {
        Given::Options(options) => options,
        Given::Help => {
            output::print(&session.format(format)?.help(&session)?)?;
            return Ok(0);
        }
    };
    let wish = check(&args, given)?;
    session.objects(&args.objects).await?;
    let mut sources = Vec::with_capacity(wish.sources.len());
    // A target that is one of the sources, or lies below one, has to be refused before it is emptied.
    let how =
        How { steady: true, ..How::read(args.share.force_share) }.cache(&args.source_cache, "source ")?;
    for spec in &wish.sources {
        let image = match &args.snapshot {
            Some(snapshot) => session.open_snapshot(spec, how, snapshot).await?,
            None => session.open(spec, how).await?,
        };
        sources.push(image);
    }
    let mut total: u64 = 0;
    for source in &sources {
        total = total.saturating_add(source.size()?);
    }
    let bitmaps = match (args.bitmaps, sources.first()) {
        (true, Some(source)) => bitmap::to_copy(source, args.skip_broken_bitmaps)?,
        _ => Vec::new(),
    };
    let (target, fresh) = target(&session, &args, &wish, total).await?;
    if args.bitmaps && !target.node()?.driver().supports_bitmaps() {
        let format = target.node()?.driver_name();
        return Err(Failure::new(format!("Format driver '{format}' does not support bitmaps")));
    }
    let target_backing = match wish.options.get("backing-file") {
        Some(_) => target.io(|io| async move { Ok(status::backing(&io)?.map(|b| b.size())) }).await?,
        None => None,
    };
    let target_zero = match target_backing {
        // What is not copied shows through: it must not be zeroed before.
        Some(_) => TargetZero::No,
        None => zero_before(&args, fresh),
    };
    let options = CopyOptions { target_zero, target_backing, ..wish.copy };
    let options = match args.compress {
        true => compressed(&target, options)?,
        false => options,
    };
    let progress = Progress::begin(args.progress && !args.quiet.quiet);
    let result = transfer(&session, &sources, &target, options, wish.rate, &progress).await;
    progress.end(result.is_ok());
    let report = result?;
    for range in &report.unreadable {
        complain(&format!(
            "warning: error while reading offset {}: {} ({} bytes)",
            range.offset, range.errno, range.len
        ));
    }
    if report.unreadable_bytes > 0 {
        complain(&format!(
            "warning: {} bytes could not be read and are zeroes in the copy",
            report.unreadable_bytes
        ));
    }
    if let Some(source) = sources.first() {
        bitmap::copy(&session, source, &target, &bitmaps).await?;
    }
    target.close().await.map_err(|e| e.context("error while writing"))?;
    for source in sources {
        source.close().await?;
    }
    Ok(0)
}

/// What the target reads as before the copy.
fn zero_before(args: &ConvertArgs, fresh: bool) -> TargetZero {
    match args.target_is_zero || fresh {
        true => TargetZero::Yes,
        false => TargetZero::Try,
    }
}

fn check(args: &ConvertArgs, mut options: Options) -> Result<Wish, Failure> {
    let fail = |text: &str| Err(Failure::new(text));
    let Some((target, sources)) = args.filenames.split_last().filter(|(_, sources)| !sources.is_empty())
    else {
        return fail("Must specify image file name: SRC_FILENAME... TGT_FILENAME");
    };
    if args.target_image_opts && !args.no_create {
        return fail("--target-image-opts requires use of -n flag");
    }
    if args.target_image_opts && args.target_format.is_some() {
        return fail("-O and --target-image-opts are mutually exclusive");
    }
    if args.target_is_zero && !args.no_create {
        return fail("--target-is-zero requires use of -n flag");
    }
    if args.skip_broken_bitmaps && !args.bitmaps {
        return fail("Use of --skip-broken-bitmaps requires --bitmaps");
    }
    if args.copy_range && (args.compress || args.salvage) {
        return fail("Cannot use copy offloading when -c or --salvage is used");
    }
    if args.compress && options.get("preallocation").is_some_and(|mode| mode != "off") {
        return fail("Compression and preallocation not supported at the same time");
    }
    if args.no_create && args.backing.is_some() {
        return fail("-B cannot be combined with -n: the target is what it is");
    }
    if args.no_create && !options.is_empty() {
        complain("warning: -o has no effect when skipping image creation");
        options = Options::default();
    }
    if sources.len() > 1 && (args.bitmaps || args.snapshot.is_some() || args.backing.is_some()) {
        return fail("--bitmaps, -l and -B work on a single source");
    }
    if let Some(backing) = &args.backing {
        options.set("backing-file", backing);
    }
    if let Some(format) = &args.backing_format {
        options.set("backing-fmt", format);
    }
    let backed = options.get("backing-file").is_some();
    if backed && sources.len() > 1 {
        return fail(
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        );
    }
    if backed && options.get("backing-fmt").is_none() {
        return fail("Use of backing file requires explicit backing format: give -F FORMAT");
    }
    let min_sparse = match &args.sparse_size {
        None => SPARSE,
        Some(text) => match size::parse(text) {
            Some(n) if n <= MAX_SPARSE && n.is_multiple_of(512) => n,
            _ => {
                return Err(Failure::new(format!(
                    "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to \
                     {MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
                )));
            }
        },
    };
    let tasks = args.parallel.parse().ok().filter(|n| (1..=MAX_TASKS).contains(n));
    let Some(tasks) = tasks else {
        return Err(Failure::new(format!(
            "Invalid number of coroutines specified. Must be between 1 and {MAX_TASKS}."
        )));
    };
    let rate = match &args.rate {
        None => 0,
        Some(text) => {
            size::parse(text).ok_or_else(|| Failure::new(format!("Invalid rate limit '{text}'")))?
        }
    };
    let format = (!args.target_image_opts).then(|| args.target_format.as_deref().unwrap_or("raw"));
    let mut specs = Vec::with_capacity(sources.len());
    for source in sources {
        specs.push(Spec::new(source, args.source_format.as_deref(), args.image_opts)?);
    }
    Ok(Wish {
        sources: specs,
        target: Spec {
            name: target.clone(),
            format: format.map(str::to_owned),
            opts: args.target_image_opts,
            keys: if args.no_create { Vec::new() } else { options.keys() },
        },
        options,
        copy: CopyOptions {
            buffer: BUFFER,
            tasks,
            ordered: !args.out_of_order,
            min_sparse,
            salvage: args.salvage,
            flush: true,
            ..CopyOptions::default()
        },
        rate,
    })
}

/// The target, open for writing, and whether it is new and reads as zeroes.
async fn target(
    session: &Session,
    args: &ConvertArgs,
    wish: &Wish,
    total: u64,
) -> Result<(Image, bool), Failure> {
    let how = How::write().cache(&args.target_cache, "")?;
    let mut fresh = false;
    if !args.no_create {
        let name = &wish.target.name;
        let format = session.format(wish.target.format.as_deref().unwrap_or("raw"))?;
        let mut options = wish.options.clone();
        if options.get("size").is_none() {
            options.set("size", total.to_string());
        }
        let named = |e: Failure| e.context(name);
        create::below(session, name, &format, &mut options, false).await.map_err(named)?;
        layout::create(session, name, &format, &options, true).await?;
        fresh = format.is_zero_when_new(name, &options) && options.get("backing-file").is_none();
    }
    let image = session.open(&wish.target, how).await?;
    let size = image.size()?;
    if size < total && (!args.no_create || size < total / 512 * 512) {
        return Err(Failure::new("output file is smaller than input file"));
    }
    Ok((image, fresh))
}

/// Compressed clusters are written one by one, each as a whole.
fn compressed(target: &Image, options: CopyOptions) -> Result<CopyOptions, Failure> {
    let node = target.node()?;
    let cluster = node.driver().info().cluster_size.filter(|_| node.driver().supports_compressed());
    let Some(cluster) = cluster else {
        return Err(Failure::new("Compression not supported for this file format"));
    };
    Ok(CopyOptions { compressed: true, buffer: u64::from(cluster), ..options })
}

async fn transfer(
    session: &Session,
    sources: &[Image],
    target: &Image,
    options: CopyOptions,
    rate: u64,
    progress: &Progress,
) -> Result<CopyReport, Failure> {
    let control = Control::new();
    control.set_rate(rate);
    let shown = progress.clone();
    control.watch(Box::new(move |done, total| shown.set(done, total)));
    let names: Vec<&str> = sources.iter().map(Image::node_name).collect();
    // A few long requests: beside each other in the kernel they take less time than one after the other here. One thread, so
    // that a new image grows in the order of the disk.
    session.thread().post(|local| local.set_inline(false));
    let threads = [session.thread().clone()];
    let result = copy(session.graph(), &names, target.node_name(), &threads, &options, &control).await;
    Ok(result?)
}
