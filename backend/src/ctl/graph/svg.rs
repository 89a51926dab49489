//! The graph as a drawing for browsers: boxes, lines, nothing that runs.

use std::fmt::Write as _;

use super::layout::{Layout, layout};
use super::model::{Edge, Node, Picture};

/// Width of a letter of the fonts below, generously, pixels.
const LETTER: f64 = 7.4;
/// Height of a line of text, pixels.
const LINE: f64 = 17.0;
/// Between a border and its text, pixels.
const PAD: f64 = 10.0;

/// How it looks.
const STYLE: &str = "\
text { font: 12px sans-serif; fill: #202020 } .name { font-weight: bold } .small { font: 10px monospace; fill: #505050 }
.node { fill: #f4f7fb; stroke: #5b7083; stroke-width: 1.2 } .user { fill: #fdf3e3; stroke: #a9772b; stroke-width: 1.2 }
.ro { fill: #ececec } .drained { stroke-dasharray: 5 3 } .edge { fill: none; stroke: #5b7083; stroke-width: 1.2 }
.frozen { stroke: #2060c0; stroke-width: 2.4 } .arrow { fill: #5b7083 }";

/// Text of a document: what XML gives a meaning is escaped, what it forbids is left out.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => out.push(c),
        }
    }
    out
}

fn box_size(node: &Node) -> (f64, f64) {
    let lines = node.lines();
    let longest = lines.iter().map(|l| l.chars().count()).max().unwrap_or(0);
    (longest as f64 * LETTER + 2.0 * PAD, lines.len() as f64 * LINE + PAD)
}

/// Draws.
pub fn draw(picture: &Picture) -> String {
    let layout = layout(picture, |id| picture.node(id).map(box_size).unwrap_or_default());
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    // Writing to a string cannot fail.
    let (width, height) = (layout.width.ceil(), layout.height.ceil());
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\">"
    );
    let _ = writeln!(out, "<title>ringblk</title>\n<style>{STYLE}</style>");
    out.push_str("<defs><marker id=\"arrow\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" ");
    out.push_str("orient=\"auto\"><path class=\"arrow\" d=\"M0 0 L8 4 L0 8 z\"/></marker></defs>\n");
    for (edge, points) in picture.edges.iter().zip(&layout.lines) {
        draw_edge(edge, points, &mut out);
    }
    for node in &picture.nodes {
        draw_node(node, &layout, &mut out);
    }
    out.push_str("</svg>\n");
    out
}

fn draw_edge(edge: &Edge, points: &[(f64, f64)], out: &mut String) {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return };
    let way: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let mut class = String::from("edge");
    if !edge.frozen_by.is_empty() {
        class.push_str(" frozen");
    }
    if edge.drained {
        class.push_str(" drained");
    }
    let _ = writeln!(
        out,
        "<polyline class=\"{class}\" points=\"{}\" marker-end=\"url(#arrow)\"/>",
        way.join(" ")
    );
    // Beside the middle of its first part.
    let second = points.get(1).unwrap_or(last);
    let (x, y) = ((first.0 + second.0) / 2.0 + 4.0, (first.1 + second.1) / 2.0);
    let _ = writeln!(out, "<text class=\"small\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escape(&edge.label()));
    if !edge.frozen_by.is_empty() {
        let who = escape(&format!("frozen by {}", edge.frozen_by.join(", ")));
        let _ = writeln!(out, "<text class=\"small\" x=\"{x:.1}\" y=\"{:.1}\">{who}</text>", y + 12.0);
    }
}

fn draw_node(node: &Node, layout: &Layout, out: &mut String) {
    let Some(place) = layout.boxes.get(&node.id) else { return };
    let mut class = String::from(if node.is_user() { "user" } else { "node" });
    if node.read_only {
        class.push_str(" ro");
    }
    if node.drained {
        class.push_str(" drained");
    }
    let round = if node.is_user() { place.height / 2.0 } else { 4.0 };
    let _ = writeln!(
        out,
        "<rect class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"{round:.1}\"/>",
        place.x, place.y, place.width, place.height
    );
    for (at, line) in node.lines().iter().enumerate() {
        let class = if at == 0 { " class=\"name\"" } else { "" };
        let (x, y) = (place.x + PAD, place.y + PAD / 2.0 + LINE * (at as f64 + 0.75));
        let _ = writeln!(out, "<text{class} x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escape(line));
    }
}
