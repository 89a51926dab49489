//! blkdebug: requests fail as they do below QEMU's, and an image whose file fails once at any point keeps what it
//! acknowledged.

use conformance::Discarded;
use conformance::data::{Setting, Subject};
use conformance::request::{Client, Way};
use conformance::rng::Rng;
use graph::{DebugEvent, Errno, Map, Op, ZeroFlags};
use host::exec::block_on;
use serde_json::{Value, json};

use crate::common::tool;
use crate::table::{Table, nameless};

/// A request both sides can make.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, u64),
    Zero(u64, u64),
    Read(u64, u64),
    Discard(u64, u64),
    /// Neither side says how it went: `qemu-io` does not.
    Flush,
}

impl Step {
    fn command(self) -> String {
        match self {
            Step::Write(at, len) => format!("write {at} {len}"),
            Step::Zero(at, len) => format!("write -z {at} {len}"),
            Step::Read(at, len) => format!("read {at} {len}"),
            Step::Discard(at, len) => format!("discard {at} {len}"),
            Step::Flush => "flush".to_owned(),
        }
    }

    async fn run(self, client: &Client) -> Option<bool> {
        let result = match self {
            Step::Write(at, len) => client.write(at, &vec![0xcd; len as usize], false).await,
            Step::Zero(at, len) => client.zero(at, len, ZeroFlags::empty()).await,
            Step::Read(at, len) => client.read(at, len).await.map(drop),
            Step::Discard(at, len) => client.discard(at, len).await,
            Step::Flush => {
                let _ = client.flush().await;
                return None;
            }
        };
        Some(result.is_ok())
    }
}

/// Which of the steps succeed with us.
fn ours(table: &mut Table, node: Value, steps: &'static [Step]) -> Vec<bool> {
    table.open(node);
    let results = table.client(move |client| async move {
        let mut results = Vec::new();
        for step in steps {
            results.extend(step.run(&client).await);
        }
        results
    });
    table.close();
    results
}

/// Which of them succeed with QEMU, in order.
fn theirs(node: &Value, steps: &[Step]) -> Option<Vec<bool>> {
    tool("qemu-io", &["--version"])?;
    let commands: Vec<String> = steps.iter().map(|s| format!("-c '{}'", s.command())).collect();
    // Its own choice of cache would have it flush after each write; one pipe keeps answers and errors in order.
    let line = format!("qemu-io -t writeback {} 'json:{}' 2>&1", commands.join(" "), nameless(node));
    let output = tool("sh", &["-c", &line])?;
    let text = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<bool> = text
        .lines()
        .filter(|l| {
            // Not what the format itself says of its troubles.
            let said = ["read failed: ", "write failed: ", "discard failed: "];
            said.iter().any(|s| l.starts_with(s)) || l.contains(" ops; ")
        })
        .map(|l| l.contains(" ops; "))
        .collect();
    let expected = steps.iter().filter(|s| !matches!(s, Step::Flush)).count();
    assert_eq!(answers.len(), expected, "{text}");
    Some(answers)
}

const K4: u64 = 4096;

const STEPS: [Step; 16] = [
    Step::Write(0, K4),
    Step::Read(0, 512),
    Step::Zero(2 * K4, K4),
    Step::Write(K4, 512),
    Step::Flush,
    Step::Read(512, 512),
    Step::Discard(2 * K4, K4),
    Step::Write(512, 1024),
    Step::Read(2 * K4, 512),
    Step::Flush,
    Step::Zero(0, 512),
    Step::Read(0, 16 * K4),
    Step::Write(16 * K4, 16 * K4),
    Step::Write(16 * K4, 16 * K4),
    Step::Read(20 * K4, K4),
    Step::Discard(0, 64 * K4),
];

static ALL_STEPS: [Step; 16] = STEPS;
/// The same without discards: whether a format has anything to do for one is each implementation's own affair.
static DATA_STEPS: [Step; 14] = [
    STEPS[0], STEPS[1], STEPS[2], STEPS[3], STEPS[4], STEPS[5], STEPS[7], STEPS[8], STEPS[9], STEPS[10],
    STEPS[11], STEPS[12], STEPS[13], STEPS[14],
];

/// Sets of rules: those of `inject-error` and of `set-state`.
fn rule_sets(events: &[&str]) -> Vec<(Value, Value)> {
    let mut sets = Vec::new();
    for event in events {
        for more in [
            json!({}),
            json!({"once": true}),
            json!({"sector": 1}),
            json!({"iotype": "read"}),
            json!({"iotype": "write", "once": true}),
            json!({"state": 2}),
        ] {
            let mut rule = json!({"event": event, "errno": 28});
            rule.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            sets.push((json!([rule]), json!([{"event": "write_aio", "state": 1, "new_state": 2}])));
        }
    }
    sets.push((
        json!([{"event": "read_aio", "state": 2, "errno": 28, "once": true},
               {"event": "write_aio", "state": 3, "errno": 28, "iotype": "write"}]),
        json!([{"event": "read_aio", "state": 1, "new_state": 2}, {"event": "read_aio", "state": 2, "new_state": 3},
               {"event": "write_aio", "state": 3, "new_state": 1}]),
    ));
    sets
}

fn compare(events: &[&str], steps: &'static [Step], make: impl Fn(&Table, Value) -> Option<Value>) {
    let mut differ = Vec::new();
    for (inject, set) in rule_sets(events) {
        let results: Option<Vec<Vec<bool>>> = [true, false]
            .iter()
            .map(|own| {
                // Fresh images for each side.
                let mut table = Table::new();
                let file = table.file("file", &[0x11; 1 << 20]);
                let debug = json!({"driver": "blkdebug", "image": file, "discard": "unmap",
                                   "inject-error": inject, "set-state": set});
                let node = make(&table, debug)?;
                if *own { Some(ours(&mut table, node, steps)) } else { theirs(&node, steps) }
            })
            .collect();
        let Some(results) = results else { return };
        if results[0] != results[1] {
            differ.push(format!("{inject} {set}\n  ours   {:?}\n  QEMU's {:?}", results[0], results[1]));
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}

#[test]
fn below_raw_the_same_requests_fail_as_with_qemu() {
    let events = [
        "none",
        "read_aio",
        "write_aio",
        "pwritev",
        "pwritev_done",
        "pwritev_zero",
        "flush_to_os",
        "flush_to_disk",
    ];
    compare(&events, &ALL_STEPS, |_, debug| {
        Some(json!({"driver": "raw", "file": debug, "discard": "unmap"}))
    });
}

#[test]
fn below_qcow2_the_same_requests_fail_as_with_qemu() {
    // Points on the way of data. Where metadata is written, and when, is each implementation's own affair.
    let events = ["read_aio", "write_aio", "l2_load"];
    compare(&events, &DATA_STEPS, |table, mut debug| {
        let path = table.path("file");
        let path = path.to_str().unwrap();
        tool("qemu-img", &["--version"])?;
        let made = tool("qemu-img", &["create", "-q", "-f", "qcow2", path, "1M"])?;
        assert!(made.status.success());
        // Written, so that nothing is allocated while it is looked at.
        let filled = tool("qemu-io", &["-f", "qcow2", "-c", "write -P 17 0 1M", path])?;
        assert!(filled.status.success());
        debug["discard"] = json!("ignore");
        Some(json!({"driver": "qcow2", "file": debug}))
    });
}

#[test]
fn without_rules_left_requests_are_mapped_again() {
    let mut table = Table::new();
    let image = table.file("file", &[7; 1 << 16]);
    table.open(json!({"driver": "blkdebug", "image": image,
                      "inject-error": [{"event": "none", "sector": 3, "once": true}]}));
    let driver = table.graph.node("top").unwrap().driver().clone();
    assert!(matches!(driver.map(Op::Read, 0, 512), Map::Drive));
    assert_eq!(table.read(0, 512), Ok(vec![7; 512]));
    assert_eq!(table.read(1024, 1024), Err(Errno::EIO));
    assert_eq!(table.read(1024, 1024), Ok(vec![7; 1024]));
    assert!(matches!(driver.map(Op::Read, 0, 512), Map::Child { child: 0, offset: 0, len: 512 }));
    // Growing has to come by.
    assert!(matches!(driver.map(Op::Write, 1 << 16, 512), Map::Drive));
}

#[test]
fn permissions_are_taken_and_kept_from_others() {
    let table = Table::new();
    table.add(table.file("file", &[7; 1 << 16])).unwrap();
    let debug = |name: &str, more: Value| {
        let mut options = json!({"driver": "blkdebug", "node-name": name, "image": "file"});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        table.add(options)
    };
    debug("takes", json!({"take-child-perms": ["write"]})).unwrap();
    let e = debug("unshares", json!({"unshare-child-perms": ["write"]})).unwrap_err();
    assert!(
        e.starts_with("Permission conflict on node 'file': permissions 'write' are both required by"),
        "{e}"
    );
    debug("shares", json!({"unshare-child-perms": ["resize"]})).unwrap();
    let e = block_on(table.graph.block_resize("file", 4096)).unwrap_err().to_string();
    assert!(e.contains("unshared by node 'shares'"), "{e}");
}

#[test]
fn its_own_options_stay_and_its_child_may_be_another_one() {
    let mut table = Table::new();
    table.add(table.file("one", &[1; 1 << 16])).unwrap();
    table.add(table.file("two", &[2; 1 << 16])).unwrap();
    let debug = |image: &str, more: Value| {
        let mut options = json!({"driver": "blkdebug", "node-name": "top", "image": image});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    let reopen = |table: &Table, options: Value| {
        block_on(table.graph.blockdev_reopen(&[options])).map_err(|e| e.to_string())
    };
    let once = json!({"align": 512, "inject-error": [{"event": "none", "once": true}]});
    table.open(debug("one", once.clone()));
    let refused = |more: Value| reopen(&table, debug("one", more)).unwrap_err();
    assert_eq!(
        refused(json!({"align": 1024, "inject-error": [{"event": "none", "once": true}]})),
        "Cannot change the option 'align'"
    );
    assert_eq!(refused(json!({"align": 512})), "Option 'inject-error' cannot be reset to its default value");
    assert_eq!(table.read(0, 512), Err(Errno::EIO));
    assert_eq!(table.read(0, 512), Ok(vec![1; 512]));
    reopen(&table, debug("two", once)).unwrap();
    // The rule was used up before.
    assert_eq!(table.read(0, 512), Ok(vec![2; 512]));
}

#[test]
fn rules_come_out_of_a_file_too() {
    let mut table = Table::new();
    let image = table.file("file", &[7; 1 << 16]);
    let config = table.path("rules");
    std::fs::write(&config, "[inject-error]\nevent = \"none\"\nerrno = \"28\"\nsector = \"1\"\n").unwrap();
    let with = |path: &str| {
        json!({"driver": "blkdebug", "node-name": "n", "image": image, "config": path,
                                   "inject-error": [{"event": "none", "errno": 5}]})
    };
    let missing = table.path("missing");
    assert_eq!(
        table.add(with(missing.to_str().unwrap())).unwrap_err(),
        "Could not read blkdebug config file: No such file or directory"
    );
    assert_eq!(
        table.add(with("/dev/zero")).unwrap_err(),
        "Could not read blkdebug config file: it is not a regular file"
    );
    table.open(with(config.to_str().unwrap()));
    assert_eq!(table.read(512, 512), Err(Errno::ENOSPC));
    assert_eq!(table.read(0, 512), Err(Errno::EIO));
}

/// Points a qcow2 image passes while it is used as `storm` does.
const POINTS: [DebugEvent; 23] = [
    DebugEvent::None,
    DebugEvent::L1Update,
    DebugEvent::L2Load,
    DebugEvent::L2Update,
    DebugEvent::ReadAio,
    DebugEvent::ReadBackingAio,
    DebugEvent::WriteAio,
    DebugEvent::CowRead,
    DebugEvent::CowWrite,
    DebugEvent::RefblockLoad,
    DebugEvent::RefblockUpdatePart,
    DebugEvent::RefblockAlloc,
    DebugEvent::RefblockAllocWrite,
    DebugEvent::RefblockAllocHookup,
    DebugEvent::ClusterAlloc,
    DebugEvent::ClusterAllocSpace,
    DebugEvent::ClusterFree,
    DebugEvent::ReftableGrow,
    DebugEvent::RefblockAllocWriteTable,
    DebugEvent::RefblockAllocSwitchTable,
    DebugEvent::FlushToOs,
    DebugEvent::FlushToDisk,
    DebugEvent::Pwritev,
];

const STORM: u64 = 5 << 19;

/// Random requests on an image whose file fails one request after `event`; afterwards what was acknowledged is there, and
/// `qemu-img check` finds no corruption. Whether the point was passed.
fn storm(event: DebugEvent, seed: u64) -> Option<bool> {
    let mut table = Table::new();
    let mut rng = Rng::new(seed);
    let backing = rng.data(STORM / 2);
    std::fs::write(table.path("base"), &backing).unwrap();
    let (image, base) = (table.path("image"), table.path("base"));
    let (image, base) = (image.to_str().unwrap(), base.to_str().unwrap());
    let size = STORM.to_string();
    // Small clusters and wide counts: a refcount block serves 64 clusters, the refcount table 64 blocks.
    let options = "cluster_size=512,refcount_bits=64";
    let args = ["create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", image, &size];
    assert!(tool("qemu-img", &args)?.status.success());
    let file = table.existing("image");
    let debug = json!({"driver": "blkdebug", "node-name": "debug", "image": file, "discard": "unmap",
                       "inject-error": [{"event": event, "errno": 5, "once": true}]});
    let node = |file: Value| {
        json!({"driver": "qcow2", "file": file, "discard": "unmap", "l2-cache-size": 4096,
               "l2-cache-entry-size": 512, "refcount-cache-size": 2048,
               "backing": {"driver": "file", "filename": base}})
    };
    let mut options = node(debug);
    options["node-name"] = json!("top");
    let known = match table.add(options) {
        // It was the opening that failed: all of the image is as it was.
        Err(_) => None,
        Ok(()) => {
            table.attach("top");
            let data = backing.clone();
            let model = table.on(move |io| async move {
                let (content, discarded) = (conformance::Content::Kept, Discarded::Anything);
                let setting = Setting { size: STORM, content, discarded, faults: true, torn_unit: 1, seed };
                let mut subject = Subject::new(io, Way::Mapped, setting);
                subject.model.write(0, &data);
                for step in 0..150 {
                    subject.step(&mut rng).await.map_err(|e| format!("step {step}: {e}"))?;
                }
                // A failure may have been this flush's own; but a barrier that failed is not forgotten.
                let client = Client { io: subject.io().clone(), way: Way::Driven };
                let _ = client.flush().await;
                let durable = client.flush().await.is_ok();
                Ok::<_, String>(durable.then_some((subject.model, setting)))
            });
            // What was never made durable may be gone.
            model.unwrap_or_else(|e| panic!("{event:?}, RINGBLK_SEED={seed}: {e}"))
        }
    };
    let fired = match table.graph.node("debug") {
        Ok(node) => matches!(node.driver().map(Op::Read, 0, 512), Map::Child { .. }),
        Err(_) => true,
    };
    table.close();
    let check = tool("qemu-img", &["check", "-f", "qcow2", image])?;
    let text = String::from_utf8_lossy(&check.stdout).into_owned() + &String::from_utf8_lossy(&check.stderr);
    // 3: leaks alone.
    assert!(matches!(check.status.code(), Some(0 | 3)), "{event:?}, RINGBLK_SEED={seed}: {text}");
    let file = table.existing("image");
    table.open(node(file));
    let after = table.on(move |io| async move {
        match known {
            Some((model, setting)) => {
                let setting = Setting { faults: false, ..setting };
                Subject::with_model(io, Way::Driven, setting, model).read_all().await
            }
            None => Ok(()),
        }
    });
    after.unwrap_or_else(|e| panic!("{event:?}, RINGBLK_SEED={seed}, opened again: {e}"));
    Some(fired)
}

#[test]
fn an_image_survives_one_failure_at_any_point() {
    let mut silent = Vec::new();
    for event in POINTS {
        let mut fired = false;
        for seed in conformance::seeds() {
            let Some(this) = storm(event, seed) else { return };
            fired |= this;
        }
        if !fired {
            silent.push(event);
        }
    }
    assert!(silent.is_empty(), "points that nobody passed: {silent:?}");
}
