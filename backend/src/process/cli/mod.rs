//! The command line: text in, a [`Plan`] out.
//!
//! Called once by `main.rs`. Parsing opens nothing, starts nothing and prints nothing; the one look outside is at
//! the file type of `--blk-file`. Options of the block graph stay text ([`QapiText`]): their members belong to the
//! control channel, which parses the same structs from the command line and from QMP.
//!
//! Two passes, as in qemu-storage-daemon: the first finds bad options, `--help`, `--version`, `--daemonize` and
//! `--pidfile`; the second reads everything else in the order given. What differs on purpose: option names are not
//! abbreviated (a new option must not change what an old script means), help of an option is answered before any
//! other option takes effect, and an error names the option and the node or export it is about, not the option's
//! full text, which may hold a secret.

pub mod conventions;
pub mod options;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use super::chardev::{Chardev, Monitor};
use super::logging::{self, TraceOption};
use super::opts;
use conventions::Shorthand;
use options::{Kind, OPTIONS, OptionDef};

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// Print this to stdout and exit with status 0.
    Print(String),
    /// Print the help of an option whose members are known elsewhere, and exit with status 0.
    Help(HelpTopic),
    /// Run the daemon.
    Run(Plan),
}

/// Help asked for by `--blockdev help`, `--object iothread,help` and the like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelpTopic {
    /// The option's name without dashes: `blockdev`, `export` or `object`.
    pub option: &'static str,
    /// The driver or type asked about; `None`: list them all.
    pub subject: Option<String>,
}

/// All that a daemon is to do.
#[derive(Debug)]
pub struct Plan {
    /// `--daemonize` was given.
    pub daemonize: bool,
    /// `--pidfile`, the last one given.
    pub pidfile: Option<PathBuf>,
    /// The rest, in order.
    pub steps: Vec<Step>,
}

/// One option to apply.
#[derive(Debug)]
pub struct Step {
    /// How messages name it: `--blockdev disk0`.
    pub label: String,
    /// What to do.
    pub action: Action,
}

impl Step {
    /// An error of this step, as `main.rs` prints it.
    #[must_use]
    pub fn error(&self, message: impl fmt::Display) -> CliError {
        CliError(format!("{}: {message}", self.label))
    }
}

/// What a step does.
#[derive(Debug)]
pub enum Action {
    /// `--blockdev`: as QMP `blockdev-add`; `node-name` is mandatory.
    Blockdev(QapiText),
    /// `--export`: as QMP `block-export-add`.
    Export(QapiText),
    /// `--object`: as QMP `object-add`.
    Object(QapiText),
    /// `--chardev`.
    Chardev(Chardev),
    /// `--monitor`; its chardev is an earlier step.
    Monitor(Monitor),
    /// `--trace`: see [`logging::apply`].
    Trace(TraceOption),
}

/// An option's text, still to be parsed: JSON if it starts with `{`, dotted keys otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QapiText {
    /// The text as given.
    pub text: String,
    /// Key of a first member that has no `=`.
    pub implied_key: &'static str,
}

impl QapiText {
    /// The `node-name` or `id` in the text, if it can be told without parsing all of it.
    fn name(&self) -> Option<String> {
        // An export carries both; its id is the better name.
        let keys = if self.implied_key == "driver" { ["node-name", "id"] } else { ["id", "node-name"] };
        let found = if self.text.starts_with('{') {
            let value: serde_json::Value = serde_json::from_str(&self.text).ok()?;
            keys.iter().find_map(|k| Some(value.get(k)?.as_str()?.to_owned()))
        } else {
            let pieces = opts::split_commas(&self.text);
            keys.iter().find_map(|k| {
                pieces.iter().find_map(|p| Some(p.strip_prefix(k)?.strip_prefix('=')?.to_owned()))
            })
        };
        found.filter(|name| opts::is_identifier(name))
    }
}

/// What is wrong with the command line, in one line: print it after `ringblk: ` and exit with status 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CliError(String);

impl CliError {
    /// An error of the option `long`.
    pub(crate) fn at(long: &str, message: impl fmt::Display) -> Self {
        Self(format!("--{long}: {message}"))
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // One event, one line: what the user typed may hold anything.
        logging::escape(&self.0, f)
    }
}

impl std::error::Error for CliError {}

/// An option and its value, as found.
struct Found {
    def: &'static OptionDef,
    value: String,
}

/// Parses the arguments after the program's name.
///
/// # Errors
///
/// The first error found; the first pass's come before the second's.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, CliError> {
    let mut texts = Vec::new();
    let mut not_utf8 = None;
    for arg in args {
        match arg.into_string() {
            Ok(text) => texts.push(text),
            Err(raw) => not_utf8 = not_utf8.or(Some(raw)),
        }
    }
    // The convention says that everything else is ignored, so this comes before any error.
    if texts.iter().any(|t| t == "--print-capabilities") {
        return Ok(Invocation::Print(options::capabilities_text()));
    }
    if let Some(raw) = not_utf8 {
        return Err(CliError(format!("{}: the argument is not UTF-8", raw.to_string_lossy())));
    }
    let (found, positional) = match scan(texts)? {
        Scanned::Print(text) => return Ok(Invocation::Print(text)),
        Scanned::Options(found, positional) => (found, positional),
    };
    if let Some(text) = positional {
        return Err(CliError(format!("{text}: Unexpected argument: options start with '--'")));
    }
    plan(found)
}

enum Scanned {
    Print(String),
    Options(Vec<Found>, Option<String>),
}

/// First pass: names and presence of values; `--help` and `--version` end it.
fn scan(texts: Vec<String>) -> Result<Scanned, CliError> {
    let mut found = Vec::new();
    let mut positional = None;
    let mut texts = texts.into_iter();
    while let Some(text) = texts.next() {
        if text == "--" {
            positional = positional.or(texts.next());
            break;
        }
        let fresh = if let Some(long) = text.strip_prefix("--") {
            vec![scan_long(long, &mut texts)?]
        } else if text.len() > 1 && text.starts_with('-') {
            scan_short(&text, &mut texts)?
        } else {
            positional = positional.or(Some(text));
            continue;
        };
        for option in fresh {
            match option.def.kind {
                Kind::Help => return Ok(Scanned::Print(options::help_text())),
                Kind::Version => return Ok(Scanned::Print(options::version_text())),
                _ => found.push(option),
            }
        }
    }
    Ok(Scanned::Options(found, positional))
}

fn scan_long(text: &str, rest: &mut impl Iterator<Item = String>) -> Result<Found, CliError> {
    let (name, inline) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    let Some(def) = OPTIONS.iter().find(|def| def.long == name) else {
        return Err(CliError(format!("unrecognized option '--{name}'{}", suggestion(name))));
    };
    let value = match (def.value, inline) {
        (None, None) => String::new(),
        (None, Some(_)) => return Err(CliError(format!("option '--{name}' doesn't allow an argument"))),
        (Some(_), Some(value)) => value,
        (Some(_), None) => rest
            .next()
            .ok_or_else(|| CliError(format!("option '--{name}' requires an argument: --help shows which")))?,
    };
    Ok(Found { def, value })
}

/// `-T PATTERN`, `-TPATTERN`, `-hV`.
fn scan_short(text: &str, rest: &mut impl Iterator<Item = String>) -> Result<Vec<Found>, CliError> {
    let mut found = Vec::new();
    let mut letters = text.chars();
    letters.next();
    while let Some(letter) = letters.next() {
        let Some(def) = OPTIONS.iter().find(|def| def.short == Some(letter)) else {
            // `-x` after a letter that ends the program is never reached, as with getopt.
            if found.iter().any(|f: &Found| matches!(f.def.kind, Kind::Help | Kind::Version)) {
                break;
            }
            let hint = suggestion(text.trim_start_matches('-'));
            return Err(CliError(format!("invalid option -- '{letter}'{hint}")));
        };
        if def.value.is_none() {
            found.push(Found { def, value: String::new() });
            continue;
        }
        let attached = letters.as_str();
        let value = if attached.is_empty() { rest.next() } else { Some(attached.to_owned()) };
        match value {
            Some(value) => found.push(Found { def, value }),
            None if found.is_empty() => {
                return Err(CliError(format!("option requires an argument -- '{letter}'")));
            }
            None => {}
        }
        break;
    }
    Ok(found)
}

/// `: did you mean '--x'?` for a beginning of an option's name, or one with a letter or two too many.
fn suggestion(name: &str) -> String {
    let is_near = |def: &&OptionDef| {
        let begins = name.len() > 1 && def.long.starts_with(name);
        begins || name.strip_prefix(def.long).is_some_and(|rest| rest.len() <= 2)
    };
    match OPTIONS.iter().find(is_near) {
        Some(def) => format!(": did you mean '--{}'?", def.long),
        None => ": --help lists them".to_owned(),
    }
}

/// Answers `--object help` and the like.
fn help(def: &'static OptionDef, value: &str) -> Option<Result<Invocation, CliError>> {
    let with_help = [Kind::Blockdev, Kind::Export, Kind::Object, Kind::Chardev, Kind::Monitor, Kind::Trace];
    if !with_help.contains(&def.kind) || !opts::asks_for_help(value) {
        return None;
    }
    Some(match def.kind {
        Kind::Chardev => Ok(Invocation::Print("Available chardev backend types:\n  socket\n".to_owned())),
        Kind::Trace => Ok(Invocation::Print(logging::targets_help())),
        Kind::Monitor => Err(CliError::at(def.long, "Help is not available for this option: see --help")),
        _ => Ok(Invocation::Help(help_topic(def.long, value))),
    })
}

/// Second pass: values, in order.
fn plan(found: Vec<Found>) -> Result<Invocation, CliError> {
    let mut plan = Plan { daemonize: false, pidfile: None, steps: Vec::new() };
    let mut shorthand = Shorthand::default();
    for Found { def, value } in found {
        let long = def.long;
        if let Some(answer) = help(def, &value) {
            return answer;
        }
        match def.kind {
            Kind::Blockdev => push(&mut plan, long, Action::Blockdev(qapi(value, "driver"))),
            Kind::Export => push(&mut plan, long, Action::Export(qapi(value, "type"))),
            Kind::Object => push(&mut plan, long, Action::Object(qapi(value, "qom-type"))),
            Kind::Chardev => {
                let chardev = Chardev::parse(&value).map_err(|e| CliError::at(long, e))?;
                if chardevs(&plan).contains(&chardev.id.as_str()) {
                    let message = format!("Duplicate ID '{}' for chardev: give each its own id", chardev.id);
                    return Err(CliError::at(long, message));
                }
                push(&mut plan, long, Action::Chardev(chardev));
            }
            Kind::Monitor => {
                let monitor = Monitor::parse(&value, &chardevs(&plan), &monitored(&plan))
                    .map_err(|e| CliError::at(long, e))?;
                push(&mut plan, long, Action::Monitor(monitor));
            }
            Kind::Trace => {
                let trace = TraceOption::parse(&value).map_err(|e| CliError::at(long, e))?;
                push(&mut plan, long, Action::Trace(trace));
            }
            Kind::NbdServer => {
                return Err(CliError::at(long, "not supported by this build: use --export vhost-user-blk"));
            }
            Kind::Daemonize => plan.daemonize = true,
            Kind::Pidfile if value.is_empty() => return Err(CliError::at(long, "the path is empty")),
            Kind::Pidfile => plan.pidfile = Some(PathBuf::from(value)),
            Kind::SocketPath => once(long, &mut shorthand.socket_path, value)?,
            Kind::Fd => once(long, &mut shorthand.fd, value)?,
            Kind::BlkFile => once(long, &mut shorthand.blk_file, value)?,
            Kind::ReadOnly => shorthand.read_only = true,
            // The first pass has answered these.
            Kind::Help | Kind::Version | Kind::PrintCapabilities => {}
        }
    }
    if let Some(expansion) = conventions::expand(shorthand)? {
        let [storage, disk] = expansion.blockdevs;
        let mut convention = |long: &str, action| {
            plan.steps.push(Step { label: format!("--{long}"), action });
        };
        convention("blk-file", Action::Blockdev(storage));
        convention("blk-file", Action::Blockdev(disk));
        convention(expansion.socket_option, Action::Export(expansion.export));
    }
    Ok(Invocation::Run(plan))
}

fn qapi(text: String, implied_key: &'static str) -> QapiText {
    QapiText { text, implied_key }
}

fn push(plan: &mut Plan, long: &str, action: Action) {
    let name = match &action {
        Action::Blockdev(text) | Action::Export(text) | Action::Object(text) => text.name(),
        Action::Chardev(chardev) => Some(chardev.id.clone()),
        Action::Monitor(monitor) => Some(monitor.chardev.clone()),
        Action::Trace(_) => None,
    };
    let label = match name {
        Some(name) => format!("--{long} {name}"),
        None => format!("--{long}"),
    };
    plan.steps.push(Step { label, action });
}

/// A shorthand option describes the one disk; a second value would silently drop the first.
fn once(long: &str, slot: &mut Option<String>, value: String) -> Result<(), CliError> {
    if value.is_empty() {
        return Err(CliError::at(long, "the value is empty"));
    }
    if slot.replace(value).is_some() {
        return Err(CliError::at(long, "given twice: for several disks use --blockdev and --export"));
    }
    Ok(())
}

/// Ids of the chardevs defined so far.
fn chardevs(plan: &Plan) -> Vec<&str> {
    let ids = plan.steps.iter().filter_map(|step| match &step.action {
        Action::Chardev(chardev) => Some(chardev.id.as_str()),
        _ => None,
    });
    ids.collect()
}

/// Ids of the chardevs a monitor already speaks on.
fn monitored(plan: &Plan) -> Vec<&str> {
    let ids = plan.steps.iter().filter_map(|step| match &step.action {
        Action::Monitor(monitor) => Some(monitor.chardev.as_str()),
        _ => None,
    });
    ids.collect()
}

fn help_topic(option: &'static str, value: &str) -> HelpTopic {
    let implied = ["driver=", "type=", "qom-type="];
    let first = opts::split_commas(value).into_iter().next().filter(|f| f != "help" && f != "?");
    let subject =
        first.map(|f| implied.iter().find_map(|key| f.strip_prefix(key).map(str::to_owned)).unwrap_or(f));
    HelpTopic { option, subject }
}

#[cfg(test)]
mod tests;
