//! What a node does to bytes: every part opens a fresh image and compares it with the model.
//!
//! Runs on one iothread, real or simulated. With faults (`Setting::faults`) requests may fail; what they leave must still be
//! either the old or the new bytes, and nothing else may change.

use std::future::Future;
use std::pin::Pin;

use graph::{Errno, Location, NodeIo, StatusFlags, ZeroFlags};

use crate::case::{Content, Discarded, DriverCase};
use crate::model::Model;
use crate::request::{Answer, Client, UNTOUCHED, Way, join_all};
use crate::rng::Rng;
use crate::{Check, ensure};

/// What a part needs to know.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Size of the node, bytes.
    pub size: u64,
    /// What becomes of written data.
    pub content: Content,
    /// What a discarded range reads as.
    pub discarded: Discarded,
    /// Whether requests may fail without a reason the suite knows.
    pub faults: bool,
    /// How much around a torn write may read as anything, bytes.
    pub torn_unit: u64,
    /// Where randomness comes from.
    pub seed: u64,
}

impl Setting {
    /// Of a case.
    pub fn new(case: &DriverCase, seed: u64, faults: bool) -> Setting {
        let DriverCase { size, content, discarded, torn_unit, .. } = *case;
        Setting { size, content, discarded, faults, torn_unit, seed }
    }
}

/// A part: runs on an iothread with the root of the node.
pub type Part = fn(NodeIo, Setting) -> Pin<Box<dyn Future<Output = Check>>>;

/// All parts, with their names.
pub const PARTS: &[(&str, Part)] = &[
    ("ranges", |io, s| Box::pin(ranges(io, s))),
    ("zeroes and discards", |io, s| Box::pin(zeroes(io, s))),
    ("ends", |io, s| Box::pin(ends(io, s))),
    ("block status", |io, s| Box::pin(status(io, s))),
    ("random requests", |io, s| Box::pin(random(io, s))),
    ("concurrent writers", |io, s| Box::pin(concurrent(io, s))),
];

/// A stretch of a node together with what it must hold.
pub struct Subject {
    client: Client,
    setting: Setting,
    /// Where the stretch begins.
    base: u64,
    /// What it holds.
    pub model: Model,
}

impl Subject {
    /// A whole fresh node.
    pub fn new(io: NodeIo, way: Way, setting: Setting) -> Subject {
        Subject::part(io, way, setting, 0, setting.size)
    }

    /// A part of a fresh node.
    pub fn part(io: NodeIo, way: Way, setting: Setting, base: u64, len: u64) -> Subject {
        let mut model = Model::zeroes(len);
        if setting.content == Content::Untouched {
            model.write(0, &vec![UNTOUCHED; len as usize]);
        }
        Subject { client: Client { io, way }, setting, base, model }
    }

    /// Goes on with what is known of a node that was opened again.
    pub fn with_model(io: NodeIo, way: Way, setting: Setting, model: Model) -> Subject {
        Subject { client: Client { io, way }, setting, base: 0, model }
    }

    /// The root its requests go to.
    pub fn io(&self) -> &NodeIo {
        &self.client.io
    }

    /// Takes the other way from now on.
    pub fn turn(&mut self) {
        self.client = self.client.other();
    }

    fn keeps(&self) -> bool {
        self.setting.content == Content::Kept
    }

    /// Whether it worked; an error only where faults are expected.
    fn judge<T>(&self, what: &str, offset: u64, len: u64, answer: Answer<T>) -> Result<Option<T>, String> {
        match answer {
            Ok(value) => Ok(Some(value)),
            Err(_) if self.setting.faults => Ok(None),
            Err(e) => Err(format!("{what} {offset}+{len} ({:?}): {e}", self.client.way)),
        }
    }

    /// Writes random data.
    ///
    /// # Errors
    /// It failed.
    pub async fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Check {
        let answer = self.client.write(self.base + offset, data, fua).await;
        let done = self.judge("write", offset, data.len() as u64, answer)?.is_some();
        match (self.keeps(), done) {
            (false, _) => {}
            (true, true) => self.model.write(offset, data),
            (true, false) => {
                self.model.maybe_write(offset, data);
                self.tear(offset, data.len() as u64);
            }
        }
        Ok(())
    }

    /// After a change that failed: what was encrypted together may have been torn.
    fn tear(&mut self, offset: u64, len: u64) {
        let unit = self.setting.torn_unit;
        if self.setting.faults && unit > 1 && len > 0 {
            let start = offset - offset % unit;
            self.model.forget(start, (offset + len).next_multiple_of(unit) - start);
        }
    }

    /// Reads and compares.
    ///
    /// # Errors
    /// It failed, or returned what cannot be.
    pub async fn read(&mut self, offset: u64, len: u64) -> Check {
        let answer = self.client.read(self.base + offset, len).await;
        let Some(data) = self.judge("read", offset, len, answer)? else { return Ok(()) };
        self.model.read(offset, &data).map_err(|e| format!("{e} ({:?})", self.client.way))
    }

    /// Reads both ways, and both must be the same.
    ///
    /// # Errors
    /// As [`Subject::read`].
    pub async fn read_both(&mut self, offset: u64, len: u64) -> Check {
        self.read(offset, len).await?;
        self.turn();
        let result = self.read(offset, len).await;
        self.turn();
        result
    }

    /// Reads everything.
    ///
    /// # Errors
    /// As [`Subject::read`].
    pub async fn read_all(&mut self) -> Check {
        let size = self.model.size();
        let mut at = 0;
        while at < size {
            let len = (size - at).min(1 << 20);
            self.read_both(at, len).await?;
            at += len;
        }
        Ok(())
    }

    /// Writes zeroes.
    ///
    /// # Errors
    /// It failed.
    pub async fn zero(&mut self, offset: u64, len: u64, flags: ZeroFlags) -> Check {
        let answer = self.client.zero(self.base + offset, len, flags).await;
        let done = match answer {
            // The one error that is asked for.
            Err(Errno::ENOTSUP) if flags.contains(ZeroFlags::NO_FALLBACK) => false,
            answer => self.judge("write zeroes", offset, len, answer)?.is_some(),
        };
        match (self.keeps(), done) {
            (false, _) => {}
            (true, true) => self.model.zero(offset, len),
            (true, false) => {
                self.model.maybe_zero(offset, len);
                self.tear(offset, len);
            }
        }
        Ok(())
    }

    /// Discards.
    ///
    /// # Errors
    /// It failed.
    pub async fn discard(&mut self, offset: u64, len: u64) -> Check {
        let answer = self.client.discard(self.base + offset, len).await;
        let done = self.judge("discard", offset, len, answer)?.is_some();
        if self.keeps() {
            match self.setting.discarded {
                Discarded::Kept => {}
                // Only whole blocks are given up: the edges may stay.
                Discarded::Zeroes if done && offset.is_multiple_of(4096) && len.is_multiple_of(4096) => {
                    self.model.zero(offset, len);
                }
                Discarded::Zeroes => self.model.maybe_zero(offset, len),
                Discarded::Anything => self.model.forget(offset, len),
            }
        }
        Ok(())
    }

    /// Flushes.
    ///
    /// # Errors
    /// It failed.
    pub async fn flush(&mut self) -> Check {
        let answer = self.client.flush().await;
        self.judge("flush", 0, 0, answer).map(drop)
    }

    /// One random request.
    ///
    /// # Errors
    /// It failed, or a read returned what cannot be.
    pub async fn step(&mut self, rng: &mut Rng) -> Check {
        let (offset, len) = rng.range(self.model.size());
        if rng.one_in(2) {
            self.turn();
        }
        match rng.below(16) {
            0..=5 => {
                let data = if rng.one_in(8) { vec![0; len as usize] } else { rng.data(len) };
                self.write(offset, &data, rng.one_in(8)).await
            }
            6 => self.zero(offset, len, ZeroFlags::empty()).await,
            7 => self.zero(offset, len, ZeroFlags::MAY_UNMAP).await,
            8 => self.zero(offset, len, ZeroFlags::NO_FALLBACK | ZeroFlags::MAY_UNMAP | ZeroFlags::FUA).await,
            9 => self.discard(offset, len).await,
            10 => self.flush().await,
            11 => self.read_both(offset, len).await,
            _ => self.read(offset, len).await,
        }
    }
}

/// Reads and writes around every border that alignment, blocks and clusters make.
async fn ranges(io: NodeIo, s: Setting) -> Check {
    let mut rng = Rng::new(s.seed);
    let mut left = None;
    for way in [Way::Driven, Way::Mapped] {
        let mut subject = match left.take() {
            Some(model) => Subject::with_model(io.clone(), way, s, model),
            None => Subject::new(io.clone(), way, s),
        };
        if way == Way::Mapped {
            // The second round starts over what the first one left, which is there still where this fails.
            subject.zero(0, s.size, ZeroFlags::empty()).await?;
        }
        subject.read_all().await?;
        let borders = [512, 4096, 65536, s.size / 2, s.size - 4096, s.size];
        for border in borders {
            for before in [0u64, 1, 511, 512, 4097] {
                for len in [1u64, 2, 512, 513, 4096, 8195, 70_001] {
                    let offset = border.saturating_sub(before);
                    let len = len.min(s.size.saturating_sub(offset));
                    if len == 0 {
                        continue;
                    }
                    subject.write(offset, &rng.data(len), false).await?;
                    // With a margin, so that a write that reaches too far is seen.
                    let start = offset.saturating_sub(600);
                    let end = (offset + len + 600).min(s.size);
                    subject.read(start, end - start).await?;
                    subject.read_both(offset, len).await?;
                }
            }
        }
        // Nothing at all is a request, too.
        subject.write(0, &[], false).await?;
        subject.read(s.size, 0).await?;
        subject.flush().await?;
        subject.read_all().await?;
        left = Some(subject.model);
    }
    Ok(())
}

/// Zeroing and discarding over data, aligned and not, each sort.
async fn zeroes(io: NodeIo, s: Setting) -> Check {
    let mut rng = Rng::new(s.seed);
    let mut subject = Subject::new(io, Way::Driven, s);
    subject.write(0, &rng.data(s.size), false).await?;
    let sorts = [
        ZeroFlags::empty(),
        ZeroFlags::MAY_UNMAP,
        ZeroFlags::FUA,
        ZeroFlags::NO_FALLBACK,
        ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK | ZeroFlags::FUA,
    ];
    let ranges = [
        (0, 65536),
        (4096, 4096),
        (1, 1),
        (4095, 2),
        (65536 + 512, 512),
        (70_000, 90_001),
        (s.size - 700, 700),
    ];
    for flags in sorts {
        for (offset, len) in ranges {
            subject.turn();
            subject.zero(offset, len, flags).await?;
            subject.read_both(offset.saturating_sub(4096), (len + 4096).min(s.size - offset)).await?;
            // Zeroed space takes data again, and only there.
            subject.write(offset, &rng.data(len), false).await?;
        }
    }
    for (offset, len) in ranges {
        subject.turn();
        subject.discard(offset, len).await?;
        subject.read(offset.saturating_sub(4096), (len + 4096).min(s.size - offset)).await?;
        subject.write(offset, &rng.data(len), false).await?;
    }
    subject.discard(0, s.size).await?;
    subject.read_all().await?;
    subject.zero(0, s.size, ZeroFlags::MAY_UNMAP).await?;
    subject.read_all().await
}

/// What reaches past the end fails, and changes nothing.
async fn ends(io: NodeIo, s: Setting) -> Check {
    let mut rng = Rng::new(s.seed);
    ensure!(io.size() == s.size, "the node has {} bytes, must have {}", io.size(), s.size);
    let mut subject = Subject::new(io.clone(), Way::Driven, s);
    subject.write(s.size - 4096, &rng.data(4096), false).await?;
    let beyond = [
        (s.size, 1),
        (s.size - 1, 2),
        (s.size - 512, 1024),
        (s.size + 4096, 512),
        (i64::MAX as u64 - 511, 512),
        (i64::MAX as u64, 512),
        (u64::MAX - 511, 512),
        (u64::MAX, 1),
    ];
    for way in [Way::Driven, Way::Mapped] {
        let client = Client { io: io.clone(), way };
        for (offset, len) in beyond {
            let data = rng.data(len);
            let answers = [
                ("read", client.read(offset, len).await.map(drop)),
                ("write", client.write(offset, &data, false).await),
                ("zero", client.zero(offset, len, ZeroFlags::empty()).await),
                ("discard", client.discard(offset, len).await),
            ];
            for (what, answer) in answers {
                // A discard that is ignored may be ignored before its range is looked at.
                let ignored = what == "discard" && s.discarded == Discarded::Kept;
                ensure!(
                    answer == Err(Errno::EIO) || (ignored && answer.is_ok()),
                    "{what} {offset}+{len} past the end ({way:?}): {answer:?}"
                );
            }
        }
    }
    ensure!(io.size() == s.size, "the size changed to {}", io.size());
    subject.read_all().await
}

/// Block status covers the node without gaps and never calls data zero.
async fn status(io: NodeIo, s: Setting) -> Check {
    let mut rng = Rng::new(s.seed);
    let mut subject = Subject::new(io.clone(), Way::Driven, s);
    for _ in 0..12 {
        let (offset, len) = rng.range(s.size);
        match rng.below(3) {
            0 => subject.zero(offset, len, ZeroFlags::MAY_UNMAP).await?,
            _ => subject.write(offset, &rng.data(len), false).await?,
        }
    }
    for longest in [u64::MAX, 70_000, 513] {
        // The short steps take long on a large node: the first part is enough for them.
        let end = if longest < 4096 { s.size.min(256 << 10) } else { s.size };
        let mut at = 0;
        while at < end {
            let asked = longest.min(s.size - at);
            let status = match io.block_status(at, asked).await {
                Ok(status) => status,
                Err(_) if s.faults => return Ok(()),
                Err(e) => return Err(format!("block status {at}+{asked}: {e}")),
            };
            let what = format!("block status {at}+{asked}: {status:?}");
            ensure!(status.len > 0 && status.len <= asked, "{what}: length");
            let flags = status.flags;
            ensure!(
                flags.contains(StatusFlags::EOF) == (at + status.len == s.size),
                "{what}: EOF in a node of {}",
                s.size
            );
            ensure!(
                flags.contains(StatusFlags::OFFSET_VALID) == status.location.is_some(),
                "{what}: location"
            );
            if flags.contains(StatusFlags::ZERO) && s.content != Content::Untouched {
                subject
                    .model
                    .read(at, &vec![0; status.len as usize])
                    .map_err(|e| format!("{what}: called zero: {e}"))?;
            }
            subject.read(at, status.len).await?;
            if let Some(Location::Child { child, offset }) = status.location
                && !s.faults
            {
                let below = Client { io: io.child(child), way: Way::Driven };
                let data = below.read(offset, status.len).await.map_err(|e| format!("{what}: child: {e}"))?;
                subject.model.read(at, &data).map_err(|e| format!("{what}: in the child: {e}"))?;
            }
            at += status.len;
        }
    }
    let past = io.block_status(s.size, 512).await.map_err(|e| format!("block status past the end: {e}"))?;
    ensure!(past.flags.contains(StatusFlags::EOF | StatusFlags::ZERO), "past the end: {past:?}");
    Ok(())
}

/// Everything in random order.
async fn random(io: NodeIo, s: Setting) -> Check {
    let mut rng = Rng::new(s.seed);
    let mut subject = Subject::new(io, Way::Driven, s);
    for step in 0..400 {
        subject.step(&mut rng).await.map_err(|e| format!("step {step}: {e}"))?;
    }
    subject.flush().await?;
    subject.read_all().await
}

/// Many writers at the same time, each in a stretch of its own; the stretches meet inside of blocks.
async fn concurrent(io: NodeIo, s: Setting) -> Check {
    stripes(io, s, 0, 1).await
}

/// Writers on every `of`-th stretch, beginning with number `first`.
pub(crate) async fn stripes(io: NodeIo, s: Setting, first: u64, of: u64) -> Check {
    const STRETCHES: u64 = 24;
    let len = s.size / STRETCHES;
    let tasks = (0..STRETCHES).filter(|n| n % of == first).map(|n| {
        let io = io.clone();
        async move {
            let mut rng = Rng::new(s.seed.wrapping_mul(1000).wrapping_add(n));
            let way = if n % 2 == 0 { Way::Driven } else { Way::Mapped };
            let mut subject = Subject::part(io, way, s, n * len, len);
            for step in 0..40 {
                let (offset, len) = rng.range(len);
                let result = match rng.below(8) {
                    0..=4 => subject.write(offset, &rng.data(len), false).await,
                    5 => subject.zero(offset, len, ZeroFlags::MAY_UNMAP).await,
                    6 => subject.flush().await,
                    _ => subject.read(offset, len).await,
                };
                result.map_err(|e| format!("stretch {n}, step {step}: {e}"))?;
            }
            subject.read_both(0, len).await.map_err(|e| format!("stretch {n}, at the end: {e}"))
        }
    });
    for result in join_all(&io, tasks).await {
        result.unwrap_or_else(|| Err("a task panicked".to_owned()))?;
    }
    Ok(())
}
