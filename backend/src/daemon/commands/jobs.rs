//! Jobs: creating images, the verbs of all jobs and of those over nodes, the queries, the events. What they do is the
//! jobs' crate's.

use graph::Registry;
use jobs::JobEvent;
use jobs::job::{BlockJobInfo, BlockJobProgress, ErrorAction, JobInfo, JobStatus, JobType};
use qmp::event::Event;
use qmp::schema::SchemaBuilder;
use qmp::{Commands, Events, QmpError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::State;
use crate::daemon::errors::block;

/// A job.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct JobId {
    /// The job.
    id: String,
}

/// A job over nodes.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockJobDevice {
    /// The job.
    device: String,
}

/// `block-job-cancel`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockJobCancel {
    /// The job.
    device: String,
    /// Also if it rests, and without coming to an end in order. Default: false.
    force: Option<bool>,
}

/// `block-job-set-speed`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockJobSetSpeed {
    /// The job.
    device: String,
    /// Bytes per second, 0 for no limit.
    speed: i64,
}

/// What the events about a job's end tell.
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct BlockJobEnd {
    /// Its sort.
    #[serde(rename = "type")]
    kind: JobType,
    /// The job.
    device: String,
    /// How much there was to do, in units of the job's own: bytes where it copies.
    len: u64,
    /// How much is done.
    offset: u64,
    /// Its limit, bytes per second.
    speed: u64,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl From<BlockJobProgress> for BlockJobEnd {
    fn from(p: BlockJobProgress) -> BlockJobEnd {
        BlockJobEnd {
            kind: p.kind,
            device: p.device,
            len: p.len,
            offset: p.offset,
            speed: p.speed,
            error: p.error,
        }
    }
}

/// `JOB_STATUS_CHANGE`
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct JobStatusChange {
    /// The job.
    id: String,
    /// Its state from now on.
    status: JobStatus,
}

impl Event for JobStatusChange {
    const NAME: &'static str = "JOB_STATUS_CHANGE";
    const DOC: &'static str = "Sent when a job changes its state.";
}

/// `BLOCK_JOB_COMPLETED`
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(transparent)]
struct BlockJobCompleted(BlockJobEnd);

impl Event for BlockJobCompleted {
    const NAME: &'static str = "BLOCK_JOB_COMPLETED";
    const DOC: &'static str = "Sent when a job over nodes has come to its end, well or with an error.";
}

/// `BLOCK_JOB_CANCELLED`
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(transparent)]
struct BlockJobCancelled(BlockJobEnd);

impl Event for BlockJobCancelled {
    const NAME: &'static str = "BLOCK_JOB_CANCELLED";
    const DOC: &'static str = "Sent when a job over nodes was cancelled.";
}

/// `BLOCK_JOB_READY`
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(transparent)]
struct BlockJobReady(BlockJobEnd);

impl Event for BlockJobReady {
    const NAME: &'static str = "BLOCK_JOB_READY";
    const DOC: &'static str = "Sent when a job over nodes can be completed.";
}

/// `BLOCK_JOB_PENDING`
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct BlockJobPending {
    /// Its sort.
    #[serde(rename = "type")]
    kind: JobType,
    /// The job.
    id: String,
}

impl Event for BlockJobPending {
    const NAME: &'static str = "BLOCK_JOB_PENDING";
    const DOC: &'static str = "Sent when a job over nodes waits for `job-finalize`.";
}

/// The sort of request that failed.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Operation {
    /// Reading.
    Read,
    /// Writing.
    Write,
}

/// `BLOCK_JOB_ERROR`
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct BlockJobError {
    /// The job.
    device: String,
    /// What failed.
    operation: Operation,
    /// What is done about it.
    action: ErrorAction,
}

impl Event for BlockJobError {
    const NAME: &'static str = "BLOCK_JOB_ERROR";
    const DOC: &'static str = "Sent when a request of a job failed.";
}

/// The event as the control clients get it.
pub fn emit(events: &Events, event: JobEvent) {
    match event {
        JobEvent::Status { id, status } => events.emit(&JobStatusChange { id, status }),
        JobEvent::Completed(p) => events.emit(&BlockJobCompleted(p.into())),
        JobEvent::Cancelled(p) => events.emit(&BlockJobCancelled(p.into())),
        JobEvent::Ready(p) => events.emit(&BlockJobReady(p.into())),
        JobEvent::Pending { kind, id } => events.emit(&BlockJobPending { kind, id }),
        JobEvent::Error { device, read, action } => {
            let operation = if read { Operation::Read } else { Operation::Write };
            events.emit(&BlockJobError { device, operation, action });
        }
    }
}

/// Registers a verb that needs nothing but the job.
macro_rules! job_verb {
    ($commands:expr, $name:literal, $doc:literal, $find:ident, $args:ty, $field:ident, |$job:ident| $ask:expr) => {
        $commands.register($name, $doc, |daemon: State, a: $args| async move {
            let $job = daemon.jobs.$find(&a.$field).map_err(block)?;
            $ask.await.map_err(block)
        })
    };
}

/// `block-check`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockCheck {
    /// The job's id.
    job_id: String,
    /// The node.
    node_name: String,
    /// What is repaired; default: nothing.
    #[serde(default)]
    fix: Option<BlockCheckFix>,
}

/// What a check repairs, as `qemu-img check -r` has it.
#[derive(Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum BlockCheckFix {
    /// Space that nobody refers to is given back.
    Leaks,
    /// As `leaks`, and contradictions are put right.
    All,
}

fn check(commands: &mut Commands<State>) {
    commands.register(
        "block-check",
        "Looks for contradictions in the metadata of an image that is in use, as a job. Requests go on meanwhile, but for \
         a moment at the end; where something is to be repaired they wait all the time. The job stays until it is \
         dismissed; `query-block-check` tells what it found. QEMU has no such command.",
        |daemon: State, a: BlockCheck| async move {
            daemon.ready_graph()?;
            let thread = daemon.own_iothread()?;
            let fix = graph::CheckFix {
                leaks: a.fix.is_some(),
                errors: matches!(a.fix, Some(BlockCheckFix::All)),
            };
            jobs::check::start(&daemon.jobs, &daemon.graph, thread, &a.job_id, &a.node_name, fix).map_err(block)?;
            Ok(())
        },
    );
    commands
        .register_value(
            "query-block-check",
            "Tells what a check has found. QEMU has no such command.",
            |schema| schema.object_from::<JobId>(),
            |schema| schema.returns::<jobs::check::BlockCheckReport>(),
            |daemon: State, arguments| async move {
                let a: JobId =
                    serde_json::from_value(arguments).map_err(|e| QmpError::generic(e.to_string()))?;
                jobs::check::report(&daemon.jobs, &a.id).map_err(block)
            },
        )
        .concurrent();
}

pub fn register(commands: &mut Commands<State>, registry: &Registry) {
    create(commands, registry);
    check(commands);
    verbs(commands);
    block_verbs(commands);
    commands
        .register_query("query-jobs", "Tells of all jobs, the newest first.", |daemon: State| async move {
            let list: Vec<JobInfo> = daemon.jobs.query();
            Ok(list)
        })
        .concurrent();
    commands
        .register_query(
            "query-block-jobs",
            "Tells of all jobs over nodes, the newest first.",
            |daemon: State| async move {
                let list: Vec<BlockJobInfo> = daemon.jobs.query_block();
                Ok(list)
            },
        )
        .concurrent();
    commands.event::<JobStatusChange>();
    commands.event::<BlockJobCompleted>();
    commands.event::<BlockJobCancelled>();
    commands.event::<BlockJobReady>();
    commands.event::<BlockJobPending>();
    commands.event::<BlockJobError>();
}

/// An image to create: a union over the drivers, which only the registry knows.
#[derive(Deserialize)]
struct BlockdevCreateOptions(serde_json::Map<String, Value>);

impl JsonSchema for BlockdevCreateOptions {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "BlockdevCreateOptions".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        // Found by its name: `create_options` has defined it.
        schemars::json_schema!({})
    }
}

/// `blockdev-create`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockdevCreate {
    /// The job's id.
    job_id: String,
    /// The image.
    options: BlockdevCreateOptions,
}

/// The base of the union: only the tag, which the union adds.
#[derive(Deserialize, JsonSchema)]
struct BlockdevCreateBase {}

fn create_options(schema: &mut SchemaBuilder, registry: &Registry) {
    // Drivers refer to nodes that may be defined in place.
    super::block::blockdev_options(schema, registry);
    let base = schema.object_from::<BlockdevCreateBase>();
    let variants = registry
        .iter()
        .map(|d| {
            let ty = match d.create {
                Some(create) => {
                    let name = format!("BlockdevCreateOptions-{}", d.name);
                    schema.from_schema(&name, &(create.schema)())
                }
                None => schema.empty(),
            };
            (d.name.to_owned(), ty, String::new())
        })
        .collect();
    schema.union(
        "BlockdevCreateOptions",
        "An image to create, by its driver. Drivers without options of their own cannot create images.",
        "driver",
        base,
        variants,
    );
}

fn create(commands: &mut Commands<State>, registry: &Registry) {
    let registry = registry.clone();
    let arguments = move |schema: &mut SchemaBuilder| {
        create_options(schema, &registry);
        schema.object_from::<BlockdevCreate>()
    };
    commands.register_value(
        "blockdev-create",
        "Creates an image, as a job. Nothing is attached to the graph: `blockdev-add` opens the image afterwards. The job \
         finalizes by itself and stays until it is dismissed, so that its error can be seen.",
        arguments,
        SchemaBuilder::empty,
        |daemon: State, arguments| async move {
            let a: BlockdevCreate =
                serde_json::from_value(arguments).map_err(|e| QmpError::generic(e.to_string()))?;
            let mut options = a.options.0;
            let driver = options.remove("driver").and_then(|v| v.as_str().map(str::to_owned));
            let driver = driver.ok_or_else(|| QmpError::missing("options.driver"))?;
            daemon.ready_graph()?;
            let options = Value::Object(options);
            jobs::create::start(&daemon.jobs, &daemon.graph, &a.job_id, &driver, options).map_err(block)?;
            Ok(Value::Null)
        },
    );
}

fn verbs(commands: &mut Commands<State>) {
    job_verb!(
        commands,
        "job-pause",
        "Lets a job rest once what it has in flight has ended.",
        job,
        JobId,
        id,
        |job| job.pause()
    );
    job_verb!(commands, "job-resume", "Lets a job that rests go on.", job, JobId, id, |job| job.resume());
    job_verb!(commands, "job-cancel", "Ends a job without a result.", job, JobId, id, |job| job.cancel(true));
    job_verb!(commands, "job-complete", "Lets a job that is ready come to its end.", job, JobId, id, |job| {
        job.complete()
    });
    job_verb!(
        commands,
        "job-finalize",
        "Makes the result of a job final that does not do so by itself, and of all jobs of its transaction.",
        job,
        JobId,
        id,
        |job| job.finalize()
    );
    job_verb!(commands, "job-dismiss", "Forgets a job that has come to its end.", job, JobId, id, |job| job
        .dismiss());
}

fn block_verbs(commands: &mut Commands<State>) {
    commands.register(
        "block-job-set-speed",
        "Limits the rate of a job over nodes.",
        |daemon: State, a: BlockJobSetSpeed| async move {
            daemon.jobs.block_job(&a.device).map_err(block)?.set_speed(a.speed).await.map_err(block)
        },
    );
    commands.register(
        "block-job-cancel",
        "Ends a job over nodes. One that is ready comes to its end in order, unless forced.",
        |daemon: State, a: BlockJobCancel| async move {
            let job = daemon.jobs.block_job(&a.device).map_err(block)?;
            job.block_cancel(a.force.unwrap_or(false)).await.map_err(block)
        },
    );
    job_verb!(
        commands,
        "block-job-pause",
        "As `job-pause`, for a job over nodes.",
        block_job,
        BlockJobDevice,
        device,
        |job| job.pause()
    );
    job_verb!(
        commands,
        "block-job-resume",
        "As `job-resume`, for a job over nodes.",
        block_job,
        BlockJobDevice,
        device,
        |job| job.resume()
    );
    job_verb!(
        commands,
        "block-job-complete",
        "As `job-complete`, for a job over nodes.",
        block_job,
        BlockJobDevice,
        device,
        |job| job.complete()
    );
    job_verb!(
        commands,
        "block-job-finalize",
        "As `job-finalize`, for a job over nodes.",
        block_job,
        JobId,
        id,
        |job| job.finalize()
    );
    job_verb!(
        commands,
        "block-job-dismiss",
        "As `job-dismiss`, for a job over nodes.",
        block_job,
        JobId,
        id,
        |job| job.dismiss()
    );
}
