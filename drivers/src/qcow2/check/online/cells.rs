//! How often the active tables refer to each host cluster, up and down as they change.
//!
//! Used under the watch's lock (`table/watch.rs`), by the walk and by whoever changes an entry meanwhile. Pure. Four bytes per
//! host cluster in use, in chunks that exist where something is counted; a hostile image decides which, hence the limit.

use std::collections::BTreeMap;

/// Cells of a chunk.
const CHUNK: u64 = 4096;
/// References in general.
const REFS: Field = Field { shift: 0, max: (1 << 20) - 1 };
/// Of these, those of entries that say they are the only one (COPIED).
const SOLE: Field = Field { shift: 20, max: 63 };
/// Those of entries that could say so and do not.
const SHARED: Field = Field { shift: 26, max: 63 };

/// A part of a cell. At its maximum it stays there: such a cluster is damaged in any case.
#[derive(Clone, Copy)]
struct Field {
    shift: u32,
    max: u32,
}

impl Field {
    fn get(self, cell: u32) -> u32 {
        cell >> self.shift & self.max
    }

    fn change(self, cell: u32, up: bool) -> u32 {
        let now = self.get(cell);
        match (now, up) {
            (n, _) if n == self.max => cell,
            (0, false) => cell,
            (_, true) => cell + (1 << self.shift),
            (_, false) => cell - (1 << self.shift),
        }
    }
}

/// What sort of reference it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Of an entry with COPIED.
    Sole,
    /// Of an entry without it that may have it.
    Shared,
    /// Of anything else.
    Other,
}

/// What a cell says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    /// All references.
    pub(crate) refs: u64,
    /// Entries with COPIED.
    pub(crate) sole: u32,
    /// Entries that could have it.
    pub(crate) shared: u32,
}

/// See the module's page.
pub(crate) struct Cells {
    index: BTreeMap<u64, usize>,
    chunks: Vec<Box<[u32]>>,
    last: Option<(u64, usize)>,
    budget: u64,
    /// A reference found no room: the figures are not to be used.
    full: bool,
}

impl Cells {
    /// At most `budget` bytes.
    pub(crate) fn new(budget: u64) -> Cells {
        Cells { index: BTreeMap::new(), chunks: Vec::new(), last: None, budget, full: false }
    }

    /// Whether more places are referred to than the limit allows.
    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    /// One reference more, or less.
    pub(crate) fn change(&mut self, cluster: u64, class: Class, up: bool) {
        let chunk = cluster / CHUNK;
        let place = match self.last {
            Some((number, place)) if number == chunk => Some(place),
            _ => self.index.get(&chunk).copied(),
        };
        let place = match place {
            Some(place) => place,
            None if !up => return,
            None => {
                // The chunk, and its share of the index.
                if (self.chunks.len() as u64 + 1) * (CHUNK * 4 + 64) > self.budget {
                    self.full = true;
                    return;
                }
                self.chunks.push(vec![0; CHUNK as usize].into_boxed_slice());
                self.index.insert(chunk, self.chunks.len() - 1);
                self.chunks.len() - 1
            }
        };
        self.last = Some((chunk, place));
        let cell = self.chunks.get_mut(place).and_then(|c| c.get_mut((cluster % CHUNK) as usize));
        let Some(cell) = cell else { return };
        *cell = REFS.change(*cell, up);
        match class {
            Class::Sole => *cell = SOLE.change(*cell, up),
            Class::Shared => *cell = SHARED.change(*cell, up),
            Class::Other => {}
        }
    }

    /// What is known of a cluster.
    pub(crate) fn get(&mut self, cluster: u64) -> Cell {
        let chunk = cluster / CHUNK;
        if self.last.is_none_or(|(number, _)| number != chunk) {
            match self.index.get(&chunk) {
                Some(&place) => self.last = Some((chunk, place)),
                None => return Cell { refs: 0, sole: 0, shared: 0 },
            }
        }
        let place = self.last.map_or(usize::MAX, |(_, place)| place);
        let cell =
            self.chunks.get(place).and_then(|c| c.get((cluster % CHUNK) as usize)).copied().unwrap_or(0);
        Cell { refs: REFS.get(cell).into(), sole: SOLE.get(cell), shared: SHARED.get(cell) }
    }

    /// Whether nothing was ever counted in `[cluster, cluster + n)`; may say no although.
    pub(crate) fn untouched(&self, cluster: u64, n: u64) -> bool {
        let last = cluster.saturating_add(n.max(1) - 1) / CHUNK;
        self.index.range(cluster / CHUNK..=last).next().is_none()
    }
}
