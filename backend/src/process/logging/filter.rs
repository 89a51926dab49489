//! Which lines are wanted: `RINGBLK_LOG` and `--trace`, as rules over target names.
//!
//! Used by the logger and by the command line. Pure text; reads the pattern file of `--trace events=` through
//! [`TraceOption::patterns`] alone.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use log::LevelFilter;

use super::super::opts::{Bare, Members, OptError, err};

/// Longest `events=` file, in bytes.
const MAX_EVENTS: u64 = 1 << 20;

/// Level of targets that no rule names.
pub const DEFAULT_LEVEL: LevelFilter = LevelFilter::Info;

/// Parts of ringblk that log, with what they say; a target is one of these or lies beneath one.
pub const TARGETS: &[(&str, &str)] = &[
    ("ringblk", "start-up and shutdown"),
    ("process", "command line, descriptors, signals"),
    ("export", "exports: creation, removal, resize"),
    ("session", "vhost-user messages and connections"),
    ("ring", "virtqueues and requests"),
    ("iothread", "placement and polling"),
    ("qmp", "control sessions, commands and events"),
    ("jobs", "block jobs"),
    ("graph", "nodes, permissions, drain, transactions"),
    ("drivers", "format and protocol drivers"),
    ("host", "io_uring, files, locks"),
    ("vhost", "the vhost-user protocol library"),
    ("event_manager", "the main loop's library"),
];

/// A target as users see it: `ringblk::session::memory` is `session::memory`, `ringblk_graph::drain` is
/// `graph::drain`.
#[must_use]
pub fn display_target(target: &str) -> &str {
    target.strip_prefix("ringblk::").or_else(|| target.strip_prefix("ringblk_")).unwrap_or(target)
}

/// A target pattern: `*` stands for anything; without one, the name and all beneath it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Makes a pattern. Both the shown names and the full ones (`ringblk_graph`) are understood.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(display_target(text).to_owned())
    }

    /// Whether a target, in its shown form, is meant.
    #[must_use]
    pub fn matches(&self, target: &str) -> bool {
        if self.0.contains('*') {
            return glob(&self.0, target);
        }
        target.strip_prefix(self.0.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    }

    /// Whether it can match anything, as far as [`TARGETS`] tells.
    #[must_use]
    pub fn is_known(&self) -> bool {
        let head = self.0.split("::").next().unwrap_or_default();
        TARGETS.iter().any(|(name, _)| if head.contains('*') { glob(head, name) } else { head == *name })
    }

    /// The text of the pattern.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Matches `*` by greedy search with one fallback position: linear space, no recursion.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
            }
            Some(c) if *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((after, from)) => {
                    star = Some((after, from + 1));
                    p = after;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// Rules in order; the last that matches a target decides.
#[derive(Debug, Clone)]
pub struct Filter {
    default: LevelFilter,
    rules: Vec<(Pattern, LevelFilter)>,
}

impl Default for Filter {
    fn default() -> Self {
        Self::new()
    }
}

impl Filter {
    /// No rules: [`DEFAULT_LEVEL`] for all.
    #[must_use]
    pub const fn new() -> Self {
        Self { default: DEFAULT_LEVEL, rules: Vec::new() }
    }

    /// Reads `RINGBLK_LOG`: `LEVEL` or `PATTERN=LEVEL`, comma separated.
    ///
    /// # Errors
    ///
    /// A word that is no level.
    pub fn parse(spec: &str) -> Result<Self, OptError> {
        let mut filter = Self::new();
        for piece in spec.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (pattern, level) = match piece.split_once('=') {
                Some((pattern, level)) => (Some(pattern), level),
                None => (None, piece),
            };
            let Ok(level) = level.parse::<LevelFilter>() else {
                return err(format!("'{level}' is not a level: off, error, warn, info, debug, trace"));
            };
            match pattern {
                Some(pattern) => filter.rules.push((Pattern::new(pattern), level)),
                None => filter.default = level,
            }
        }
        Ok(filter)
    }

    /// Adds a rule.
    pub fn push(&mut self, pattern: Pattern, level: LevelFilter) {
        self.rules.push((pattern, level));
    }

    /// The level of a target in its shown form.
    #[must_use]
    pub fn level(&self, target: &str) -> LevelFilter {
        self.rules.iter().rev().find(|(p, _)| p.matches(target)).map_or(self.default, |(_, level)| *level)
    }

    /// The most detailed level any target can have.
    #[must_use]
    pub fn most(&self) -> LevelFilter {
        self.rules.iter().map(|(_, level)| *level).fold(self.default, Ord::max)
    }
}

/// One `--trace` option.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TraceOption {
    /// `enable=`: log these targets in full; with a leading `-`, at the default level again.
    pub enable: Option<String>,
    /// `events=`: a file of such patterns, one a line, `#` for comments.
    pub events: Option<PathBuf>,
    /// `file=`: from now on the log goes to the end of this file instead of stderr.
    pub file: Option<PathBuf>,
}

impl TraceOption {
    /// Reads the text after `--trace`.
    ///
    /// # Errors
    ///
    /// Unknown members, or none at all.
    pub fn parse(text: &str) -> Result<Self, OptError> {
        let mut members = Members::parse(text, "enable", Bare::Refused)?;
        let option = Self {
            enable: members.take("enable"),
            events: members.take("events").map(PathBuf::from),
            file: members.take("file").map(PathBuf::from),
        };
        match members.first_left() {
            Some(key) => err(format!("Invalid parameter '{key}': enable, events and file are known")),
            None if option == Self::default() => err("a target pattern is missing: -T help lists targets"),
            None => Ok(option),
        }
    }

    /// The rules of `events=` and `enable=`, in that order, as QEMU applies them.
    ///
    /// # Errors
    ///
    /// The file cannot be read, is longer than 1 MiB or not UTF-8.
    pub fn patterns(&self) -> Result<Vec<(Pattern, LevelFilter)>, OptError> {
        let mut rules = Vec::new();
        if let Some(path) = &self.events {
            let text = read_limited(path)
                .map_err(|e| OptError(format!("Parameter 'events': {}: {e}", path.display())))?;
            rules.extend(text.lines().filter_map(rule));
        }
        rules.extend(self.enable.as_deref().and_then(rule));
        Ok(rules)
    }
}

fn rule(line: &str) -> Option<(Pattern, LevelFilter)> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    Some(match line.strip_prefix('-') {
        Some(off) => (Pattern::new(off), DEFAULT_LEVEL),
        None => (Pattern::new(line), LevelFilter::Trace),
    })
}

fn read_limited(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_EVENTS + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_EVENTS {
        return Err(std::io::Error::other(format!("longer than {MAX_EVENTS} bytes")));
    }
    Ok(text)
}
