//! What queries and events tell about jobs, in QEMU's names.
//!
//! Made by the lifecycle; the control channel serialises them.

use schemars::JsonSchema;
use serde::Serialize;

use super::table::JobStatus;

/// The sort of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobType {
    /// Copies an image's content into one below it.
    Commit,
    /// Copies the content of images below into one above them.
    Stream,
    /// Keeps a copy up to date.
    Mirror,
    /// Copies an image as it was at the start.
    Backup,
    /// Creates an image.
    Create,
    /// Changes options of an image.
    Amend,
    /// Checks an image's metadata.
    Check,
    /// Reads ranges for the caches on the way.
    Warm,
}

/// Where the last failed request of a job has left it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// Nothing has failed since the last resume.
    #[default]
    Ok,
    /// A request failed.
    Failed,
    /// A request failed for lack of space.
    Nospace,
}

/// What to do about a failed request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// The request is tried again, or what it was for is left out.
    Ignore,
    /// Lack of space pauses the job, anything else fails it.
    Enospc,
    /// The job pauses until it is resumed.
    Stop,
    /// As `enospc`.
    Auto,
}

/// What was done about a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ErrorAction {
    /// Taken as done.
    Ignore,
    /// The job fails.
    Report,
    /// The job pauses.
    Stop,
}

/// An entry of `query-jobs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// Its sort.
    #[serde(rename = "type")]
    pub kind: JobType,
    /// Its state.
    pub status: JobStatus,
    /// How much is done, in units of the job's own.
    pub current_progress: u64,
    /// How much there is to do, as far as is known.
    pub total_progress: u64,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An entry of `query-block-jobs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJobInfo {
    /// Its sort.
    #[serde(rename = "type")]
    pub kind: JobType,
    /// Its id.
    pub device: String,
    /// How much there is to do, as far as is known.
    pub len: u64,
    /// How much is done.
    pub offset: u64,
    /// Requests are in flight.
    pub busy: bool,
    /// It rests, or is about to, because somebody asked it to.
    pub paused: bool,
    /// Bytes per second it may move, 0 for no limit.
    pub speed: u64,
    /// Where the last failed request has left it.
    pub io_status: IoStatus,
    /// It may be completed.
    pub ready: bool,
    /// Its state.
    pub status: JobStatus,
    /// It finalizes by itself.
    pub auto_finalize: bool,
    /// It vanishes by itself.
    pub auto_dismiss: bool,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What `BLOCK_JOB_COMPLETED` and its siblings tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobProgress {
    /// Its sort.
    pub kind: JobType,
    /// Its id.
    pub device: String,
    /// How much there was to do.
    pub len: u64,
    /// How much is done.
    pub offset: u64,
    /// Its limit, bytes per second.
    pub speed: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// News of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEvent {
    /// `JOB_STATUS_CHANGE`
    Status {
        /// The job.
        id: String,
        /// Its state from now on.
        status: JobStatus,
    },
    /// `BLOCK_JOB_COMPLETED`
    Completed(BlockJobProgress),
    /// `BLOCK_JOB_CANCELLED`
    Cancelled(BlockJobProgress),
    /// `BLOCK_JOB_READY`
    Ready(BlockJobProgress),
    /// `BLOCK_JOB_PENDING`
    Pending {
        /// Its sort.
        kind: JobType,
        /// The job.
        id: String,
    },
    /// `BLOCK_JOB_ERROR`
    Error {
        /// The job.
        device: String,
        /// The request read; otherwise it wrote.
        read: bool,
        /// What is done about it.
        action: ErrorAction,
    },
}
