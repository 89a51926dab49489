//! Jobs: their table, their verbs, and the list of all of them.
//!
//! Called by the control channel on the main thread. A job runs as a task of the main executor; its verbs change it at once
//! and wait only where their answer depends on it. Every change of state goes through `Job::enter`, which knows the table.
//!
//! | file | subject |
//! |---|---|
//! | `table` | states and verbs |
//! | `work` | what a job does, and what it has at hand |
//! | `verbs` | what control clients ask |
//! | `life` | from the start to the end, alone or in a group |
//! | `info` | queries and events |

mod info;
mod life;
mod table;
mod verbs;
mod work;

#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use graph::{BlockError, Errno, ErrorKind, Result};
use host::exec::MainExecutor;
use host::sync::WaitQueue;

use crate::control::Control;

pub use info::{BlockJobInfo, BlockJobProgress, ErrorAction, IoStatus, JobEvent, JobInfo, JobType, OnError};
pub use table::{JobStatus, Verb};
pub use work::{Done, Ending, Site, Work};

/// Most jobs at once, ended ones that were not dismissed included.
pub const MAX_JOBS: usize = 1024;

/// Longest id, bytes.
pub const MAX_JOB_ID: usize = 1024;

/// How a job is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobOptions {
    /// Its id.
    pub id: String,
    /// Bytes per second it may move, 0 for no limit.
    pub speed: u64,
    /// It finalizes by itself.
    pub auto_finalize: bool,
    /// It vanishes by itself.
    pub auto_dismiss: bool,
}

impl JobOptions {
    /// With QEMU's defaults.
    pub fn new(id: impl Into<String>) -> JobOptions {
        JobOptions { id: id.into(), speed: 0, auto_finalize: true, auto_dismiss: true }
    }
}

/// What may change about a job.
struct State {
    status: JobStatus,
    /// Somebody asked it to rest.
    user_paused: bool,
    /// It ends as cancelled, whatever its work says.
    force_cancelled: bool,
    ending: Option<Ending>,
    io_status: IoStatus,
    /// The work has ended; its result.
    ended: bool,
    error: Option<BlockError>,
}

/// One job.
pub struct Job {
    id: String,
    options: JobOptions,
    work: Rc<dyn Work>,
    control: Arc<Control>,
    state: RefCell<State>,
    group: Rc<Group>,
    jobs: Weak<Inner>,
    /// Told when the state changes.
    changed: WaitQueue,
}

/// Jobs that succeed or fail together. A job alone is a group of one.
#[derive(Default)]
struct Group {
    members: RefCell<Vec<Weak<Job>>>,
    /// One of them failed.
    aborting: Cell<bool>,
    /// Their ends are being made final: verbs wait.
    finalizing: Cell<bool>,
    settled: WaitQueue,
}

struct Inner {
    executor: MainExecutor,
    emit: Box<dyn Fn(JobEvent)>,
    /// By number, oldest first.
    list: RefCell<BTreeMap<u64, Rc<Job>>>,
    next: Cell<u64>,
}

/// All jobs of a process. A handle; cheap to clone.
#[derive(Clone)]
pub struct Jobs {
    inner: Rc<Inner>,
}

/// Whether a text may be an id (QEMU's `id_wellformed`): a letter, then letters, digits, `-`, `.`, `_`.
fn well_formed(id: &str) -> bool {
    let mut chars = id.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
        && id.len() <= MAX_JOB_ID
}

impl Jobs {
    /// No jobs. `emit` hears of every event, in order; it is called on the main thread and must not call back.
    pub fn new(executor: MainExecutor, emit: impl Fn(JobEvent) + 'static) -> Jobs {
        Jobs {
            inner: Rc::new(Inner {
                executor,
                emit: Box::new(emit),
                list: RefCell::default(),
                next: Cell::new(0),
            }),
        }
    }

    /// Whether a job of this id could be started now.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check_id(&self, id: &str) -> Result<()> {
        if !well_formed(id) {
            return Err(BlockError::invalid(format!("Invalid job ID '{id}'")));
        }
        if self.by_id(id).is_some() {
            return Err(BlockError::new(Errno::EEXIST, format!("Job ID '{id}' already in use")));
        }
        if self.inner.list.borrow().len() >= MAX_JOBS {
            return Err(BlockError::new(Errno::EBUSY, format!("There are {MAX_JOBS} jobs already")));
        }
        Ok(())
    }

    /// Starts a job of its own.
    ///
    /// # Errors
    /// As [`Jobs::check_id`].
    pub fn start(&self, options: JobOptions, work: Rc<dyn Work>) -> Result<Rc<Job>> {
        let mut jobs = self.start_group(vec![(options, work)])?;
        jobs.pop().ok_or_else(|| Errno::EIO.into())
    }

    /// Starts jobs that succeed or fail together.
    ///
    /// # Errors
    /// As [`Jobs::check_id`]; none is started then.
    pub fn start_group(&self, members: Vec<(JobOptions, Rc<dyn Work>)>) -> Result<Vec<Rc<Job>>> {
        let mut ids = std::collections::BTreeSet::new();
        for (options, _) in &members {
            self.check_id(&options.id)?;
            if !ids.insert(options.id.as_str()) {
                return Err(BlockError::new(
                    Errno::EEXIST,
                    format!("Job ID '{}' already in use", options.id),
                ));
            }
        }
        drop(ids);
        let group = Rc::<Group>::default();
        let jobs: Vec<Rc<Job>> = members
            .into_iter()
            .map(|(options, work)| {
                let control = Control::new();
                control.set_rate(options.speed);
                Rc::new(Job {
                    id: options.id.clone(),
                    options,
                    work,
                    control,
                    state: RefCell::new(State {
                        status: JobStatus::Undefined,
                        user_paused: false,
                        force_cancelled: false,
                        ending: None,
                        io_status: IoStatus::Ok,
                        ended: false,
                        error: None,
                    }),
                    group: Rc::clone(&group),
                    jobs: Rc::downgrade(&self.inner),
                    changed: WaitQueue::new(),
                })
            })
            .collect();
        *group.members.borrow_mut() = jobs.iter().map(Rc::downgrade).collect();
        for job in &jobs {
            let number = self.inner.next.get();
            self.inner.next.set(number + 1);
            self.inner.list.borrow_mut().insert(number, Rc::clone(job));
            job.enter(JobStatus::Created);
        }
        for job in &jobs {
            job.enter(JobStatus::Running);
            self.inner.executor.spawn_local(life::live(Rc::clone(job)));
        }
        Ok(jobs)
    }

    fn by_id(&self, id: &str) -> Option<Rc<Job>> {
        self.inner.list.borrow().values().find(|j| j.id == id).cloned()
    }

    /// The job of that id.
    ///
    /// # Errors
    /// `Job not found`.
    pub fn job(&self, id: &str) -> Result<Rc<Job>> {
        self.by_id(id).ok_or_else(|| BlockError::new(Errno::ENOENT, "Job not found"))
    }

    /// The job over nodes of that id.
    ///
    /// # Errors
    /// `Block job 'x' not found`.
    pub fn block_job(&self, id: &str) -> Result<Rc<Job>> {
        self.by_id(id).filter(|j| j.work.is_block_job()).ok_or_else(|| {
            BlockError::new(Errno::ENOENT, format!("Block job '{id}' not found"))
                .with_kind(ErrorKind::DeviceNotActive)
        })
    }

    /// For `query-jobs`: the newest first.
    pub fn query(&self) -> Vec<JobInfo> {
        self.inner.list.borrow().values().rev().map(|j| j.info()).collect()
    }

    /// For `query-block-jobs`: the newest first.
    pub fn query_block(&self) -> Vec<BlockJobInfo> {
        let list = self.inner.list.borrow();
        list.values().rev().filter(|j| j.work.is_block_job()).map(|j| j.block_info()).collect()
    }

    /// Ends all jobs and forgets them; for the end of the process. The newest first, as in QEMU.
    pub async fn cancel_all(&self) {
        let all: Vec<Rc<Job>> = self.inner.list.borrow().values().rev().cloned().collect();
        for job in &all {
            // One that has come to its end needs nothing.
            let _ = job.cancel(true).await;
        }
        for job in all {
            job.concluded().await;
            if job.status() == JobStatus::Concluded {
                job.forget();
            }
        }
    }
}

impl Job {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its state.
    pub fn status(&self) -> JobStatus {
        self.state.borrow().status
    }

    /// Progress, rate, pausing and cancelling.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Why it failed, as its clients are told.
    pub fn error(&self) -> Option<String> {
        self.state.borrow().error.as_ref().map(ToString::to_string)
    }

    /// Its sort.
    pub fn kind(&self) -> JobType {
        self.work.kind()
    }

    /// What it found out, for a query of its own.
    pub fn outcome(&self) -> Option<serde_json::Value> {
        self.work.outcome()
    }

    fn emit(&self, event: JobEvent) {
        if let Some(jobs) = self.jobs.upgrade() {
            (jobs.emit)(event);
        }
    }

    /// The one place a state changes.
    fn enter(&self, next: JobStatus) {
        let before = std::mem::replace(&mut self.state.borrow_mut().status, next);
        if !before.leads_to(next) {
            log::error!("job '{}' went from {} to {}", self.id, before.as_str(), next.as_str());
            debug_assert!(false, "{} to {}", before.as_str(), next.as_str());
        }
        if before != next {
            self.emit(JobEvent::Status { id: self.id.clone(), status: next });
        }
        self.changed.notify_all();
    }

    fn progress(&self) -> (u64, u64) {
        self.work.progress().unwrap_or_else(|| self.control.progress())
    }

    fn block_progress(&self) -> BlockJobProgress {
        let (offset, len) = self.progress();
        BlockJobProgress {
            kind: self.work.kind(),
            device: self.id.clone(),
            len,
            offset,
            speed: self.control.rate(),
            error: self.error(),
        }
    }

    fn info(&self) -> JobInfo {
        let (current_progress, total_progress) = self.progress();
        JobInfo {
            id: self.id.clone(),
            kind: self.work.kind(),
            status: self.status(),
            current_progress,
            total_progress,
            error: self.error(),
        }
    }

    fn block_info(&self) -> BlockJobInfo {
        let (offset, len) = self.progress();
        let state = self.state.borrow();
        BlockJobInfo {
            kind: self.work.kind(),
            device: self.id.clone(),
            len,
            offset,
            busy: !state.ended && self.control.is_active(),
            paused: state.user_paused && !state.ended,
            speed: self.control.rate(),
            io_status: state.io_status,
            ready: matches!(state.status, JobStatus::Ready | JobStatus::Standby),
            status: state.status,
            auto_finalize: self.options.auto_finalize,
            auto_dismiss: self.options.auto_dismiss,
            error: state.error.as_ref().map(ToString::to_string),
        }
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({:?}, {})", self.id, self.status().as_str())
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.inner.list.borrow().values()).finish()
    }
}
