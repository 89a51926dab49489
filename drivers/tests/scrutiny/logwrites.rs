//! blklogwrites: replaying the log gives what is on disk, at each flush and at the end; and for the same requests the log is
//! the one QEMU's driver writes.

use std::path::Path;

use conformance::request::{Client, Way, join_all};
use conformance::rng::Rng;
use graph::ZeroFlags;
use serde_json::{Value, json};

use crate::common::tool;
use crate::table::{Table, nameless};

const SIZE: usize = 1 << 20;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// An entry as it is on disk, and its data.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    data: Vec<u8>,
}

/// A log read from front to end, by what is known of the format from the kernel's documentation.
struct Log {
    sector_size: usize,
    entries: Vec<Entry>,
    /// Sectors the entries take up, the superblock's included.
    sectors: usize,
}

fn word(bytes: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().unwrap())
}

impl Log {
    fn read(path: &Path) -> Log {
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(&bytes[..8], b"rhswfsj\0", "magic");
        assert_eq!(word(&bytes, 1), 1, "version");
        let count = word(&bytes, 2);
        let sector_size = u32::from_le_bytes(bytes[24..28].try_into().unwrap()) as usize;
        let mut at = sector_size;
        let mut entries = Vec::new();
        for _ in 0..count {
            let head = &bytes[at..at + 32];
            let (sector, sectors, flags) = (word(head, 0), word(head, 1), word(head, 2));
            assert_eq!(word(head, 3), 0, "data_len");
            at += sector_size;
            let len = if flags & DISCARD != 0 { 0 } else { sectors as usize * sector_size };
            // A hole at the end need not have been written.
            let mut data = bytes.get(at..(at + len).min(bytes.len())).unwrap_or_default().to_vec();
            data.resize(len, 0);
            at += len;
            entries.push(Entry { sector, sectors, flags, data });
        }
        Log { sector_size, entries, sectors: at / sector_size }
    }

    /// Carries an entry out.
    fn replay(&self, entry: &Entry, disk: &mut [u8]) {
        if entry.flags & DISCARD == 0 {
            let at = entry.sector as usize * self.sector_size;
            disk[at..at + entry.data.len()].copy_from_slice(&entry.data);
        }
    }
}

fn node(table: &Table, more: Value) -> Value {
    let mut options =
        json!({"driver": "blklogwrites", "file": table.existing("file"), "log": table.existing("log")});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    options
}

fn fresh(table: &Table) {
    std::fs::write(table.path("file"), vec![0; SIZE]).unwrap();
    std::fs::write(table.path("log"), b"").unwrap();
}

/// Requests side by side, many of which overlap; each flush is followed by a picture of the disk.
async fn load(client: Client, seed: u64, path: std::path::PathBuf) -> Vec<Vec<u8>> {
    let mut pictures = Vec::new();
    for round in 0..6u64 {
        let io = client.io.clone();
        let tasks = (0..24u64).map(|n| {
            let client = client.clone();
            async move {
                let mut rng = Rng::new(seed * 1000 + round * 100 + n);
                let (offset, len) = rng.range(SIZE as u64 / 4);
                match rng.below(8) {
                    0 => client.zero(offset, len, ZeroFlags::MAY_UNMAP).await.unwrap(),
                    1 => client.flush().await.unwrap(),
                    2 => client.write(offset, &rng.data(len), true).await.unwrap(),
                    _ => client.write(offset, &rng.data(len), false).await.unwrap(),
                }
            }
        });
        for done in join_all(&io, tasks).await {
            done.expect("a request panicked");
        }
        client.flush().await.unwrap();
        pictures.push(std::fs::read(&path).unwrap());
    }
    pictures
}

#[test]
fn replaying_the_log_gives_the_disk() {
    for sector_size in [512, 4096] {
        for seed in conformance::seeds() {
            let mut table = Table::new();
            fresh(&table);
            table.open(node(&table, json!({"log-sector-size": sector_size, "log-super-update-interval": 7})));
            let path = table.path("file");
            let pictures = table.client(move |client| load(client, seed, path));
            // Flushed: all of it is in the log already.
            let while_open = Log::read(&table.path("log"));
            table.close();
            let log = Log::read(&table.path("log"));
            // Closing flushes once more.
            assert_eq!(while_open.entries.len() + 1, log.entries.len());
            assert_eq!(log.sector_size, sector_size);
            let mut disk = vec![0; SIZE];
            let mut seen = 0;
            for entry in &log.entries {
                log.replay(entry, &mut disk);
                // Rounds end with a flush; those within may find the disk on its way.
                if entry.flags & FLUSH != 0 && pictures.get(seen).is_some_and(|p| *p == disk) {
                    seen += 1;
                }
            }
            let what = format!("sectors of {sector_size}, RINGBLK_SEED={seed}");
            assert_eq!(seen, pictures.len(), "pictures met: {what}");
            assert!(disk == table.content("file"), "the end: {what}");
            assert!(log.entries.iter().any(|e| e.flags == FUA), "durable writes: {what}");
        }
    }
}

#[test]
fn a_log_can_be_gone_on_with() {
    let mut table = Table::new();
    fresh(&table);
    let mut disk = vec![0; SIZE];
    for round in 0..3u8 {
        // The first one finds an empty node, which is an empty log.
        table.open(node(&table, json!({"log-append": true})));
        table.write(u64::from(round) * 4096, vec![round + 1; 8192]).unwrap();
        table.close();
    }
    let log = Log::read(&table.path("log"));
    // Each time with a flush when it was closed.
    let flags: Vec<_> = log.entries.iter().map(|e| e.flags).collect();
    assert_eq!(flags, [0, FLUSH, 0, FLUSH, 0, FLUSH]);
    log.entries.iter().for_each(|e| log.replay(e, &mut disk));
    assert!(disk == table.content("file"));
    // A new one forgets the old one, and only once something is written.
    table.open(node(&table, json!({})));
    assert_eq!(table.read(0, 512), Ok(vec![1; 512]));
    table.close();
    assert_eq!(Log::read(&table.path("log")).entries.len(), 6);
    table.open(node(&table, json!({})));
    table.write(0, vec![9; 512]).unwrap();
    table.close();
    let log = Log::read(&table.path("log"));
    assert_eq!((log.entries.len(), log.sectors), (2, 4));
}

#[test]
fn a_large_write_is_logged_in_pieces() {
    let mut table = Table::new();
    std::fs::write(table.path("file"), vec![0; 4 << 20]).unwrap();
    std::fs::write(table.path("log"), b"").unwrap();
    table.open(node(&table, json!({})));
    table.write(512, Rng::new(1).data((5 << 19) + 512)).unwrap();
    table.client(|c| async move { c.zero(0, 4 << 20, ZeroFlags::empty()).await }).unwrap();
    table.write(1 << 20, vec![1; 512]).unwrap();
    table.close();
    let log = Log::read(&table.path("log"));
    let sectors: Vec<_> =
        log.entries.iter().filter(|e| e.flags != FLUSH).map(|e| (e.sector, e.sectors)).collect();
    assert_eq!(sectors, [(1, 2048), (2049, 2048), (4097, 1025), (0, 8192), (2048, 1)]);
    let mut disk = vec![0; 4 << 20];
    log.entries.iter().for_each(|e| log.replay(e, &mut disk));
    assert!(disk == table.content("file"));
}

#[test]
fn what_cannot_be_logged_fails_and_so_does_what_comes_later() {
    let mut table = Table::new();
    fresh(&table);
    // The second entry goes to sector 3.
    let log = json!({"driver": "blkdebug", "image": table.existing("log"),
                     "inject-error": [{"event": "none", "sector": 3, "errno": 28, "once": true}]});
    table.open(node(&table, json!({"log": log})));
    table.write(0, vec![1; 512]).unwrap();
    let full = graph::Errno::ENOSPC;
    assert_eq!(table.write(512, vec![2; 512]), Err(full));
    assert_eq!(table.write(1024, vec![3; 512]), Err(full));
    assert_eq!(table.flush(), Err(full));
    assert_eq!(table.read(0, 512), Ok(vec![1; 512]));
    table.close();
    let log = Log::read(&table.path("log"));
    assert_eq!(log.entries.len(), 1, "good up to there");
    // What was not tried is not on the disk.
    assert_eq!(table.content("file")[1024..1536], [0; 512]);
}

#[test]
fn a_flush_that_fails_is_none_in_the_log() {
    let mut table = Table::new();
    fresh(&table);
    let file = json!({"driver": "blkdebug", "image": table.existing("file"),
                      "inject-error": [{"event": "none", "iotype": "flush", "errno": 28, "once": true}]});
    table.open(node(&table, json!({"file": file})));
    table.write(0, vec![1; 512]).unwrap();
    assert_eq!(table.flush(), Err(graph::Errno::ENOSPC));
    table.write(512, vec![2; 512]).unwrap();
    table.flush().unwrap();
    table.close();
    let log = Log::read(&table.path("log"));
    let flags: Vec<_> = log.entries.iter().map(|e| e.flags).collect();
    // The last one is the closing's.
    assert_eq!(flags, [0, 0, 0, FLUSH, FLUSH]);
    assert_eq!(log.entries[1].sectors, 0);
}

#[test]
fn what_is_no_log_is_not_gone_on_with() {
    let table = Table::new();
    fresh(&table);
    let head = |version: u64, entries: u64, sector_size: u32| {
        let mut bytes = b"rhswfsj\0".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        bytes.extend(sector_size.to_le_bytes());
        bytes.resize(512, 0);
        bytes
    };
    let entry = |sectors: u64, flags: u64| {
        let mut bytes = 0u64.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.resize(512, 0);
        bytes
    };
    let refused = |log: Vec<u8>| {
        std::fs::write(table.path("log"), log).unwrap();
        let mut options = node(&table, json!({"log-append": true}));
        options["node-name"] = json!("n");
        table.add(options).unwrap_err()
    };
    assert_eq!(refused(vec![0; 512]), "Invalid log superblock magic");
    assert_eq!(refused(head(2, 0, 512)), "Unsupported log version 2");
    assert_eq!(refused(head(1, 0, 511)), "Invalid log sector size 511");
    assert_eq!(refused([head(1, 1, 512), entry(1, 64)].concat()), "Invalid flags 0x40 in log entry 0");
    // Numbers of a hostile log: no endless reading.
    assert_eq!(refused(head(1, u64::MAX, 512)), "Log entry 0 lies past the end of the log");
    assert_eq!(
        refused([head(1, 2, 512), entry(u64::MAX, 0)].concat()),
        "Log entry 0 lies past the end of the log"
    );
    assert_eq!(
        refused([head(1, 2, 512), entry(1 << 60, 0)].concat()),
        "Log entry 1 lies past the end of the log"
    );
}

/// `qemu-io` makes the same requests through QEMU's driver.
#[test]
fn the_log_is_the_one_qemu_writes() {
    for sector_size in [512u64, 4096] {
        let mut rng = Rng::new(sector_size);
        let mut commands = Vec::new();
        for n in 0..60u64 {
            // Discards that are not aligned end QEMU's process.
            let (at, len) = (rng.below(100) * sector_size, (1 + rng.below(20)) * sector_size);
            commands.push(match rng.below(8) {
                0 => ("write -z", at, len, 0),
                1 => ("discard", at, len, 0),
                2 => ("flush", 0, 0, 0),
                // Below the sector size: read, modified, written.
                3 => ("write", at + 100, len - 200, n),
                _ => ("write", at, len, n),
            });
        }
        commands.push(("flush", 0, 0, 0));
        let mut table = Table::new();
        fresh(&table);
        let options = node(&table, json!({"log-sector-size": sector_size, "discard": "unmap"}));
        let text: Vec<String> = commands
            .iter()
            .map(|(what, at, len, byte)| match *what {
                "flush" => "flush".to_owned(),
                "write" => format!("write -P {byte} {at} {len}"),
                what => format!("{what} {at} {len}"),
            })
            .collect();
        let name = format!("json:{}", nameless(&options));
        let mut args = vec!["-t", "writeback", "-d", "unmap"];
        args.extend(text.iter().flat_map(|c| ["-c", c.as_str()]));
        args.push(&name);
        let Some(output) = tool("qemu-io", &args) else { return };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let theirs = Log::read(&table.path("log"));
        fresh(&table);
        table.open(options);
        table.on(move |io| async move {
            let client = Client { io, way: Way::Mapped };
            for (what, at, len, byte) in commands {
                let done = match what {
                    "flush" => client.flush().await,
                    "write" => client.write(at, &vec![byte as u8; len as usize], false).await,
                    "discard" => client.discard(at, len).await,
                    _ => client.zero(at, len, ZeroFlags::empty()).await,
                };
                done.unwrap();
            }
        });
        table.close();
        let ours = Log::read(&table.path("log"));
        assert_eq!(ours.sector_size, theirs.sector_size);
        // QEMU leaves a flush out that comes after another one, also when it closes.
        let without_repeats = |log: &Log| {
            let mut entries = log.entries.clone();
            entries.dedup_by(|b, a| a.flags == FLUSH && b.flags == FLUSH);
            entries
        };
        let (a, b) = (without_repeats(&ours), without_repeats(&theirs));
        assert_eq!(a.len(), b.len());
        for (n, (a, b)) in a.iter().zip(&b).enumerate() {
            assert!(a == b, "sectors of {sector_size}, entry {n}: {:?} and {:?}", Short(a), Short(b));
        }
        let replay = |log: &Log| {
            let mut disk = vec![0; SIZE];
            log.entries.iter().for_each(|e| log.replay(e, &mut disk));
            disk
        };
        assert!(replay(&ours) == replay(&theirs));
    }
}

/// An entry in few words.
struct Short<'a>(&'a Entry);

impl std::fmt::Debug for Short<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}+{} flags {}", self.0.sector, self.0.sectors, self.0.flags)
    }
}
