//! `block-check`: looks for contradictions in the metadata of an image that is in use. QEMU has nothing of the sort.
//!
//! Started by the control channel. The driver's check runs in pieces on an iothread while requests go on; between two pieces the
//! job can be paused and cancelled, and the node drained by others. Where the driver asks for it, at the end as a rule,
//! the job drains the node for a piece. Drivers that know no check beside requests are drained for all of it. A job that repairs
//! drains the node for all of it, too: nobody may use tables that are being rewritten.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use graph::{
    BlockError, BoxFut, CheckFix, CheckReport, CheckStep, Errno, ErrorKind, Graph, OnlineCheck, Perm, Result,
    RootOptions, View,
};
use host::IoThread;
use schemars::JsonSchema;
use serde::Serialize;

use crate::hold::Hold;
use crate::job::{Done, Job, JobOptions, JobType, Jobs, Site, Work};

/// What a check has found, with QEMU's names (`ImageCheck`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockCheckReport {
    /// The node.
    pub node_name: String,
    /// Its driver.
    pub format: String,
    /// What could not be checked.
    pub check_errors: u64,
    /// Where the used part of the file ends, bytes.
    pub image_end_offset: u64,
    /// Contradictions that endanger data.
    pub corruptions: u64,
    /// Clusters that are counted as used and are not.
    pub leaks: u64,
    /// Contradictions that were repaired; what is left counts above.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Of these, those that have a place in the file.
    pub allocated_clusters: u64,
    /// Of these, those that do not follow their predecessor.
    pub fragmented_clusters: u64,
    /// Of these, the compressed ones.
    pub compressed_clusters: u64,
    /// One line each, in `qemu-img`'s words.
    pub messages: Vec<String>,
}

impl BlockCheckReport {
    fn new(node_name: &str, format: &str, r: CheckReport) -> BlockCheckReport {
        BlockCheckReport {
            node_name: node_name.to_owned(),
            format: format.to_owned(),
            check_errors: r.check_errors,
            image_end_offset: r.image_end_offset,
            corruptions: r.corruptions,
            leaks: r.leaks,
            corruptions_fixed: r.corruptions_fixed,
            leaks_fixed: r.leaks_fixed,
            total_clusters: r.total_clusters,
            allocated_clusters: r.allocated_clusters,
            fragmented_clusters: r.fragmented_clusters,
            compressed_clusters: r.compressed_clusters,
            messages: r.messages,
        }
    }
}

struct Check {
    graph: Graph,
    node: String,
    fix: CheckFix,
    thread: IoThread,
    hold: RefCell<Option<Hold>>,
    report: RefCell<Option<BlockCheckReport>>,
}

impl Check {
    async fn look(&self, at: &Site) -> Result<()> {
        // Held as long as the job lives: it is the job's node, and stays where it is when users are moved.
        let options = RootOptions {
            perm: if self.fix == CheckFix::NONE {
                Perm::CONSISTENT_READ
            } else {
                Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED
            },
            shared: Perm::ALL,
            stay_at_node: true,
            ..RootOptions::new(format!("block job '{}'", at.id()), false)
        };
        let hold = Hold::attach(&self.graph, &self.node, options, at.control()).await?;
        let node = hold.node()?;
        *self.hold.borrow_mut() = Some(hold);
        let mut check = OnlineCheck::default();
        let mut drained = self.fix != CheckFix::NONE;
        let report = loop {
            at.rest().await?;
            let step = if drained {
                let guard = self.graph.drain(node.name()).await?;
                // Taken inside of the drain: graph changes are drained too, so that it stays true until the guard goes.
                let view = self.hold.borrow().as_ref().and_then(|h| h.root().view());
                let view = view.ok_or_else(|| BlockError::new(Errno::ENODEV, "The node is gone"))?;
                let step;
                (step, check) = self.piece(view, check, true).await?;
                drop(guard);
                step
            } else {
                let active = at.control().enter().await?;
                let view = self.hold.borrow().as_ref().map(Hold::view).transpose()?;
                let view = view.ok_or_else(|| BlockError::new(Errno::ENODEV, "The node is gone"))?;
                let step;
                (step, check) = self.piece(view, check, false).await?;
                drop(active);
                step
            };
            at.control().set_progress(check.done, check.total.max(check.done + 1));
            match step {
                CheckStep::Done(report) => break report,
                step => drained = step == CheckStep::Drained,
            }
        };
        *self.report.borrow_mut() = Some(BlockCheckReport::new(node.name(), node.driver_name(), report));
        let total = check.total.max(1);
        at.control().set_progress(total, total);
        Ok(())
    }

    /// One piece on the iothread.
    async fn piece(
        &self,
        view: Arc<View>,
        mut check: OnlineCheck,
        drained: bool,
    ) -> Result<(CheckStep, OnlineCheck)> {
        let fix = self.fix;
        let call = self.thread.call(move |local| async move {
            let io = view.io(&local);
            drop(view);
            if drained && let Err(e) = io.flush().await {
                // An image that takes no more writes is looked at as it is.
                log::debug!("an image could not be flushed before its check: {e}");
            }
            let node = io.node()?;
            let step = if fix == CheckFix::NONE {
                node.driver().check_online(&io, &mut check, drained).await?
            } else {
                CheckStep::Done(node.driver().check(&io, fix).await?)
            };
            Ok((step, check))
        });
        call.await.map_err(|_| BlockError::new(Errno::ENODEV, "The iothread is gone"))?
    }
}

impl Work for Check {
    fn kind(&self) -> JobType {
        JobType::Check
    }

    fn run<'a>(&'a self, at: &'a Site) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.look(at).await.map_err(|e| match e.errno() {
                Errno::ENOTSUP => BlockError::unsupported(format!(
                    "The format of node '{}' does not support checks",
                    self.node
                )),
                _ => e,
            })
        })
    }

    fn clean(&self) -> Done<'_> {
        Box::pin(async move {
            let hold = self.hold.take();
            if let Some(hold) = hold {
                hold.detach().await;
            }
        })
    }

    fn outcome(&self) -> Option<serde_json::Value> {
        let report = self.report.borrow();
        report.as_ref().and_then(|r| serde_json::to_value(r).ok())
    }
}

/// Starts a check of a node, which repairs what `fix` says. The job stays until it is dismissed, so that its report can be seen.
///
/// # Errors
/// No such node, or the id is bad or taken.
pub fn start(
    jobs: &Jobs,
    graph: &Graph,
    thread: IoThread,
    id: &str,
    node: &str,
    fix: CheckFix,
) -> Result<Rc<Job>> {
    graph.node(node)?;
    let work = Check {
        graph: graph.clone(),
        node: node.to_owned(),
        fix,
        thread,
        hold: RefCell::new(None),
        report: RefCell::new(None),
    };
    jobs.start(JobOptions { auto_dismiss: false, ..JobOptions::new(id) }, Rc::new(work))
}

/// What a check job has found.
///
/// # Errors
/// No such job, one of another sort, or it has not come to its end.
pub fn report(jobs: &Jobs, id: &str) -> Result<serde_json::Value> {
    let job = jobs.block_job(id)?;
    if job.kind() != JobType::Check {
        return Err(BlockError::invalid(format!("Job '{id}' is not a check")));
    }
    job.outcome().ok_or_else(|| {
        BlockError::new(Errno::EAGAIN, format!("Job '{id}' has no report"))
            .with_kind(ErrorKind::DeviceNotActive)
    })
}
