//! The lifecycle against a small model, the table against itself, groups, pausing with requests in flight.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use graph::{BlockError, BoxFut, Errno, Result};
use host::exec::MainExecutor;
use proptest::prelude::*;

use super::*;
use crate::control::Active;

/// What the work of a test is told to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Ready,
    Succeed,
    Fail,
    /// Begins something on an iothread, so to speak.
    Begin,
    /// Ends it.
    End,
}

/// Work that does what it is told.
#[derive(Default)]
struct Puppet {
    next: Cell<Option<Step>>,
    fail_prepare: Cell<bool>,
    active: RefCell<Option<Active>>,
    calls: RefCell<Vec<&'static str>>,
    soft: bool,
}

impl Work for Puppet {
    fn kind(&self) -> JobType {
        JobType::Mirror
    }
    fn run<'a>(&'a self, at: &'a Site) -> BoxFut<'a, ()> {
        Box::pin(async move {
            loop {
                let changed = at.control().changed();
                if at.control().cancelled() {
                    self.active.take();
                    return Err(Errno::ECANCELED.into());
                }
                if at.ending().is_some() {
                    return Ok(());
                }
                match self.next.take() {
                    Some(Step::Ready) => at.ready().await?,
                    Some(Step::Succeed) => return Ok(()),
                    Some(Step::Fail) => return Err(BlockError::new(Errno::EIO, "It broke")),
                    Some(Step::Begin) => *self.active.borrow_mut() = at.control().try_enter(),
                    Some(Step::End) => drop(self.active.take()),
                    None => changed.await,
                }
            }
        })
    }
    fn prepare(&self) -> BoxFut<'_, ()> {
        self.calls.borrow_mut().push("prepare");
        let fail = self.fail_prepare.get();
        Box::pin(async move { if fail { Err(BlockError::new(Errno::EIO, "Not now")) } else { Ok(()) } })
    }
    fn commit(&self) -> Done<'_> {
        self.calls.borrow_mut().push("commit");
        work::done()
    }
    fn abort(&self) -> Done<'_> {
        self.calls.borrow_mut().push("abort");
        work::done()
    }
    fn clean(&self) -> Done<'_> {
        self.calls.borrow_mut().push("clean");
        work::done()
    }
    fn completes(&self) -> bool {
        true
    }
    fn cancels_softly(&self, ready: bool) -> bool {
        self.soft && ready
    }
}

struct Rig {
    executor: MainExecutor,
    jobs: Jobs,
    events: Rc<RefCell<Vec<String>>>,
}

impl Rig {
    fn new() -> Rig {
        let executor = MainExecutor::new().unwrap();
        let events = Rc::<RefCell<Vec<String>>>::default();
        let log = Rc::clone(&events);
        let jobs = Jobs::new(executor.clone(), move |e| {
            log.borrow_mut().push(match e {
                JobEvent::Status { id, status } => format!("{id} {}", status.as_str()),
                JobEvent::Completed(p) => {
                    format!("{} COMPLETED{}", p.device, p.error.map(|e| format!(" {e}")).unwrap_or_default())
                }
                JobEvent::Cancelled(p) => format!("{} CANCELLED", p.device),
                JobEvent::Ready(p) => format!("{} READY", p.device),
                JobEvent::Pending { id, .. } => format!("{id} PENDING"),
                JobEvent::Error { device, read, action } => format!("{device} ERROR {read} {action:?}"),
            });
        });
        Rig { executor, jobs, events }
    }

    fn start(&self, options: JobOptions, work: &Rc<Puppet>) -> Rc<Job> {
        let job = self.jobs.start(options, Rc::clone(work) as Rc<dyn Work>).unwrap();
        self.settle();
        job
    }

    fn settle(&self) {
        self.executor.run();
    }

    fn tell(&self, job: &Job, work: &Puppet, step: Step) {
        work.next.set(Some(step));
        job.control().poke();
        self.settle();
    }

    fn ask<F: Future<Output = Result<()>> + 'static>(&self, f: F) -> std::result::Result<(), String> {
        let result = self.executor.block_on(f).map_err(|e| e.to_string());
        self.settle();
        result
    }

    fn events(&self) -> String {
        std::mem::take(&mut *self.events.borrow_mut()).join(", ")
    }
}

fn manual(id: &str) -> JobOptions {
    JobOptions { auto_finalize: false, auto_dismiss: false, ..JobOptions::new(id) }
}

#[test]
fn the_table_is_qemus() {
    // Rows and columns in the order of `ALL`, as in QEMU's `JobSTT`.
    let stt = [
        "0 1 0 0 0 0 0 0 0 0 0",
        "0 0 1 0 0 0 0 0 1 0 1",
        "0 0 0 1 1 0 1 0 1 0 0",
        "0 0 1 0 0 0 0 0 0 0 0",
        "0 0 0 0 0 1 1 0 1 0 0",
        "0 0 0 0 1 0 0 0 0 0 0",
        "0 0 0 0 0 0 0 1 1 0 0",
        "0 0 0 0 0 0 0 0 1 1 0",
        "0 0 0 0 0 0 0 0 1 1 0",
        "0 0 0 0 0 0 0 0 0 0 1",
        "0 0 0 0 0 0 0 0 0 0 0",
    ];
    for (from, row) in JobStatus::ALL.iter().zip(stt) {
        let ours: Vec<&str> =
            JobStatus::ALL.iter().map(|to| if from.leads_to(*to) { "1" } else { "0" }).collect();
        assert_eq!(ours.join(" "), row, "{from:?}");
    }
    let verbs = [
        ("cancel", "0 1 1 1 1 1 1 1 0 0 0"),
        ("pause", "0 1 1 1 1 1 0 0 0 0 0"),
        ("resume", "0 1 1 1 1 1 0 0 0 0 0"),
        ("set-speed", "0 1 1 1 1 1 0 0 0 0 0"),
        ("complete", "0 0 0 0 1 1 0 0 0 0 0"),
        ("finalize", "0 0 0 0 0 0 0 1 0 0 0"),
        ("dismiss", "0 0 0 0 0 0 0 0 0 1 0"),
    ];
    for (verb, (name, row)) in Verb::ALL.iter().zip(verbs) {
        assert_eq!(verb.as_str(), name);
        let ours: Vec<&str> =
            JobStatus::ALL.iter().map(|s| if s.accepts(*verb) { "1" } else { "0" }).collect();
        assert_eq!(ours.join(" "), row, "{name}");
    }
}

#[test]
fn a_job_runs_to_its_end_and_vanishes() {
    let rig = Rig::new();
    let work = Rc::<Puppet>::default();
    let job = rig.start(JobOptions::new("a"), &work);
    assert_eq!(rig.events(), "a created, a running");
    rig.tell(&job, &work, Step::Succeed);
    assert_eq!(rig.events(), "a waiting, a pending, a COMPLETED, a concluded, a null");
    assert_eq!(*work.calls.borrow(), ["prepare", "commit", "clean"]);
    assert!(rig.jobs.query().is_empty());
    assert_eq!(rig.jobs.job("a").unwrap_err().to_string(), "Job not found");
    let e = rig.jobs.block_job("a").unwrap_err();
    assert_eq!((e.kind(), e.to_string().as_str()), (ErrorKind::DeviceNotActive, "Block job 'a' not found"));
}

#[test]
fn a_failure_is_kept_until_it_is_dismissed() {
    let rig = Rig::new();
    let work = Rc::<Puppet>::default();
    let job = rig.start(manual("a"), &work);
    rig.tell(&job, &work, Step::Fail);
    assert_eq!(rig.events(), "a created, a running, a aborting, a COMPLETED It broke, a concluded");
    assert_eq!(*work.calls.borrow(), ["abort", "clean"]);
    assert_eq!(rig.jobs.query()[0].error.as_deref(), Some("It broke"));
    let asked = Rc::clone(&job);
    rig.ask(async move { asked.dismiss().await }).unwrap();
    assert_eq!(rig.events(), "a null");
    assert_eq!(rig.ask(async move { job.dismiss().await }).unwrap_err(), "Job not found");
}

#[test]
fn a_failure_in_the_last_step_takes_everything_back() {
    let rig = Rig::new();
    let work = Rc::<Puppet>::default();
    work.fail_prepare.set(true);
    let job = rig.start(JobOptions::new("a"), &work);
    rig.tell(&job, &work, Step::Succeed);
    assert_eq!(
        rig.events(),
        "a created, a running, a waiting, a pending, a aborting, a COMPLETED Not now, a concluded, a null"
    );
    assert_eq!(*work.calls.borrow(), ["prepare", "abort", "clean"]);
}

#[test]
fn a_pause_waits_for_what_is_in_flight() {
    let rig = Rig::new();
    let work = Rc::<Puppet>::default();
    let job = rig.start(JobOptions::new("a"), &work);
    rig.tell(&job, &work, Step::Begin);
    rig.events();
    let asked = Rc::clone(&job);
    rig.ask(async move { asked.pause().await }).unwrap();
    assert_eq!(rig.events(), "");
    let info = &rig.jobs.query_block()[0];
    assert!(info.paused && info.busy && info.status == JobStatus::Running);
    rig.tell(&job, &work, Step::End);
    assert_eq!(rig.events(), "a paused");
    assert!(job.control().try_enter().is_none());
    // The work ends meanwhile: the job does not.
    rig.tell(&job, &work, Step::Succeed);
    assert_eq!(rig.events(), "");
    rig.ask(async move { job.resume().await }).unwrap();
    assert_eq!(rig.events(), "a running, a waiting, a pending, a COMPLETED, a concluded, a null");
}

#[test]
fn groups_succeed_together_or_not_at_all() {
    for last in [Step::Succeed, Step::Fail] {
        let rig = Rig::new();
        let works: Vec<Rc<Puppet>> = (0..3).map(|_| Rc::default()).collect();
        let members = works
            .iter()
            .zip(["a", "b", "c"])
            .map(|(w, id)| (JobOptions::new(id), Rc::clone(w) as Rc<dyn Work>))
            .collect();
        let jobs = rig.jobs.start_group(members).unwrap();
        rig.settle();
        rig.events();
        rig.tell(&jobs[0], &works[0], Step::Succeed);
        assert_eq!(rig.events(), "a waiting");
        rig.tell(&jobs[1], &works[1], last);
        if last == Step::Succeed {
            assert_eq!(rig.events(), "b waiting");
            rig.tell(&jobs[2], &works[2], Step::Succeed);
            assert_eq!(
                rig.events(),
                "c waiting, a pending, b pending, c pending, a COMPLETED, a concluded, a null, b COMPLETED, \
                 b concluded, b null, c COMPLETED, c concluded, c null"
            );
            for work in &works {
                assert_eq!(*work.calls.borrow(), ["prepare", "commit", "clean"]);
            }
        } else {
            assert_eq!(
                rig.events(),
                "b aborting, a aborting, c aborting, a CANCELLED, a concluded, a null, \
                 b COMPLETED It broke, b concluded, b null, c CANCELLED, c concluded, c null"
            );
            for work in &works {
                assert_eq!(*work.calls.borrow(), ["abort", "clean"]);
            }
        }
    }
}

#[test]
fn the_end_of_the_process_cancels_all() {
    let rig = Rig::new();
    let works: Vec<Rc<Puppet>> = (0..3).map(|_| Rc::default()).collect();
    let a = rig.start(manual("a"), &works[0]);
    let b = rig.start(JobOptions::new("b"), &works[1]);
    let c = rig.start(manual("c"), &works[2]);
    rig.tell(&a, &works[0], Step::Succeed);
    rig.tell(&c, &works[2], Step::Fail);
    rig.events();
    let asked = Rc::clone(&b);
    rig.ask(async move { asked.pause().await }).unwrap();
    let jobs = rig.jobs.clone();
    rig.executor.block_on(async move { jobs.cancel_all().await });
    assert!(rig.jobs.query().is_empty());
    assert_eq!([a.status(), b.status(), c.status()], [JobStatus::Null; 3]);
}

#[test]
fn failed_requests_follow_the_policy() {
    for (policy, errno, action, io_status) in [
        (OnError::Report, Errno::ENOSPC, ErrorAction::Report, IoStatus::Ok),
        (OnError::Ignore, Errno::EIO, ErrorAction::Ignore, IoStatus::Ok),
        (OnError::Stop, Errno::EIO, ErrorAction::Stop, IoStatus::Failed),
        (OnError::Stop, Errno::ENOSPC, ErrorAction::Stop, IoStatus::Nospace),
        (OnError::Enospc, Errno::EIO, ErrorAction::Report, IoStatus::Ok),
        (OnError::Enospc, Errno::ENOSPC, ErrorAction::Stop, IoStatus::Nospace),
        (OnError::Auto, Errno::ENOSPC, ErrorAction::Stop, IoStatus::Nospace),
    ] {
        let rig = Rig::new();
        let job = rig.start(JobOptions::new("a"), &Rc::default());
        rig.events();
        assert_eq!(job.request_failed(policy, true, errno), action);
        let stopped = if action == ErrorAction::Stop { ", a paused" } else { "" };
        assert_eq!(rig.events(), format!("a ERROR true {action:?}{stopped}"));
        assert_eq!(rig.jobs.query_block()[0].io_status, io_status);
        if action == ErrorAction::Stop {
            rig.ask(async move { job.resume().await }).unwrap();
            assert_eq!(rig.jobs.query_block()[0].io_status, IoStatus::Ok);
        }
    }
}

#[test]
fn ids_are_checked() {
    let rig = Rig::new();
    for bad in ["", "1a", "-a", "a b", "ä", "a/b", "#a"] {
        let e = rig.jobs.check_id(bad).unwrap_err();
        assert_eq!(e.to_string(), format!("Invalid job ID '{bad}'"));
    }
    for good in ["a", "A1", "a.b-c_d"] {
        rig.jobs.check_id(good).unwrap();
    }
    let _job = rig.start(JobOptions::new("a"), &Rc::default());
    assert_eq!(rig.jobs.check_id("a").unwrap_err().to_string(), "Job ID 'a' already in use");
    for i in 1..MAX_JOBS {
        rig.jobs.start(JobOptions::new(format!("j{i}")), Rc::new(Puppet::default())).unwrap();
    }
    assert_eq!(rig.jobs.check_id("b").unwrap_err().to_string(), "There are 1024 jobs already");
}

/// What a model of one job does with an operation: plain states, no tasks.
#[derive(Clone, Debug)]
struct Model {
    status: JobStatus,
    paused: bool,
    done: Option<bool>,
    soft: bool,
    options: JobOptions,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Step(Step),
    Cancel(bool),
    Pause,
    Resume,
    Speed,
    Complete,
    Finalize,
    Dismiss,
}

impl Model {
    fn conclude(&mut self) {
        self.status = if self.options.auto_dismiss { JobStatus::Null } else { JobStatus::Concluded };
    }

    /// The work has ended, and nobody wants a rest.
    fn end(&mut self) {
        match self.done {
            Some(true) if self.options.auto_finalize => self.conclude(),
            Some(true) => self.status = JobStatus::Pending,
            Some(false) => self.conclude(),
            None => {}
        }
    }

    fn wake(&mut self) {
        self.paused = false;
        self.status = self.status.resting(false);
    }

    /// Whether it is accepted.
    fn apply(&mut self, op: Op) -> bool {
        let was = self.status;
        let verb = |v: Verb| was.accepts(v);
        match op {
            Op::Step(step) => {
                if self.done.is_some()
                    || !matches!(
                        was,
                        JobStatus::Running | JobStatus::Paused | JobStatus::Ready | JobStatus::Standby
                    )
                {
                    return true;
                }
                match step {
                    Step::Succeed => self.done = Some(true),
                    Step::Fail => self.done = Some(false),
                    // Resting it becomes ready when it goes on.
                    Step::Ready if was == JobStatus::Running => self.status = JobStatus::Ready,
                    _ => {}
                }
                if !self.paused {
                    self.end();
                }
                true
            }
            Op::Cancel(force) => {
                if !verb(Verb::Cancel) {
                    return false;
                }
                let ready = matches!(was, JobStatus::Ready | JobStatus::Standby);
                let soft = !force && self.soft && ready;
                self.wake();
                if !soft {
                    self.done = Some(false);
                } else if self.done.is_none() {
                    self.done = Some(true);
                }
                self.end();
                true
            }
            Op::Pause => {
                if !verb(Verb::Pause) || self.paused {
                    return false;
                }
                self.paused = true;
                self.status = was.resting(true);
                true
            }
            Op::Resume => {
                if !self.paused || !verb(Verb::Resume) {
                    return false;
                }
                self.wake();
                self.end();
                true
            }
            Op::Speed => verb(Verb::SetSpeed),
            Op::Complete => {
                if !verb(Verb::Complete) {
                    return false;
                }
                self.done.get_or_insert(true);
                if !self.paused {
                    self.end();
                }
                true
            }
            Op::Finalize => {
                if verb(Verb::Finalize) {
                    self.conclude();
                }
                verb(Verb::Finalize)
            }
            Op::Dismiss => {
                if verb(Verb::Dismiss) {
                    self.status = JobStatus::Null;
                }
                verb(Verb::Dismiss)
            }
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => prop_oneof![Just(Step::Ready), Just(Step::Succeed), Just(Step::Fail)].prop_map(Op::Step),
        1 => any::<bool>().prop_map(Op::Cancel),
        3 => Just(Op::Pause),
        3 => Just(Op::Resume),
        1 => Just(Op::Speed),
        2 => Just(Op::Complete),
        1 => Just(Op::Finalize),
        1 => Just(Op::Dismiss),
    ]
}

proptest! {
    #[test]
    fn a_job_does_what_the_model_does(
        ops in proptest::collection::vec(op(), 1..24),
        auto_finalize in any::<bool>(),
        auto_dismiss in any::<bool>(),
        soft in any::<bool>(),
    ) {
        let rig = Rig::new();
        let options = JobOptions { auto_finalize, auto_dismiss, ..JobOptions::new("a") };
        let work = Rc::new(Puppet { soft, ..Puppet::default() });
        let job = rig.start(options.clone(), &work);
        let mut model = Model { status: JobStatus::Running, paused: false, done: None, soft, options };
        for op in ops {
            // A step that the work takes while it waits in `ready` for its rest to end would come later than the model says.
            if model.paused && matches!(op, Op::Step(Step::Ready)) {
                continue;
            }
            let status = job.status();
            let asked = Rc::clone(&job);
            let answer = match op {
                Op::Step(step) => { rig.tell(&job, &work, step); Ok(()) }
                Op::Cancel(force) => rig.ask(async move { asked.cancel(force).await }),
                Op::Pause => rig.ask(async move { asked.pause().await }),
                Op::Resume => rig.ask(async move { asked.resume().await }),
                Op::Speed => rig.ask(async move { asked.set_speed(5).await }),
                Op::Complete => rig.ask(async move { asked.complete().await }),
                Op::Finalize => rig.ask(async move { asked.finalize().await }),
                Op::Dismiss => rig.ask(async move { asked.dismiss().await }),
            };
            let accepted = model.apply(op);
            prop_assert_eq!(answer.is_ok(), accepted, "{:?} in {:?}: {:?}", op, status, answer);
            prop_assert_eq!(job.status(), model.status, "{:?} in {:?}", op, status);
            if let Err(text) = answer {
                let known = text.starts_with("Job 'a' in state '") || text == "Job not found"
                    || text == "Job is already paused" || text == "Can't resume a job that was not paused";
                prop_assert!(known, "{}", text);
            }
        }
        // Whatever was done: exactly one of the two ends, once.
        let calls = work.calls.borrow().join(" ");
        let ends = ["", "prepare commit clean", "abort clean"];
        prop_assert!(ends.contains(&calls.as_str()), "{}", calls);
        prop_assert_eq!(calls.is_empty(), !matches!(job.status(), JobStatus::Concluded | JobStatus::Null));
    }
}
