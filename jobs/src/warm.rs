//! `block-cache-warm`: reads what a dirty bitmap marks, through a node, so that caches on the way hold it. QEMU has nothing of
//! the sort.
//!
//! Started by the control channel. An ordinary user that reads: drains stop it, it can be paused, limited and cancelled. What
//! is read is thrown away. The bitmap stays as it is, and may go on recording.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use graph::{Bitmap, BlockError, BoxFut, Errno, Graph, Perm, Result, RootOptions, View};
use host::{IoThread, IoVecs, Local};

use crate::control::Control;
use crate::hold::Hold;
use crate::job::{Done, Job, JobOptions, JobType, Jobs, Site, Work};

/// Most bytes of one read.
const PIECE: u64 = 1 << 20;

/// What to warm, and how fast.
#[derive(Clone, Debug)]
pub struct WarmOptions {
    /// The node that is read.
    pub node: String,
    /// The node that has the bitmap.
    pub bitmap_node: String,
    /// The bitmap.
    pub bitmap: String,
    /// Bytes per second, 0 for no limit.
    pub speed: u64,
}

struct Warm {
    graph: Graph,
    node: String,
    bitmap: Arc<Bitmap>,
    thread: IoThread,
    hold: RefCell<Option<Hold>>,
}

impl Warm {
    async fn read(&self, at: &Site) -> Result<()> {
        let options = RootOptions {
            perm: Perm::CONSISTENT_READ,
            shared: Perm::ALL,
            ..RootOptions::new(format!("block job '{}'", at.id()), false)
        };
        let hold = Hold::attach(&self.graph, &self.node, options, at.control()).await?;
        *self.hold.borrow_mut() = Some(hold);
        at.control().set_total(self.bitmap.count());
        let mut position = Some(0);
        while let Some(from) = position {
            at.rest().await?;
            let active = at.control().enter().await?;
            let view = match self.hold.borrow().as_ref().map(Hold::view) {
                Some(view) => view?,
                None => return Err(Errno::ENODEV.into()),
            };
            let (bitmap, control) = (Arc::clone(&self.bitmap), Arc::clone(at.control()));
            let call = self.thread.call(move |local| some(view, local.clone(), bitmap, control, from));
            let result = call.await.map_err(|_| BlockError::new(Errno::ENODEV, "The iothread is gone"));
            drop(active);
            position = result??;
        }
        Ok(())
    }
}

/// Reads marked ranges from `from` on until somebody wants it to rest; where to go on, `None` at the end.
async fn some(
    view: Arc<View>,
    local: Local,
    bitmap: Arc<Bitmap>,
    control: Arc<Control>,
    mut from: u64,
) -> Result<Option<u64>> {
    let io = view.io(&local);
    drop(view);
    let buffer = IoVecs::alloc(PIECE as usize, 4096)?;
    while !control.stopping() {
        // The node may be shorter than the bitmap's.
        let Some((at, len)) = bitmap.next_dirty(from, io.size(), PIECE) else { return Ok(None) };
        let begun = local.now();
        io.read(at, &buffer.slice(0, len as usize)).await?;
        control.advance(len);
        from = at + len;
        if let Some(ns) = len.saturating_mul(1_000_000_000).checked_div(control.rate()) {
            control.changed_or(local.sleep_until(begun.saturating_add(ns))).await;
        }
    }
    Ok(Some(from))
}

impl Work for Warm {
    fn kind(&self) -> JobType {
        JobType::Warm
    }

    fn run<'a>(&'a self, at: &'a Site) -> BoxFut<'a, ()> {
        Box::pin(self.read(at))
    }

    fn clean(&self) -> Done<'_> {
        Box::pin(async move {
            let hold = self.hold.take();
            if let Some(hold) = hold {
                hold.detach().await;
            }
        })
    }
}

/// Starts reading.
///
/// # Errors
/// No such node or bitmap, a bitmap whose content is not known, or the id is bad or taken.
pub fn start(
    jobs: &Jobs,
    graph: &Graph,
    thread: IoThread,
    id: &str,
    options: WarmOptions,
) -> Result<Rc<Job>> {
    graph.node(&options.node)?;
    let found = graph.node(&options.bitmap_node)?.bitmaps().find(&options.bitmap);
    let name = &options.bitmap;
    let bitmap =
        found.ok_or_else(|| BlockError::new(Errno::ENOENT, format!("Dirty bitmap '{name}' not found")))?;
    if bitmap.inconsistent() {
        let text = format!("Bitmap '{name}' is inconsistent and cannot be used");
        return Err(BlockError::invalid(text));
    }
    let work = Warm { graph: graph.clone(), node: options.node, bitmap, thread, hold: RefCell::new(None) };
    jobs.start(JobOptions { speed: options.speed, ..JobOptions::new(id) }, Rc::new(work))
}
