//! The graph as lines of text: each user with what it uses below it. A node that several use is drawn where it first comes;
//! later it is only named.

use std::collections::BTreeSet;

use super::model::{Edge, Node, Picture};

/// Deepest nesting that is drawn.
const MAX_DEPTH: usize = 256;

/// Draws.
pub fn draw(picture: &Picture) -> String {
    if picture.nodes.is_empty() {
        return "There are no nodes.\n".to_owned();
    }
    let mut out = String::new();
    let mut drawn = BTreeSet::new();
    // Whoever is not reached from a top (a circle, which nobody should have made) is drawn at the end.
    let all = picture.tops().into_iter().chain(picture.nodes.iter().map(|n| n.id));
    for top in all {
        if let Some(node) = picture.node(top).filter(|_| drawn.insert(top)) {
            out.push_str(&about(node));
            out.push('\n');
            below(picture, top, "", 0, &mut drawn, &mut out);
        }
    }
    out.push_str("\nr read  w write  u write unchanged  z resize: what is used / what others may do\n");
    out
}

fn about(node: &Node) -> String {
    let lines = node.lines();
    match lines.split_first() {
        Some((name, [])) => name.clone(),
        Some((name, [about])) => format!("{name} ({about})"),
        Some((name, [about, rates @ ..])) => format!("{name} ({about})  {}", rates.join("  ")),
        None => String::new(),
    }
}

fn line(edge: &Edge) -> String {
    let mut line = edge.label();
    if !edge.frozen_by.is_empty() {
        line.push_str(&format!(" [frozen by {}]", edge.frozen_by.join(", ")));
    }
    if edge.drained {
        line.push_str(" [drained]");
    }
    line
}

fn below(
    picture: &Picture,
    id: u64,
    indent: &str,
    depth: usize,
    drawn: &mut BTreeSet<u64>,
    out: &mut String,
) {
    let edges: Vec<&Edge> = picture.below(id).collect();
    for (at, edge) in edges.iter().enumerate() {
        let last = at + 1 == edges.len();
        let (branch, next) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        let Some(node) = picture.node(edge.child) else { continue };
        let first = drawn.insert(edge.child);
        let what = if first { about(node) } else { format!("{} (see above)", node.name) };
        out.push_str(&format!("{indent}{branch}{} → {what}\n", line(edge)));
        if first && depth < MAX_DEPTH {
            below(picture, edge.child, &format!("{indent}{next}"), depth + 1, drawn, out);
        }
    }
}
