//! `ringblk img snapshot`: the snapshots inside an image.
//!
//! One action a call; the driver does the work while nobody else uses the node.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use graph::{BlockError, Errno, NewSnapshot, SnapshotInfo, SnapshotRef};

use super::cli::SnapshotArgs;
use super::failure::{Failure, Outcome};
use super::image::{How, Image, Spec};
use super::output::print;
use super::session::Session;
use super::size;

enum Action {
    List,
    Apply(String),
    Create(String),
    Delete(String),
}

/// Runs the command.
///
/// # Errors
/// The image cannot be opened, or what the driver says.
pub async fn run(session: Session, args: SnapshotArgs) -> Outcome {
    let mut actions = Vec::new();
    actions.extend(args.list.then_some(Action::List));
    actions.extend(args.apply.map(Action::Apply));
    actions.extend(args.create.map(Action::Create));
    actions.extend(args.delete.map(Action::Delete));
    if actions.len() > 1 {
        return Err(Failure::new("Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let action = actions.pop().unwrap_or(Action::List);
    session.objects(&args.source.objects).await?;
    let spec = Spec::new(&args.filename, args.source.format.as_deref(), args.source.image_opts)?;
    let how = How {
        writable: !matches!(action, Action::List),
        force_share: args.share.force_share,
        ..How::default()
    };
    let image = session.open(&spec, how).await?;
    match action {
        Action::List => print(&list(&image.node()?.driver().snapshots()))?,
        Action::Create(name) => create(&image, name).await?,
        Action::Apply(name) => {
            let which = SnapshotRef::IdOrName(name.clone());
            let done = image.io(move |io| async move {
                let driver = io.node()?.driver();
                driver.snapshot_apply(&io, which).await.map_err(words)
            });
            done.await.map_err(|e| e.context(format!("Could not apply snapshot '{name}'")))?;
        }
        Action::Delete(name) => {
            // As qemu-img: never by id. A name may look like the id of another one, which would be gone then.
            let which = SnapshotRef::Name(name.clone());
            let done = image.io(move |io| async move {
                let driver = io.node()?.driver();
                driver.snapshot_delete(&io, which).await.map_err(words)
            });
            done.await.map_err(|e| e.context(format!("Could not delete snapshot '{name}'")))?;
        }
    }
    image.close().await?;
    Ok(0)
}

async fn create(image: &Image, name: String) -> Result<(), Failure> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let new = NewSnapshot {
        name: name.clone(),
        // The image has 32 bits for it.
        date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        date_nsec: now.subsec_nanos(),
        vm_clock_nsec: 0,
    };
    let done = image.io(move |io| async move {
        let driver = io.node()?.driver();
        driver.snapshot_create(&io, new).await.map_err(words)
    });
    done.await.map(drop).map_err(|e| e.context(format!("Could not create snapshot '{name}'")))
}

/// A driver without snapshots says so with a number.
fn words(e: BlockError) -> BlockError {
    match e.errno() {
        Errno::ENOTSUP => BlockError::unsupported("Operation not supported"),
        _ => e,
    }
}

/// The table of snapshots; empty without any.
pub fn list(snapshots: &[SnapshotInfo]) -> String {
    if snapshots.is_empty() {
        return String::new();
    }
    let mut out = String::from("Snapshot list:\n");
    // Writing into a string cannot fail.
    let _ = writeln!(
        out,
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    for s in snapshots {
        let _ = writeln!(
            out,
            "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
            s.id,
            s.name,
            size::human(s.vm_state_size),
            local_time(s.date_sec),
            clock(s.vm_clock_nsec),
            s.icount.map_or_else(|| "--".to_owned(), |n| n.to_string())
        );
    }
    out
}

/// The guest's clock as hours, minutes, seconds and thousandths.
fn clock(nsec: u64) -> String {
    let (sec, milli) = (nsec / 1_000_000_000, nsec % 1_000_000_000 / 1_000_000);
    format!("{:04}:{:02}:{:02}.{milli:03}", sec / 3600, sec / 60 % 60, sec % 60)
}

/// A moment on the clock of this place.
fn local_time(sec: u32) -> String {
    let moment = jiff::Timestamp::from_second(i64::from(sec)).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    moment.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

#[cfg(test)]
mod tests;
