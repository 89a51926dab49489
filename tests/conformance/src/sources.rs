//! Request sources: one that is driven by hand, and one that never rests.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use graph::{BoxFut, NodeIo, RequestSource, View};
use host::IoThread;
use host::sync::Event;

use crate::Check;
use crate::request::{Client, Way};
use crate::rng::Rng;

/// The source of a session: whoever holds the session has nothing in flight when the graph changes.
#[derive(Default)]
pub(crate) struct Idle {
    /// What `resized` said last.
    pub(crate) size: Cell<u64>,
}

impl RequestSource for Idle {
    fn quiesce(&self) -> BoxFut<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn resume(&self, _view: Arc<View>) {}
    fn resized(&self, size: u64) {
        self.size.set(size);
    }
}

/// Requests in flight per iothread.
const DEPTH: u64 = 8;

/// What all tasks of a [`Busy`] source share.
#[derive(Default)]
pub(crate) struct Load {
    paused: AtomicBool,
    generation: AtomicU64,
    pub(crate) running: AtomicUsize,
    pub(crate) done: AtomicU64,
    idle: Event,
    failure: Mutex<Option<String>>,
}

impl Load {
    /// What has gone wrong so far.
    pub(crate) fn check(&self) -> Check {
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    fn fail(&self, e: String) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
    }

    /// Writes and reads back until told to stop.
    async fn work(self: Arc<Self>, io: NodeIo, generation: u64, task: u64, tasks: u64, kept: bool) {
        let mut rng = Rng::new(generation * 1000 + task);
        let way = if task.is_multiple_of(2) { Way::Driven } else { Way::Mapped };
        let local = io.local().clone();
        let client = Client { io, way };
        let stretch = (client.io.size() / tasks).min(64 << 10);
        while !self.paused.load(SeqCst) && self.generation.load(SeqCst) == generation {
            let (offset, len) = rng.range(stretch);
            let offset = task * stretch + offset;
            let data = rng.data(len);
            match client.write(offset, &data, rng.one_in(16)).await {
                Ok(()) => match client.read(offset, len).await {
                    Ok(found) if kept && found != data => {
                        self.fail(format!("{offset}+{len}: read other data back"))
                    }
                    Ok(_) => {}
                    Err(e) => self.fail(format!("read {offset}+{len}: {e}")),
                },
                Err(e) => self.fail(format!("write {offset}+{len}: {e}")),
            }
            self.done.fetch_add(1, SeqCst);
            local.yield_now().await;
        }
        drop(client);
        if self.running.fetch_sub(1, SeqCst) == 1 {
            self.idle.set();
        }
    }
}

/// Keeps several iothreads busy whenever it may.
pub(crate) struct Busy {
    pub(crate) load: Arc<Load>,
    threads: Vec<IoThread>,
    kept: bool,
}

impl Busy {
    /// `kept`: the node keeps data.
    pub(crate) fn new(threads: &[IoThread], kept: bool) -> Busy {
        Busy { load: Arc::default(), threads: threads.to_vec(), kept }
    }
}

impl RequestSource for Busy {
    fn quiesce(&self) -> BoxFut<'_, ()> {
        self.load.paused.store(true, SeqCst);
        Box::pin(async move {
            while self.load.running.load(SeqCst) != 0 {
                self.load.idle.wait().await;
            }
            Ok(())
        })
    }

    fn resume(&self, view: Arc<View>) {
        let generation = self.load.generation.fetch_add(1, SeqCst) + 1;
        self.load.paused.store(false, SeqCst);
        self.load.idle.clear();
        let tasks = self.threads.len() as u64 * DEPTH;
        self.load.running.fetch_add(tasks as usize, SeqCst);
        let kept = self.kept;
        for (thread, first) in self.threads.iter().zip((0..).step_by(DEPTH as usize)) {
            let (load, view) = (Arc::clone(&self.load), Arc::clone(&view));
            thread.post(move |local| {
                let io = view.io(local);
                for task in first..first + DEPTH {
                    local.spawn(Arc::clone(&load).work(io.clone(), generation, task, tasks, kept));
                }
            });
        }
    }

    fn resized(&self, _size: u64) {}
}
