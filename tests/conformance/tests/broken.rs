//! The suite must find what is wrong: a driver that is right passes, and the same driver with one flaw does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use graph::{
    BlockError, BlockStatus, BoxFut, Driver, DriverDef, DriverKind, Errno, Limits, Map, NodeIo, Op,
    OpenContext, Opened, Perm, Registry, Roles, StatusFlags, Truncate, WriteFlags, ZeroFlags,
};
use host::IoVecs;
use ringblk_conformance::{DriverCase, run, run_on_iothreads, run_simulated};
use serde_json::{Value, json};

const SIZE: u64 = 1 << 20;

/// What is wrong with the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// The last byte of a write is lost when it ends inside of a block.
    LosesTail,
    /// `map` says that everything reads as zeroes.
    MapsZeroes,
    /// A driven read returns the block before at one place.
    ReadsElsewhere,
    /// Zeroing reaches one byte too far.
    ZeroesTooMuch,
    /// Discards zero a range that should stay.
    Discards,
    /// Block status calls everything zero.
    StatusZero,
    /// Block status says nothing about the end.
    StatusShort,
    /// What was cut off comes back.
    ResizeKeeps,
    /// Everything is gone when the node is closed.
    Forgets,
    /// Two writes at the same time may mix: read-modify-write of whole blocks without a lock.
    Races,
}

/// One image.
type Image = Arc<Mutex<Vec<u8>>>;

/// The images, by directory.
fn images() -> &'static Mutex<HashMap<String, Image>> {
    static IMAGES: OnceLock<Mutex<HashMap<String, Image>>> = OnceLock::new();
    IMAGES.get_or_init(Mutex::default)
}

struct Memory {
    bytes: Image,
    flaw: Flaw,
}

impl Memory {
    /// Something that takes a moment, so that requests overlap.
    async fn pause(&self, io: &NodeIo) {
        io.local().yield_now().await;
    }
}

impl Driver for Memory {
    fn map(&self, op: Op, _offset: u64, len: u64) -> Map<'_> {
        match op {
            Op::Read if self.flaw == Flaw::MapsZeroes => Map::Zero { len },
            Op::Flush => Map::Done { len },
            _ => Map::Drive,
        }
    }

    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.pause(io).await;
            let shift = if self.flaw == Flaw::ReadsElsewhere && offset == 65536 { 512 } else { 0 };
            let at = (offset - shift) as usize;
            bufs.copy_from(0, &self.bytes.lock().unwrap()[at..at + bufs.len()]);
            Ok(())
        })
    }

    fn write<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs, _: WriteFlags) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let mut data = bufs.to_vec();
            let end = offset + data.len() as u64;
            if self.flaw == Flaw::Races {
                let (start, stop) = (offset / 4096 * 4096, end.next_multiple_of(4096).min(self.size()));
                let mut block = self.bytes.lock().unwrap()[start as usize..stop as usize].to_vec();
                self.pause(io).await;
                let at = (offset - start) as usize;
                block[at..at + data.len()].copy_from_slice(&data);
                self.bytes.lock().unwrap()[start as usize..stop as usize].copy_from_slice(&block);
                return Ok(());
            }
            if self.flaw == Flaw::LosesTail && !end.is_multiple_of(512) {
                data.pop();
            }
            self.pause(io).await;
            self.bytes.lock().unwrap()[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, _: &'a NodeIo, offset: u64, len: u64, _: ZeroFlags) -> BoxFut<'a, ()> {
        let extra = u64::from(self.flaw == Flaw::ZeroesTooMuch);
        let mut bytes = self.bytes.lock().unwrap();
        let end = ((offset + len + extra) as usize).min(bytes.len());
        bytes[offset as usize..end].fill(0);
        Box::pin(std::future::ready(Ok(())))
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        if self.flaw == Flaw::Discards {
            return self.write_zeroes(io, offset, len, ZeroFlags::empty());
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn flush<'a>(&'a self, _: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn block_status<'a>(&'a self, _: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        let zero = self.flaw == Flaw::StatusZero;
        let flags = if zero { StatusFlags::ZERO } else { StatusFlags::DATA };
        let len = if self.flaw == Flaw::StatusShort && offset >= 4096 { 0 } else { len };
        Box::pin(std::future::ready(Ok(BlockStatus { flags, len, location: None })))
    }

    fn truncate<'a>(&'a self, _: &'a NodeIo, size: u64, _: Truncate) -> BoxFut<'a, ()> {
        let fresh = if self.flaw == Flaw::ResizeKeeps { 7 } else { 0 };
        self.bytes.lock().unwrap().resize(size as usize, fresh);
        Box::pin(std::future::ready(Ok(())))
    }

    fn supports_fua(&self) -> bool {
        true
    }

    fn child_perm(&self, _: usize, _: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        (perm, shared)
    }
}

fn flaw_of(name: &str) -> Flaw {
    ALL.into_iter().find(|f| format!("{f:?}") == name).unwrap_or(Flaw::None)
}

const ALL: [Flaw; 10] = [
    Flaw::LosesTail,
    Flaw::MapsZeroes,
    Flaw::ReadsElsewhere,
    Flaw::ZeroesTooMuch,
    Flaw::Discards,
    Flaw::StatusZero,
    Flaw::StatusShort,
    Flaw::ResizeKeeps,
    Flaw::Forgets,
    Flaw::Races,
];

async fn open(_: OpenContext, options: Value) -> Result<Opened, BlockError> {
    let flaw = flaw_of(options["flaw"].as_str().unwrap());
    let image = options["image"].as_str().unwrap().to_owned();
    let bytes = match images().lock().unwrap().get(&image) {
        _ if flaw == Flaw::Forgets => Arc::new(Mutex::new(vec![0; SIZE as usize])),
        Some(bytes) => Arc::clone(bytes),
        None => return Err(Errno::ENOENT.into()),
    };
    Ok(Opened::new(Memory { bytes, flaw }))
}

fn case(flaw: Flaw) -> DriverCase {
    let def = DriverDef {
        name: "memory",
        kind: DriverKind::Protocol,
        schema: || schemars::schema_for!(()),
        open: |cx, value| Box::pin(open(cx, value)),
        create: None,
    };
    let key = |dir: &Path| dir.to_str().unwrap().to_owned();
    let create = move |dir: &Path| {
        images().lock().unwrap().insert(key(dir), Arc::new(Mutex::new(vec![0; SIZE as usize])));
        Ok(())
    };
    let options = move |dir: &Path| json!({"driver": "memory", "flaw": format!("{flaw:?}"), "image": key(dir), "discard": "unmap"});
    let case = DriverCase::new(format!("{flaw:?}"), Registry::new([def]), SIZE, create, options);
    DriverCase { resizable: true, ..case }
}

#[test]
fn a_driver_without_flaws_passes() {
    run(&case(Flaw::None)).unwrap();
}

#[test]
fn every_flaw_is_found() {
    for flaw in ALL {
        let found = run_on_iothreads(&case(flaw));
        assert!(found.is_err(), "{flaw:?} was not found");
    }
}

#[test]
fn flaws_of_the_data_path_are_found_in_the_simulation_too() {
    for flaw in [Flaw::LosesTail, Flaw::MapsZeroes, Flaw::ReadsElsewhere, Flaw::ZeroesTooMuch, Flaw::Races] {
        assert!(run_simulated(&case(flaw)).is_err(), "{flaw:?} was not found");
    }
}
