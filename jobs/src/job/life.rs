//! The life of a job: its work, the wait for its group, and its end.
//!
//! [`live`] is the task of a job. Whoever brings the last missing piece (the last member that ends, the client that
//! finalizes) carries out the end of the whole group; meanwhile verbs wait (`Group::finalizing`).

use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use graph::{Errno, Result};

use super::info::JobEvent;
use super::table::JobStatus;
use super::work::Site;
use super::{Group, Job};

/// A job from its start until its work has ended and, if it is the last of its group, to the very end.
pub(super) async fn live(job: Rc<Job>) {
    let site = Site { job: Rc::clone(&job) };
    let result = job.watched(job.work.run(&site)).await;
    // A job that rests does not end.
    job.rest().await;
    {
        let mut state = job.state.borrow_mut();
        state.ended = true;
        if let Err(e) = result {
            state.error = Some(e);
        }
    }
    member_ended(&job).await;
}

impl Job {
    /// Runs the work; notices when what was in flight has ended after somebody asked for a rest.
    async fn watched(&self, work: impl Future<Output = Result<()>>) -> Result<()> {
        let mut work = pin!(work);
        loop {
            let changed = self.changed.wait();
            let resting = self.user_paused() && !self.status().rests();
            let mut rest = pin!(async {
                if resting {
                    self.control.idle().await;
                } else {
                    changed.await;
                }
            });
            let result = std::future::poll_fn(|cx| {
                if let Poll::Ready(result) = work.as_mut().poll(cx) {
                    return Poll::Ready(Some(result));
                }
                rest.as_mut().poll(cx).map(|()| None)
            })
            .await;
            match result {
                Some(result) => return result,
                None if resting => self.rests_now(),
                None => {}
            }
        }
    }

    /// Rests until nobody wants it to.
    pub(super) async fn rest(&self) {
        loop {
            let changed = self.changed.wait();
            if !self.user_paused() {
                return;
            }
            self.rests_now();
            changed.await;
        }
    }

    pub(super) fn became_ready(&self) {
        if self.status() == JobStatus::Running {
            self.enter(JobStatus::Ready);
            if self.work.is_block_job() {
                self.emit(JobEvent::Ready(self.block_progress()));
            }
        }
    }

    /// The result so far; a job that was cancelled has failed.
    fn settle_result(&self) {
        let mut state = self.state.borrow_mut();
        if state.force_cancelled && state.error.is_none() {
            state.error = Some(Errno::ECANCELED.into());
        }
        let failed = state.error.is_some();
        drop(state);
        if failed {
            self.enter_aborting();
        }
    }

    fn enter_aborting(&self) {
        if !matches!(self.status(), JobStatus::Concluded | JobStatus::Null) {
            self.enter(JobStatus::Aborting);
        }
    }

    fn failed(&self) -> bool {
        self.state.borrow().error.is_some()
    }

    /// Waits until it has come to its end.
    pub(super) async fn concluded(&self) {
        loop {
            let changed = self.changed.wait();
            if matches!(self.status(), JobStatus::Concluded | JobStatus::Null) {
                break;
            }
            changed.await;
        }
        self.group.settled().await;
    }

    /// Takes it off the list.
    pub(super) fn forget(&self) {
        self.enter(JobStatus::Null);
        if let Some(jobs) = self.jobs.upgrade() {
            jobs.list.borrow_mut().retain(|_, j| !std::ptr::eq(Rc::as_ptr(j), self));
        }
    }
}

/// The work of a member has ended, or a member whose work had ended was cancelled.
pub(super) async fn member_ended(job: &Rc<Job>) {
    let group = Rc::clone(&job.group);
    job.settle_result();
    let members = group.alive();
    if job.failed() && !group.aborting.replace(true) {
        for other in &members {
            other.force_cancel();
        }
    }
    if group.aborting.get() {
        for other in members.iter().filter(|j| j.state.borrow().ended) {
            other.settle_result();
        }
        if members.iter().all(|j| j.state.borrow().ended) {
            conclude(&group).await;
        }
        return;
    }
    job.enter(JobStatus::Waiting);
    if !members.iter().all(|j| j.state.borrow().ended) {
        return;
    }
    for member in &members {
        member.enter(JobStatus::Pending);
        if !member.options.auto_finalize && member.work.is_block_job() {
            member.emit(JobEvent::Pending { kind: member.work.kind(), id: member.id.clone() });
        }
    }
    if members.iter().all(|j| j.options.auto_finalize) {
        finalize(&group).await;
    }
}

impl Group {
    fn alive(&self) -> Vec<Rc<Job>> {
        self.members.borrow().iter().filter_map(std::rc::Weak::upgrade).collect()
    }
}

/// Verbs wait as long as it lives.
struct Finalizing<'a>(&'a Group);

impl<'a> Finalizing<'a> {
    fn begin(group: &'a Group) -> Finalizing<'a> {
        group.finalizing.set(true);
        Finalizing(group)
    }
}

impl Drop for Finalizing<'_> {
    fn drop(&mut self) {
        self.0.finalizing.set(false);
        self.0.settled.notify_all();
    }
}

/// Makes the ends of all members final: all that are pending, or none.
pub(super) async fn finalize(group: &Group) {
    let finalizing = Finalizing::begin(group);
    let members = group.alive();
    for member in &members {
        if let Err(e) = member.work.prepare().await {
            member.state.borrow_mut().error = Some(e);
            group.aborting.set(true);
            break;
        }
    }
    if group.aborting.get() {
        for member in &members {
            // The others of one that failed are cancelled.
            let failed = member.failed();
            member.state.borrow_mut().force_cancelled |= !failed;
            member.settle_result();
        }
    }
    end(&members).await;
    drop(finalizing);
}

/// All members have ended and one has failed.
async fn conclude(group: &Group) {
    let finalizing = Finalizing::begin(group);
    end(&group.alive()).await;
    drop(finalizing);
}

/// The very end of each.
async fn end(members: &[Rc<Job>]) {
    for member in members {
        let failed = member.failed();
        if failed {
            member.work.abort().await;
        } else {
            member.work.commit().await;
        }
        member.work.clean().await;
        if member.work.is_block_job() {
            let progress = member.block_progress();
            let cancelled = member.state.borrow().force_cancelled;
            member.emit(if cancelled {
                JobEvent::Cancelled(super::BlockJobProgress { error: None, ..progress })
            } else {
                JobEvent::Completed(progress)
            });
        }
        member.enter(JobStatus::Concluded);
        if member.options.auto_dismiss {
            member.forget();
        }
    }
}
