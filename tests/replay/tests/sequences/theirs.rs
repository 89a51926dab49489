//! QEMU's side: `qemu-io` and `qemu-img`.

use std::path::Path;

use ringblk_replay::qemu::{must, run};
use ringblk_replay::words;

use crate::shape::Shape;
use crate::{Sequence, Step};

/// `qemu-img check`: clean, or leaks alone.
pub fn check(shape: &Shape, dir: &Path) -> Result<(), String> {
    let source = shape.source();
    let source: Vec<&str> = source.iter().map(String::as_str).collect();
    let output = run(dir, "qemu-img", &[&["check"], &source[..]].concat())?;
    match output.status.code() {
        Some(0) => Ok(()),
        code => Err(format!(
            "qemu-img check: {code:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// The content of the disk, or of a snapshot.
pub fn content(shape: &Shape, dir: &Path, snapshot: Option<&str>) -> Result<Vec<u8>, String> {
    let source = shape.source();
    let source: Vec<&str> = source.iter().map(String::as_str).collect();
    let name = snapshot.map(|s| format!("snapshot.name={s}"));
    let which = name.iter().flat_map(|n| ["-l", n.as_str()]);
    let args: Vec<&str> =
        ["convert", "-O", "raw"].into_iter().chain(which).chain(source).chain(["out.raw"]).collect();
    must(dir, "qemu-img", &args)?;
    std::fs::read(dir.join("out.raw")).map_err(words)
}

/// Has the commands carried out and compares what QEMU reads then.
fn send(sequence: &mut Sequence, commands: &mut Vec<String>) -> Result<(), String> {
    if commands.is_empty() {
        return Ok(());
    }
    send_all(sequence, commands)?;
    let content = content(&sequence.shape, sequence.dir.path(), None)?;
    sequence.seen(&content).map_err(|e| format!("QEMU reads its own: {e}"))
}

fn send_all(sequence: &Sequence, commands: &mut Vec<String>) -> Result<(), String> {
    let source = sequence.shape.source();
    let commands = std::mem::take(commands);
    let mut args = vec!["-d", "unmap"];
    args.extend(source.iter().map(String::as_str));
    args.extend(commands.iter().flat_map(|c| ["-c", c.as_str()]));
    let said = must(sequence.dir.path(), "qemu-io", &args)?;
    if said.contains("failed") || said.contains("error") {
        return Err(format!("qemu-io: {said}"));
    }
    Ok(())
}

/// Some steps.
pub fn session(sequence: &mut Sequence, steps: u64) -> Result<(), String> {
    let mut commands = Vec::new();
    for _ in 0..steps {
        let step = sequence.step(true);
        // These tools have no keys.
        let keyless = sequence.shape.passphrase().is_none();
        sequence.log.push(format!("{step:?}"));
        match &step {
            Step::Write { offset, len, pattern } => {
                commands.push(format!("write -P {pattern} {offset} {len}"))
            }
            // QEMU compresses into clusters that have no place yet; a version 2 image over another never gives one up.
            Step::Compressed { .. } if sequence.shape.never_unmaps() => continue,
            // QEMU 10.0 goes on filling the host cluster it compressed into last, also when that has been freed and taken
            // for something else meanwhile. A process of its own has nothing to go on with.
            Step::Compressed { offset, len, pattern } => {
                send(sequence, &mut commands)?;
                commands.push(format!("discard {offset} {len}"));
                send_all(sequence, &mut commands)?;
                commands.push(format!("write -c -P {pattern} {offset} {len}"));
                send_all(sequence, &mut commands)?;
            }
            Step::Zero { offset, len, unmap } => {
                commands.push(format!("write -z{} {offset} {len}", if *unmap { "u" } else { "" }));
            }
            Step::Discard { offset, len } => commands.push(format!("discard {offset} {len}")),
            Step::Flush => commands.push("flush".to_owned()),
            Step::Read { .. } => {}
            Step::Reopen => send(sequence, &mut commands)?,
            Step::Create { .. } | Step::Apply { .. } | Step::Delete { .. } | Step::Resize { .. }
                if !keyless =>
            {
                continue;
            }
            Step::Create { name } => {
                send(sequence, &mut commands)?;
                snapshot(sequence, "-c", name)?;
                let content = content(&sequence.shape, sequence.dir.path(), None)?;
                sequence.truth.snapshots.push((name.clone(), content));
            }
            Step::Apply { name } => {
                send(sequence, &mut commands)?;
                snapshot(sequence, "-a", name)?;
            }
            Step::Delete { name } => {
                send(sequence, &mut commands)?;
                snapshot(sequence, "-d", name)?;
            }
            Step::Resize { size } => {
                send(sequence, &mut commands)?;
                let size = size.to_string();
                let args = ["resize", "-q", "--shrink", "-f", "qcow2", "image.qcow2", &size];
                must(sequence.dir.path(), "qemu-img", &args)?;
            }
        }
        sequence.note(&step, true)?;
    }
    send(sequence, &mut commands)
}

fn snapshot(sequence: &Sequence, what: &str, name: &str) -> Result<(), String> {
    must(sequence.dir.path(), "qemu-img", &["snapshot", what, name, "image.qcow2"]).map(|_| ())
}
