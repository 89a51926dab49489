//! `ringblk img map`: where the data of an image lies.
//!
//! Asks `status` for one range after the other and puts equal neighbours together. Must not read data.

use std::fmt::Write as _;

use graph::NodeIo;

use super::cli::{MapArgs, Output};
use super::failure::{Failure, Outcome};
use super::image::{How, Spec};
use super::output::print;
use super::session::Session;
use super::size;
use super::status::{self, Place};

/// Longest range that is asked for at once: an answer for all of it is put together anyway.
const STEP: u64 = 1 << 30;

/// Entries handed over at a time, so that a fragmented image does not fill the memory with text.
const BATCH: usize = 4096;

/// A range with one answer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    start: u64,
    status: status::Status,
}

impl Entry {
    /// Whether `next` continues this one.
    fn continues(&self, next: &Entry) -> bool {
        let (a, b) = (&self.status, &next.status);
        let same = (a.data, a.zero, a.present, a.compressed, a.depth)
            == (b.data, b.zero, b.present, b.compressed, b.depth);
        let place = match (&a.place, &b.place) {
            (None, None) => true,
            (Some(a_at), Some(b_at)) => {
                a_at.file == b_at.file && a_at.offset.checked_add(a.len) == Some(b_at.offset)
            }
            _ => false,
        };
        same && place
    }
}

/// Runs the command.
///
/// # Errors
/// The image cannot be opened or read.
pub async fn run(session: Session, args: MapArgs) -> Outcome {
    let start = number("--start-offset", args.start_offset.as_deref())?.unwrap_or(0);
    let length = number("--max-length", args.max_length.as_deref())?.unwrap_or(u64::MAX);
    session.objects(&args.source.objects).await?;
    let spec = Spec::new(&args.filename, args.source.format.as_deref(), args.source.image_opts)?;
    let image = session.open(&spec, How::read(args.share.force_share)).await?;
    let end = start.saturating_add(length).min(image.size()?);
    let mut printer = Printer { output: args.output, first: true };
    print(printer.head())?;
    let mut at = start;
    let mut held: Option<Entry> = None;
    while at < end {
        let entries = image.io(move |io| async move { batch(&io, at, end).await }).await?;
        let mut text = String::new();
        for entry in entries {
            at = entry.start + entry.status.len;
            match &mut held {
                Some(last) if last.continues(&entry) => last.status.len += entry.status.len,
                last => {
                    if let Some(done) = last.replace(entry) {
                        printer.entry(&mut text, &done)?;
                    }
                }
            }
        }
        print(&text)?;
    }
    let mut text = String::new();
    if let Some(last) = held {
        printer.entry(&mut text, &last)?;
    }
    text.push_str(printer.tail());
    print(&text)?;
    image.close().await?;
    Ok(0)
}

fn number(option: &str, text: Option<&str>) -> Result<Option<u64>, Failure> {
    let Some(text) = text else { return Ok(None) };
    let value = size::parse(text).filter(|v| *v <= i64::MAX as u64);
    value
        .map(Some)
        .ok_or_else(|| Failure::new(format!("Invalid value '{text}' for {option}: a size is expected")))
}

async fn batch(io: &NodeIo, start: u64, end: u64) -> graph::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut at = start;
    while at < end && entries.len() < BATCH {
        let status = status::of_chain(io, at, (end - at).min(STEP)).await?;
        let entry = Entry { start: at, status };
        at += entry.status.len;
        match entries.last_mut() {
            Some(last) if Entry::continues(last, &entry) => last.status.len += entry.status.len,
            _ => entries.push(entry),
        }
    }
    Ok(entries)
}

struct Printer {
    output: Output,
    first: bool,
}

impl Printer {
    fn head(&self) -> &'static str {
        match self.output {
            Output::Human => "Offset          Length          Mapped to       File\n",
            Output::Json => "[",
        }
    }

    fn tail(&self) -> &'static str {
        match self.output {
            Output::Human => "",
            Output::Json => "]\n",
        }
    }

    fn entry(&mut self, out: &mut String, entry: &Entry) -> Result<(), Failure> {
        let status = &entry.status;
        match (self.output, &status.place) {
            (Output::Human, Some(Place { file, offset })) if status.data && !status.zero => {
                let (start, len) = (hex(entry.start), hex(status.len));
                // Writing into a string cannot fail.
                let _ = writeln!(out, "{start:<16}{len:<16}{:<16}{file}", hex(*offset));
            }
            (Output::Human, None) if status.data && !status.zero => {
                return Err(Failure::new(
                    "File contains external, encrypted or compressed clusters: use --output=json",
                ));
            }
            (Output::Human, _) => {}
            (Output::Json, place) => {
                let comma = if std::mem::take(&mut self.first) { "" } else { ",\n" };
                let _ = write!(
                    out,
                    "{comma}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
                     \"data\": {}, \"compressed\": {}",
                    entry.start,
                    status.len,
                    status.depth,
                    status.present,
                    status.zero,
                    status.data,
                    status.compressed
                );
                if let Some(place) = place {
                    let _ = write!(out, ", \"offset\": {}", place.offset);
                }
                out.push('}');
            }
        }
        Ok(())
    }
}

/// As C's `%#x`: nothing stands before a zero.
fn hex(n: u64) -> String {
    if n == 0 { "0".to_owned() } else { format!("{n:#x}") }
}
