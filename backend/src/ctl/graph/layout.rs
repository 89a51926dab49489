//! Which box stands where: layers from the top down, each child below all its parents; lines that pass a layer have a place
//! of their own there, so that they go between the boxes.
//!
//! Used by `svg`. Sizes are in pixels. Pure.

use std::collections::BTreeMap;

use super::model::Picture;

/// Between neighbours.
const GAP_X: f64 = 36.0;
/// Between layers: room for what is written on lines.
const GAP_Y: f64 = 64.0;
/// Around everything.
pub const MARGIN: f64 = 20.0;
/// How often the order of layers is improved.
const PASSES: usize = 6;

/// Width and height.
pub type Size = (f64, f64);

/// A place: left, top, width, height.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Place {
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
}

impl Place {
    fn center(&self) -> f64 {
        self.x + self.width / 2.0
    }
}

/// Where everything is.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// By the number of the node.
    pub boxes: BTreeMap<u64, Place>,
    /// The points of each edge, in the order of the edges; empty for one that leads nowhere.
    pub lines: Vec<Vec<(f64, f64)>>,
    pub width: f64,
    pub height: f64,
}

/// What has a place in a layer.
#[derive(Clone, Copy, Debug)]
enum Item {
    Node(u64),
    /// Edge by index, passing.
    Pass(usize),
}

#[derive(Clone, Debug)]
struct Slot {
    item: Item,
    width: f64,
    height: f64,
    x: f64,
    /// Slots of the layer above it hangs from.
    above: Vec<usize>,
}

/// The layer of each node: the longest way down to it. Circles end after as many steps as there are nodes.
fn layers(picture: &Picture) -> BTreeMap<u64, usize> {
    let mut layer: BTreeMap<u64, usize> = picture.nodes.iter().map(|n| (n.id, 0)).collect();
    for _ in 0..picture.nodes.len() {
        let mut changed = false;
        for edge in &picture.edges {
            let (Some(parent), Some(child)) = (layer.get(&edge.parent), layer.get(&edge.child)) else {
                continue;
            };
            let least = parent + 1;
            if *child < least && least <= picture.nodes.len() {
                layer.insert(edge.child, least);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    layer
}

/// Lays a picture out; `size` says how large the box of a node is.
pub fn layout(picture: &Picture, size: impl Fn(u64) -> Size) -> Layout {
    let layer_of = layers(picture);
    let depth = layer_of.values().max().map_or(0, |d| d + 1);
    let mut rows: Vec<Vec<Slot>> = vec![Vec::new(); depth];
    let mut slot_of: BTreeMap<u64, (usize, usize)> = BTreeMap::new();
    for node in &picture.nodes {
        let at = layer_of.get(&node.id).copied().unwrap_or(0);
        let (width, height) = size(node.id);
        if let Some(row) = rows.get_mut(at) {
            slot_of.insert(node.id, (at, row.len()));
            row.push(Slot { item: Item::Node(node.id), width, height, x: 0.0, above: Vec::new() });
        }
    }
    for (index, edge) in picture.edges.iter().enumerate() {
        let (Some((top, first)), Some((bottom, last))) =
            (slot_of.get(&edge.parent), slot_of.get(&edge.child))
        else {
            continue;
        };
        let mut from = *first;
        for row in rows.iter_mut().take(*bottom).skip(top + 1) {
            row.push(Slot { item: Item::Pass(index), width: 8.0, height: 0.0, x: 0.0, above: vec![from] });
            from = row.len() - 1;
        }
        if top < bottom
            && let Some(slot) = rows.get_mut(*bottom).and_then(|r| r.get_mut(*last))
        {
            slot.above.push(from);
        }
    }
    order(&mut rows);
    place(picture, &rows)
}

/// Sorts each layer by where its slots hang in the one above, again and again; then gives them places.
fn order(rows: &mut [Vec<Slot>]) {
    let spread = |row: &mut [Slot]| {
        let mut x = 0.0;
        for slot in row {
            slot.x = x;
            x += slot.width + GAP_X;
        }
    };
    rows.iter_mut().for_each(|r| spread(r));
    for _ in 0..PASSES {
        for at in 1..rows.len() {
            let (above, below) = rows.split_at_mut(at);
            let (Some(above), Some(row)) = (above.last(), below.first_mut()) else { continue };
            let weight = |slot: &Slot| {
                let centers: Vec<f64> =
                    slot.above.iter().filter_map(|a| above.get(*a)).map(|s| s.x + s.width / 2.0).collect();
                match centers.is_empty() {
                    true => slot.x + slot.width / 2.0,
                    false => centers.iter().sum::<f64>() / centers.len() as f64,
                }
            };
            let mut sorted: Vec<(usize, f64)> = row.iter().map(weight).enumerate().collect();
            sorted.sort_by(|a, b| a.1.total_cmp(&b.1));
            let moved: BTreeMap<usize, usize> =
                sorted.iter().enumerate().map(|(new, (old, _))| (*old, new)).collect();
            let mut fresh: Vec<Slot> = sorted.iter().filter_map(|(old, _)| row.get(*old).cloned()).collect();
            // As near to what they hang from as their neighbours let them.
            let mut least = f64::NEG_INFINITY;
            for (slot, (_, wish)) in fresh.iter_mut().zip(&sorted) {
                slot.x = (wish - slot.width / 2.0).max(least);
                least = slot.x + slot.width + GAP_X;
            }
            *row = fresh;
            if let Some(next) = rows.get_mut(at + 1) {
                for slot in next {
                    for a in &mut slot.above {
                        *a = moved.get(a).copied().unwrap_or(*a);
                    }
                }
            }
        }
    }
}

fn place(picture: &Picture, rows: &[Vec<Slot>]) -> Layout {
    let left = rows.iter().flatten().map(|s| s.x).fold(f64::INFINITY, f64::min);
    let left = if left.is_finite() { left } else { 0.0 };
    let mut layout = Layout::default();
    let mut passes: BTreeMap<usize, Vec<(f64, f64)>> = BTreeMap::new();
    let mut y = MARGIN;
    for row in rows {
        let height = row.iter().map(|s| s.height).fold(0.0, f64::max);
        for slot in row {
            let x = slot.x - left + MARGIN;
            layout.width = layout.width.max(x + slot.width + MARGIN);
            match slot.item {
                Item::Node(id) => {
                    let place = Place { x, y, width: slot.width, height: slot.height };
                    layout.boxes.insert(id, place);
                }
                Item::Pass(edge) => {
                    let x = x + slot.width / 2.0;
                    passes.entry(edge).or_default().extend([(x, y), (x, y + height)]);
                }
            }
        }
        y += height + GAP_Y;
    }
    layout.height = (y - GAP_Y + MARGIN).max(2.0 * MARGIN);
    layout.width = layout.width.max(2.0 * MARGIN);
    layout.lines =
        picture.edges.iter().enumerate().map(|(at, e)| line(picture, &layout, &passes, at, e)).collect();
    layout
}

/// The way of one edge. Edges that share an end leave and arrive side by side.
fn line(
    picture: &Picture,
    layout: &Layout,
    passes: &BTreeMap<usize, Vec<(f64, f64)>>,
    at: usize,
    edge: &super::model::Edge,
) -> Vec<(f64, f64)> {
    let (Some(from), Some(to)) = (layout.boxes.get(&edge.parent), layout.boxes.get(&edge.child)) else {
        return Vec::new();
    };
    let share = |place: &Place, same: &dyn Fn(&super::model::Edge) -> bool| {
        let all: Vec<usize> =
            picture.edges.iter().enumerate().filter(|(_, e)| same(e)).map(|(i, _)| i).collect();
        let nth = all.iter().position(|i| *i == at).unwrap_or(0);
        match all.len() {
            0 | 1 => place.center(),
            n => place.x + place.width * (nth + 1) as f64 / (n + 1) as f64,
        }
    };
    let mut points = vec![(share(from, &|e| e.parent == edge.parent), from.y + from.height)];
    points.extend(passes.get(&at).into_iter().flatten());
    points.push((share(to, &|e| e.child == edge.child), to.y));
    points
}
