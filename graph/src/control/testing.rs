//! Drivers for this crate's tests: memory that records what it is told about permissions and checks what it is asked, a
//! filter, and a format with a backing file.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use host::{IoThread, IoThreadOptions, IoVecs};
use serde_json::{Value, json};

use crate::*;

/// What a driver was told, and what it shall refuse.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) log: Mutex<Vec<Told>>,
    pub(crate) refuse: AtomicBool,
    pub(crate) closed: AtomicBool,
    pub(crate) io: Mutex<Vec<String>>,
    pub(crate) fail_flush: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Check(Perm, Perm),
    Refused,
    Set(Perm, Perm),
    Abort,
}

impl Record {
    pub(crate) fn take(&self) -> Vec<Told> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
    fn note(&self, told: Told) {
        self.log.lock().unwrap().push(told);
    }
    pub(crate) fn io(&self) -> Vec<String> {
        std::mem::take(&mut *self.io.lock().unwrap())
    }
}

thread_local! {
    static RECORDS: RefCell<HashMap<String, Arc<Record>>> = RefCell::default();
}

/// The record of a node, by name; also before it exists.
pub(crate) fn record(name: &str) -> Arc<Record> {
    RECORDS.with(|r| Arc::clone(r.borrow_mut().entry(name.to_owned()).or_default()))
}

pub(crate) struct Mem {
    record: Arc<Record>,
    data: Mutex<Vec<u8>>,
    size: AtomicU64,
    limits: Limits,
    zeroes: bool,
    fua: bool,
    yields: usize,
    fast: bool,
}

impl Mem {
    fn check(&self, offset: u64, len: u64) {
        let align = u64::from(self.limits.request_alignment);
        assert!((offset | len).is_multiple_of(align), "misaligned {offset}+{len}");
        assert!(self.limits.max_transfer == 0 || len <= self.limits.max_transfer, "too long: {len}");
    }
    fn note(&self, text: String) {
        self.record.io.lock().unwrap().push(text);
    }
}

impl Driver for Mem {
    fn map(&self, _op: Op, _offset: u64, len: u64) -> Map<'_> {
        if self.fast { Map::Done { len } } else { Map::Drive }
    }
    fn size(&self) -> u64 {
        self.size.load(SeqCst)
    }
    fn limits(&self) -> Limits {
        self.limits
    }
    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let len = bufs.len() as u64;
            self.check(offset, len);
            self.note(format!("r {offset} {len}"));
            let data = {
                let data = self.data.lock().unwrap();
                let at = |o: u64| data.get(o as usize).copied().unwrap_or(0);
                (offset..offset + len).map(at).collect::<Vec<u8>>()
            };
            for _ in 0..self.yields {
                io.local().yield_now().await;
            }
            bufs.copy_from(0, &data);
            Ok(())
        })
    }
    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.check(offset, bufs.len() as u64);
            assert!(self.fua || !flags.contains(WriteFlags::FUA));
            self.note(format!("w {offset} {}", bufs.len()));
            for _ in 0..self.yields {
                io.local().yield_now().await;
            }
            let mut data = self.data.lock().unwrap();
            let end = offset as usize + bufs.len();
            if data.len() < end {
                data.resize(end, 0);
            }
            bufs.copy_to(0, &mut data[offset as usize..end]);
            self.size.fetch_max(end as u64, SeqCst);
            Ok(())
        })
    }
    fn write_zeroes<'a>(
        &'a self,
        _io: &'a NodeIo,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(async move {
            if !self.zeroes {
                return Err(Errno::ENOTSUP.into());
            }
            let align = u64::from(self.limits.write_zeroes_alignment.max(self.limits.request_alignment));
            if !(offset | len).is_multiple_of(align) {
                return Err(Errno::ENOTSUP.into());
            }
            self.note(format!("z {offset} {len} {}", flags.contains(ZeroFlags::MAY_UNMAP)));
            self.data.lock().unwrap()[offset as usize..(offset + len) as usize].fill(0);
            Ok(())
        })
    }
    fn discard<'a>(&'a self, _io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.check(offset, len);
            self.note(format!("d {offset} {len}"));
            Ok(())
        })
    }
    fn flush<'a>(&'a self, _io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.note("f".to_owned());
            if self.record.fail_flush.load(SeqCst) { Err(Errno::EIO.into()) } else { Ok(()) }
        })
    }
    fn block_status<'a>(&'a self, _io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        let location = Some(Location::File { offset });
        let flags = StatusFlags::DATA | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
        Box::pin(async move { Ok(BlockStatus { flags, len, location }) })
    }
    fn truncate<'a>(&'a self, _io: &'a NodeIo, size: u64, _how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.data.lock().unwrap().resize(size as usize, 0);
            self.size.store(size, SeqCst);
            Ok(())
        })
    }
    fn supports_fua(&self) -> bool {
        self.fua
    }
    fn child_perm(&self, _child: usize, _role: Roles, _perm: Perm, _shared: Perm) -> (Perm, Perm) {
        panic!("memory has no children")
    }
    fn check_perm(&self, perm: Perm, shared: Perm) -> Result<()> {
        if self.record.refuse.load(SeqCst) {
            self.record.note(Told::Refused);
            return Err(BlockError::new(Errno::EAGAIN, "refused"));
        }
        self.record.note(Told::Check(perm, shared));
        Ok(())
    }
    fn set_perm(&self, perm: Perm, shared: Perm) {
        self.record.note(Told::Set(perm, shared));
    }
    fn abort_perm(&self) {
        self.record.note(Told::Abort);
    }
    fn close<'a>(&'a self, _io: &'a NodeIo) -> BoxFut<'a, ()> {
        self.record.closed.store(true, SeqCst);
        Box::pin(async { Ok(()) })
    }
}

/// Filter or format over child 0; the rest is recorded as in `Mem`.
pub(crate) struct Above {
    record: Arc<Record>,
    size: AtomicU64,
    read_only: bool,
}

impl Driver for Above {
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        let _ = op;
        Map::Child { child: 0, offset, len }
    }
    fn size(&self) -> u64 {
        self.size.load(SeqCst)
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(0).read(offset, bufs).await })
    }
    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(0).write(offset, bufs, flags).await })
    }
    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(0).flush().await })
    }
    fn block_status<'a>(&'a self, _io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        let location = Some(Location::Child { child: 0, offset });
        Box::pin(async move { Ok(BlockStatus { flags: StatusFlags::OFFSET_VALID, len, location }) })
    }
    fn child_perm(&self, _child: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        default_child_perm(role, perm, shared, !self.read_only)
    }
    fn check_perm(&self, perm: Perm, shared: Perm) -> Result<()> {
        if self.record.refuse.load(SeqCst) {
            self.record.note(Told::Refused);
            return Err(BlockError::new(Errno::EAGAIN, "refused"));
        }
        self.record.note(Told::Check(perm, shared));
        Ok(())
    }
    fn set_perm(&self, perm: Perm, shared: Perm) {
        self.record.note(Told::Set(perm, shared));
    }
    fn abort_perm(&self) {
        self.record.note(Told::Abort);
    }
    fn child_changed(&self, child: usize, now: Option<(&str, &Arc<Node>)>) {
        if let (0, Some((_, node))) = (child, now) {
            self.size.store(node.size(), SeqCst);
        }
    }
    fn close<'a>(&'a self, _io: &'a NodeIo) -> BoxFut<'a, ()> {
        self.record.closed.store(true, SeqCst);
        Box::pin(async { Ok(()) })
    }
}

#[derive(serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct MemOptions {
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    align: Option<u32>,
    #[serde(default)]
    max_transfer: u64,
    #[serde(default)]
    zeroes: bool,
    #[serde(default)]
    zero_align: u32,
    #[serde(default)]
    max_zeroes: u64,
    #[serde(default)]
    fua: bool,
    #[serde(default)]
    yields: usize,
    #[serde(default)]
    fast: bool,
    #[serde(default)]
    broken: bool,
}

fn open_mem(context: OpenContext, options: Value) -> BoxFut<'static, Opened> {
    Box::pin(async move {
        let o: MemOptions = parse_options(options)?;
        if o.broken {
            return Err(BlockError::new(Errno::EIO, "broken"));
        }
        let size = o.size.unwrap_or(1 << 20);
        Ok(Opened::new(Mem {
            record: record(context.node_name()),
            data: Mutex::new(vec![0; size as usize]),
            size: AtomicU64::new(size),
            limits: Limits {
                request_alignment: o.align.unwrap_or(1),
                max_transfer: o.max_transfer,
                write_zeroes_alignment: o.zero_align,
                max_write_zeroes: o.max_zeroes,
                ..Limits::default()
            },
            zeroes: o.zeroes,
            fua: o.fua,
            yields: o.yields,
            fast: o.fast,
        }))
    })
}

#[derive(serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct AboveOptions {
    file: BlockdevRef,
    #[serde(default)]
    backing: Option<BlockdevRef>,
    #[serde(default)]
    broken: bool,
}

fn open_above(context: OpenContext, options: Value, roles: Roles) -> BoxFut<'static, Opened> {
    Box::pin(async move {
        let o: AboveOptions = parse_options(options)?;
        assert_eq!(context.open_child("file", roles, o.file).await?, 0);
        if let Some(backing) = o.backing {
            assert_eq!(context.open_child("backing", Roles::COW, backing).await?, 1);
        }
        if o.broken {
            return Err(BlockError::new(Errno::EIO, "broken"));
        }
        Ok(Opened::new(Above {
            record: record(context.node_name()),
            size: AtomicU64::new(context.child(0)?.size()),
            read_only: context.options().read_only,
        }))
    })
}

/// A graph with the drivers `mem`, `filter`, `data` (raw with an offset, say) and `format`.
pub(crate) fn graph() -> Graph {
    let def = |name, kind, open| DriverDef {
        name,
        kind,
        schema: || schemars::schema_for!(AboveOptions),
        open,
        create: None,
    };
    let registry = Registry::new([
        DriverDef {
            name: "mem",
            kind: DriverKind::Protocol,
            schema: || schemars::schema_for!(MemOptions),
            open: open_mem,
            create: None,
        },
        def("filter", DriverKind::Filter, |c, o| open_above(c, o, Roles::FILTER)),
        def("data", DriverKind::Format, |c, o| open_above(c, o, Roles::DATA | Roles::PRIMARY)),
        def("format", DriverKind::Format, |c, o| open_above(c, o, Roles::IMAGE)),
    ]);
    let options = IoThreadOptions { name: "graph-test".to_owned(), ..IoThreadOptions::default() };
    RECORDS.with(|r| r.borrow_mut().clear());
    Graph::new(registry, Some(IoThread::start(options).unwrap()))
}

/// Runs a future of the control side.
pub(crate) fn run<F: Future>(future: F) -> F::Output {
    host::exec::block_on(future)
}

/// `blockdev-add`.
pub(crate) fn add(graph: &Graph, options: Value) -> Result<()> {
    run(graph.blockdev_add(options))
}

/// A plain memory node.
pub(crate) fn mem(graph: &Graph, name: &str) {
    add(graph, json!({"driver": "mem", "node-name": name})).unwrap();
}

/// Edges with their permissions, for comparisons.
pub(crate) fn shape(graph: &Graph) -> query::XDbgBlockGraph {
    graph.query_block_graph()
}

thread_local! {
    static VIEW: Arc<View> = {
        let g = graph();
        mem(&g, "viewed");
        let id = g.node("viewed").unwrap().id();
        g.state().view(id, Perm::ALL).unwrap()
    };
}

/// Some view.
pub(crate) fn view() -> Arc<View> {
    VIEW.with(Arc::clone)
}
