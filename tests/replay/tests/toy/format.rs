//! A small copy-on-write format, right or with one of its barriers left out: the harness must tell which.
//!
//! Sector 0 says which of two tables is valid; a table says for each guest sector where it is; data is only ever appended.
//! A flush writes the other table, makes that and the data durable, switches, and makes that durable.

use std::sync::Mutex as StdMutex;

use graph::options::parse_options;
use graph::{
    BlockStatus, BlockdevRef, BoxFut, Driver, DriverDef, DriverKind, Errno, Limits, Map, NodeIo, Op, Opened,
    Perm, Result, Roles, StatusFlags, WriteFlags, default_child_perm,
};
use host::IoVecs;
use host::sync::Mutex;
use ringblk_replay::image::Image;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Guest sectors.
pub const SECTORS: u64 = 128;
const SECTOR: u64 = 512;
const MAGIC: u64 = 0x0079_6f74;
/// Sectors of one table; two of them follow sector 0.
const TABLE: u64 = SECTORS * 8 / SECTOR;

/// What is done wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Wrong {
    /// Nothing.
    #[default]
    Nothing,
    /// Data and the table are not durable before the switch.
    FirstBarrier,
    /// The switch is not durable before the flush is acknowledged.
    LastBarrier,
    /// The valid table is overwritten.
    SameTable,
    /// A guest sector is overwritten where it is, half of it first.
    TornSector,
    /// Old places are used again at once.
    EarlyReuse,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: BlockdevRef,
    #[serde(default)]
    wrong: Wrong,
}

/// The driver.
pub const TOY: DriverDef = DriverDef {
    name: "toy",
    kind: DriverKind::Format,
    schema: || schemars::schema_for!(Options),
    open: |cx, value| {
        Box::pin(async move {
            let options: Options = parse_options(value)?;
            let file =
                cx.open_child("file", Roles::DATA | Roles::METADATA | Roles::PRIMARY, options.file).await?;
            let state = cx.child_io(file, load).await?;
            Ok(Opened::new(Toy {
                wrong: options.wrong,
                state: StdMutex::new(state),
                flushing: Mutex::new(()),
            }))
        })
    },
    create: None,
};

struct State {
    table: Vec<u64>,
    /// Which of the two is valid.
    slot: u64,
    /// Next sector nobody has used.
    next: u64,
    free: Vec<u64>,
    dirty: bool,
}

struct Toy {
    wrong: Wrong,
    state: StdMutex<State>,
    flushing: Mutex<()>,
}

/// An empty image.
pub fn create() -> Image {
    let mut image = Image::default();
    image.write(0, &MAGIC.to_le_bytes());
    image.truncate((1 + 2 * TABLE) * SECTOR);
    image
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at * 8..at * 8 + 8]);
    u64::from_le_bytes(word)
}

/// The rules of the format, for any state of the file.
pub fn check(files: &[(String, Image)]) -> std::result::Result<(), String> {
    let image = &files[0].1;
    let header = image.bytes(0, 16);
    if word(&header, 0) != MAGIC || word(&header, 1) > 1 {
        return Err(format!("a header of {header:?}"));
    }
    let table = image.bytes((1 + word(&header, 1) * TABLE) * SECTOR, (TABLE * SECTOR) as usize);
    let mut seen = std::collections::BTreeSet::new();
    for sector in 0..SECTORS as usize {
        let at = word(&table, sector);
        if at != 0 && (at <= 2 * TABLE || (at + 1) * SECTOR > image.len() || !seen.insert(at)) {
            return Err(format!("sector {sector} is at {at}"));
        }
    }
    Ok(())
}

async fn load(io: NodeIo) -> Result<State> {
    let header = IoVecs::from_vec(vec![0; 512]);
    io.read(0, &header).await?;
    let header = header.to_vec();
    if word(&header, 0) != MAGIC || word(&header, 1) > 1 {
        return Err(Errno::EINVAL.into());
    }
    let slot = word(&header, 1);
    let table = IoVecs::from_vec(vec![0; (TABLE * SECTOR) as usize]);
    io.read((1 + slot * TABLE) * SECTOR, &table).await?;
    let table = table.to_vec();
    let table = (0..SECTORS as usize).map(|i| word(&table, i)).collect();
    let next = (io.size() / SECTOR).max(1 + 2 * TABLE);
    Ok(State { table, slot, next, free: Vec::new(), dirty: false })
}

impl Toy {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn place(&self) -> u64 {
        let mut state = self.state();
        if self.wrong == Wrong::EarlyReuse
            && let Some(old) = state.free.pop()
        {
            return old;
        }
        state.next += 1;
        state.next - 1
    }

    async fn write_all(&self, io: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        let none = WriteFlags::empty();
        for i in 0..bufs.len() as u64 / SECTOR {
            let data = bufs.slice((i * SECTOR) as usize, SECTOR as usize);
            let sector = (offset / SECTOR + i) as usize;
            if self.wrong == Wrong::TornSector {
                let there = self.state().table[sector];
                if there != 0 {
                    io.child(0).write(there * SECTOR, &data.slice(0, 256), none).await?;
                    io.child(0).write(there * SECTOR + 256, &data.slice(256, 256), none).await?;
                    continue;
                }
            }
            let place = self.place();
            io.child(0).write(place * SECTOR, &data, none).await?;
            let mut state = self.state();
            let old = std::mem::replace(&mut state.table[sector], place);
            state.dirty = true;
            if old != 0 {
                state.free.push(old);
            }
        }
        Ok(())
    }

    async fn commit(&self, io: &NodeIo) -> Result<()> {
        let _one = self.flushing.lock().await;
        let news = {
            let mut state = self.state();
            let table: Vec<u8> = state.table.iter().flat_map(|w| w.to_le_bytes()).collect();
            let slot = if self.wrong == Wrong::SameTable { state.slot } else { 1 - state.slot };
            std::mem::take(&mut state.dirty).then_some((table, slot))
        };
        let Some((table, slot)) = news else { return io.child(0).flush().await };
        let none = WriteFlags::empty();
        io.child(0).write((1 + slot * TABLE) * SECTOR, &IoVecs::from_vec(table), none).await?;
        if self.wrong != Wrong::FirstBarrier {
            io.child(0).flush().await?;
        }
        let header = [MAGIC, slot].iter().flat_map(|w| w.to_le_bytes()).collect();
        io.child(0).write(0, &IoVecs::from_vec(header), none).await?;
        if self.wrong != Wrong::LastBarrier {
            io.child(0).flush().await?;
        }
        self.state().slot = slot;
        Ok(())
    }
}

impl Driver for Toy {
    fn map(&self, _op: Op, _offset: u64, _len: u64) -> Map<'_> {
        Map::Drive
    }

    fn size(&self) -> u64 {
        SECTORS * SECTOR
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 512, ..Limits::default() }
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move {
            for i in 0..bufs.len() as u64 / SECTOR {
                let part = bufs.slice((i * SECTOR) as usize, SECTOR as usize);
                let place = self.state().table[(offset / SECTOR + i) as usize];
                match place {
                    0 => part.fill(0),
                    place => io.child(0).read(place * SECTOR, &part).await?,
                }
            }
            Ok(())
        })
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        _flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(self.write_all(io, offset, bufs))
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(self.commit(io))
    }

    fn block_status<'a>(&'a self, _io: &'a NodeIo, _offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        let flags = StatusFlags::ALLOCATED | StatusFlags::DATA;
        Box::pin(std::future::ready(Ok(BlockStatus { flags, len, location: None })))
    }

    fn child_perm(&self, _child: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        default_child_perm(role, perm | Perm::RESIZE, shared, true)
    }
}
