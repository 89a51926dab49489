//! Opening a preallocate node, and other options while it is open.
//!
//! Called by the graph on the main thread.

use std::sync::atomic::Ordering::Acquire;
use std::sync::{Arc, PoisonError};

use graph::options::parse_options;
use graph::{NodeIo, OpenContext, Opened, Reopen, ReopenContext, Result, Roles};
use host::sync::Mutex;
use serde_json::Value;

use super::options::{PreallocateOptions, ReopenOptions, Steps};
use super::{Growth, Preallocate};
use crate::filter::FILE;

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: PreallocateOptions = parse_options(value)?;
    cx.open_child("file", Roles::FILTER, options.file).await?;
    let child = cx.child(FILE)?;
    let align = child.driver().limits().request_alignment;
    let steps = Steps::new(options.prealloc_align, options.prealloc_size, align)?;
    Ok(Opened::new(Preallocate::new(steps, child.size())))
}

/// Other steps from now on.
struct NewSteps {
    steps: Arc<std::sync::Mutex<Steps>>,
    after: Steps,
}

impl Reopen for NewSteps {
    fn commit(self: Box<Self>) {
        *self.steps.lock().unwrap_or_else(PoisonError::into_inner) = self.after;
    }
}

impl Preallocate {
    pub(super) fn new(steps: Steps, size: u64) -> Preallocate {
        Preallocate {
            steps: Arc::new(std::sync::Mutex::new(steps)),
            data_end: size.into(),
            zero_start: size.into(),
            set_aside: false.into(),
            growth: Mutex::new(Growth { file_end: size, unable: false }),
        }
    }

    pub(super) async fn prepare(&self, cx: &ReopenContext, own: Value) -> Result<Box<dyn Reopen>> {
        let options: ReopenOptions = parse_options(own)?;
        let align =
            cx.on_io(|io: NodeIo| async move { Ok(io.child(FILE).limits().request_alignment) }).await?;
        let after = Steps::new(options.prealloc_align, options.prealloc_size, align)?;
        if self.set_aside.load(Acquire) {
            // What is set aside now may be more than the new options want, and a read-only node could not cut it off.
            cx.on_io(|io: NodeIo| async move {
                let driver = io.node()?.driver();
                driver.give_back(&io).await
            })
            .await?;
        }
        Ok(Box::new(NewSteps { steps: Arc::clone(&self.steps), after }))
    }
}
