//! The log: one line per event on stderr, through the `log` crate.
//!
//! `main.rs` installs it ([`init`]) before anything can log and applies `--trace` ([`apply`]); all crates write to
//! it with `log::warn!` and its kin. Nothing on the path of a request may log above `debug`.
//!
//! # Lines
//!
//! Under journald (`JOURNAL_STREAM` names stderr) a line is `<N>target: message`, N being the syslog priority;
//! elsewhere `2026-01-31T12:00:00.000000Z WARN  target: message`, in UTC. Control characters are escaped, so that
//! no guest, image or client can forge a line, and a line is cut at [`MAX_LINE`] bytes.
//!
//! # Levels
//!
//! `error`: something was lost or ended. `warn`: something is wrong and was dealt with. `info` (the default):
//! life-cycle events, none per request. `debug`, `trace`: for the developer; asked for by `RINGBLK_LOG` or `-T`.
//!
//! # Rate limit
//!
//! A call site writes at most [`BURST`] lines per [`WINDOW`]; what is dropped is
//! counted and the count is put on the site's next line, or on one last line at exit. `debug` and `trace` are not
//! limited: who asks for them wants all of them.
//!
//! # Locks
//!
//! In this order, each released before the next is taken; a message is formatted under none of them:
//!
//! 1. the filter, shared, while a line is judged;
//! 2. the limiter;
//! 3. the output, while the line is written.

mod filter;
mod limit;

pub use filter::{Filter, TARGETS, TraceOption, display_target};

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{Level, Log, Metadata, Record};

use super::opts::OptError;
use limit::{RateLimiter, Site, Verdict};

/// Longest line, in bytes, without the note that it was cut.
pub const MAX_LINE: usize = 4096;

static LOGGER: Logger = Logger {
    filter: RwLock::new(Filter::new()),
    limiter: OnceLock::new(),
    output: Mutex::new(Output::Stderr(Style::Timestamp)),
    begun: OnceLock::new(),
};

struct Logger {
    filter: RwLock<Filter>,
    limiter: OnceLock<Mutex<RateLimiter>>,
    output: Mutex<Output>,
    begun: OnceLock<Instant>,
}

/// How a line begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// `<N>`: journald reads the priority and knows the time.
    Journal,
    /// Time and level in words.
    Timestamp,
}

enum Output {
    Stderr(Style),
    File(File),
}

/// Installs the logger. `spec` is the value of `RINGBLK_LOG`, `journal_stream` that of `JOURNAL_STREAM`.
///
/// # Errors
///
/// `spec` cannot be read; the default level is in force then. A logger that is already installed stays.
pub fn init(spec: Option<&str>, journal_stream: Option<&str>) -> Result<(), OptError> {
    LOGGER.begun.get_or_init(Instant::now);
    *lock(&LOGGER.output) = Output::Stderr(style(journal_stream));
    // Fails only if a logger exists, as it does when called twice.
    let _ = log::set_logger(&LOGGER);
    let parsed = spec.map_or_else(|| Ok(Filter::new()), Filter::parse);
    let (filter, result) = match parsed {
        Ok(filter) => (filter, Ok(())),
        Err(e) => (Filter::new(), Err(OptError(format!("RINGBLK_LOG: {e}")))),
    };
    log::set_max_level(filter.most());
    *LOGGER.filter.write().unwrap_or_else(PoisonError::into_inner) = filter;
    result
}

/// Applies one `--trace`. A pattern that names no known target is warned about and kept.
///
/// # Errors
///
/// A file that cannot be read (`events=`) or opened for appending (`file=`); nothing is changed then.
pub fn apply(option: &TraceOption) -> Result<(), OptError> {
    let rules = option.patterns()?;
    let file = option.file.as_deref().map(open_log).transpose()?;
    if let Some(file) = file {
        *lock(&LOGGER.output) = Output::File(file);
    }
    let mut unknown = Vec::new();
    let most = {
        let mut filter = LOGGER.filter.write().unwrap_or_else(PoisonError::into_inner);
        for (pattern, level) in rules {
            if !pattern.is_known() {
                unknown.push(pattern.as_str().to_owned());
            }
            filter.push(pattern, level);
        }
        filter.most()
    };
    log::set_max_level(most);
    for pattern in unknown {
        log::warn!("--trace: '{pattern}' names no known target: -T help lists them");
    }
    Ok(())
}

fn open_log(path: &Path) -> Result<File, OptError> {
    // 0640: a log may name images; it is for the owner and its group.
    let opened = OpenOptions::new().append(true).create(true).mode(0o640).open(path);
    opened.map_err(|e| OptError(format!("Parameter 'file': {}: {e}", path.display())))
}

/// The `-T help` text.
#[must_use]
pub fn targets_help() -> String {
    let mut out = String::from("Log targets; '*' matches anything, a name covers what lies beneath it:\n");
    for (name, what) in TARGETS {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "  {name:<15} {what}");
    }
    out
}

/// Writes the count of lines that were dropped and not reported yet. Called at exit.
pub fn flush() {
    LOGGER.flush();
}

/// Writes `text` with control characters, line separators and direction marks escaped.
///
/// # Errors
///
/// Those of the formatter.
pub fn escape(text: &str, out: &mut impl fmt::Write) -> fmt::Result {
    for c in text.chars() {
        let invisible =
            matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || invisible {
            write!(out, "{}", c.escape_default())?;
        } else {
            out.write_char(c)?;
        }
    }
    Ok(())
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let filter = self.filter.read().unwrap_or_else(PoisonError::into_inner);
        metadata.level() <= filter.level(display_target(metadata.target()))
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let dropped = match self.admit(record) {
            Verdict::Write(dropped) => dropped,
            Verdict::Drop => return,
        };
        let mut message = Capped::default();
        // An error is the cap's: what fits is kept.
        let _ = write!(message, "{}", record.args());
        self.write(record.level(), display_target(record.target()), &message.text, dropped);
    }

    fn flush(&self) {
        let dropped = self.limiter.get().map_or(0, |limiter| lock(limiter).take_dropped());
        if dropped > 0 {
            self.write(Level::Info, "ringblk", &format!("{dropped} lines were dropped by the rate limit"), 0);
        }
    }
}

impl Logger {
    fn admit(&self, record: &Record<'_>) -> Verdict {
        if record.level() > Level::Info {
            return Verdict::Write(0);
        }
        let site = match (record.file_static(), record.line()) {
            (Some(file), Some(line)) => Site::Call(file, line),
            _ => Site::Target(record.target().to_owned()),
        };
        let now = self.begun.get_or_init(Instant::now).elapsed();
        lock(self.limiter.get_or_init(Mutex::default)).admit(site, now)
    }

    fn write(&self, level: Level, target: &str, message: &str, dropped: u64) {
        let mut output = lock(&self.output);
        let style = match &*output {
            Output::Stderr(style) => *style,
            Output::File(_) => Style::Timestamp,
        };
        let line = line(style, SystemTime::now(), level, target, message, dropped);
        // One write per line, so that lines of several processes on one stream do not mix. There is nobody to
        // tell when the log itself cannot be written.
        let _ = match &mut *output {
            Output::Stderr(_) => io::stderr().lock().write_all(line.as_bytes()),
            Output::File(file) => file.write_all(line.as_bytes()),
        };
    }
}

/// Collects escaped text up to [`MAX_LINE`] bytes and refuses the rest, so that formatting ends early.
#[derive(Default)]
struct Capped {
    text: String,
}

impl fmt::Write for Capped {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for c in s.chars() {
            if self.text.len() >= MAX_LINE {
                self.text.push_str(" [cut]");
                return Err(fmt::Error);
            }
            escape(c.encode_utf8(&mut [0; 4]), &mut self.text)?;
        }
        Ok(())
    }
}

fn line(style: Style, now: SystemTime, level: Level, target: &str, message: &str, dropped: u64) -> String {
    let mut line = String::with_capacity(message.len() + target.len() + 64);
    // Writing to a String cannot fail, here and below.
    let _ = match style {
        Style::Journal => write!(line, "<{}>", priority(level)),
        Style::Timestamp => write!(line, "{} {level:<5} ", Timestamp(now)),
    };
    let _ = escape(target, &mut line);
    let _ = write!(line, ": {message}");
    if dropped > 0 {
        let _ = write!(line, " ({dropped} similar lines were dropped)");
    }
    line.push('\n');
    line
}

/// syslog(3) priorities, as sd-daemon(3) prefixes.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// `JOURNAL_STREAM` is `device:inode` of the stream journald reads; it is inherited, stderr may have changed since.
fn style(journal_stream: Option<&str>) -> Style {
    let same = || -> Option<bool> {
        let (device, inode) = journal_stream?.split_once(':')?;
        let stat = rustix::fs::fstat(rustix::stdio::stderr()).ok()?;
        Some(device.parse() == Ok(stat.st_dev) && inode.parse() == Ok(stat.st_ino))
    };
    if same() == Some(true) { Style::Journal } else { Style::Timestamp }
}

/// RFC 3339 in UTC with microseconds.
struct Timestamp(SystemTime);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let seconds = since.as_secs();
        let (year, month, day) = civil_date(seconds / 86_400);
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let micros = since.subsec_micros();
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Years are counted from March, so that the leap day is the last of its year; an era is 400 years (146097 days).
fn civil_date(days_since_epoch: u64) -> (u64, u64, u64) {
    // 719468 days lie between 0000-03-01 and 1970-01-01.
    let days = days_since_epoch + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panicking thread leaves behind is a whole counter or stream; the log goes on.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
