//! The one table of job states: which follows which, and which verb is accepted where. As QEMU's `job.c`.
//!
//! Pure; asked by the lifecycle before every step. Must not know what a job does.

use schemars::JsonSchema;
use serde::Serialize;

/// States of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// Does not exist yet.
    Undefined,
    /// Exists and has not been started.
    Created,
    /// Works.
    Running,
    /// Rests because somebody asked it to; was running before.
    Paused,
    /// Works on, and may be completed.
    Ready,
    /// Rests because somebody asked it to; was ready before.
    Standby,
    /// Has done its work and waits for the others of its transaction.
    Waiting,
    /// Has done its work; what it changes for others is still to come.
    Pending,
    /// Failed or was cancelled; takes back what it did.
    Aborting,
    /// At its end, kept until it is dismissed.
    Concluded,
    /// Gone.
    Null,
}

impl JobStatus {
    /// All states, in the order of the table.
    pub const ALL: [JobStatus; 11] = [
        JobStatus::Undefined,
        JobStatus::Created,
        JobStatus::Running,
        JobStatus::Paused,
        JobStatus::Ready,
        JobStatus::Standby,
        JobStatus::Waiting,
        JobStatus::Pending,
        JobStatus::Aborting,
        JobStatus::Concluded,
        JobStatus::Null,
    ];

    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            JobStatus::Undefined => "undefined",
            JobStatus::Created => "created",
            JobStatus::Running => "running",
            JobStatus::Paused => "paused",
            JobStatus::Ready => "ready",
            JobStatus::Standby => "standby",
            JobStatus::Waiting => "waiting",
            JobStatus::Pending => "pending",
            JobStatus::Aborting => "aborting",
            JobStatus::Concluded => "concluded",
            JobStatus::Null => "null",
        }
    }

    /// Whether `next` may follow.
    pub fn leads_to(self, next: JobStatus) -> bool {
        use JobStatus::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Undefined, Waiting,
        };
        let after: &[JobStatus] = match self {
            Undefined => &[Created],
            Created => &[Running, Aborting, Null],
            Running => &[Paused, Ready, Waiting, Aborting],
            Paused => &[Running],
            Ready => &[Standby, Waiting, Aborting],
            Standby => &[Ready],
            Waiting => &[Pending, Aborting],
            Pending => &[Aborting, Concluded],
            Aborting => &[Aborting, Concluded],
            Concluded => &[Null],
            Null => &[],
        };
        after.contains(&next)
    }

    /// Whether a verb is accepted.
    pub fn accepts(self, verb: Verb) -> bool {
        use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        let working = matches!(self, Created | Running | Paused | Ready | Standby);
        match verb {
            Verb::Cancel => working || matches!(self, Waiting | Pending),
            Verb::Pause | Verb::Resume | Verb::SetSpeed => working,
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }

    /// Whether the job rests because somebody asked it to.
    pub fn rests(self) -> bool {
        matches!(self, JobStatus::Paused | JobStatus::Standby)
    }

    /// The state with or without the rest somebody asked for; itself where there is no such pair.
    pub(super) fn resting(self, rest: bool) -> JobStatus {
        match (self, rest) {
            (JobStatus::Running, true) => JobStatus::Paused,
            (JobStatus::Ready, true) => JobStatus::Standby,
            (JobStatus::Paused, false) => JobStatus::Running,
            (JobStatus::Standby, false) => JobStatus::Ready,
            (other, _) => other,
        }
    }
}

/// What a control client asks of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// End without a result.
    Cancel,
    /// Rest.
    Pause,
    /// Go on.
    Resume,
    /// Keep to another rate.
    SetSpeed,
    /// Come to the end; for jobs that would go on for ever.
    Complete,
    /// Make the changes that were held back.
    Finalize,
    /// Forget the job.
    Dismiss,
}

impl Verb {
    /// All verbs.
    pub const ALL: [Verb; 7] = [
        Verb::Cancel,
        Verb::Pause,
        Verb::Resume,
        Verb::SetSpeed,
        Verb::Complete,
        Verb::Finalize,
        Verb::Dismiss,
    ];

    /// The word in QEMU's messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        }
    }
}
