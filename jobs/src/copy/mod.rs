//! The copy engine: one or more nodes, one after the other, into a node, as fast as both sides go.
//!
//! Used by `ringblk img convert` ([`copy`]) and by jobs that copy. Runs on the main thread as a future that sends the work to
//! the iothreads it is given; every iothread runs several tasks that take the next range from a common plan, read it, leave
//! out what is zero and write the rest. It knows holes (block status), finds zeroes in data, writes zeroes cheaply where the
//! target can, writes compressed clusters, goes on after unreadable sectors if told to, keeps to a rate and can be paused
//! and cancelled at any range. Memory: `buffer` bytes per task. Must not know formats; must not change the graph but for
//! its own users.
//!
//! | file | subject |
//! |---|---|
//! | `options` | what can be asked, what is reported |
//! | `plan` | the next range, and what is known about it |
//! | `lane` | the tasks of one iothread |
//! | `sparse` | where data has zeroes |
//! | `order` | writes in the order of their offsets |
//! | `limit` | bytes per second |

mod lane;
mod limit;
mod options;
mod order;
mod plan;
mod sparse;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use graph::{BlockError, Errno, Graph, Perm, Result, RootOptions};
use host::IoThread;

use crate::control::Control;
use crate::hold::Hold;
use lane::{Ended, Shared};

pub use options::{CopyOptions, CopyReport, MAX_REPORTED, MAX_TASKS, TargetZero, Unreadable};

/// Copies nodes of a graph. `sources` are put one after the other; the target is at least as long as all of them. The
/// sources are used for reading, the target for writing, both shared with everybody: whoever wants more has a user of their
/// own. Progress counts bytes of the sources.
///
/// # Errors
/// No such node, a conflict of permissions, `ENOTSUP` where compression was asked for and the target has none, `ECANCELED`,
/// what reading and writing says (with the offset in the words).
pub async fn copy(
    graph: &Graph,
    sources: &[&str],
    target: &str,
    threads: &[IoThread],
    options: &CopyOptions,
    control: &Arc<Control>,
) -> Result<CopyReport> {
    let mut holds = Vec::with_capacity(sources.len());
    let result = async {
        for source in sources {
            let root = RootOptions::new("copy source", false);
            holds.push(Hold::attach(graph, source, root, control).await?);
        }
        let mut root = RootOptions::new("copy target", true);
        root.shared = Perm::ALL;
        let target = Hold::attach(graph, target, root, control).await?;
        let result = run(&holds, &target, threads, options, control).await;
        target.detach().await;
        result
    }
    .await;
    for hold in holds {
        hold.detach().await;
    }
    result
}

/// As [`copy`], between users that exist already.
///
/// # Errors
/// As there.
pub async fn run(
    sources: &[Hold],
    target: &Hold,
    threads: &[IoThread],
    options: &CopyOptions,
    control: &Arc<Control>,
) -> Result<CopyReport> {
    let Some(first) = threads.first() else {
        return Err(BlockError::new(Errno::ENODEV, "There is no iothread for this operation"));
    };
    let gone = || BlockError::new(Errno::ENODEV, "The iothread is gone");
    let mut sizes = Vec::with_capacity(sources.len());
    for source in sources {
        sizes.push(source.node()?.size());
    }
    if options.compressed && !target.node()?.driver().supports_compressed() {
        return Err(BlockError::unsupported("Compression not supported for this file format"));
    }
    let shared = Arc::new(Shared::new(options.clone(), &sizes, target.node()?.size(), Arc::clone(control))?);
    loop {
        // Whoever pauses (a user, a drain) waits for the lanes to come back; they go on with the views of then.
        let active = control.enter().await?;
        let mut views = Vec::with_capacity(sources.len());
        for source in sources {
            views.push(source.view()?);
        }
        let into = target.view()?;
        let calls: Vec<_> = threads
            .iter()
            .map(|thread| {
                let (shared, views, into) = (Arc::clone(&shared), views.clone(), Arc::clone(&into));
                thread.call(move |local| lane::run(shared, views, into, local))
            })
            .collect();
        drop((views, into));
        let mut ended = Ended::Finished;
        // All of them, also after a failure: nothing may be in flight when this returns.
        for call in calls {
            let lane = call.await.unwrap_or_else(|_| {
                shared.fail(gone());
                Ended::Stopped
            });
            if lane == Ended::Stopped {
                ended = lane;
            }
        }
        shared.check()?;
        if ended == Ended::Finished {
            if options.flush {
                let view = target.view()?;
                let flush = first.call(move |local| async move { view.io(&local).flush().await });
                flush.await.map_err(|_| gone())??;
            }
            return Ok(shared.report());
        }
        drop(active);
    }
}
