//! What a job does: the trait every job implements, and what its work has at hand.
//!
//! Implemented by the jobs' folders, called by the lifecycle on the main thread. The work moves data on iothreads, between
//! [`Control::enter`] and the end of what that returned; everything else happens on the main thread.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use graph::{BoxFut, Errno, Result};

use super::Job;
use super::info::{ErrorAction, JobType, OnError};
use crate::control::Control;

/// A future that cannot fail.
pub type Done<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Nothing to do.
pub(super) fn done<'a>() -> Done<'a> {
    Box::pin(std::future::ready(()))
}

/// How a job that goes on for ever was told to come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By `complete`.
    Complete,
    /// By a cancel that is none for this job: end, and leave things as they were.
    Soft,
}

/// What a job does. All methods run on the main thread.
pub trait Work: 'static {
    /// Its sort.
    fn kind(&self) -> JobType;

    /// A job over nodes: `block-job-*` commands, BLOCK_JOB events and `query-block-jobs` know it.
    fn is_block_job(&self) -> bool {
        true
    }

    /// The work itself. Ends with `ECANCELED` soon after [`Control::cancelled`].
    fn run<'a>(&'a self, at: &'a Site) -> BoxFut<'a, ()>;

    /// The last step that may fail; every job of a transaction takes it before any of them is made final.
    fn prepare(&self) -> BoxFut<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Makes the result final.
    fn commit(&self) -> Done<'_> {
        done()
    }

    /// Takes back what was done.
    fn abort(&self) -> Done<'_> {
        done()
    }

    /// Gives everything back; after `commit` or `abort`.
    fn clean(&self) -> Done<'_> {
        done()
    }

    /// Whether `complete` means anything.
    fn completes(&self) -> bool {
        false
    }

    /// Whether a cancel without force ends it in order instead ([`Ending::Soft`]).
    fn cancels_softly(&self, _ready: bool) -> bool {
        false
    }

    /// What it found out, for a query of its own.
    fn outcome(&self) -> Option<serde_json::Value> {
        None
    }

    /// Progress for the queries, where it is not counted in the [`Control`].
    fn progress(&self) -> Option<(u64, u64)> {
        None
    }
}

/// What the work has at hand: its job, seen from inside.
#[derive(Clone)]
pub struct Site {
    pub(super) job: Rc<Job>,
}

impl Site {
    /// The job's id.
    pub fn id(&self) -> &str {
        &self.job.id
    }

    /// Progress, rate, pausing and cancelling.
    pub fn control(&self) -> &Arc<Control> {
        &self.job.control
    }

    /// Rests here if somebody asked the job to.
    ///
    /// # Errors
    /// `ECANCELED`.
    pub async fn rest(&self) -> Result<()> {
        self.job.rest().await;
        if self.control().cancelled() { Err(Errno::ECANCELED.into()) } else { Ok(()) }
    }

    /// Says that the job may be completed from now on.
    ///
    /// # Errors
    /// `ECANCELED`.
    pub async fn ready(&self) -> Result<()> {
        self.rest().await?;
        self.job.became_ready();
        Ok(())
    }

    /// How the job was told to come to its end, if it was.
    pub fn ending(&self) -> Option<Ending> {
        self.job.ending()
    }

    /// Waits until it is told.
    ///
    /// # Errors
    /// `ECANCELED`.
    pub async fn ended(&self) -> Result<Ending> {
        loop {
            let changed = self.control().changed();
            if self.control().cancelled() {
                return Err(Errno::ECANCELED.into());
            }
            if let Some(ending) = self.ending() {
                return Ok(ending);
            }
            changed.await;
        }
    }

    /// Decides about a failed request, and tells the control clients. With [`ErrorAction::Stop`] the job is paused: it
    /// rests at the next [`Site::rest`] or [`Control::enter`] until somebody resumes it.
    pub fn request_failed(&self, policy: OnError, read: bool, errno: Errno) -> ErrorAction {
        self.job.request_failed(policy, read, errno)
    }
}
