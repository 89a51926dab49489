//! Quorums whose children lie, fail, come and go; and the same files read by QEMU's quorum.

use graph::{Change, Errno, GraphEvent, QuorumOp, Roles};
use host::exec::block_on;
use serde_json::{Value, json};

use crate::table::{Table, nameless, qemu_io};

const KIB: u64 = 1024;

fn bad(op: QuorumOp, error: Option<Errno>, node: &str, sector: u64, sectors: u64) -> GraphEvent {
    GraphEvent::QuorumReportBad {
        op,
        error: error.map(|e| e.to_string()),
        node_name: node.to_owned(),
        sector_num: sector,
        sectors_count: sectors,
    }
}

fn failure(sector: u64, sectors: u64) -> GraphEvent {
    GraphEvent::QuorumFailure { reference: "top".to_owned(), sector_num: sector, sectors_count: sectors }
}

fn quorum(threshold: u32, children: Vec<Value>, more: Value) -> Value {
    let mut options = json!({"driver": "quorum", "vote-threshold": threshold, "children": children});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    options
}

/// Files of 64 KiB filled with these bytes, as inline nodes `f0`, `f1`...
fn files(table: &Table, bytes: &[u8]) -> Vec<Value> {
    let each = bytes.iter().enumerate();
    each.map(|(n, b)| table.file(&format!("f{n}"), &vec![*b; 64 << 10])).collect()
}

/// The node, failing as the rules say.
fn failing(name: &str, image: Value, rules: Value) -> Value {
    json!({"driver": "blkdebug", "node-name": name, "image": image, "inject-error": rules})
}

#[test]
fn the_majority_is_right_and_the_other_one_is_told_of() {
    let mut table = Table::new();
    let children = files(&table, &[9, 7, 7]);
    table.open(quorum(2, children, json!({})));
    assert_eq!(table.read(4 * KIB, 4 * KIB), Ok(vec![7; 4096]));
    assert_eq!(table.events(), [bad(QuorumOp::Read, None, "f0", 8, 8)]);
    // Nobody asked for a repair.
    assert_eq!(table.content("f0"), vec![9; 64 << 10]);
    // Written, they are of one mind; around it not.
    table.write(4 * KIB, vec![3; 4096]).unwrap();
    assert_eq!(table.read(4 * KIB, 4 * KIB), Ok(vec![3; 4096]));
    assert_eq!(table.events(), []);
}

#[test]
fn what_was_outvoted_is_written_anew_if_wanted() {
    let mut table = Table::new();
    let children = files(&table, &[7, 7, 9]);
    table.open(quorum(2, children, json!({"rewrite-corrupted": true})));
    assert_eq!(table.read(512, 1024), Ok(vec![7; 1024]));
    assert_eq!(table.events(), [bad(QuorumOp::Read, None, "f2", 1, 2)]);
    assert_eq!(table.read(512, 1024), Ok(vec![7; 1024]));
    assert_eq!(table.events(), []);
    table.close();
    let content = table.content("f2");
    assert_eq!((content[511], &content[512..1536], content[1536]), (9, &[7; 1024][..], 9));
}

#[test]
fn without_enough_votes_there_is_no_answer() {
    let mut table = Table::new();
    let children = files(&table, &[1, 2, 3]);
    table.open(quorum(2, children, json!({})));
    assert_eq!(table.read(0, 512), Err(Errno::EIO));
    assert_eq!(table.events(), [failure(0, 1)]);
    table.write(0, vec![4; 512]).unwrap();
    assert_eq!(table.read(0, 512), Ok(vec![4; 512]));
    let mut table = Table::new();
    let children = files(&table, &[1, 2]);
    table.open(quorum(2, children, json!({"blkverify": true})));
    assert_eq!(table.read(1024, 512), Err(Errno::EIO));
    assert_eq!(table.events(), [failure(2, 1)]);
}

#[test]
fn a_child_may_fail_but_not_too_many() {
    let mut table = Table::new();
    let mut children = files(&table, &[7, 7, 7]);
    let rules = json!([{"event": "none", "sector": 0, "errno": 28}, {"event": "none", "iotype": "flush"}]);
    children[1] = failing("broken", children[1].take(), rules);
    // Fails beside the other one for one sector.
    children[2] = failing(
        "weak",
        children[2].take(),
        json!([{"event": "none", "sector": 0, "errno": 28,
                                                                "iotype": "write"}]),
    );
    table.open(quorum(2, children, json!({})));
    assert_eq!(table.read(0, 1024), Ok(vec![7; 1024]));
    assert_eq!(table.events(), [bad(QuorumOp::Read, Some(Errno::ENOSPC), "broken", 0, 2)]);
    assert_eq!(table.flush(), Ok(()));
    assert_eq!(table.events(), [bad(QuorumOp::Flush, Some(Errno::EIO), "broken", 0, 128)]);
    table.write(512, vec![5; 512]).unwrap();
    assert_eq!(table.events(), []);
    assert_eq!(table.write(0, vec![5; 512]), Err(Errno::ENOSPC));
    assert_eq!(
        table.events(),
        [
            bad(QuorumOp::Write, Some(Errno::ENOSPC), "broken", 0, 1),
            bad(QuorumOp::Write, Some(Errno::ENOSPC), "weak", 0, 1),
            failure(0, 1),
        ]
    );
}

#[test]
fn one_after_the_other_until_one_answers() {
    let mut table = Table::new();
    let mut children = files(&table, &[1, 2, 3]);
    children[0] =
        failing("first", children[0].take(), json!([{"event": "none", "sector": 4, "iotype": "read"}]));
    table.open(quorum(1, children, json!({"read-pattern": "fifo"})));
    assert_eq!(table.read(0, 512), Ok(vec![1; 512]));
    assert_eq!(table.events(), []);
    assert_eq!(table.read(2048, 512), Ok(vec![2; 512]));
    assert_eq!(table.events(), [bad(QuorumOp::Read, Some(Errno::EIO), "first", 4, 1)]);
}

#[test]
fn a_child_that_missed_a_write_is_not_read_from() {
    let mut table = Table::new();
    let mut children = files(&table, &[1, 1, 1]);
    children[0] =
        failing("first", children[0].take(), json!([{"event": "none", "iotype": "write", "once": true}]));
    table.open(quorum(2, children, json!({"read-pattern": "fifo"})));
    assert_eq!(table.read(0, 512), Ok(vec![1; 512]));
    table.write(0, vec![2; 512]).unwrap();
    assert_eq!(table.events(), [bad(QuorumOp::Write, Some(Errno::EIO), "first", 0, 1)]);
    assert_eq!(table.read(0, 512), Ok(vec![2; 512]));
    assert_eq!(table.events(), []);
}

#[test]
fn children_come_and_go() {
    let mut table = Table::new();
    let children = files(&table, &[7, 7]);
    table.add(table.file("extra", &[9; 64 << 10])).unwrap();
    table.add(table.file("short", &[9; 4096])).unwrap();
    table.open(quorum(2, children, json!({})));
    let driver = table.graph.node("top").unwrap().driver().clone();
    assert_eq!(
        driver.remove_child(0).unwrap_err().to_string(),
        "The number of children cannot be lower than the vote threshold 2"
    );
    let change = |change: Change| block_on(table.graph.change(&[change])).unwrap();
    let attach = |node: &str| {
        let (name, roles) = driver.add_child().unwrap();
        assert_eq!(roles, Roles::DATA);
        let (parent, node) = ("top".to_owned(), node.to_owned());
        change(Change::AttachChild { parent, child: name.clone(), roles, node });
        name
    };
    let detach = |child: &str| {
        let (parent, child) = ("top".to_owned(), child.to_owned());
        change(Change::DetachChild { parent, child });
    };
    assert_eq!(attach("extra"), "children.2");
    assert_eq!(table.read(0, 512), Ok(vec![7; 512]));
    assert_eq!(table.events(), [bad(QuorumOp::Read, None, "extra", 0, 1)]);
    table.write(0, vec![5; 512]).unwrap();
    assert!(driver.remove_child(0).is_ok());
    detach("children.0");
    // The new one has a vote.
    assert_eq!(table.read(0, 512), Ok(vec![5; 512]));
    assert_eq!(table.read(512, 512), Err(Errno::EIO));
    assert!(driver.remove_child(1).is_err());
    table.events();
    // Names are not used again, but for the last one.
    assert_eq!(attach("short"), "children.3");
    // What it has not cannot be read or written there.
    assert_eq!(table.write(8 * KIB, vec![6; 512]), Ok(()));
    assert_eq!(table.events(), [bad(QuorumOp::Write, Some(Errno::EIO), "short", 16, 1)]);
    assert_eq!(table.content("short").len(), 4096);
    detach("children.3");
    assert_eq!(driver.add_child().unwrap().0, "children.3");
    assert_eq!(table.read(8 * KIB, 512), Ok(vec![6; 512]));
    assert_eq!(table.events(), []);
}

#[test]
fn refusals_name_what_is_wrong() {
    let table = Table::new();
    let children = files(&table, &[1, 1]);
    let add = |options: Value| {
        let mut options = options;
        options["node-name"] = json!("q");
        table.add(options).unwrap_err()
    };
    let longer = table.file("longer", &[0; 65 << 10]);
    assert_eq!(
        add(quorum(1, vec![children[0].clone(), longer], json!({}))),
        "Could not refresh total sector count: children 'f0' (65536 bytes) and 'longer' (66560 bytes) differ in size"
    );
    // QEMU's words: it takes the permission to write.
    let rewriting = json!({"rewrite-corrupted": true, "read-only": true});
    let refused = add(quorum(1, children.clone(), rewriting));
    assert!(refused.starts_with("Block node is read-only"), "{refused}");
    let verifying = quorum(2, children, json!({"blkverify": true, "node-name": "v"}));
    table.add(verifying).unwrap();
    let driver = table.graph.node("v").unwrap().driver().clone();
    assert_eq!(
        driver.add_child().unwrap_err().to_string(),
        "Cannot add a child to a quorum in blkverify mode"
    );
    assert_eq!(
        block_on(table.graph.block_resize("v", 4096)).unwrap_err().to_string(),
        "Image format driver does not support resize"
    );
}

/// Every way in which up to four children can differ in a block, at every threshold: QEMU reads what we read.
#[test]
fn votes_end_as_qemus_do() {
    const BLOCK: usize = 4096;
    for children in 1..=4u32 {
        // Block n: child c holds the digit c of n.
        let blocks = 3usize.pow(children);
        for threshold in 1..=children {
            let mut table = Table::new();
            let nodes: Vec<Value> = (0..children)
                .map(|c| {
                    let byte = |n: usize| b'a' + (n / 3usize.pow(c) % 3) as u8;
                    let content: Vec<u8> = (0..blocks).flat_map(|n| vec![byte(n); BLOCK]).collect();
                    table.file(&format!("f{c}"), &content)
                })
                .collect();
            let options = quorum(threshold, nodes, json!({}));
            table.open(options.clone());
            let ours: Vec<_> = (0..blocks).map(|n| table.read((n * BLOCK) as u64, BLOCK as u64)).collect();
            table.close();
            let commands: Vec<String> =
                (0..blocks).map(|n| format!("read -v {} {BLOCK}", n * BLOCK)).collect();
            let Some(text) = qemu_io(&nameless(&options), &commands) else { return };
            // Each command prints a dump and its sum, or an error.
            let mut theirs = Vec::new();
            let mut byte = None;
            for line in text.lines() {
                if let Some((_, dump)) = line.split_once(":  ") {
                    byte = dump.split_whitespace().next().and_then(|b| u8::from_str_radix(b, 16).ok());
                } else if line.starts_with("read failed") {
                    theirs.push(None);
                } else if line.starts_with("read ") {
                    theirs.push(byte.take());
                }
            }
            let vague = |n: usize| {
                // Several with the same number of votes, and enough of them: whose turn it is depends on QEMU's lists.
                let digit = |c: u32| n / 3usize.pow(c) % 3;
                let votes = |d: usize| (0..children).filter(|c| digit(*c) == d).count() as u32;
                let most = (0..3).map(votes).max().unwrap();
                most >= threshold && (0..3).filter(|d| votes(*d) == most).count() > 1
            };
            assert_eq!(theirs.len(), blocks, "{text}");
            for (n, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                let same = match ours {
                    Ok(data) => data.iter().all(|b| Some(*b) == *theirs) || (vague(n) && theirs.is_some()),
                    Err(e) => *e == Errno::EIO && theirs.is_none(),
                };
                assert!(same, "{children} children, threshold {threshold}, block {n}: {theirs:?}");
            }
        }
    }
}
