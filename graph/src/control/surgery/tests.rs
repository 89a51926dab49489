//! Cuts by example: what a filter's coming and going means for users and permissions, what frozen edges keep from happening.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::rc::Rc;
use std::sync::atomic::Ordering::SeqCst;

use serde_json::json;

use super::*;
use crate::control::testing::{add, graph, mem, record, run, shape};
use crate::{NoSource, Root, RootOptions};

fn user(graph: &Graph, node: &str) -> Root {
    let mut options = RootOptions::new("block export 'e'", true);
    options.granularity = 512;
    run(graph.attach(node, options, Rc::new(NoSource))).unwrap()
}

#[track_caller]
fn refused(result: Result<()>, text: &str) {
    assert_eq!(result.unwrap_err().to_string(), text);
}

fn insertion(node: serde_json::Value, parent: Option<&str>, root: Option<EdgeId>) -> Insertion {
    let node = serde_json::from_value(node).unwrap();
    Insertion { node, parent: parent.map(str::to_owned), root, child: None }
}

#[test]
fn a_filter_comes_and_goes_with_its_user() {
    let g = graph();
    mem(&g, "disk");
    let root = user(&g, "disk");
    let before = shape(&g);
    let filter = json!({"driver": "filter", "node-name": "f", "file": "disk"});
    run(g.insert_node(insertion(filter.clone(), None, Some(root.id())))).unwrap();
    assert_eq!(root.node().unwrap().name(), "f");
    // Between the two, whichever end is named.
    let second = json!({"driver": "filter", "node-name": "g", "file": "disk"});
    run(g.insert_node(insertion(second, Some("f"), None))).unwrap();
    assert_eq!(root.view().unwrap().nodes().len(), 3);
    run(g.remove_node("f")).unwrap();
    assert_eq!(root.node().unwrap().name(), "g");
    assert!(record("f").closed.load(SeqCst) && g.node("f").is_err());
    run(g.remove_node("g")).unwrap();
    assert_eq!(shape(&g), before);
    // One that was made before stays.
    add(&g, filter).unwrap();
    run(g.insert_node(insertion(json!("f"), None, Some(root.id())))).unwrap();
    run(g.remove_node("f")).unwrap();
    assert_eq!(root.node().unwrap().name(), "disk");
    refused(run(g.remove_node("f")), "Node 'f' has no users: blockdev-del removes it");
}

#[test]
fn what_somebody_relies_on_stays() {
    let g = graph();
    mem(&g, "disk");
    add(&g, json!({"driver": "filter", "node-name": "f", "file": "disk"})).unwrap();
    add(&g, json!({"driver": "filter", "node-name": "above", "file": "f"})).unwrap();
    let root = user(&g, "above");
    let frozen = g.freeze("above", "file", "job 'j'").unwrap();
    let before = shape(&g);
    let words = "Cannot change frozen 'file' link from 'above' to 'f': job 'j' relies on it";
    refused(run(g.remove_node("f")), words);
    let filter = json!({"driver": "filter", "node-name": "new", "file": "f"});
    refused(run(g.insert_node(insertion(filter, Some("above"), None))), words);
    assert!(g.node("new").is_err(), "what was opened for it has gone");
    let replacing = Replacing { from: "f".into(), to: "disk".into(), ..Replacing::default() };
    refused(run(g.replace_node(&replacing)), words);
    assert_eq!(shape(&g), before);
    drop(frozen);
    run(g.remove_node("f")).unwrap();
    // A job keeps its node.
    let mut options = RootOptions::new("job 'k'", false);
    options.stay_at_node = true;
    let job = run(g.attach("above", options, Rc::new(NoSource))).unwrap();
    refused(run(g.remove_node("above")), "Node 'above' is in use: it is used by job 'k'");
    run(job.detach());
    run(root.detach());
}

#[test]
fn a_driver_that_refuses_leaves_all_as_it_was() {
    let g = graph();
    mem(&g, "disk");
    mem(&g, "other");
    let root = user(&g, "disk");
    let before = shape(&g);
    record("other").refuse.store(true, SeqCst);
    let replacing =
        Replacing { from: "disk".into(), to: "other".into(), force: true, ..Replacing::default() };
    refused(run(g.replace_node(&replacing)), "refused");
    assert_eq!(shape(&g), before);
    record("other").refuse.store(false, SeqCst);
    let careful = Replacing { force: false, ..replacing.clone() };
    refused(
        run(g.replace_node(&careful)),
        "Cannot replace 'disk' by 'other': nothing shows that they hold the same data; 'force' replaces it all the same",
    );
    run(g.replace_node(&replacing)).unwrap();
    assert_eq!(root.node().unwrap().name(), "other");
}

#[test]
fn options_change_for_all_or_none() {
    let g = graph();
    mem(&g, "disk");
    add(&g, json!({"driver": "filter", "node-name": "f", "file": "disk"})).unwrap();
    let words = "Block format 'filter' used by node 'f' does not support reopening files";
    let list = [json!({"driver": "filter", "node-name": "f", "file": "disk"})];
    refused(run(g.blockdev_reopen(&list)), words);
    assert!(run(g.blockdev_reopen(&[])).is_ok());
    // Common options are the graph's affair, and a driver that holds nothing need not know of them.
    run(g.set_active(Some("f"), false)).unwrap();
    assert!(g.is_inactive("f") && g.is_inactive("disk"));
    let mut options = RootOptions::new("block export 'e'", true);
    options.granularity = 512;
    let writer = run(g.attach("f", options, Rc::new(NoSource)));
    let words = writer.map(|_| ()).unwrap_err().to_string();
    assert!(words.starts_with("Block node is inactive"), "{words}");
    run(g.set_active(None, true)).unwrap();
    let root = user(&g, "f");
    assert_eq!(
        run(g.set_active(Some("disk"), false)).unwrap_err().to_string(),
        "Node has active parent node"
    );
    assert!(
        run(g.set_active(None, false))
            .unwrap_err()
            .to_string()
            .starts_with("Failed to inactivate all nodes: ")
    );
    assert!(!g.is_inactive("f") && !g.is_inactive("disk"));
    run(root.detach());
}
