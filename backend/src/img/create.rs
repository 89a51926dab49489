//! `ringblk img create`: a new image.
//!
//! Puts the options together; `layout` creates.

use super::cli::CreateArgs;
use super::failure::{Failure, Outcome};
use super::layout::{self, Given};
use super::output;
use super::session::Session;
use super::size;

/// Runs the command.
///
/// # Errors
/// A bad option, no size, what the drivers say.
pub async fn run(session: Session, args: CreateArgs) -> Outcome {
    let mut options = match layout::parse(&args.options)? {
        Given::Options(options) => options,
        Given::Help => {
            output::print(&session.format(&args.format)?.help(&session)?)?;
            return Ok(0);
        }
    };
    let Some(filename) = args.filename else {
        return Err(Failure::new("Expecting image file name"));
    };
    let named = |e: Failure| e.context(&filename);
    session.objects(&args.objects).await?;
    let format = session.format(&args.format).map_err(named)?;
    if let Some(text) = &args.size {
        let bytes = size::parse(text).filter(|v| *v <= i64::MAX as u64);
        let bytes = bytes.ok_or_else(|| Failure::new(format!("Invalid image size specified: '{text}'.")))?;
        if options.get("size").is_some() {
            return Err(named(Failure::new("The image size must be specified only once")));
        }
        options.set("size", bytes.to_string());
    }
    if let Some(backing) = args.backing {
        options.set("backing-file", backing);
    }
    if let Some(format) = args.backing_format {
        options.set("backing-fmt", format);
    }
    below(&session, &filename, &format, &mut options, args.backing_unsafe).await.map_err(named)?;
    if options.get("size").is_none() {
        return Err(named(Failure::new("Image creation needs a size parameter")));
    }
    layout::create(&session, &filename, &format, &options, args.quiet.quiet).await?;
    Ok(0)
}

/// Checks what is said about the image below the new one, and takes the size from it if none was given.
///
/// # Errors
/// It has no format, is the new image itself, or cannot be opened.
pub async fn below(
    session: &Session,
    filename: &str,
    format: &layout::Format,
    options: &mut layout::Options,
    unchecked: bool,
) -> Result<(), Failure> {
    let Some(backing) = options.get("backing-file").map(str::to_owned) else {
        if options.get("backing-fmt").is_some() && !format.has_backing() {
            return Err(Failure::new(format!(
                "Backing format not supported for file format '{}'",
                format.name()
            )));
        }
        return Ok(());
    };
    if !format.has_backing() {
        return Err(Failure::new(format!("Backing file not supported for file format '{}'", format.name())));
    }
    let image = filename.strip_prefix("file:").unwrap_or(filename);
    let below = super::info::full_name(filename, &backing);
    if backing == filename || layout::same_file(image, below.strip_prefix("file:").unwrap_or(&below)) {
        return Err(Failure::new(
            "Error: Trying to create an image with the same filename as the backing file",
        ));
    }
    let Some(backing_format) = options.get("backing-fmt").map(str::to_owned) else {
        return Err(Failure::new("Backing file specified without backing format: give -F FORMAT"));
    };
    if session.graph().registry().get(&backing_format).is_none() {
        return Err(Failure::new(format!("Unknown backing file format '{backing_format}'")));
    }
    if !unchecked {
        let size = layout::backing_size(session, filename, &backing, &backing_format).await?;
        if options.get("size").is_none() {
            options.set("size", size.to_string());
        }
    }
    Ok(())
}
