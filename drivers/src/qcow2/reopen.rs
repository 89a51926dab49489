//! Other options for an image in use: it is brought into order on disk and opened again beside itself.
//!
//! Called by the graph, drained. What was in memory is on disk when the new object reads it, so both are right until one
//! of them is used again; the caches may have other sizes, and an image that becomes writable is read as one that is opened for
//! writing. The bitmaps are the node's and stay.
//!
//! | change | on disk, when |
//! |---|---|
//! | to read-only | bitmaps stored: prepare (marked as in use again if it is not to be) |
//! | any, from writable | commit, refcounts as in memory, dirty bit off: prepare |
//! | to writable | unknown autoclear bits off, bitmaps marked as in use: finish; if that fails the image takes no writes |

use std::any::Any;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use graph::options::{Purpose, parse_options};
use graph::{
    BlockError, BoxFut, Driver, Errno, NodeIo, Reopen, ReopenContext, Result, cannot_change, refuse_changes,
};
use serde_json::Value;

use super::alloc::Kind;
use super::bitmap::Bitmaps;
use super::cleaning::Cleaning;
use super::commit::{Commits, HeaderIo, Health};
use super::format::Policy;
use super::node::{FILE, NO_BACKING, Qcow2};
use super::open::{inactive_tables, make_space, read_image};
use super::options::Qcow2Options;
use super::settings;
use super::table::Tables;

/// What belongs to the image, not to the way it is used.
const FIXED: [&str; 3] = ["encrypt", "data-file", "snapshot"];

/// The image, opened again.
struct Anew {
    new: Arc<Qcow2>,
    /// Whether it was, and whether it will be, read-only.
    read_only: (bool, bool),
    fell_back: bool,
}

/// The open image behind a node's driver.
fn of(driver: &dyn Driver) -> Result<&Qcow2> {
    let any: &dyn Any = driver;
    any.downcast_ref().ok_or_else(|| BlockError::errno_only(Errno::ENODEV))
}

impl Reopen for Anew {
    fn replacement(&self) -> Option<Arc<dyn Driver>> {
        let new: Arc<dyn Driver> = self.new.clone();
        Some(new)
    }

    fn read_only(&self) -> bool {
        self.fell_back
    }

    fn finish<'a>(&'a mut self, cx: &'a ReopenContext) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let (before, after) = self.read_only;
            if after || !before {
                return Ok(());
            }
            let new = Arc::clone(&self.new);
            let begun = cx.on_io(move |io| async move { new.begin_writing(&io).await }).await;
            match &begun {
                Ok(()) => self.new.set_bitmaps_readonly(false),
                // Bitmaps that the image calls right while it is written would be wrong after a crash.
                Err(e) => self.new.commits.health().stop(&format!("it could not be marked as in use: {e}")),
            }
            begun
        })
    }

    fn restore<'a>(&'a mut self, cx: &'a ReopenContext) -> BoxFut<'a, ()> {
        Box::pin(async move {
            if self.read_only != (false, true) {
                return Ok(());
            }
            cx.on_io(|io| async move {
                let driver = io.node()?.driver();
                of(&*driver)?.mark_again(&io).await
            })
            .await
        })
    }

    fn commit(self: Box<Self>) {
        if self.read_only.1 {
            self.new.set_bitmaps_readonly(true);
        }
    }
}

impl Qcow2 {
    /// Prepares.
    pub(super) async fn reopen_with(&self, cx: &ReopenContext, own: Value) -> Result<Box<dyn Reopen>> {
        let mut own = own;
        if let Some(own) = own.as_object_mut() {
            refuse_changes(cx.own_before(), own, &FIXED)?;
            // The graph sees to the children; the name does not matter here.
            own.insert("file".into(), Value::String(String::new()));
        }
        let options: Qcow2Options = parse_options(own)?;
        let after = cx.after();
        let file_read_only = cx.child_options(FILE).is_some_and(|o| o.read_only);
        let fell_back = !after.read_only && after.auto_read_only && file_read_only;
        let read_only = after.refuses_writes() || fell_back;
        if self.reading.is_some() {
            // A snapshot: there is nothing to write, and its table was found under a claim.
            return if read_only { Ok(Box::new(())) } else { Err(cannot_change("read-only")) };
        }
        if after.purpose != Purpose::Use {
            return Err(BlockError::unsupported("The image was not opened for use"));
        }
        self.commits.check()?;
        let was_read_only = self.settings.read_only;
        if !was_read_only {
            let brought = cx.on_io(move |io| async move {
                let driver = io.node()?.driver();
                let this = of(&*driver)?;
                if read_only {
                    // First: it sets space aside, which must not stay so.
                    Qcow2::store_bitmaps(this, &io).await?;
                }
                this.commits.settle(this, &io).await
            });
            if let Err(e) = brought.await {
                if read_only {
                    self.put_back(cx).await;
                }
                return Err(e);
            }
        }
        let new = match self.anew(cx, &options, read_only).await {
            Ok(new) => Arc::new(new),
            Err(e) => {
                if !was_read_only && read_only {
                    self.put_back(cx).await;
                }
                return Err(e);
            }
        };
        if was_read_only && !read_only && new.header().dirty() {
            return Err(BlockError::new(
                Errno::EIO,
                "The image was not closed and has to be repaired before it is written: delete the node and add it again",
            ));
        }
        let read_only = (was_read_only, read_only);
        Ok(Box::new(Anew { new, read_only, fell_back }))
    }

    /// After something failed half way to read-only.
    async fn put_back(&self, cx: &ReopenContext) {
        let marking = cx.on_io(|io| async move {
            let driver = io.node()?.driver();
            of(&*driver)?.mark_again(&io).await
        });
        if let Err(e) = marking.await {
            log::error!("qcow2 node '{}': {e}", cx.node_name());
        }
    }

    /// The image as it is on disk now, with other options.
    async fn anew(&self, cx: &ReopenContext, options: &Qcow2Options, read_only: bool) -> Result<Qcow2> {
        let policy = Policy { writable: !read_only, check: false, inspect: false };
        let image = cx.on_io(move |io| async move { read_image(&io.child(FILE), policy).await }).await?;
        let geo = image.header.geometry();
        if geo.cluster_size() != self.geo.cluster_size() || image.header.virtual_size() != self.size() {
            // Not while we have it open, unless locks were off.
            return Err(BlockError::new(Errno::EIO, "The image file holds another image by now"));
        }
        let settings = settings::decide(options, &image.header, &cx.after(), read_only)?;
        let events = cx.events();
        let alarm = move |msg: &str, offset, size, fatal| events.image_corrupted(msg, offset, size, fatal);
        let health = Arc::new(Health::new(!read_only, Box::new(alarm)));
        let header = HeaderIo::new(image.header.clone(), image.first.clone(), Arc::clone(&health));
        let header = Arc::new(header);
        let epochs = cx.epochs().unwrap_or_default();
        let space = make_space(epochs, &image, &settings, &health, &header, geo);
        if settings.guarded.has(Kind::InactiveL2) && !read_only && !image.snapshots.is_empty() {
            let snapshots = image.snapshots.clone();
            let reading =
                cx.on_io(move |io| async move { inactive_tables(&io.child(FILE), &snapshots, geo).await });
            for table in reading.await? {
                space.add_metadata(Kind::InactiveL2, table, geo.cluster_size());
            }
        }
        let sector = cx.child(FILE).map_or(512, |f| f.driver().limits().request_alignment.max(512));
        let tables = Tables::new(
            geo,
            image.header.l1_offset,
            &image.l1,
            settings.l2_cache_size,
            settings.l2_slice_size,
            sector.into(),
        );
        let backing_size = self.backing.and_then(|i| cx.child(i)).map_or(NO_BACKING, |node| node.size());
        Ok(Qcow2 {
            geo,
            size: AtomicU64::new(image.header.virtual_size()),
            tables: Arc::new(tables),
            space: Arc::new(space),
            cleaning: Cleaning::new(settings.cache_clean_interval),
            commits: Commits::new(health, Arc::clone(&header), !read_only),
            header,
            data: self.data,
            data_file: self.data_file,
            backing: self.backing,
            backing_size: AtomicU64::new(backing_size),
            settings,
            crypt: self.crypt.clone(),
            crypt_info: self.crypt_info.clone(),
            decoded: Default::default(),
            snapshots: Mutex::new(image.snapshots),
            bitmaps: Bitmaps::new(cx.bitmaps(), self.bitmap_directory()),
            reading: None,
            beside_writer: self.beside_writer,
        })
    }

    /// Before the first write through this object.
    async fn begin_writing(&self, io: &NodeIo) -> Result<()> {
        self.header.clear_unknown_autoclear(&io.child(FILE)).await?;
        self.bitmaps_in_use(io).await
    }

    /// The image goes on being written, although its bitmaps were stored.
    async fn mark_again(&self, io: &NodeIo) -> Result<()> {
        let marked = self.bitmaps_in_use(io).await;
        if let Err(e) = &marked {
            self.commits.health().stop(&format!("it could not be marked as in use again: {e}"));
        }
        marked
    }
}
