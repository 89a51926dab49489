//! `blockdev-create`: an image is created by its driver, as a job.
//!
//! Started by the control channel. The driver does the work and says how far it is; a cancel reaches it through its
//! `graph::JobControl`. As in QEMU the job finalizes by itself and stays until it is dismissed. It cannot be paused: it
//! goes on, and rests at its end.

use std::cell::RefCell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use graph::{BlockError, BoxFut, CreateContext, CreateDef, Errno, Graph, JobControl, Result};
use serde_json::Value;

use crate::job::{Job, JobOptions, JobType, Jobs, Site, Work};

struct Create {
    graph: Graph,
    def: CreateDef,
    options: RefCell<Option<Value>>,
    driver: Arc<JobControl>,
}

impl Work for Create {
    fn kind(&self) -> JobType {
        JobType::Create
    }

    fn is_block_job(&self) -> bool {
        false
    }

    fn run<'a>(&'a self, at: &'a Site) -> BoxFut<'a, ()> {
        Box::pin(async move {
            // Under way all the time: nothing in it can rest.
            let active = at.control().enter().await?;
            let options = self.options.take().ok_or(Errno::EINVAL)?;
            let context = CreateContext::new(self.graph.clone(), Arc::clone(&self.driver));
            let mut creating = (self.def.create)(context, options);
            let result = loop {
                let mut changed = pin!(at.control().changed());
                if at.control().cancelled() {
                    self.driver.cancel();
                }
                let step = std::future::poll_fn(|cx| match creating.as_mut().poll(cx) {
                    Poll::Ready(result) => Poll::Ready(Some(result)),
                    Poll::Pending => changed.as_mut().poll(cx).map(|()| None),
                });
                if let Some(result) = step.await {
                    break result;
                }
            };
            drop(creating);
            // What a failed creation had open is closed, and its locks with it, before the job says that it is over.
            self.graph.reap().await;
            drop(active);
            result
        })
    }

    fn progress(&self) -> Option<(u64, u64)> {
        match self.driver.current() {
            // A driver that says nothing: one step, as in QEMU.
            (_, 0) => None,
            progress => Some(progress),
        }
    }

    fn clean(&self) -> crate::job::Done<'_> {
        // What was to be done is done, or will not be.
        let (_, total) = self.driver.current();
        self.driver.progress(total.max(1), total.max(1));
        Box::pin(std::future::ready(()))
    }
}

/// Starts the creation of an image. `options` holds the driver's create options, without `driver`.
///
/// # Errors
/// The driver cannot create images, or the id is bad or taken.
pub fn start(jobs: &Jobs, graph: &Graph, id: &str, driver: &str, options: Value) -> Result<Rc<Job>> {
    let def = graph
        .registry()
        .get(driver)
        .ok_or_else(|| BlockError::invalid(format!("Parameter 'driver' does not accept value '{driver}'")))?;
    let def = def.create.ok_or_else(|| BlockError::unsupported("Driver does not support blockdev-create"))?;
    let work =
        Create { graph: graph.clone(), def, options: RefCell::new(Some(options)), driver: Arc::default() };
    let options = JobOptions { auto_dismiss: false, ..JobOptions::new(id) };
    let job = jobs.start(options, Rc::new(work))?;
    job.control().set_total(1);
    Ok(job)
}
