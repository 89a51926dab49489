//! Opening an image: header, children, tables; nothing is written before all of it was accepted.
//!
//! Called by the graph on the main thread; reading happens on an iothread. Names found inside an image are followed only as
//! plain paths (a backing file also as `json:`), in the format the image says, never probed.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use graph::options::{BlockdevRef, DiscardOption, Purpose, parse_options};
use graph::{
    BlockError, CheckFix, Epochs, Errno, NodeIo, OpenContext, Opened, Perm, PermPair, Result, Roles,
};
use host::IoVecs;
use serde_json::{Map, Value, json};

use super::alloc::{Kind, PassDiscard, Space, SpaceConfig};
use super::bitmap;
use super::check::{self, NodeStorage};
use super::cleaning::Cleaning;
use super::commit::{Commits, HeaderIo, Health};
use super::crypt;
use super::format::snapshot::{self, Snapshot, Step};
use super::format::{
    AUTOCLEAR_DATA_FILE_RAW, Geometry, Header, MAX_CLUSTER_BITS, MAX_SNAPSHOT_EXTRA, MIN_CLUSTER_BITS,
    OFFSET_MASK, Policy,
};
use super::node::{FILE, NO_BACKING, Qcow2, Settings};
use super::options::{BlockdevRefOrNull, Qcow2Options};
use super::settings;
use super::snapshot::reading;
use super::table::Tables;

/// Longest chain of backing files that is opened by the names inside the images: what the graph's nesting allows, less one
/// for the protocol node below the last one. Longer ones can be built from nodes with names.
const MAX_CHAIN: usize = 62;

/// What was read of an image file.
pub(super) struct Image {
    pub(super) first: Vec<u8>,
    pub(super) header: Header,
    pub(super) l1: Vec<u64>,
    reftable: Vec<u64>,
    pub(super) snapshots: Vec<Snapshot>,
}

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: Qcow2Options = parse_options(value)?;
    let common = *cx.options();
    // A file node that is defined here is nobody else's: no other one may write to the file, as for any image.
    let beside_writer = options.snapshot.is_some() && matches!(options.file, BlockdevRef::Reference(_));
    let index = match beside_writer {
        false => cx.open_child("file", Roles::IMAGE, options.file.clone()).await?,
        true => {
            // Somebody may be writing to the image: what a snapshot refers to stays as it is.
            let meanwhile = PermPair { perm: Perm::CONSISTENT_READ, shared: Perm::ALL };
            cx.open_child_as("file", Roles::IMAGE, options.file.clone(), meanwhile).await?
        }
    };
    debug_assert_eq!(index, FILE);
    // An image that cannot be written is opened for reading where that was allowed.
    let file_read_only = cx.child(FILE)?.options().read_only;
    let fell_back = !common.read_only && file_read_only && common.auto_read_only;
    // Of an inactive image the same: it is opened again when it becomes active.
    let read_only = common.refuses_writes() || fell_back;
    if file_read_only && !read_only {
        return Err(BlockError::new(Errno::EACCES, "Block node is read-only"));
    }
    let policy = Policy {
        writable: !read_only,
        check: common.purpose == Purpose::Check,
        inspect: common.purpose == Purpose::Inspect,
    };
    let mut image = cx.child_io(FILE, move |io| async move { read_image(&io, policy).await }).await?;
    let mut reading = None;
    if let Some(which) = &options.snapshot {
        let (snapshot, pin) = reading::begin(&cx, &image.header, &image.snapshots, which)?;
        let again = cx.child_io(FILE, move |io| async move {
            let mut image = read_image(&io, policy).await?;
            reading::show(&mut image.header, &image.snapshots, &snapshot)?;
            let l1 = read_bytes(&io, image.header.l1_offset, image.header.l1_bytes()).await;
            image.l1 = words(&l1.map_err(|e| e.context("Could not read the snapshot's L1 table"))?);
            Ok(image)
        });
        image = again.await?;
        reading = Some(pin);
    }
    let geo = image.header.geometry();
    let settings = settings::decide(&options, &image.header, &common, read_only)?;
    let image = if image.header.dirty() && !read_only && common.purpose == Purpose::Use {
        // Refcounts on disk are behind: put right before anything is allocated.
        log::warn!("qcow2 node '{}' was not closed: its refcounts are repaired", cx.node_name());
        cx.child_io(FILE, move |io| async move { repair(&io, policy).await }).await?
    } else {
        image
    };
    let name = cx.child(FILE)?.driver().info().filename;
    let data_file = open_data_file(&cx, &options, &image.header, &name).await?;
    let backing = open_backing(&cx, &options, &image.header, &name).await?;
    let (crypt, crypt_info) = crypt::open(&cx, &options, &image.header).await?;

    let events = cx.events();
    let alarm = move |msg: &str, offset, size, fatal| events.image_corrupted(msg, offset, size, fatal);
    let health = Arc::new(Health::new(!read_only, Box::new(alarm)));
    let header_io = Arc::new(HeaderIo::new(image.header.clone(), image.first.clone(), Arc::clone(&health)));
    if !read_only && common.purpose == Purpose::Use {
        let header = Arc::clone(&header_io);
        cx.child_io(FILE, move |io| async move { header.clear_unknown_autoclear(&io).await }).await?;
    }
    let (mut directory, set) = (Vec::new(), cx.bitmaps());
    if common.purpose != Purpose::Check {
        let (header, writable) = (image.header.clone(), !read_only);
        let loading = cx.child_io(FILE, move |io| async move { bitmap::read(&io, &header, writable).await });
        let (entries, bitmaps) = match loading.await {
            Err(e) if common.purpose == Purpose::Inspect => {
                log::warn!("the dirty bitmaps of the image cannot be read: {e}");
                Default::default()
            }
            loaded => loaded?,
        };
        directory = entries;
        for bitmap in bitmaps {
            set.add(bitmap)?;
        }
        if !read_only && common.purpose == Purpose::Use && !directory.is_empty() {
            let (header, health) = (Arc::clone(&header_io), Arc::clone(&health));
            let marking = cx.child_io(FILE, move |io| async move {
                bitmap::mark_in_use(&io, &header, &health, &mut directory).await.map(|()| directory)
            });
            directory = marking.await?;
        }
    }
    let space = make_space(cx.epochs(), &image, &settings, &health, &header_io, geo);
    if settings.guarded.has(Kind::InactiveL2) && !read_only && !image.snapshots.is_empty() {
        // Their L1 tables are read for this alone.
        let snapshots = image.snapshots.clone();
        let reading = cx.child_io(FILE, move |io| async move { inactive_tables(&io, &snapshots, geo).await });
        for table in reading.await? {
            space.add_metadata(Kind::InactiveL2, table, geo.cluster_size());
        }
    }
    let sector = u64::from(cx.child(FILE)?.driver().limits().request_alignment.max(512));
    let tables = Tables::new(
        geo,
        image.header.l1_offset,
        &image.l1,
        settings.l2_cache_size,
        settings.l2_slice_size,
        sector,
    );
    // One that is attached later finds its place.
    let (backing, backing_size) = match backing {
        Some(index) => (index, cx.child(index)?.size()),
        None => (cx.reserve_child(), NO_BACKING),
    };
    let node = Qcow2 {
        geo,
        size: AtomicU64::new(image.header.virtual_size()),
        tables: Arc::new(tables),
        space: Arc::new(space),
        cleaning: Cleaning::new(settings.cache_clean_interval),
        commits: Commits::new(health, Arc::clone(&header_io), !read_only),
        header: header_io,
        data: data_file.unwrap_or(FILE),
        data_file,
        backing: Some(backing),
        backing_size: AtomicU64::new(backing_size),
        settings,
        crypt,
        crypt_info,
        decoded: Default::default(),
        snapshots: Mutex::new(image.snapshots),
        bitmaps: bitmap::Bitmaps::new(set, directory),
        reading,
        beside_writer,
    };
    Ok(Opened::new(node).read_only(fell_back))
}

/// Reads `len` bytes at `offset`; zeroes past the end.
pub(super) async fn read_bytes(io: &NodeIo, offset: u64, len: u64) -> Result<Vec<u8>> {
    let buffer = IoVecs::alloc(len as usize, 4096).map_err(BlockError::from)?;
    io.read(offset, &buffer).await?;
    Ok(buffer.to_vec())
}

/// Big-endian words of a table.
pub(super) fn words(raw: &[u8]) -> Vec<u64> {
    raw.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect()
}

pub(super) async fn read_image(io: &NodeIo, policy: Policy) -> Result<Image> {
    // The first sector says how long the first cluster is.
    let start = read_bytes(io, 0, 512).await?;
    let bits = start.get(20..24).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
    let cluster = 1u64 << bits.clamp(MIN_CLUSTER_BITS, MAX_CLUSTER_BITS);
    let len = cluster.min(io.size());
    let first = read_bytes(io, 0, len).await?;
    let header = Header::parse(&first, policy)?;
    if policy.inspect {
        let snapshots = read_snapshots(io, &header).await.unwrap_or_default();
        return Ok(Image { first, header, l1: Vec::new(), reftable: Vec::new(), snapshots });
    }
    let l1 = read_bytes(io, header.l1_offset, header.l1_bytes()).await;
    let l1 = words(&l1.map_err(|e| e.context("Could not read L1 table"))?);
    io.debug_event(graph::DebugEvent::ReftableLoad);
    let reftable = read_bytes(io, header.reftable_offset, header.reftable_bytes()).await;
    let mut reftable = words(&reftable.map_err(|e| e.context("Could not read refcount table"))?);
    reftable.iter_mut().for_each(|entry| *entry &= !0x1ff);
    let snapshots = match read_snapshots(io, &header).await {
        Err(_) if policy.check => Vec::new(),
        result => result.map_err(|e| e.context("Could not read snapshots"))?,
    };
    Ok(Image { first, header, l1, reftable, snapshots })
}

/// Reads the snapshot table, entry by entry.
pub(super) async fn read_snapshots(io: &NodeIo, header: &Header) -> Result<Vec<Snapshot>> {
    let mut out = Vec::new();
    let mut at = 0u64;
    let mut window: Vec<u8> = Vec::new();
    let mut base = 0u64;
    for index in 0..header.snapshot_count {
        loop {
            let skip = (at - base) as usize;
            let rest = window.get(skip..).unwrap_or(&[]);
            match Snapshot::parse(rest, index, header.snapshots_offset, MAX_SNAPSHOT_EXTRA)? {
                Step::Entry(entry, len) => {
                    at += len as u64;
                    snapshot::check_table_len(at, header.snapshots_offset)?;
                    out.push(*entry);
                    break;
                }
                Step::Need(len) => {
                    base = at;
                    window = read_bytes(io, header.snapshots_offset + at, (len as u64).max(64 << 10)).await?;
                }
            }
        }
    }
    Ok(out)
}

/// Repairs an image that was left dirty, and reads it again.
async fn repair(io: &NodeIo, policy: Policy) -> Result<Image> {
    let storage = NodeStorage::new(io.clone());
    let fix = CheckFix { leaks: true, errors: true };
    let report = check::run(&storage, fix, check::Limits::default()).await;
    let failed = |e: BlockError| e.context("Could not repair dirty image");
    let report = report.map_err(|e| failed(e.into()))?;
    if report.check_errors != 0 || report.corruptions != 0 {
        return Err(failed(BlockError::new(Errno::EIO, "It has errors that are not repaired")));
    }
    read_image(io, policy).await
}

/// The space of an image that was read.
pub(super) fn make_space(
    epochs: Arc<Epochs>,
    image: &Image,
    settings: &Settings,
    health: &Arc<Health>,
    header_io: &Arc<HeaderIo>,
    geo: Geometry,
) -> Space {
    let header = &image.header;
    let config = SpaceConfig {
        geometry: geo,
        reftable: image.reftable.clone(),
        reftable_offset: header.reftable_offset,
        reftable_clusters: header.reftable_clusters,
        cache_bytes: settings.refcount_cache_size,
        pass_discard: PassDiscard {
            request: settings.pass_discard_request,
            snapshot: settings.pass_discard_snapshot,
            other: settings.pass_discard_other,
        },
        guarded: settings.guarded,
        lazy: settings.lazy_refcounts,
    };
    let space = Space::new(config, epochs, Arc::clone(health), Arc::clone(header_io));
    // Where nothing will be written nothing can be overwritten.
    if !settings.read_only {
        place_metadata(&space, image, geo);
    }
    space
}

/// Tells the allocator where the metadata is that it does not find by itself.
fn place_metadata(space: &Space, image: &Image, geo: Geometry) {
    let header = &image.header;
    space.add_metadata(Kind::ActiveL1, header.l1_offset, header.l1_bytes());
    let size = geo.cluster_size();
    for table in image.l1.iter().map(|e| e & OFFSET_MASK).filter(|t| *t != 0) {
        space.add_metadata(Kind::ActiveL2, table, size);
    }
    if header.snapshot_count != 0 {
        // As far as the table is known to reach.
        let len: usize = image.snapshots.iter().map(Snapshot::serialised_len).sum();
        space.add_metadata(Kind::SnapshotTable, header.snapshots_offset, len as u64);
        // One that makes no sense is refused when it is used; the image opens, as in QEMU.
        for snapshot in image.snapshots.iter().filter(|s| s.validate_l1(&geo).is_ok()) {
            space.add_metadata(Kind::InactiveL1, snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
        }
    }
    if let Some(bitmaps) = &header.bitmaps {
        space.add_metadata(Kind::BitmapDirectory, bitmaps.directory_offset, bitmaps.directory_size);
    }
    if let Some(crypto) = &header.crypto {
        space.add_metadata(Kind::Crypto, crypto.offset, crypto.length);
    }
}

impl Qcow2 {
    /// The image was repaired behind our back: memory is made what the disk is. Drained; everything had been written before.
    ///
    /// # Errors
    /// It cannot be read. The image takes no more writes then.
    pub(super) async fn read_again(&self, io: &NodeIo) -> Result<()> {
        let file = io.child(FILE);
        let policy = Policy { writable: !self.settings.read_only, check: false, inspect: false };
        let image = match read_image(&file, policy).await {
            Ok(image) => image,
            Err(e) => {
                self.commits.health().stop(&format!("the image could not be read after its repair: {e}"));
                return Err(e.context("Could not read the repaired image"));
            }
        };
        self.tables.replace_l1(image.header.l1_offset, &image.l1);
        self.space.read_again(&image.header, image.reftable.clone());
        if self.settings.guarded.has(Kind::InactiveL2) {
            for table in inactive_tables(&file, &image.snapshots, self.geo).await? {
                self.space.add_metadata(Kind::InactiveL2, table, self.geo.cluster_size());
            }
        }
        place_metadata(&self.space, &image, self.geo);
        self.header.read_again(image.header.clone(), image.first.clone()).await;
        *self.snapshots() = image.snapshots;
        self.decoded.clear();
        Ok(())
    }
}

/// L2 tables that snapshots refer to.
pub(super) async fn inactive_tables(
    file: &NodeIo,
    snapshots: &[Snapshot],
    geo: Geometry,
) -> Result<Vec<u64>> {
    let mut tables = Vec::new();
    for s in snapshots.iter().filter(|s| s.validate_l1(&geo).is_ok()) {
        let l1 = words(&read_bytes(file, s.l1_offset, u64::from(s.l1_size) * 8).await?);
        tables.extend(l1.into_iter().map(|e| e & OFFSET_MASK).filter(|t| *t != 0));
        tables.sort_unstable();
        tables.dedup();
    }
    Ok(tables)
}

async fn open_data_file(
    cx: &OpenContext,
    options: &Qcow2Options,
    header: &Header,
    image: &str,
) -> Result<Option<usize>> {
    if !header.has_data_file() {
        if options.data_file.is_some() {
            return Err(BlockError::invalid(
                "'data-file' can only be set for images with an external data file",
            ));
        }
        return Ok(None);
    }
    if cx.options().purpose == Purpose::Inspect {
        return Ok(None);
    }
    let reference = match (&options.data_file, &header.data_file) {
        (Some(reference), _) => reference.clone(),
        (None, Some(name)) => {
            let name = plain_name(name).ok_or_else(|| {
                BlockError::invalid("The name of the data file is not a plain path; give 'data-file'")
            })?;
            let path = beside(image, &name).ok_or_else(|| no_directory(&name))?;
            BlockdevRef::Inline(protocol(&path))
        }
        (None, None) => return Err(BlockError::invalid("'data-file' is required for this image")),
    };
    let opened = cx.open_child("data-file", Roles::DATA, reference).await;
    opened.map(Some).map_err(|e| e.context("Could not open the external data file"))
}

async fn open_backing(
    cx: &OpenContext,
    options: &Qcow2Options,
    header: &Header,
    image: &str,
) -> Result<Option<usize>> {
    let reference = match &options.backing {
        Some(BlockdevRefOrNull::Null) => return Ok(None),
        // QEMU takes the empty name for null.
        Some(BlockdevRefOrNull::Child(BlockdevRef::Reference(name))) if name.is_empty() => return Ok(None),
        Some(BlockdevRefOrNull::Child(reference)) => reference.clone(),
        None if cx.options().purpose == Purpose::Inspect => return Ok(None),
        None => match &header.backing_file {
            None => return Ok(None),
            Some(name) => BlockdevRef::Inline(stored_backing(name, header, options, image)?),
        },
    };
    let opened = cx.open_child("backing", Roles::COW, reference).await;
    opened.map(Some).map_err(|e| e.context("Could not open backing file"))
}

/// Options of the backing file an image names.
fn stored_backing(
    name: &[u8],
    header: &Header,
    options: &Qcow2Options,
    image: &str,
) -> Result<Map<String, Value>> {
    let shown = String::from_utf8_lossy(name).into_owned();
    let chain = chain_of(options, image)?;
    let format = header.backing_format.as_deref().map(|f| String::from_utf8_lossy(f).into_owned());
    let extend = |mut map: Map<String, Value>| {
        if map.get("driver") == Some(&json!("qcow2")) {
            map.insert(settings::CHAIN.into(), json!(chain));
        }
        map
    };
    if let Some(text) = shown.strip_prefix("json:") {
        let Ok(Value::Object(map)) = serde_json::from_str(text) else {
            return Err(BlockError::invalid(format!("The name of the backing file is not valid: '{shown}'")));
        };
        return Ok(extend(map));
    }
    let Some(format) = format else {
        return Err(BlockError::invalid(format!(
            "The image names the backing file '{shown}' and does not say in which format: give 'backing', or write the \
             format into the image ('qemu-img rebase -u -b {shown} -F FORMAT')"
        )));
    };
    let Some(plain) = plain_name(name) else {
        return Err(BlockError::invalid(format!(
            "The backing file '{shown}' is not a file of this host: give 'backing'"
        )));
    };
    let path = beside(image, &plain).ok_or_else(|| no_directory(&plain))?;
    // Before it is opened, where it would meet the locks of its own upper end.
    if identity(&path).is_some_and(|id| chain.contains(&id)) {
        return Err(infinite(&path.to_string_lossy()));
    }
    let below = protocol(&path);
    Ok(match format.as_str() {
        "file" | "host_device" => below,
        _ => {
            extend(Map::from_iter([("driver".into(), json!(format)), ("file".into(), Value::Object(below))]))
        }
    })
}

/// The images above the next one, this one included; refuses circles and chains without end.
fn chain_of(options: &Qcow2Options, image: &str) -> Result<Vec<String>> {
    let mut chain = options.chain.clone();
    let id = identity(Path::new(image)).unwrap_or_else(|| image.to_owned());
    if chain.contains(&id) {
        return Err(infinite(image));
    }
    if chain.len() >= MAX_CHAIN {
        return Err(BlockError::invalid(format!(
            "A chain of more than {MAX_CHAIN} backing files is not opened"
        )));
    }
    chain.push(id);
    Ok(chain)
}

/// What tells a file from all others, whatever its name.
fn identity(path: &Path) -> Option<String> {
    std::fs::metadata(path).ok().map(|meta| format!("{}:{}", meta.dev(), meta.ino()))
}

fn infinite(name: &str) -> BlockError {
    BlockError::invalid(format!("Backing file '{name}' creates an infinite loop."))
}

/// A name that means a path: without the prefix of a protocol, as QEMU tells them apart.
fn plain_name(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?;
    let name = name.strip_prefix("file:").unwrap_or(name);
    let until = name.find([':', '/']);
    let prefixed = until.is_some_and(|i| name.as_bytes().get(i) == Some(&b':'));
    (!prefixed && !name.is_empty()).then(|| name.to_owned())
}

/// A path as seen from the directory of the image; `None` if the image has none and the path is relative.
fn beside(image: &str, name: &str) -> Option<PathBuf> {
    if Path::new(name).is_absolute() {
        return Some(PathBuf::from(name));
    }
    if image.is_empty() {
        return None;
    }
    Some(Path::new(image).parent().unwrap_or(Path::new("")).join(name))
}

fn no_directory(name: &str) -> BlockError {
    BlockError::invalid(format!(
        "Cannot use relative file name '{name}': the image is not a file of this host"
    ))
}

/// Options of the node for a path.
fn protocol(path: &Path) -> Map<String, Value> {
    use std::os::unix::fs::FileTypeExt;
    let device = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
    let driver = if device { "host_device" } else { "file" };
    Map::from_iter([("driver".into(), json!(driver)), ("filename".into(), json!(path.to_string_lossy()))])
}

/// The raw bit of the data file.
pub(super) fn data_file_raw(header: &Header) -> bool {
    header.has_data_file() && header.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0
}

/// What a node does with discards by default.
pub(super) fn passes_discards(discard: DiscardOption) -> bool {
    discard == DiscardOption::Unmap
}
