//! `ringblk img compare`: whether two images show the same.
//!
//! Both are read on the iothread, several ranges at a time; what is known to be zero on both sides is not read. The result
//! comes in the order of offsets. Exit status: 0 same, 1 different, 2 or more failed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use graph::{NodeIo, View};
use host::sync::oneshot::channel;
use host::{IoVecs, Local};

use super::cli::CompareArgs;
use super::failure::{Failure, Outcome};
use super::image::{How, Image, Spec};
use super::output::print;
use super::progress::Progress;
use super::session::Session;
use super::status;

/// Bytes of one request.
const CHUNK: u64 = 1 << 20;
/// Chunks on their way at a time.
const WINDOW: usize = 8;
/// Differences are told by the sector.
const SECTOR: u64 = 512;
/// Piece in which memory is compared.
const PIECE: usize = 32 << 10;

/// Status: something went wrong.
const TROUBLE: u8 = 2;
/// Status: an image cannot be read.
const UNREADABLE: u8 = 4;

/// What the comparison of a range came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Same,
    /// From this sector on.
    Content(u64),
    /// Strict mode: one has an opinion of its own about this place, the other has not.
    Status(u64),
}

/// Runs the command.
///
/// # Errors
/// An image cannot be opened or read.
pub async fn run(session: Session, args: CompareArgs) -> Outcome {
    let trouble = |e: Failure| e.with_status(TROUBLE);
    let how = How::read(args.share.force_share).cache(&args.cache, "source ").map_err(trouble)?;
    session.objects(&args.objects).await.map_err(trouble)?;
    let spec = |name: &str, format: Option<&str>| Spec::new(name, format, args.image_opts).map_err(trouble);
    let (first, second) =
        (spec(&args.filename1, args.format1.as_deref())?, spec(&args.filename2, args.format2.as_deref())?);
    let a = session.open(&first, how).await.map_err(trouble)?;
    let b = session.open(&second, how).await.map_err(trouble)?;
    let say = |text: &str| if args.quiet.quiet { Ok(()) } else { print(text) };
    let (size_a, size_b) = (a.size()?, b.size()?);
    let common = size_a.min(size_b);
    if size_a != size_b && args.strict {
        say("Strict mode: Image size mismatch!\n")?;
        return Ok(1);
    }
    let progress = Progress::begin(args.progress && !args.quiet.quiet);
    let total = size_a.max(size_b);
    let mut verdict = compare(&session, &a, Some(&b), 0..common, args.strict, (&progress, total)).await;
    if let Ok(Verdict::Same) = verdict
        && size_a != size_b
    {
        say("Warning: Image size mismatch!\n")?;
        // What the longer one has more must be zero.
        let longer = if size_a > size_b { &a } else { &b };
        verdict = compare(&session, longer, None, common..total, false, (&progress, total)).await;
    }
    let verdict = verdict.inspect_err(|_| progress.end(false)).map_err(|e| e.with_status(UNREADABLE))?;
    let code = match verdict {
        Verdict::Same => {
            say("Images are identical.\n")?;
            0
        }
        Verdict::Content(at) => {
            say(&format!("Content mismatch at offset {at}!\n"))?;
            1
        }
        Verdict::Status(at) => {
            say(&format!("Strict mode: Offset {at} block status mismatch!\n"))?;
            1
        }
    };
    progress.end(true);
    a.close().await?;
    b.close().await?;
    Ok(code)
}

/// Compares a range of two images, or of one with zeroes.
async fn compare(
    session: &Session,
    a: &Image,
    b: Option<&Image>,
    range: std::ops::Range<u64>,
    strict: bool,
    (progress, total): (&Progress, u64),
) -> Result<Verdict, Failure> {
    let a = a.view()?;
    let b = b.map(Image::view).transpose()?;
    let progress = progress.clone();
    let call = session.thread().call(move |local| {
        let sides =
            Sides { a: a.io(&local), b: b.map(|b: Arc<View>| b.io(&local)), spare: RefCell::default() };
        on_thread(local, Rc::new(sides), range, strict, progress, total)
    });
    Ok(call.await.map_err(|e| Failure::new(e.to_string()))??)
}

struct Sides {
    a: NodeIo,
    /// None: zeroes.
    b: Option<NodeIo>,
    /// Buffers of `CHUNK` bytes that are not in use: fresh memory costs more than reading into it.
    spare: RefCell<Vec<IoVecs>>,
}

impl Sides {
    /// Reads a range, at most a chunk.
    async fn read(&self, io: &NodeIo, at: u64, len: usize) -> graph::Result<IoVecs> {
        let spare = self.spare.borrow_mut().pop();
        let buffer = match spare {
            Some(buffer) => buffer,
            None => IoVecs::alloc(CHUNK as usize, 4096)?,
        };
        io.read(at, &buffer.slice(0, len)).await?;
        Ok(buffer)
    }

    fn give_back(&self, buffer: IoVecs) {
        self.spare.borrow_mut().push(buffer);
    }
}

async fn on_thread(
    local: Local,
    sides: Rc<Sides>,
    range: std::ops::Range<u64>,
    strict: bool,
    progress: Progress,
    total: u64,
) -> graph::Result<Verdict> {
    let mut running = VecDeque::new();
    let mut at = range.start;
    loop {
        while running.len() < WINDOW && at < range.end {
            let step = plan(&sides, at, range.end - at, strict).await?;
            let from = at;
            at += step.len;
            let (tell, result) = channel();
            let (sides, end) = (Rc::clone(&sides), at);
            local.spawn(async move {
                let verdict = work(&sides, from, step).await;
                // Nobody waits any more once a difference was found.
                let _ = tell.send((verdict, end));
            });
            running.push_back(result);
        }
        let Some(next) = running.pop_front() else { return Ok(Verdict::Same) };
        let gone = || graph::BlockError::new(graph::Errno::EIO, "the work was dropped");
        let (verdict, end) = next.await.map_err(|_| gone())?;
        match verdict? {
            Verdict::Same => progress.set(end, total),
            other => return Ok(other),
        }
    }
}

/// What has to be done about a range.
#[derive(Clone, Copy)]
struct Step {
    len: u64,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    /// Nothing.
    Skip,
    /// Both are read.
    Both,
    /// This one must be zero.
    Zero { first: bool },
    /// Strict mode: they differ without a look at the data.
    Status,
}

async fn plan(sides: &Sides, at: u64, len: u64, strict: bool) -> graph::Result<Step> {
    // A long hole is one step.
    let a = status::of_chain(&sides.a, at, len.min(1 << 30)).await?;
    let Some(b) = &sides.b else {
        let kind = if a.zero { Kind::Skip } else { Kind::Zero { first: true } };
        let len = if a.zero { a.len } else { a.len.min(CHUNK) };
        return Ok(Step { len, kind });
    };
    let b = status::of_chain(b, at, a.len).await?;
    let len = a.len.min(b.len);
    let kind = match (a.zero, b.zero) {
        // Where space was set aside holes are no matter.
        _ if strict && (a.data, a.zero && !a.data, a.present) != (b.data, b.zero && !b.data, b.present) => {
            Kind::Status
        }
        (true, true) => Kind::Skip,
        (false, false) => Kind::Both,
        (a_zero, _) => Kind::Zero { first: !a_zero },
    };
    let len = if matches!(kind, Kind::Skip) { len } else { len.min(CHUNK) };
    Ok(Step { len, kind })
}

async fn work(sides: &Sides, at: u64, step: Step) -> graph::Result<Verdict> {
    let len = step.len as usize;
    let other = sides.b.as_ref().unwrap_or(&sides.a);
    let found = match step.kind {
        Kind::Skip => None,
        Kind::Status => return Ok(Verdict::Status(at)),
        Kind::Zero { first } => {
            let buffer = sides.read(if first { &sides.a } else { other }, at, len).await?;
            let part = buffer.slice(0, len);
            let zero = part.is_zero();
            let found = if zero { None } else { first_difference(&part, &IoVecs::alloc(len, 1)?) };
            sides.give_back(buffer);
            found
        }
        Kind::Both => {
            let (a, b) = (sides.read(&sides.a, at, len).await?, sides.read(other, at, len).await?);
            let found = first_difference(&a.slice(0, len), &b.slice(0, len));
            sides.give_back(a);
            sides.give_back(b);
            found
        }
    };
    Ok(found.map_or(Verdict::Same, |n| Verdict::Content((at + n) / SECTOR * SECTOR)))
}

/// Where two buffers of equal length differ first.
fn first_difference(a: &IoVecs, b: &IoVecs) -> Option<u64> {
    let mut left = [0u8; PIECE];
    let mut right = [0u8; PIECE];
    let mut at = 0;
    while at < a.len() {
        let n = PIECE.min(a.len() - at);
        let (left, right) = (left.get_mut(..n)?, right.get_mut(..n)?);
        a.copy_to(at, left);
        b.copy_to(at, right);
        if left != right {
            let inner = left.iter().zip(right.iter()).position(|(l, r)| l != r)?;
            return Some((at + inner) as u64);
        }
        at += n;
    }
    None
}

#[cfg(test)]
mod tests;
