//! A graph with a user of one node, a directory for images, and the events nodes told.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use conformance::request::{Client, Way};
use graph::{Errno, Graph, GraphEvent, NoSource, NodeIo, Root, RootOptions};
use host::exec::block_on;
use host::{IoThread, IoThreadOptions};
use serde_json::{Value, json};

use crate::common::{registry, tool};

/// See the module's page.
pub struct Table {
    pub graph: Graph,
    pub dir: tempfile::TempDir,
    pub thread: IoThread,
    root: Option<Root>,
    events: Arc<Mutex<Vec<GraphEvent>>>,
}

impl Table {
    pub fn new() -> Table {
        let options = IoThreadOptions { name: "scrutiny".to_owned(), ..IoThreadOptions::default() };
        let thread = IoThread::start(options).unwrap();
        let graph = Graph::new(registry(), Some(thread.clone()));
        let events: Arc<Mutex<Vec<GraphEvent>>> = Arc::default();
        let sink = Arc::clone(&events);
        graph.set_event_sink(Box::new(move |e| sink.lock().unwrap().push(e)));
        Table { graph, dir: tempfile::tempdir().unwrap(), thread, root: None, events }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file with this content, and its definition as an inline node.
    pub fn file(&self, name: &str, content: &[u8]) -> Value {
        std::fs::write(self.path(name), content).unwrap();
        self.existing(name)
    }

    /// The definition of a node over a file that exists, named after it.
    pub fn existing(&self, name: &str) -> Value {
        json!({"driver": "file", "node-name": name, "filename": self.path(name).to_str().unwrap()})
    }

    pub fn content(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    pub fn add(&self, options: Value) -> Result<(), String> {
        block_on(self.graph.blockdev_add(options)).map_err(|e| e.to_string())
    }

    /// Adds a node named `top` and uses it.
    pub fn open(&mut self, options: Value) {
        let mut options = options;
        options["node-name"] = json!("top");
        self.add(options).unwrap();
        self.attach("top");
    }

    pub fn attach(&mut self, node: &str) {
        let options = RootOptions::new("a test", true);
        self.root = Some(block_on(self.graph.attach(node, options, Rc::new(NoSource))).unwrap());
    }

    /// Runs requests on the user's node.
    pub fn on<T, F, Fut>(&self, work: F) -> T
    where
        T: Send + 'static,
        F: FnOnce(NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let view = self.root.as_ref().unwrap().view().unwrap();
        let call = self.thread.call_blocking(move |local| work(view.io(&local)));
        call.unwrap_or_else(|_| panic!("a request panicked"))
    }

    /// One request as a ring sends it.
    pub fn client<T, F, Fut>(&self, work: F) -> T
    where
        T: Send + 'static,
        F: FnOnce(Client) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        self.on(|io| work(Client { io, way: Way::Mapped }))
    }

    pub fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
        self.client(move |c| async move { c.read(offset, len).await })
    }

    pub fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), Errno> {
        self.client(move |c| async move { c.write(offset, &data, false).await })
    }

    pub fn flush(&self) -> Result<(), Errno> {
        self.client(|c| async move { c.flush().await })
    }

    /// What was told since the last call.
    pub fn events(&self) -> Vec<GraphEvent> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    /// Gives the node back and closes everything.
    pub fn close(&mut self) {
        if let Some(root) = self.root.take() {
            block_on(root.detach());
        }
        block_on(self.graph.close_all());
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.close();
        self.graph.set_iothread(None);
        self.thread.clone().stop();
    }
}

/// Runs `qemu-io` with these commands over a node; what it printed, and whether there is such a program.
pub fn qemu_io(node: &Value, commands: &[String]) -> Option<String> {
    let node = format!("json:{node}");
    let mut args: Vec<&str> = commands.iter().flat_map(|c| ["-c", c.as_str()]).collect();
    args.push(&node);
    let output = tool("qemu-io", &args)?;
    Some(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

/// The definition without node names, which QEMU's tools have no need of.
pub fn nameless(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            members.iter().filter(|(k, _)| *k != "node-name").map(|(k, v)| (k.clone(), nameless(v))).collect()
        }
        Value::Array(all) => all.iter().map(nameless).collect(),
        other => other.clone(),
    }
}
