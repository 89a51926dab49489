//! `block-check`: looks for contradictions in the metadata of an image that is in use. QEMU has nothing of the sort.
//!
//! Started by the control channel. Requests wait while the image is looked at: the node is drained and flushed, so that what
//! is on disk is what is meant, and its driver's read-only check runs on an iothread. How long that takes depends on the
//! metadata (some 8 MiB per 64 GiB of disk with clusters of 64 KiB). It repairs nothing. Once it has begun it cannot be
//! cancelled or paused; the job ends as cancelled afterwards, and requests go on in any case.

use std::cell::RefCell;
use std::rc::Rc;

use graph::{BlockError, BoxFut, CheckFix, CheckReport, Errno, ErrorKind, Graph, Perm, Result, RootOptions};
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
    thread: IoThread,
    hold: RefCell<Option<Hold>>,
    report: RefCell<Option<BlockCheckReport>>,
}

impl Check {
    async fn look(&self, at: &Site) -> Result<()> {
        at.control().set_total(1);
        // Held as long as the job lives: it is the job's node, and stays where it is when users are moved.
        let options = RootOptions {
            perm: Perm::CONSISTENT_READ,
            shared: Perm::ALL,
            stay_at_node: true,
            ..RootOptions::new(format!("block job '{}'", at.id()), false)
        };
        let hold = Hold::attach(&self.graph, &self.node, options, at.control()).await?;
        let node = hold.node()?;
        *self.hold.borrow_mut() = Some(hold);
        at.rest().await?;
        let guard = self.graph.drain(node.name()).await?;
        // Taken inside of the drain: graph changes are drained too, so that it stays true until the guard goes.
        let view = self.hold.borrow().as_ref().and_then(|h| h.root().view());
        let view = view.ok_or_else(|| BlockError::new(Errno::ENODEV, "The node is gone"))?;
        let call = self.thread.call(move |local| async move {
            let io = view.io(&local);
            drop(view);
            io.flush().await?;
            io.node()?.driver().check(&io, CheckFix::NONE).await
        });
        let result = call.await;
        drop(guard);
        let report = result.map_err(|_| BlockError::new(Errno::ENODEV, "The iothread is gone"))??;
        *self.report.borrow_mut() = Some(BlockCheckReport::new(node.name(), node.driver_name(), report));
        at.control().advance(1);
        Ok(())
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

/// Starts a check of a node. The job stays until it is dismissed, so that its report can be seen.
///
/// # Errors
/// No such node, or the id is bad or taken.
pub fn start(jobs: &Jobs, graph: &Graph, thread: IoThread, id: &str, node: &str) -> Result<Rc<Job>> {
    graph.node(node)?;
    let work = Check {
        graph: graph.clone(),
        node: node.to_owned(),
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
