//! ringblk's side.

use std::path::Path;

use graph::{BlockError, CheckFix, Errno, NewSnapshot, NodeIo, Registry, SnapshotRef, WriteFlags, ZeroFlags};
use host::IoVecs;
use host::exec::block_on;
use ringblk_replay::rig::{NODE, Opened, Rig};
use ringblk_replay::scenario::SECRET;
use ringblk_replay::words;
use ringblk_replay::workload::read_all;

use crate::shape::Shape;
use crate::{Sequence, Step};

fn rig(shape: &Shape) -> Result<Rig, String> {
    let rig = Rig::new(Registry::new(drivers::ALL.iter().copied()))?;
    if let Some(passphrase) = shape.passphrase() {
        let secret = graph::Secret::new(passphrase.as_bytes().to_vec());
        rig.graph().secrets().add(SECRET, secret).map_err(words)?;
    }
    Ok(rig)
}

/// Reads the whole disk with a read-only node, and has it checked.
pub fn content_and_check(shape: &Shape, dir: &Path) -> Result<Vec<u8>, String> {
    let rig = rig(shape)?;
    let opened = rig.open(shape.options(dir), true)?;
    let content = opened.on_iothread(|io| async move {
        let content = read_all(&io).await?;
        let driver = io.node().map_err(words)?.driver();
        match driver.check(&io, CheckFix::NONE).await {
            Ok(r) if r.corruptions + r.check_errors > 0 => Err(format!("check: {:?}", r.messages)),
            Ok(_) => Ok(content),
            Err(e) if e.errno() == Errno::ENOTSUP => Ok(content),
            Err(e) => Err(format!("check: {e}")),
        }
    })?;
    opened.close()?;
    Ok(content)
}

async fn io_step(io: NodeIo, step: Step) -> Result<Option<Vec<u8>>, BlockError> {
    let buffer = |len: u64, pattern: u8| IoVecs::from_vec(vec![pattern; len as usize]);
    match step {
        Step::Write { offset, len, pattern } => {
            io.write(offset, &buffer(len, pattern), WriteFlags::empty()).await?;
        }
        Step::Compressed { offset, len, pattern } => {
            io.write(offset, &buffer(len, pattern), WriteFlags::COMPRESSED).await?;
        }
        Step::Zero { offset, len, unmap } => {
            let flags = if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
            io.write_zeroes(offset, len, flags).await?;
        }
        Step::Discard { offset, len } => io.discard(offset, len).await?,
        Step::Flush => io.flush().await?,
        Step::Read { offset, len } => {
            let found = buffer(len, 0xa5);
            io.read(offset, &found).await?;
            return Ok(Some(found.to_vec()));
        }
        Step::Create { name } => {
            let new = NewSnapshot { name, date_sec: 1, ..NewSnapshot::default() };
            io.node()?.driver().snapshot_create(&io, new).await?;
        }
        Step::Apply { name } => io.node()?.driver().snapshot_apply(&io, SnapshotRef::Name(name)).await?,
        Step::Delete { name } => {
            io.node()?.driver().snapshot_delete(&io, SnapshotRef::Name(name)).await?;
        }
        Step::Resize { .. } | Step::Reopen => {}
    }
    Ok(None)
}

fn whole(opened: &Opened<'_>) -> Result<Vec<u8>, String> {
    opened.on_iothread(|io| async move { read_all(&io).await })
}

/// Some steps.
pub fn session(sequence: &mut Sequence, steps: u64) -> Result<(), String> {
    let rig = rig(&sequence.shape)?;
    let mut opened = rig.open(sequence.shape.options(sequence.dir.path()), false)?;
    for _ in 0..steps {
        let step = sequence.step(false);
        sequence.log.push(format!("{step:?}"));
        match &step {
            Step::Reopen => {
                opened.close()?;
                opened = rig.open(sequence.shape.options(sequence.dir.path()), false)?;
            }
            Step::Resize { size } => {
                block_on(rig.graph().block_resize(NODE, *size)).map_err(|e| format!("{step:?}: {e}"))?;
            }
            _ => {
                if let Step::Create { name } = &step {
                    let content = whole(&opened)?;
                    sequence.seen(&content)?;
                    sequence.truth.snapshots.push((name.clone(), content));
                }
                let doing = step.clone();
                let done =
                    opened.on_iothread(move |io| async move { io_step(io, doing).await.map_err(words) });
                let found = done.map_err(|e| format!("{step:?}: {e}"))?;
                if let (Some(found), Step::Read { offset, .. }) = (found, &step) {
                    sequence.truth.disk.read(*offset, &found)?;
                }
            }
        }
        sequence.note(&step, false)?;
    }
    let content = whole(&opened)?;
    sequence.seen(&content).map_err(|e| format!("read before closing: {e}"))?;
    opened.close()
}
