//! Work that goes on when nobody waits for it any more: a change in several places must not stop between two of them.
//!
//! Used by drivers that keep places in step. A request whose future is dropped half way would leave them apart.

use std::future::Future;

use graph::{Errno, Result};
use host::Local;
use host::sync::oneshot;

/// Runs `work` as a task of its own and waits for it; dropped, the task goes on.
pub(crate) async fn to_the_end(local: Local, work: impl Future<Output = Result<()>> + 'static) -> Result<()> {
    let (tx, rx) = oneshot::channel();
    local.spawn(async move {
        // Nobody may be waiting any more.
        let _ = tx.send(work.await);
    });
    match rx.await {
        Ok(result) => result,
        // It panicked, or the thread is ending.
        Err(_) => Err(Errno::EIO.into()),
    }
}
