//! The graph in the language of graphviz.

use std::fmt::Write as _;

use super::model::Picture;

/// A string of the language.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Several lines in one string.
fn label(lines: &[String]) -> String {
    let escaped: Vec<String> = lines.iter().map(|l| l.replace('\\', "\\\\").replace('"', "\\\"")).collect();
    format!("\"{}\"", escaped.join("\\n"))
}

/// Draws.
pub fn draw(picture: &Picture) -> String {
    let mut out =
        String::from("digraph ringblk {\n  rankdir=TB;\n  node [fontname=\"sans-serif\", fontsize=11];\n");
    out.push_str("  edge [fontname=\"monospace\", fontsize=9];\n");
    for node in &picture.nodes {
        let shape = if node.is_user() { "ellipse" } else { "box" };
        let mut styles = Vec::new();
        if node.drained {
            styles.push("dashed");
        }
        if node.read_only {
            styles.push("filled");
        }
        let style =
            if styles.is_empty() { String::new() } else { format!(", style={}", quoted(&styles.join(","))) };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "  n{} [shape={shape}, label={}{style}];", node.id, label(&node.lines()));
    }
    for edge in &picture.edges {
        let mut lines = vec![edge.label()];
        let mut more = String::new();
        if !edge.frozen_by.is_empty() {
            lines.push(format!("frozen by {}", edge.frozen_by.join(", ")));
            more.push_str(", color=\"#2060c0\", penwidth=2");
        }
        if edge.drained {
            more.push_str(", style=dashed");
        }
        let _ = writeln!(out, "  n{} -> n{} [label={}{more}];", edge.parent, edge.child, label(&lines));
    }
    out.push_str("}\n");
    out
}
