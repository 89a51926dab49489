//! What a node does when the graph around it changes: closing and opening, users that conflict, resizing, draining.
//!
//! Each part opens images of its own. Whatever waits here waits for something that must happen; there are no limits of time.

use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::atomic::Ordering::SeqCst;
use std::task::Poll;

use graph::{Errno, Op, Perm, RootOptions, ZeroFlags};
use host::exec::block_on;
use host::{Engine, IoThread};

use crate::case::{Content, DriverCase};
use crate::data::{Setting, Subject, stripes};
use crate::model::Model;
use crate::request::{Client, Way};
use crate::rng::Rng;
use crate::session::{NODE, Session, fresh};
use crate::sources::{Busy, Idle};
use crate::{Check, ensure};

/// A part.
pub type Part = fn(&DriverCase, Engine, u64) -> Check;

/// All parts, with their names.
pub const PARTS: &[(&str, Part)] = &[
    ("opened again", reopened),
    ("read-only", read_only),
    ("permissions", permissions),
    ("resize", resize),
    ("statistics", statistics),
    ("drain under load", drain),
    ("dropped requests", dropped),
    ("two iothreads", two_threads),
];

/// What was written is there after closing and opening, flushed or not.
fn reopened(case: &DriverCase, engine: Engine, seed: u64) -> Check {
    let dir = fresh(case)?;
    let setting = Setting::new(case, seed, false);
    let mut model: Option<Model> = None;
    for round in 0..3 {
        let session = Session::open(case, dir.path(), engine, false)?;
        let known = model.take();
        model = Some(session.on(0, move |io| async move {
            let mut rng = Rng::new(seed + round);
            let mut subject = match known {
                Some(model) if setting.content == Content::Kept => {
                    Subject::with_model(io, Way::Mapped, setting, model)
                }
                _ => Subject::new(io, Way::Mapped, setting),
            };
            subject.read_all().await.map_err(|e| format!("round {round}: {e}"))?;
            for _ in 0..60 {
                subject.step(&mut rng).await.map_err(|e| format!("round {round}: {e}"))?;
            }
            subject.read_all().await?;
            Ok(subject.model)
        })?);
        session.close()?;
    }
    Ok(())
}

/// A read-only node reads, refuses everything else, and refuses writers in the first place.
fn read_only(case: &DriverCase, engine: Engine, seed: u64) -> Check {
    if !case.read_only {
        return Ok(());
    }
    let dir = fresh(case)?;
    let setting = Setting::new(case, seed, false);
    let session = Session::open(case, dir.path(), engine, true)?;
    session.on(1, move |io| async move {
        let mut subject = Subject::new(io.clone(), Way::Driven, setting);
        subject.read_all().await?;
        for way in [Way::Driven, Way::Mapped] {
            let client = Client { io: io.clone(), way };
            let answers = [
                ("write", client.write(0, &[1; 512], false).await),
                ("zero", client.zero(0, 512, ZeroFlags::empty()).await),
                ("discard", client.discard(0, 512).await),
            ];
            for (what, answer) in answers {
                ensure!(answer == Err(Errno::EPERM), "{what} on a read-only node ({way:?}): {answer:?}");
            }
            client.flush().await.map_err(|e| format!("flush ({way:?}): {e}"))?;
        }
        subject.read_all().await
    })?;
    let writer = RootOptions::new("a writer", true);
    let refused = block_on(session.graph.attach(NODE, writer, Rc::new(Idle::default())));
    ensure!(
        refused.as_ref().err().map(|e| e.errno()) == Some(Errno::EPERM),
        "a writer on a read-only node: {refused:?}"
    );
    let grown = block_on(session.graph.block_resize(NODE, case.size + 4096));
    ensure!(grown.is_err(), "a read-only node was resized");
    session.close()
}

/// Users that cannot be together are kept apart; who goes makes room.
fn permissions(case: &DriverCase, engine: Engine, _seed: u64) -> Check {
    let dir = fresh(case)?;
    let session = Session::unused(case, dir.path(), engine, false)?;
    let attach = |name: &str, perm: Perm, shared: Perm| {
        let options = RootOptions { perm, shared, ..RootOptions::new(name, false) };
        block_on(session.graph.attach(NODE, options, Rc::new(Idle::default())))
    };
    let reads = Perm::CONSISTENT_READ;
    let jealous =
        attach("a jealous reader", reads, Perm::ALL - Perm::WRITE).map_err(|e| format!("reader: {e}"))?;
    let writer = attach("a writer", reads | Perm::WRITE, Perm::ALL);
    ensure!(
        writer.as_ref().err().map(|e| e.errno()) == Some(Errno::EPERM),
        "a writer beside a reader who does not share: {writer:?}"
    );
    block_on(jealous.detach());
    let writer =
        attach("a writer", reads | Perm::WRITE, Perm::ALL).map_err(|e| format!("writer, alone: {e}"))?;
    let jealous = attach("a jealous reader", reads, Perm::ALL - Perm::WRITE);
    ensure!(jealous.is_err(), "a reader who does not share beside a writer");
    block_on(writer.set_perm(reads, Perm::ALL)).map_err(|e| format!("stopping to write: {e}"))?;
    let jealous =
        attach("a jealous reader", reads, Perm::ALL - Perm::WRITE).map_err(|e| format!("reader: {e}"))?;
    ensure!(block_on(writer.set_perm(reads | Perm::WRITE, Perm::ALL)).is_err(), "writing again beside it");
    let deleted = block_on(session.graph.blockdev_del(NODE));
    ensure!(deleted.as_ref().err().map(|e| e.errno()) == Some(Errno::EBUSY), "deleted in use: {deleted:?}");
    block_on(jealous.detach());
    block_on(writer.detach());
    session.close()
}

/// Growing brings zeroes, shrinking cuts, and what was cut does not come back.
fn resize(case: &DriverCase, engine: Engine, seed: u64) -> Check {
    let dir = fresh(case)?;
    let setting = Setting::new(case, seed, false);
    let mut session = Session::unused(case, dir.path(), engine, false)?;
    if !case.resizable {
        let answer = block_on(session.graph.block_resize(NODE, case.size + 65536));
        ensure!(answer.is_err(), "it can be resized");
        ensure!(session.node()?.size() == case.size, "a failed resize changed the size");
        return session.close();
    }
    session.use_it(true)?;
    let mut model = session.on(1, move |io| async move {
        let mut subject = Subject::new(io, Way::Driven, setting);
        subject.write(0, &Rng::new(seed).data(setting.size), false).await?;
        Ok(subject.model)
    })?;
    let sizes = [
        case.size + (192 << 10),
        case.size / 2,
        case.size,
        case.size - 4096,
        case.size + 4096,
        case.size + 4096,
    ];
    for size in sizes {
        block_on(session.graph.block_resize(NODE, size)).map_err(|e| format!("resize to {size}: {e}"))?;
        let seen = (session.node()?.size(), session.view()?.size());
        ensure!(seen == (size, size), "resized to {size}, but the node and its user see {seen:?}");
        let old = model.size();
        model.resize(size);
        if !case.grows_zeroed {
            model.forget(old, size.saturating_sub(old));
        }
        model = session
            .on(1, move |io| async move {
                let setting = Setting { size, ..setting };
                let mut subject = Subject::with_model(io.clone(), Way::Mapped, setting, model);
                subject.read_all().await?;
                subject.write(size - 700, &Rng::new(size).data(700), false).await?;
                subject.read_all().await?;
                let beyond = Client { io, way: Way::Mapped }.read(size, 512).await;
                ensure!(beyond == Err(Errno::EIO), "a read past the new end: {beyond:?}");
                Ok(subject.model)
            })
            .map_err(|e| format!("resized to {size}: {e}"))?;
    }
    session.close()?;
    // The size is part of the image.
    let session = Session::open(case, dir.path(), engine, false)?;
    ensure!(session.node()?.size() == model.size(), "opened again it has {} bytes", session.node()?.size());
    session.on(0, move |io| async move {
        let setting = Setting { size: model.size(), ..setting };
        Subject::with_model(io, Way::Driven, setting, model).read_all().await
    })?;
    session.close()
}

/// Every driven request is counted once at the node it was sent to, with its bytes.
fn statistics(case: &DriverCase, engine: Engine, _seed: u64) -> Check {
    let dir = fresh(case)?;
    let session = Session::open(case, dir.path(), engine, false)?;
    let size = case.size;
    let before = session.node()?.stats().totals();
    session.on(1, move |io| async move {
        let client = Client { io, way: Way::Driven };
        let fail = |e: Errno| format!("a request failed: {e}");
        for n in 0..5 {
            client.write(n * 4096, &[7; 4096], false).await.map_err(fail)?;
        }
        for n in 0..3 {
            client.read(n * 512, 512).await.map_err(fail)?;
        }
        client.zero(0, 8192, ZeroFlags::empty()).await.map_err(fail)?;
        client.flush().await.map_err(fail)?;
        client.flush().await.map_err(fail)?;
        ensure!(client.read(size, 1).await.is_err(), "a read past the end");
        Ok(())
    })?;
    let after = session.node()?.stats().totals();
    let counted = |op: Op| {
        let (a, b) = (after.op(op), before.op(op));
        (a.done - b.done, a.failed - b.failed, a.bytes - b.bytes)
    };
    ensure!(counted(Op::Write) == (5, 0, 5 * 4096), "writes: {:?}", counted(Op::Write));
    ensure!(counted(Op::Read) == (3, 1, 3 * 512), "reads: {:?}", counted(Op::Read));
    ensure!(counted(Op::WriteZeroes) == (1, 0, 8192), "zeroes: {:?}", counted(Op::WriteZeroes));
    ensure!(counted(Op::Flush).0 == 2, "flushes: {:?}", counted(Op::Flush));
    session.close()
}

/// Waits for something that must happen.
fn wait_until(mut happened: impl FnMut() -> Result<bool, String>) -> Check {
    while !happened()? {
        std::thread::yield_now();
    }
    Ok(())
}

/// Drains hold requests back and lose none; they nest.
fn drain(case: &DriverCase, engine: Engine, _seed: u64) -> Check {
    let dir = fresh(case)?;
    let session = Session::unused(case, dir.path(), engine, false)?;
    let busy = Rc::new(Busy::new(&session.threads, case.content == Content::Kept));
    let load = std::sync::Arc::clone(&busy.load);
    let attached = block_on(session.graph.attach(NODE, RootOptions::new("a busy user", true), busy));
    let root = attached.map_err(|e| format!("attach: {e}"))?;
    let progress = |from: u64| {
        wait_until(|| {
            load.check()?;
            Ok(load.done.load(SeqCst) >= from + 20)
        })
    };
    for _ in 0..8 {
        progress(load.done.load(SeqCst))?;
        let first = block_on(session.graph.drain(NODE)).map_err(|e| format!("drain: {e}"))?;
        ensure!(load.running.load(SeqCst) == 0, "drained with requests in flight");
        let done = load.done.load(SeqCst);
        let second = block_on(session.graph.drain_all());
        drop(first);
        // A turn of each iothread is the chance to do what must not be done.
        for thread in &session.threads {
            let _ = thread.call_blocking(|local| async move { local.yield_now().await });
        }
        ensure!(load.done.load(SeqCst) == done, "requests ran inside a drained section");
        drop(second);
    }
    progress(load.done.load(SeqCst))?;
    let guard = block_on(root.quiesce());
    block_on(root.detach());
    drop(guard);
    load.check()?;
    session.close()
}

/// Requests whose future is dropped leave old or new bytes, and the node usable.
fn dropped(case: &DriverCase, engine: Engine, seed: u64) -> Check {
    let dir = fresh(case)?;
    let setting = Setting::new(case, seed, false);
    let mut session = Session::open(case, dir.path(), engine, false)?;
    let model = session.on(1, move |io| async move {
        let mut rng = Rng::new(seed);
        let mut subject = Subject::new(io.clone(), Way::Driven, setting);
        subject.write(0, &rng.data(setting.size), false).await?;
        let keeps = setting.content == Content::Kept;
        for round in 0..40u64 {
            // A stretch for each: what the kernel does with two writes at once is nobody's promise.
            let stretch = setting.size / 40;
            let (at, len) = rng.range(stretch);
            let at = round * stretch + at;
            let data = rng.data(len);
            let client =
                Client { io: io.clone(), way: if rng.one_in(2) { Way::Driven } else { Way::Mapped } };
            match rng.below(4) {
                0 => poll_some(client.read(at, len), rng.below(3)).await,
                1 => {
                    poll_some(client.zero(at, len, ZeroFlags::MAY_UNMAP), rng.below(3)).await;
                    if keeps {
                        subject.model.maybe_zero(at, len);
                    }
                }
                2 => poll_some(client.flush(), rng.below(3)).await,
                _ => {
                    poll_some(client.write(at, &data, false), rng.below(3)).await;
                    if keeps {
                        subject.model.maybe_write(at, &data);
                    }
                }
            }
        }
        Ok(subject.model)
    })?;
    // Stopping the thread waits for what is still on its way.
    if let Some(thread) = session.threads.pop() {
        IoThread::stop(thread);
    }
    session.on(0, move |io| async move {
        let mut subject = Subject::with_model(io, Way::Driven, setting, model);
        subject.read_all().await?;
        // Nobody waits for the dropped ones.
        let mut rng = Rng::new(seed + 1);
        for _ in 0..30 {
            subject.step(&mut rng).await?;
        }
        subject.read_all().await
    })?;
    session.close()
}

/// Polls a future a few times, then drops it.
async fn poll_some<T>(future: impl Future<Output = T>, times: u64) {
    let mut future = std::pin::pin!(future);
    let mut left = times;
    poll_fn(|cx| {
        if future.as_mut().poll(cx).is_ready() || left == 0 {
            return Poll::Ready(());
        }
        left -= 1;
        Poll::Pending
    })
    .await;
}

/// Two iothreads on one node, each with stretches of its own that meet inside of blocks.
fn two_threads(case: &DriverCase, engine: Engine, seed: u64) -> Check {
    let dir = fresh(case)?;
    let setting = Setting::new(case, seed, false);
    let session = Session::open(case, dir.path(), engine, false)?;
    let view = session.view()?;
    let calls: Vec<_> = session
        .threads
        .iter()
        .zip(0..)
        .map(|(thread, n)| {
            let view = std::sync::Arc::clone(&view);
            thread.call(move |local| stripes(view.io(&local), setting, n, 2))
        })
        .collect();
    for call in calls {
        block_on(call).map_err(|_| "a request panicked".to_owned())??;
    }
    drop(view);
    session.close()
}
