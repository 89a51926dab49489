//! Actions on dirty bitmaps: what the `block-dirty-bitmap-*` commands do, with a way back.
//!
//! See `Action` for who calls what when. Users are stopped, so that all bitmaps of a transaction change between the same two
//! requests.

use super::{Action, ActionContext};
use crate::bitmap::Bitmap;
use crate::control::Graph;
use crate::control::bitmaps::{BitmapRef, NewBitmap};
use crate::driver::BoxFut;
use crate::error::Result;

/// `block-dirty-bitmap-add`.
#[derive(Debug)]
pub struct BitmapAddAction {
    node: String,
    new: NewBitmap,
    made: bool,
}

impl BitmapAddAction {
    /// On this node.
    pub fn new(node: String, new: NewBitmap) -> Self {
        BitmapAddAction { node, new, made: false }
    }
}

impl Action for BitmapAddAction {
    fn nodes(&self, _graph: &Graph) -> Vec<String> {
        vec![self.node.clone()]
    }

    fn prepare<'a>(&'a mut self, cx: &'a mut ActionContext) -> BoxFut<'a, ()> {
        Box::pin(async move {
            cx.graph().bitmap_add(&self.node, self.new.clone()).await?;
            self.made = true;
            Ok(())
        })
    }

    fn abort<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            // It is not in the image yet: a persistent one is stored when its node is closed.
            if self.made {
                graph.bitmap_forget(&self.node, &self.new.name)?;
            }
            Ok(())
        })
    }
}

/// What a bitmap marked, to be put back.
struct Marks(Vec<u8>);

impl std::fmt::Debug for Marks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Marks({} bytes)", self.0.len())
    }
}

impl Marks {
    fn of(cx: &mut ActionContext, bitmap: &Bitmap) -> Result<Marks> {
        if bitmap.count() == 0 {
            return Ok(Marks(Vec::new()));
        }
        cx.keep(bitmap.serialised_len())?;
        let mut bytes = vec![0; usize::try_from(bitmap.serialised_len()).unwrap_or(usize::MAX)];
        bitmap.serialise(0, &mut bytes)?;
        Ok(Marks(bytes))
    }

    fn restore(&self, bitmap: &Bitmap) -> Result<()> {
        bitmap.clear_all();
        if self.0.is_empty() { Ok(()) } else { bitmap.deserialise(0, &self.0) }
    }
}

/// `block-dirty-bitmap-clear`.
#[derive(Debug)]
pub struct BitmapClearAction {
    node: String,
    name: String,
    before: Option<Marks>,
}

impl BitmapClearAction {
    /// On this node.
    pub fn new(node: String, name: String) -> Self {
        BitmapClearAction { node, name, before: None }
    }
}

impl Action for BitmapClearAction {
    fn nodes(&self, _graph: &Graph) -> Vec<String> {
        vec![self.node.clone()]
    }

    fn prepare<'a>(&'a mut self, cx: &'a mut ActionContext) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let (_, bitmap) = cx.graph().bitmap(&self.node, &self.name)?;
            let before = Marks::of(cx, &bitmap)?;
            cx.graph().bitmap_clear(&self.node, &self.name).await?;
            self.before = Some(before);
            Ok(())
        })
    }

    fn abort<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let Some(before) = self.before.take() else { return Ok(()) };
            before.restore(&graph.bitmap(&self.node, &self.name)?.1)
        })
    }
}

/// `block-dirty-bitmap-enable` and `-disable`.
#[derive(Debug)]
pub struct BitmapRecordAction {
    node: String,
    name: String,
    on: bool,
    before: Option<bool>,
}

impl BitmapRecordAction {
    /// On this node: records from now on, or not.
    pub fn new(node: String, name: String, on: bool) -> Self {
        BitmapRecordAction { node, name, on, before: None }
    }
}

impl Action for BitmapRecordAction {
    fn nodes(&self, _graph: &Graph) -> Vec<String> {
        vec![self.node.clone()]
    }

    fn prepare<'a>(&'a mut self, cx: &'a mut ActionContext) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let before = cx.graph().bitmap(&self.node, &self.name)?.1.recording();
            cx.graph().bitmap_set_recording(&self.node, &self.name, self.on).await?;
            self.before = Some(before);
            Ok(())
        })
    }

    fn abort<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let Some(before) = self.before.take() else { return Ok(()) };
            graph.bitmap_set_recording(&self.node, &self.name, before).await
        })
    }
}

/// `block-dirty-bitmap-merge`.
#[derive(Debug)]
pub struct BitmapMergeAction {
    node: String,
    target: String,
    sources: Vec<BitmapRef>,
    before: Option<Marks>,
}

impl BitmapMergeAction {
    /// Into `target` on this node.
    pub fn new(node: String, target: String, sources: Vec<BitmapRef>) -> Self {
        BitmapMergeAction { node, target, sources, before: None }
    }
}

impl Action for BitmapMergeAction {
    fn nodes(&self, _graph: &Graph) -> Vec<String> {
        let others = self.sources.iter().filter_map(|s| s.node.clone());
        std::iter::once(self.node.clone()).chain(others).collect()
    }

    fn prepare<'a>(&'a mut self, cx: &'a mut ActionContext) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let (_, target) = cx.graph().bitmap(&self.node, &self.target)?;
            let before = Marks::of(cx, &target)?;
            cx.graph().bitmap_merge(&self.node, &self.target, &self.sources).await?;
            self.before = Some(before);
            Ok(())
        })
    }

    fn abort<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let Some(before) = self.before.take() else { return Ok(()) };
            before.restore(&graph.bitmap(&self.node, &self.target)?.1)
        })
    }
}

/// `block-dirty-bitmap-remove`: nobody can use the bitmap from the preparation on; it goes at the end.
#[derive(Debug)]
pub struct BitmapRemoveAction {
    node: String,
    name: String,
    held: bool,
}

impl BitmapRemoveAction {
    /// From this node.
    pub fn new(node: String, name: String) -> Self {
        BitmapRemoveAction { node, name, held: false }
    }
}

impl Action for BitmapRemoveAction {
    fn nodes(&self, _graph: &Graph) -> Vec<String> {
        vec![self.node.clone()]
    }

    fn prepare<'a>(&'a mut self, cx: &'a mut ActionContext) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let bitmap = cx.graph().bitmap_to_remove(&self.node, &self.name)?;
            bitmap.set_busy(true);
            self.held = true;
            Ok(())
        })
    }

    fn commit<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            graph.bitmap(&self.node, &self.name)?.1.set_busy(false);
            graph.bitmap_remove(&self.node, &self.name).await
        })
    }

    fn abort<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            if self.held {
                graph.bitmap(&self.node, &self.name)?.1.set_busy(false);
            }
            Ok(())
        })
    }
}
