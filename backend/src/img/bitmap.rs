//! `ringblk img bitmap`: the persistent dirty bitmaps of an image; and copying them for `convert`.
//!
//! Works on the graph's bitmaps, which the driver loads when it opens an image and stores when it closes it.

use std::fmt::Write as _;

use clap::ArgMatches;
use clap::parser::ValueSource;
use graph::{BitmapRef, NewBitmap, Purpose};

use super::cli::BitmapArgs;
use super::failure::{Failure, Outcome};
use super::image::{How, Image, Spec};
use super::output::print;
use super::session::Session;
use super::{complain, size};

/// One action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// `--add`
    Add,
    /// `--remove`
    Remove,
    /// `--clear`
    Clear,
    /// `--enable`
    Enable,
    /// `--disable`
    Disable,
    /// `--merge`
    Merge(String),
    /// `--list`
    List,
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Action::Add => "add",
            Action::Remove => "remove",
            Action::Clear => "clear",
            Action::Enable => "enable",
            Action::Disable => "disable",
            Action::Merge(_) => "merge",
            Action::List => "list",
        }
    }
}

/// The actions in the order they were given.
pub fn in_order(matches: &ArgMatches) -> Vec<Action> {
    let mut found = Vec::new();
    let flags = [Action::Add, Action::Remove, Action::Clear, Action::Enable, Action::Disable, Action::List];
    for flag in flags {
        let id = flag.name();
        // A flag that was not given has an index as well.
        let given = matches.try_contains_id(id).unwrap_or(false)
            && matches.value_source(id) == Some(ValueSource::CommandLine);
        if given && let Some(at) = matches.index_of(id) {
            found.push((at, flag));
        }
    }
    if let Ok(Some(names)) = matches.try_get_many::<String>("merge") {
        let at = matches.indices_of("merge").into_iter().flatten();
        found.extend(at.zip(names).map(|(at, name)| (at, Action::Merge(name.clone()))));
    }
    found.sort_by_key(|(at, _)| *at);
    found.into_iter().map(|(_, action)| action).collect()
}

/// Runs the command.
///
/// # Errors
/// Arguments that make no sense together, an image that cannot be opened, what the graph says.
pub async fn run(session: Session, args: BitmapArgs, actions: Vec<Action>) -> Outcome {
    let fail = |text: &str| Err(Failure::new(text));
    if actions.is_empty() {
        return fail(
            "Need at least one of --add, --remove, --clear, --enable, --disable, --list, or --merge",
        );
    }
    let lists = actions.contains(&Action::List);
    if lists && actions.len() > 1 {
        return fail("--list stands alone");
    }
    let granularity = match &args.granularity {
        None => None,
        Some(_) if !actions.contains(&Action::Add) => return fail("granularity only supported with --add"),
        Some(text) => {
            let bytes = size::parse(text).and_then(|n| u32::try_from(n).ok());
            Some(bytes.ok_or_else(|| Failure::new(format!("Invalid granularity '{text}'")))?)
        }
    };
    if args.source_file.is_some() && !actions.iter().any(|a| matches!(a, Action::Merge(_))) {
        return fail("Merge bitmap source file only supported with --merge");
    }
    if args.source_format.is_some() && args.source_file.is_none() {
        return fail("-F only supported with -b");
    }
    let name = match (lists, args.bitmap) {
        (true, None) => String::new(),
        (false, Some(name)) => name,
        (true, Some(_)) => return fail("--list takes no bitmap name"),
        (false, None) => return fail("Expecting filename and bitmap name"),
    };
    session.objects(&args.source.objects).await?;
    let spec = Spec::new(&args.filename, args.source.format.as_deref(), args.source.image_opts)?;
    if lists {
        let image = session.open(&spec, How { purpose: Purpose::Inspect, ..How::inspect(false) }).await?;
        print(&list(&image)?)?;
        image.close().await?;
        return Ok(0);
    }
    // What lies below has no say in the bitmaps of this image.
    let image = session.open(&spec, How { alone: true, ..How::write() }).await?;
    let source = match &args.source_file {
        Some(file) => {
            let spec = Spec::new(file, args.source_format.as_deref(), false)?;
            Some(session.open(&spec, How { alone: true, ..How::read(false) }).await?)
        }
        None => None,
    };
    let mut result = Ok(());
    for action in &actions {
        let done = apply(&session, &image, source.as_ref(), &name, action, granularity).await;
        result = done.map_err(|e| e.context(format!("Operation {} on bitmap {name} failed", action.name())));
        if result.is_err() {
            break;
        }
    }
    if let Some(source) = source {
        source.close().await?;
    }
    // What was done before a failure stays, as with separate calls.
    image.close().await?;
    result.map(|()| 0)
}

async fn apply(
    session: &Session,
    image: &Image,
    source: Option<&Image>,
    name: &str,
    action: &Action,
    granularity: Option<u32>,
) -> Result<(), Failure> {
    let (graph, node) = (session.graph(), image.node_name());
    match action {
        Action::Add => {
            let new = NewBitmap { name: name.to_owned(), granularity, persistent: true, disabled: false };
            graph.bitmap_add(node, new).await?;
        }
        Action::Remove => graph.bitmap_remove(node, name).await?,
        Action::Clear => graph.bitmap_clear(node, name).await?,
        Action::Enable => graph.bitmap_set_recording(node, name, true).await?,
        Action::Disable => graph.bitmap_set_recording(node, name, false).await?,
        Action::Merge(from) => {
            let from =
                BitmapRef { node: Some(source.unwrap_or(image).node_name().to_owned()), name: from.clone() };
            graph.bitmap_merge(node, name, &[from]).await?;
        }
        Action::List => {}
    }
    Ok(())
}

fn list(image: &Image) -> Result<String, Failure> {
    let mut out = format!("{:<32} {:>11} {:>16}  {}\n", "NAME", "GRANULARITY", "DIRTY", "FLAGS");
    for bitmap in image.node()?.bitmaps().list() {
        let dirty = if bitmap.inconsistent() { "-".to_owned() } else { size::human(bitmap.count()) };
        let flags = [(bitmap.inconsistent(), "in-use"), (bitmap.recording(), "auto")];
        let flags: Vec<_> = flags.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
        // Writing into a string cannot fail.
        let _ = writeln!(
            out,
            "{:<32} {:>11} {dirty:>16}  {}",
            bitmap.name(),
            bitmap.granularity(),
            flags.join(",")
        );
    }
    Ok(out)
}

/// The persistent bitmaps of an image that `convert --bitmaps` copies, by name.
///
/// # Errors
/// The image's format has none, or one of them is inconsistent and may not be left out.
pub fn to_copy(source: &Image, skip_broken: bool) -> Result<Vec<String>, Failure> {
    let node = source.node()?;
    let mut names = Vec::new();
    for bitmap in node.bitmaps().list().into_iter().filter(|b| b.persistent()) {
        let name = bitmap.name();
        if !bitmap.inconsistent() {
            names.push(name.to_owned());
        } else if skip_broken {
            complain(&format!("warning: Skipping inconsistent bitmap '{name}'"));
        } else {
            return Err(Failure::new(format!(
                "Cannot copy inconsistent bitmap '{name}': try --skip-broken-bitmaps, or use 'ringblk img bitmap \
                 --remove'"
            )));
        }
    }
    if names.is_empty() && node.driver().make_bitmap_persistent_ok("bitmap", 65536).is_err() {
        return Err(Failure::new("Source lacks bitmap support"));
    }
    Ok(names)
}

/// Copies bitmaps; whether they record is copied too.
///
/// # Errors
/// The target cannot hold one of them.
pub async fn copy(
    session: &Session,
    source: &Image,
    target: &Image,
    names: &[String],
) -> Result<(), Failure> {
    let graph = session.graph();
    for name in names {
        let failed = |e: Failure| e.context(format!("Failed to create bitmap {name}"));
        let Some(bitmap) = source.node()?.bitmaps().find(name) else { continue };
        let new = NewBitmap {
            name: name.clone(),
            granularity: Some(bitmap.granularity()),
            persistent: true,
            // Enabled after the merge: the copy is no change of the disk.
            disabled: true,
        };
        graph.bitmap_add(target.node_name(), new).await.map_err(|e| failed(e.into()))?;
        let from = BitmapRef { node: Some(source.node_name().to_owned()), name: name.clone() };
        graph.bitmap_merge(target.node_name(), name, &[from]).await.map_err(|e| failed(e.into()))?;
        if bitmap.recording() {
            graph.bitmap_set_recording(target.node_name(), name, true).await.map_err(|e| failed(e.into()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
