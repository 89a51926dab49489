//! Comparison with the storage daemon of QEMU 10.0: the same verbs to its mirror job and to a job of ours that behaves like
//! one, the same answers and the same events expected. Skipped, with a line that says so, where that program is not
//! installed. `RINGBLK_SEED` repeats a sequence.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use graph::BoxFut;
use host::exec::MainExecutor;
use ringblk_jobs::job::{JobStatus, JobType, Site, Work};
use ringblk_jobs::{JobEvent, JobOptions, Jobs};
use serde_json::{Value, json};

const QSD: &str = "/usr/bin/qemu-storage-daemon";

/// How a mirror looks from outside: ready as soon as it may move data, then until it is told to end.
struct MirrorLike {
    slow: bool,
}

impl Work for MirrorLike {
    fn kind(&self) -> JobType {
        JobType::Mirror
    }
    fn run<'a>(&'a self, at: &'a Site) -> BoxFut<'a, ()> {
        Box::pin(async move {
            if !self.slow {
                at.ready().await?;
            }
            at.ended().await.map(drop)
        })
    }
    fn completes(&self) -> bool {
        true
    }
    fn cancels_softly(&self, ready: bool) -> bool {
        ready
    }
}

struct Qsd {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    events: Vec<String>,
}

impl Qsd {
    fn start() -> Qsd {
        let mut child = Command::new(QSD)
            .args(["--chardev", "stdio,id=m", "--monitor", "m"])
            .args(["--blockdev", "null-co,node-name=a,size=16777216"])
            .args(["--blockdev", "null-co,node-name=b,size=16777216"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut qsd = Qsd { child, input, output, events: Vec::new() };
        qsd.line();
        qsd.ask("qmp_capabilities", json!({})).unwrap();
        qsd
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.output.read_line(&mut line).unwrap() > 0, "the storage daemon has ended");
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        writeln!(self.input, "{}", json!({"execute": command, "arguments": arguments})).unwrap();
        loop {
            let message = self.line();
            if let Some(event) = message["event"].as_str() {
                let data = &message["data"];
                let text = |key: &str| data[key].as_str().unwrap_or("-").to_owned();
                self.events.push(match event {
                    "JOB_STATUS_CHANGE" => text("status"),
                    "BLOCK_JOB_COMPLETED" if data["error"].is_string() => {
                        format!("{event} {}", text("error"))
                    }
                    _ => event.to_owned(),
                });
            } else if message["error"].is_object() {
                return Err(message["error"]["desc"].as_str().unwrap().to_owned());
            } else {
                return Ok(message["return"].clone());
            }
        }
    }

    /// Waits until the job is in this state; `Null`: gone.
    fn settle(&mut self, status: JobStatus, what: &str) {
        let patience = Instant::now() + Duration::from_secs(60);
        loop {
            let jobs = self.ask("query-jobs", json!({})).unwrap();
            let now = jobs[0]["status"].as_str().unwrap_or("null").to_owned();
            if now == status.as_str() {
                return;
            }
            assert!(Instant::now() < patience, "{what}: the peer is {now}, we are {}", status.as_str());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Ours {
    executor: MainExecutor,
    jobs: Jobs,
    events: Rc<RefCell<Vec<String>>>,
}

impl Ours {
    fn new() -> Ours {
        let executor = MainExecutor::new().unwrap();
        let events = Rc::<RefCell<Vec<String>>>::default();
        let log = Rc::clone(&events);
        let jobs = Jobs::new(executor.clone(), move |event| {
            log.borrow_mut().push(match event {
                JobEvent::Status { status, .. } => status.as_str().to_owned(),
                JobEvent::Completed(p) => match p.error {
                    Some(e) => format!("BLOCK_JOB_COMPLETED {e}"),
                    None => "BLOCK_JOB_COMPLETED".to_owned(),
                },
                JobEvent::Cancelled(_) => "BLOCK_JOB_CANCELLED".to_owned(),
                JobEvent::Ready(_) => "BLOCK_JOB_READY".to_owned(),
                JobEvent::Pending { .. } => "BLOCK_JOB_PENDING".to_owned(),
                JobEvent::Error { .. } => "BLOCK_JOB_ERROR".to_owned(),
            });
        });
        Ours { executor, jobs, events }
    }

    fn ask(&self, command: &'static str, arguments: Value) -> Result<(), String> {
        let jobs = self.jobs.clone();
        let answer = self.executor.block_on(async move {
            let block = command.starts_with("block-");
            let id = arguments["id"].as_str().or(arguments["device"].as_str()).unwrap();
            let job = if block { jobs.block_job(id) } else { jobs.job(id) }?;
            match command.strip_prefix("block-").unwrap_or(command) {
                "job-cancel" if block => job.block_cancel(arguments["force"] == true).await,
                "job-cancel" => job.cancel(true).await,
                "job-pause" => job.pause().await,
                "job-resume" => job.resume().await,
                "job-set-speed" => job.set_speed(arguments["speed"].as_i64().unwrap()).await,
                "job-complete" => job.complete().await,
                "job-finalize" => job.finalize().await,
                "job-dismiss" => job.dismiss().await,
                other => panic!("{other}"),
            }
        });
        self.executor.run();
        answer.map_err(|e| e.to_string())
    }

    fn status(&self) -> JobStatus {
        self.jobs.query().first().map_or(JobStatus::Null, |j| j.status)
    }
}

fn verbs() -> Vec<(&'static str, Value)> {
    let (id, device) = (json!({"id": "j"}), json!({"device": "j"}));
    vec![
        ("job-pause", id.clone()),
        ("job-pause", id.clone()),
        ("job-resume", id.clone()),
        ("job-resume", id.clone()),
        ("job-complete", id.clone()),
        ("job-finalize", id.clone()),
        ("job-dismiss", id.clone()),
        ("job-cancel", id.clone()),
        ("block-job-pause", device.clone()),
        ("block-job-resume", device.clone()),
        ("block-job-complete", device.clone()),
        ("block-job-finalize", id.clone()),
        ("block-job-dismiss", id.clone()),
        ("block-job-cancel", device),
        ("block-job-cancel", json!({"device": "j", "force": true})),
        ("block-job-set-speed", json!({"device": "j", "speed": -1})),
        ("block-job-set-speed", json!({"device": "j", "speed": 65536})),
        ("job-cancel", json!({"id": "nobody"})),
        ("block-job-cancel", json!({"device": "nobody"})),
    ]
}

fn sequence(qsd: &mut Qsd, seed: u64) {
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |n: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 11) as usize % n
    };
    let (slow, auto_finalize, auto_dismiss) = (below(3) == 0, below(2) == 0, below(2) == 0);
    let ours = Ours::new();
    let speed = if slow { 65536 } else { 0 };
    let options = JobOptions { speed, auto_finalize, auto_dismiss, ..JobOptions::new("j") };
    ours.jobs.start(options, Rc::new(MirrorLike { slow })).unwrap();
    ours.executor.run();
    let arguments = json!({
        "job-id": "j", "device": "a", "target": "b", "sync": "full", "speed": speed,
        "auto-finalize": auto_finalize, "auto-dismiss": auto_dismiss,
    });
    qsd.events.clear();
    qsd.ask("blockdev-mirror", arguments).unwrap();
    let mut told = format!("seed {seed}: slow {slow}, finalize {auto_finalize}, dismiss {auto_dismiss}");
    qsd.settle(ours.status(), &told);
    let all = verbs();
    let mut steps: Vec<(&'static str, Value)> =
        (0..1 + below(9)).map(|_| all[below(all.len())].clone()).collect();
    // Whatever state it is in by then: gone afterwards.
    steps.push(("job-cancel", json!({"id": "j"})));
    steps.push(("job-dismiss", json!({"id": "j"})));
    for (command, arguments) in steps {
        told = format!("{told}, {command} {arguments}");
        let answer = ours.ask(command, arguments.clone());
        let peer = qsd.ask(command, arguments).map(drop);
        assert_eq!(answer, peer, "{told}");
        qsd.settle(ours.status(), &told);
    }
    assert_eq!(ours.status(), JobStatus::Null, "{told}");
    assert_eq!(*ours.events.borrow(), qsd.events, "{told}");
}

#[test]
fn verbs_are_answered_and_events_sent_as_by_the_peer() {
    if !Path::new(QSD).exists() {
        eprintln!("skipped: {QSD} is not installed");
        return;
    }
    let mut qsd = Qsd::start();
    match std::env::var("RINGBLK_SEED") {
        Ok(seed) => sequence(&mut qsd, seed.parse().unwrap()),
        Err(_) => (0..150).for_each(|seed| sequence(&mut qsd, seed)),
    }
}
