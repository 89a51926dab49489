//! `ringblk img resize`: another size for an image.
//!
//! The same steps as `block_resize`, with a preallocation mode. Nothing is cut off without `--shrink`.

use std::sync::Arc;

use graph::{BlockdevRef, CreateContext, JobControl, Perm, PermPair, Prealloc, Truncate};

use super::cli::ResizeArgs;
use super::failure::{Failure, Outcome};
use super::image::{How, Spec};
use super::output::print;
use super::session::Session;
use super::size;

/// What the user wants: a size, or a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Size(u64),
    Grow(u64),
    Shrink(u64),
}

impl Wanted {
    fn parse(text: &str) -> Result<Wanted, Failure> {
        let (make, digits): (fn(u64) -> Wanted, &str) = match (text.strip_prefix('+'), text.strip_prefix('-'))
        {
            (Some(rest), _) => (Wanted::Grow, rest),
            (_, Some(rest)) => (Wanted::Shrink, rest),
            _ => (Wanted::Size, text),
        };
        let value = size::parse(digits).filter(|v| *v <= i64::MAX as u64);
        value.map(make).ok_or_else(|| {
            Failure::new(format!(
                "'{text}' is no size: a number below 2^63, optionally with a suffix k, M, G, T, P or E"
            ))
        })
    }

    fn apply(self, now: u64) -> Option<u64> {
        let size = match self {
            Wanted::Size(size) => Some(size),
            Wanted::Grow(by) => now.checked_add(by),
            Wanted::Shrink(by) => now.checked_sub(by),
        };
        size.filter(|s| (1..=i64::MAX as u64).contains(s))
    }
}

/// Runs the command.
///
/// # Errors
/// A bad size, a size below the image's without `--shrink`, what the driver says.
pub async fn run(session: Session, args: ResizeArgs) -> Outcome {
    let wanted = Wanted::parse(&args.size)?;
    let prealloc = match &args.preallocation {
        Some(mode) => serde_json::from_value::<Prealloc>(mode.as_str().into())
            .map_err(|_| Failure::new(format!("Invalid preallocation mode '{mode}'")))?,
        None => Prealloc::Off,
    };
    session.objects(&args.source.objects).await?;
    let spec = Spec::new(&args.filename, args.source.format.as_deref(), args.source.image_opts)?;
    let image = session.open(&spec, How::write()).await?;
    let now = image.size()?;
    let size = wanted.apply(now).ok_or_else(|| Failure::new("New image size must be positive"))?;
    if size <= now && prealloc != Prealloc::Off {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if size < now && !args.shrink {
        return Err(Failure::new(format!(
            "Use the --shrink option to make the image smaller: all data beyond {size} bytes is deleted"
        )));
    }
    let mut context = CreateContext::new(session.graph().clone(), Arc::new(JobControl::default()));
    let hold = PermPair { perm: Perm::WRITE | Perm::RESIZE, shared: Perm::ALL };
    let index = context.open(BlockdevRef::Reference(image.node_name().to_owned()), hold).await?;
    let how = Truncate { exact: true, prealloc, zero: true };
    let result = context.truncate(index, size, how).await;
    context.close().await;
    result?;
    let got = image.size()?;
    image.close().await?;
    if got != size && spec.format.as_deref() != Some("raw") {
        // A raw file of an odd size is seen in whole sectors.
        log::warn!("the image has {got} bytes now: its format cannot have {size}");
    }
    if !args.quiet.quiet {
        print("Image resized.\n")?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests;
