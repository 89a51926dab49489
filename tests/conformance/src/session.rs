//! A graph with one node of the driver under test, its user, and iothreads to send requests from.

use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use graph::{Graph, Node, Perm, Root, RootOptions, View};
use host::exec::block_on;
use host::sim::{self, Faults};
use host::{Engine, IoThread, IoThreadOptions};
use serde_json::{Value, json};

use crate::Check;
use crate::case::DriverCase;
use crate::data::{Part, Setting};
use crate::sources::Idle;

/// The node's name.
pub const NODE: &str = "conformance";

/// Whether this kernel has io_uring.
pub fn has_io_uring() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| match IoThread::start(thread("probe", Engine::IoUring)) {
        Ok(iothread) => {
            iothread.stop();
            true
        }
        Err(e) => {
            eprintln!("skipped what needs io_uring: {e}");
            false
        }
    })
}

fn thread(name: &str, engine: Engine) -> IoThreadOptions {
    IoThreadOptions { name: name.to_owned(), engine, ..IoThreadOptions::default() }
}

fn words(e: impl ToString) -> String {
    e.to_string()
}

/// An open node.
pub struct Session {
    /// The graph it is in.
    pub graph: Graph,
    /// Iothreads; the graph uses the first one for itself.
    pub threads: Vec<IoThread>,
    root: Option<Root>,
}

impl Session {
    /// Opens the image in `dir` for reading and, unless `read_only`, writing.
    ///
    /// # Errors
    /// What the graph says.
    pub fn open(case: &DriverCase, dir: &Path, engine: Engine, read_only: bool) -> Result<Session, String> {
        let mut session = Session::unused(case, dir, engine, read_only)?;
        session.use_it(!read_only)?;
        Ok(session)
    }

    /// As [`Session::open`], without a user.
    ///
    /// # Errors
    /// What the graph says.
    pub fn unused(case: &DriverCase, dir: &Path, engine: Engine, read_only: bool) -> Result<Session, String> {
        let threads: Result<Vec<_>, _> =
            ["one", "two"].map(|n| IoThread::start(thread(n, engine))).into_iter().collect();
        let threads = threads.map_err(words)?;
        let graph = Graph::new(case.registry.clone(), threads.first().cloned());
        for (id, bytes) in &case.secrets {
            graph.secrets().add(id, graph::Secret::new(bytes.clone())).map_err(words)?;
        }
        (case.set_up)(&graph);
        let mut options = (case.options)(dir);
        if let Value::Object(options) = &mut options {
            options.insert("node-name".to_owned(), json!(NODE));
            if read_only {
                options.insert("read-only".to_owned(), json!(true));
            }
        }
        let session = Session { graph, threads, root: None };
        block_on(session.graph.blockdev_add(options)).map_err(|e| format!("blockdev-add: {e}"))?;
        Ok(session)
    }

    /// Attaches the user requests come from.
    ///
    /// # Errors
    /// What the graph says.
    pub fn use_it(&mut self, writable: bool) -> Check {
        self.use_as(RootOptions::new("the conformance suite", writable))
    }

    /// Attaches that user.
    ///
    /// # Errors
    /// What the graph says.
    pub fn use_as(&mut self, options: RootOptions) -> Check {
        let root = block_on(self.graph.attach(NODE, options, Rc::new(Idle::default())));
        self.root = Some(root.map_err(|e| format!("attach: {e}"))?);
        Ok(())
    }

    /// Lets the user write and change the size.
    ///
    /// # Errors
    /// There is no user, or somebody else does not share that.
    pub fn let_resize(&self) -> Check {
        let root = self.root.as_ref().ok_or("there is no user")?;
        let perm = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
        block_on(root.set_perm(perm, Perm::ALL)).map_err(words)
    }

    /// The user's view.
    ///
    /// # Errors
    /// There is no user.
    pub fn view(&self) -> Result<Arc<View>, String> {
        self.root.as_ref().and_then(Root::view).ok_or_else(|| "the user has no view".to_owned())
    }

    /// The node.
    ///
    /// # Errors
    /// There is none.
    pub fn node(&self) -> Result<Arc<Node>, String> {
        self.graph.node(NODE).map_err(words)
    }

    /// Runs something on an iothread, with the root of the view.
    ///
    /// # Errors
    /// What it returns, or that it panicked.
    pub fn on<T, F, Fut>(&self, thread: usize, work: F) -> Result<T, String>
    where
        T: Send + 'static,
        F: FnOnce(graph::NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, String>> + 'static,
    {
        let view = self.view()?;
        let thread = self.threads.get(thread).ok_or("no such thread")?;
        thread
            .call_blocking(move |local| work(view.io(&local)))
            .map_err(|_| "the request panicked".to_owned())?
    }

    /// Closes everything, in order.
    ///
    /// # Errors
    /// What the graph says.
    pub fn close(mut self) -> Check {
        if let Some(root) = self.root.take() {
            block_on(root.detach());
        }
        block_on(self.graph.blockdev_del(NODE)).map_err(|e| format!("blockdev-del: {e}"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // After a failed check as well: the next session must not find threads of this one.
        if let Some(root) = self.root.take() {
            block_on(root.detach());
        }
        block_on(self.graph.close_all());
        self.graph.set_iothread(None);
        self.threads.drain(..).for_each(IoThread::stop);
    }
}

/// A directory with a fresh image.
///
/// # Errors
/// What `create` says.
pub fn fresh(case: &DriverCase) -> Result<tempfile::TempDir, String> {
    // RINGBLK_TEST_DIR: where the file system under test is.
    let dir = match std::env::var_os("RINGBLK_TEST_DIR") {
        Some(parent) => tempfile::tempdir_in(parent),
        None => tempfile::tempdir(),
    };
    let dir = dir.map_err(words)?;
    (case.create)(dir.path()).map_err(|e| format!("create: {e}"))?;
    Ok(dir)
}

/// Runs one part over a fresh image.
pub(crate) fn data_part(case: &DriverCase, engine: Engine, seed: u64, part: Part) -> Check {
    let dir = fresh(case)?;
    let session = Session::open(case, dir.path(), engine, false)?;
    let setting = Setting::new(case, seed, false);
    session.on(1, move |io| part(io, setting))?;
    session.close()
}

/// Runs one part over a fresh image on the simulated host; `setting.faults` says whether `faults` has errors in it.
pub(crate) fn simulated_part(case: &DriverCase, setting: Setting, faults: Faults, part: Part) -> Check {
    let dir = fresh(case)?;
    let session = Session::open(case, dir.path(), Engine::Auto, false)?;
    let view = session.view()?;
    let result = sim::run(setting.seed, faults, move |local| part(view.io(&local), setting));
    result.map_err(|e| format!("the simulation ended: {e:?}"))??;
    if setting.faults {
        // Closing flushes, and a flush that failed keeps failing: nothing to see there.
        return Ok(());
    }
    session.close()
}
