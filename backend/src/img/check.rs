//! `ringblk img check`: looks for leaks and corruption in an image and repairs them if asked to.
//!
//! The driver does the work; this reports it in qemu-img's words and exit status. A repair is followed by a second look.

use std::fmt::Write as _;
use std::io::Write as _;

use graph::{CheckFix, CheckReport, Errno, Purpose};
use serde_json::{Map, Value, json};

use super::cli::{CheckArgs, Output, Repair};
use super::failure::{FAILED, Failure, Outcome};
use super::image::{How, Image, Spec};
use super::output;
use super::session::Session;

/// Status: the image is damaged.
const CORRUPT: u8 = 2;
/// Status: space is lost, nothing else.
const LEAKS: u8 = 3;
/// Status: images of this format cannot be checked.
const UNSUPPORTED: u8 = 63;

/// Runs the command.
///
/// # Errors
/// The image cannot be opened or checked.
pub async fn run(session: Session, args: CheckArgs) -> Outcome {
    let fix = match args.repair {
        None => CheckFix::NONE,
        Some(Repair::Leaks) => CheckFix { leaks: true, errors: false },
        Some(Repair::All) => CheckFix { leaks: true, errors: true },
    };
    let repairs = fix != CheckFix::NONE;
    let how = How {
        writable: repairs,
        force_share: args.share.force_share,
        // What lies below is no matter of this image.
        alone: true,
        purpose: Purpose::Check,
        ..How::default()
    };
    let how = how.cache(&args.cache, "")?;
    session.objects(&args.source.objects).await?;
    let spec = Spec::new(&args.filename, args.source.format.as_deref(), args.source.image_opts)?;
    let image = session.open(&spec, how).await?;
    let format = image.node()?.driver_name();
    let mut report = check(&image, fix).await?;
    tell(&args, &report);
    let (leaks_fixed, corruptions_fixed) = (report.leaks_fixed, report.corruptions_fixed);
    if repairs && (leaks_fixed > 0 || corruptions_fixed > 0) {
        if args.output == Output::Human && !args.quiet.quiet {
            output::print(&format!(
                "The following inconsistencies were found and repaired:\n\n    {leaks_fixed} leaked clusters\n    \
                 {corruptions_fixed} corruptions\n\nDouble checking the fixed image now...\n"
            ))?;
        }
        report = check(&image, CheckFix::NONE).await?;
        tell(&args, &report);
        report.leaks_fixed = leaks_fixed;
        report.corruptions_fixed = corruptions_fixed;
    }
    if !args.quiet.quiet || args.output == Output::Json {
        output::print(&match args.output {
            Output::Human => human(&report),
            Output::Json => output::json(&members(&report, &args.filename, format)),
        })?;
    }
    image.close().await?;
    Ok(status(&report))
}

async fn check(image: &Image, fix: CheckFix) -> Result<CheckReport, Failure> {
    let done = image.io(move |io| async move {
        let driver = io.node()?.driver();
        match driver.check(&io, fix).await {
            Ok(report) => Ok(Some(report)),
            Err(e) if e.errno() == Errno::ENOTSUP => Ok(None),
            Err(e) => Err(e),
        }
    });
    let done = done.await?;
    done.ok_or_else(|| Failure::new("This image format does not support checks").with_status(UNSUPPORTED))
}

/// What was found, line by line on stderr: results alone go to stdout.
fn tell(args: &CheckArgs, report: &CheckReport) {
    if args.quiet.quiet {
        return;
    }
    let mut err = std::io::stderr().lock();
    for line in &report.messages {
        // Nothing to be done when nobody can read it.
        let _ = writeln!(err, "{line}");
    }
}

fn status(report: &CheckReport) -> u8 {
    match report {
        CheckReport { corruptions: 1.., .. } => CORRUPT,
        CheckReport { leaks: 1.., .. } => LEAKS,
        CheckReport { check_errors: 1.., .. } => FAILED,
        _ => 0,
    }
}

fn human(report: &CheckReport) -> String {
    let mut out = String::new();
    let r = report;
    // Writing into a string cannot fail.
    if r.corruptions == 0 && r.leaks == 0 && r.check_errors == 0 {
        out.push_str("No errors were found on the image.\n");
    } else {
        if r.corruptions > 0 {
            let _ = write!(
                out,
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt \
                 it.\n",
                r.corruptions
            );
        }
        if r.leaks > 0 {
            let _ = write!(
                out,
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
                r.leaks
            );
        }
        if r.check_errors > 0 {
            let _ = write!(out, "\n{} internal errors have occurred during the check.\n", r.check_errors);
        }
    }
    if r.total_clusters != 0 && r.allocated_clusters != 0 {
        let share = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        let _ = writeln!(
            out,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            r.allocated_clusters,
            r.total_clusters,
            share(r.allocated_clusters, r.total_clusters),
            share(r.fragmented_clusters, r.allocated_clusters),
            share(r.compressed_clusters, r.allocated_clusters)
        );
    }
    if r.image_end_offset > 0 {
        let _ = writeln!(out, "Image end offset: {}", r.image_end_offset);
    }
    out
}

fn members(report: &CheckReport, filename: &str, format: &str) -> Value {
    let mut all = Map::new();
    all.insert("filename".to_owned(), json!(filename));
    all.insert("format".to_owned(), json!(format));
    all.insert("check-errors".to_owned(), json!(report.check_errors));
    let optional = [
        ("image-end-offset", report.image_end_offset),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    let present = optional.into_iter().filter(|(_, value)| *value != 0);
    all.extend(present.map(|(name, value)| (name.to_owned(), json!(value))));
    Value::Object(all)
}
