//! How far a command is: a bar on a terminal, qemu-img's percentages elsewhere, nothing without `-p`.
//!
//! Called by `convert` and `compare`; told from any thread ([`Progress::set`]). Writes to stdout only what qemu-img writes there.

use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Smallest step that is shown as text, in hundredths of a percent.
const STEP: u64 = 100;

/// See the module's words. A handle for any thread.
#[derive(Clone)]
pub struct Progress(Arc<Shown>);

enum Shown {
    Not,
    Bar(ProgressBar),
    /// Hundredths of a percent as last written.
    Text(Mutex<u64>),
}

impl Progress {
    /// Begins; `wanted` is `-p`.
    pub fn begin(wanted: bool) -> Progress {
        let shown = match wanted {
            false => Shown::Not,
            true if std::io::stdout().is_terminal() => Shown::Bar(bar()),
            true => {
                write(0);
                Shown::Text(Mutex::new(0))
            }
        };
        Progress(Arc::new(shown))
    }

    /// `done` of `total`, in any unit; cheap.
    pub fn set(&self, done: u64, total: u64) {
        match &*self.0 {
            Shown::Not => {}
            Shown::Bar(bar) => {
                if bar.length() != Some(total) {
                    bar.set_length(total);
                }
                bar.set_position(done.min(total));
            }
            Shown::Text(last) => {
                let now = share(done, total);
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if now >= last.saturating_add(STEP) {
                    *last = now;
                    write(now);
                }
            }
        }
    }

    /// Lets go of the line. `complete`: all is done; otherwise what was reached stays to be seen.
    pub fn end(&self, complete: bool) {
        match &*self.0 {
            Shown::Not => {}
            Shown::Bar(bar) if complete => bar.finish(),
            Shown::Bar(bar) => bar.abandon(),
            Shown::Text(last) => {
                let shown = *last.lock().unwrap_or_else(PoisonError::into_inner);
                if complete && shown < 10_000 {
                    write(10_000);
                }
                // As below.
                let _ = std::io::stdout().write_all(b"\n");
            }
        }
    }
}

/// Hundredths of a percent.
fn share(done: u64, total: u64) -> u64 {
    if total == 0 {
        return 10_000;
    }
    u64::try_from(u128::from(done.min(total)) * 10_000 / u128::from(total)).unwrap_or(10_000)
}

fn write(hundredths: u64) {
    let mut out = std::io::stdout().lock();
    // Progress that nobody can read is no reason to stop.
    let _ = write!(out, "    ({}.{:02}/100%)\r", hundredths / 100, hundredths % 100);
    let _ = out.flush();
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stdout());
    let template = "{percent_precise:>7}% [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    // A template of our own that did not parse would show the default bar.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

#[cfg(test)]
mod tests;
