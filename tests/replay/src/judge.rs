//! The verdict over one crash state.
//!
//! In this order: the format's own rules on the raw files (the reference checker), snapshots and guest data as the reference
//! reader sees them; then the node is opened for writing, the data is compared again, sectors are written, flushed and
//! compared, the driver checks its image, the node is closed, and the files are checked once more. QEMU looks at a sample,
//! and at whatever failed. Called for every state; must not change what it judges.

use std::cell::RefCell;
use std::collections::BTreeMap;

use conformance::request::{Client, Way};
use conformance::rng::Rng;
use graph::CheckFix;

use crate::disk::Disk;
use crate::image::Image;
use crate::oracle::{Expect, History, What};
use crate::qemu::{Exported, Verdict};
use crate::reference::{self, Chain, Header};
use crate::rig::{Opened, Rig};
use crate::scenario::{Format, PASSPHRASE, Subject};
use crate::stamp::{self, SECTOR};
use crate::states::{Log, Plan, State, Void};
use crate::words;
use crate::workload::{Kind, Run, read_all, request, rig};

/// How thoroughly states are judged.
#[derive(Clone, Copy, Debug)]
pub struct Rigour {
    /// One state in so many is opened by the driver; 0: none.
    pub open: u64,
    /// One state in so many is given to QEMU's tools; 0: none.
    pub qemu: u64,
}

impl Default for Rigour {
    fn default() -> Rigour {
        Rigour { open: 1, qemu: 400 }
    }
}

/// What was judged.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// States.
    pub states: u64,
    /// Of these, opened by the driver.
    pub opened: u64,
    /// Of these, seen by QEMU.
    pub qemu: u64,
    /// Of these, with leaks.
    pub leaky: u64,
    /// Of these, with the dirty bit.
    pub dirty: u64,
    /// Of these, those the format's own rules could be read for.
    pub read: u64,
    /// Stored bitmaps in them that were to be trusted.
    pub bitmaps: u64,
}

impl Tally {
    /// Adds another one.
    pub fn add(&mut self, other: &Tally) {
        self.states += other.states;
        self.opened += other.opened;
        self.qemu += other.qemu;
        self.leaky += other.leaky;
        self.dirty += other.dirty;
        self.read += other.read;
        self.bitmaps += other.bitmaps;
    }
}

/// Judges states of one subject.
pub struct Judge<'a> {
    subject: &'a Subject,
    rig: Rig,
    rigour: Rigour,
    /// What was judged so far.
    pub tally: Tally,
    rng: Rng,
}

impl<'a> Judge<'a> {
    /// A judge.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn new(subject: &'a Subject, rigour: Rigour, seed: u64) -> Result<Judge<'a>, String> {
        Ok(Judge { subject, rig: rig(subject)?, rigour, tally: Tally::default(), rng: Rng::new(seed) })
    }

    /// Judges every state of a run; the first violation ends it. `void` declares barriers void (`Log::states`).
    ///
    /// # Errors
    /// The violation, in words.
    pub fn all(&mut self, run: &Run, plan: Plan, seed: u64, void: Void<'_>) -> Result<(), String> {
        let mut expect: Option<(u64, Expect<'_>)> = None;
        if let Some(to) = std::env::var_os("RINGBLK_KEEP") {
            std::fs::write(std::path::Path::new(&to).join("log.txt"), run.story()).map_err(words)?;
        }
        let untouched = untouched(&run.log);
        run.log.states(plan, seed, void, |state| {
            if expect.as_ref().is_none_or(|(at, _)| *at != state.at) {
                expect = Some((state.at, run.history.expect(state.at)));
            }
            let Some((_, expect)) = &expect else { return Ok(()) };
            self.state(&state, expect, &untouched).map_err(|e| {
                format!(
                    "{}: {} (seed {seed}): {e}{}",
                    self.subject.name,
                    state.label,
                    self.second_opinion(&state)
                )
            })
        })?;
        Ok(())
    }

    /// Judges one state. `untouched` are files that must be as they were.
    ///
    /// # Errors
    /// The violation, in words.
    pub fn state(
        &mut self,
        state: &State,
        expect: &Expect<'_>,
        untouched: &[(String, Image)],
    ) -> Result<(), String> {
        self.tally.states += 1;
        let mut seen = None;
        if let Format::Qcow2 { .. } = self.subject.format {
            seen = self.raw(&state.files, Some(expect))?;
        }
        if let Some(checker) = self.subject.checker {
            checker(&state.files)?;
        }
        if let Some(disk) = &seen {
            self.tally.read += 1;
            expect.check_with(disk, self.junk(state))?;
        }
        if self.rigour.open != 0 && self.rng.one_in(self.rigour.open) {
            self.tally.opened += 1;
            let number = self.tally.states;
            self.reopen(state, expect, untouched, seen.as_deref(), number)?;
        }
        if self.rigour.qemu != 0 && self.rng.one_in(self.rigour.qemu) {
            self.tally.qemu += 1;
            self.qemu(state, expect)?;
        }
        Ok(())
    }

    /// Whether the guest may see junk where it discarded.
    fn junk(&self, state: &State) -> bool {
        state.mean && self.subject.discards_in_place
    }

    fn file<'b>(&self, files: &'b [(String, Image)], name: &str) -> Result<&'b Image, String> {
        let found = files.iter().find(|(n, _)| n == name).map(|(_, i)| i);
        found.ok_or_else(|| format!("there is no file '{name}'"))
    }

    /// The reference checker and reader over the raw files; the content of the disk, if it can be read without keys.
    fn raw(
        &mut self,
        files: &[(String, Image)],
        expect: Option<&Expect<'_>>,
    ) -> Result<Option<Vec<u8>>, String> {
        let Format::Qcow2 { data, secret } = &self.subject.format else { return Ok(None) };
        let image = self.file(files, &self.subject.top)?;
        let report = reference::check(image)?;
        if !report.corruptions.is_empty() {
            return Err(format!("corruptions: {}", report.corruptions.join("; ")));
        }
        let header = Header::read(image)?;
        self.tally.leaky += u64::from(report.leaks > 0);
        self.tally.dirty += u64::from(header.dirty());
        if header.incompatible & reference::incompatible::CORRUPT != 0 {
            return Err("the corrupt bit is set".to_owned());
        }
        let external = data.as_ref().map(|name| self.file(files, name)).transpose()?;
        let chain = Chain { image, data: external, backing: self.subject.backing.as_deref() };
        if secret.is_some() || self.subject.can.compress {
            return Ok(None);
        }
        if let Some(expect) = expect {
            let (must, may) = expect.snapshots();
            let (there, _) = header.snapshot_table(image)?;
            let there: BTreeMap<&str, _> = there.iter().map(|s| (s.name.as_str(), s)).collect();
            for snapshot in must {
                if !there.contains_key(snapshot.name.as_str()) {
                    return Err(format!("'{}' is lost", snapshot.name));
                }
            }
            for (name, entry) in there {
                let known = may.iter().find(|s| s.name == name);
                let known = known.ok_or_else(|| format!("'{name}' is back from the dead"))?;
                let found =
                    reference::read_guest(&chain, &header, entry.l1_offset, entry.l1_size, entry.size)?;
                compare(&known.content, &found).map_err(|e| format!("'{name}': {e}"))?;
            }
        }
        let disk = reference::read_guest(&chain, &header, header.l1_offset, header.l1_size, header.size)?;
        for bitmap in reference::bitmaps(image, &header)? {
            if bitmap.valid {
                self.tally.bitmaps += 1;
                bitmap.covers(&self.subject.initial, &disk)?;
            }
        }
        Ok(Some(disk))
    }

    /// Opens the state for writing, compares, writes, checks, closes, checks.
    fn reopen(
        &mut self,
        state: &State,
        expect: &Expect<'_>,
        untouched: &[(String, Image)],
        seen: Option<&[u8]>,
        number: u64,
    ) -> Result<(), String> {
        let disk = Disk::with(&state.files);
        let content = {
            let opened = self.rig.open((self.subject.options)(&disk), false)?;
            let content = use_it(&opened, &disk, expect, self.junk(state), seen, number)?;
            opened.close()?;
            content
        };
        let files = disk.files();
        for (name, image) in untouched {
            if !self.file(&files, name)?.same(image) {
                return Err(format!("'{name}' has been changed"));
            }
        }
        if let Some(checker) = self.subject.checker {
            checker(&files).map_err(|e| format!("after use: {e}"))?;
        }
        let leaks = (self.tally.leaky, self.tally.dirty);
        let after = self.raw(&files, None).map_err(|e| format!("after use: {e}"))?;
        if self.tally.dirty != leaks.1 {
            return Err("after use: still dirty".to_owned());
        }
        (self.tally.leaky, self.tally.dirty) = leaks;
        match after {
            Some(after) => compare(&content, &after).map_err(|e| format!("after use: {e}")),
            None => Ok(()),
        }
    }

    /// QEMU's arguments for opening the image of the subject.
    fn source(&self) -> Vec<String> {
        let Format::Qcow2 { secret, .. } = &self.subject.format else { return Vec::new() };
        let top = &self.subject.top;
        match secret {
            Some(_) => {
                let object = format!("secret,id=key,data={PASSPHRASE}");
                let image = format!("driver=qcow2,encrypt.key-secret=key,file.filename={top}");
                ["--object".to_owned(), object, "--image-opts".to_owned(), image].to_vec()
            }
            None => ["-f".to_owned(), "qcow2".to_owned(), top.clone()].to_vec(),
        }
    }

    fn qemu(&self, state: &State, expect: &Expect<'_>) -> Result<(), String> {
        let Format::Qcow2 { .. } = self.subject.format else { return Ok(()) };
        let exported = Exported::new(&state.files)?;
        let source = self.source();
        let source: Vec<&str> = source.iter().map(String::as_str).collect();
        let dirty = Header::read(self.file(&state.files, &self.subject.top)?)?.dirty();
        if dirty {
            // What opening it would do; its exit code tells of what was repaired.
            exported.check(&[&["-r", "all"], &source[..]].concat())?;
        }
        if let Verdict::Bad(words) = exported.check(&source)? {
            return Err(words);
        }
        expect
            .check_with(&exported.content(&source)?, self.junk(state))
            .map_err(|e| format!("read by QEMU: {e}"))
    }

    /// What QEMU says of a state that somebody complained about, for the message.
    fn second_opinion(&self, state: &State) -> String {
        let Format::Qcow2 { .. } = self.subject.format else { return String::new() };
        let source = self.source();
        let source: Vec<&str> = source.iter().map(String::as_str).collect();
        let keep = std::env::var_os("RINGBLK_KEEP");
        let said = Exported::new(&state.files).and_then(|e| {
            if let Some(to) = keep {
                for (name, image) in &state.files {
                    std::fs::write(std::path::Path::new(&to).join(name), image.to_bytes()).map_err(words)?;
                }
            }
            e.check(&source)
        });
        match said {
            Ok(Verdict::Bad(words)) => format!("\n{words}"),
            other => format!("\nqemu-img check: {other:?}"),
        }
    }
}

/// Files the run had no business with: they have no entry in its log.
fn untouched(log: &Log) -> Vec<(String, Image)> {
    let changed = |at: usize| log.entries.iter().any(|e| e.file == at);
    let all = log.start.iter().enumerate();
    all.filter(|(at, (name, _))| !changed(*at) && name.starts_with("backing"))
        .map(|(_, f)| f.clone())
        .collect()
}

/// Uses an open state: compares, writes, flushes, compares, has it checked; the content at the end.
fn use_it(
    opened: &Opened<'_>,
    disk: &Disk,
    expect: &Expect<'_>,
    junk: bool,
    seen: Option<&[u8]>,
    number: u64,
) -> Result<Vec<u8>, String> {
    let content = opened.run(number, |io| async move { read_all(&io).await })?;
    expect.check_with(&content, junk)?;
    if let Some(seen) = seen {
        compare(seen, &content).map_err(|e| format!("the driver reads something else: {e}"))?;
    }
    let mut history = History::new(content);
    let history_out = {
        let disk = disk.clone();
        let inner = std::mem::take(&mut history);
        opened.run(number, move |io| async move {
            let history = RefCell::new(inner);
            let mut rng = Rng::new(number);
            let sectors = io.size() / SECTOR as u64;
            if sectors == 0 {
                return Ok(history.into_inner());
            }
            let client = Client { io: io.clone(), way: Way::Driven };
            for _ in 0..3 {
                let first = rng.below(sectors);
                let count = (1 + rng.below(20)).min(sectors - first);
                request(&client, &disk, &history, Kind::Write, first, count).await?;
            }
            let first = rng.below(sectors);
            request(&client.other(), &disk, &history, Kind::Write, first, 1).await?;
            request(&client, &disk, &history, Kind::Flush, 0, 0).await?;
            let found = read_all(&io).await?;
            history.borrow().now(disk.tick()).check(&found).map_err(|e| format!("read back: {e}"))?;
            let driver = io.node().map_err(words)?.driver();
            match driver.check(&io, CheckFix::NONE).await {
                Ok(r) if r.corruptions + r.check_errors > 0 => {
                    return Err(format!("the driver's check: {:?}", r.messages));
                }
                Ok(_) => {}
                Err(e) if e.errno() == graph::Errno::ENOTSUP => {}
                Err(e) => return Err(format!("the driver's check: {e}")),
            }
            Ok(history.into_inner())
        })?
    };
    Ok(latest(&history_out))
}

/// The content after a history of writes that came one after the other.
fn latest(history: &History) -> Vec<u8> {
    let mut content = history.initial.to_vec();
    for (number, event) in history.events.iter().enumerate() {
        if let What::Stamp = event.what {
            let at = event.first as usize * SECTOR;
            let data = stamp::sectors(event.first, event.count, number as u64);
            content[at..at + data.len()].copy_from_slice(&data);
        }
    }
    content
}

fn compare(must: &[u8], found: &[u8]) -> Result<(), String> {
    if must.len() != found.len() {
        return Err(format!("{} bytes, must be {}", found.len(), must.len()));
    }
    let differs = |(_, (a, b)): &(usize, (&[u8], &[u8]))| a != b;
    match must.chunks(SECTOR).zip(found.chunks(SECTOR)).enumerate().find(differs) {
        None => Ok(()),
        Some((sector, (must, found))) => Err(format!(
            "sector {sector} is {:?}, must be {:?}",
            stamp::recognise(found),
            stamp::recognise(must)
        )),
    }
}
