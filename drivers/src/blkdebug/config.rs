//! The configuration file of `blkdebug`: groups of `name = "value"`, read as QEMU reads them. Pure.
//!
//! Called by `open` with the text. Must not know files nor what rules do.

use graph::{BlockError, DebugEvent, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::options::{InjectError, SetState};

/// Most bytes of a file.
pub(super) const MAX_FILE: u64 = 1 << 20;

/// A group and its options, in order.
type Group<'a> = (&'a str, Vec<(&'a str, &'a str)>);

/// The rules of a file.
///
/// # Errors
/// In QEMU's words.
pub(super) fn parse(text: &str) -> Result<(Vec<InjectError>, Vec<SetState>)> {
    let (mut inject, mut set) = (Vec::new(), Vec::new());
    for (name, options) in groups(text)? {
        match name {
            "inject-error" => inject.push(inject_error(&options)?),
            "set-state" => set.push(set_state(&options)?),
            _ => return Err(BlockError::invalid(format!("There is no option group '{name}'"))),
        }
    }
    Ok((inject, set))
}

fn groups(text: &str) -> Result<Vec<Group<'_>>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for line in text.lines() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(rest) = line.strip_prefix('[') {
            // `[group]`, or `[group "id"]`, whose id means nothing here.
            let name = rest.split([']', ' ']).next().filter(|n| !n.is_empty() && rest.contains(']'));
            groups.push((name.ok_or_else(parse_error)?, Vec::new()));
            continue;
        }
        let (name, value) = option(line).ok_or_else(parse_error)?;
        match groups.last_mut() {
            Some((_, options)) => options.push((name, value)),
            None => return Err(BlockError::invalid("no group defined")),
        }
    }
    Ok(groups)
}

fn parse_error() -> BlockError {
    BlockError::invalid("parse error")
}

/// A line `name = "value"`. As in QEMU a line that has a first word and not the rest means an empty value, and the error is
/// the one of that.
fn option(line: &str) -> Option<(&str, &str)> {
    let name = line.split_ascii_whitespace().next()?;
    let rest = line.trim_ascii_start().strip_prefix(name).unwrap_or_default().trim_ascii_start();
    let value = rest.strip_prefix('=').and_then(|r| r.trim_ascii_start().strip_prefix('"'));
    Some((name, value.and_then(|v| v.split('"').next()).unwrap_or_default()))
}

fn number(name: &str, value: &str) -> Result<i64> {
    let (digits, radix) = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if value.len() > 1 && value.starts_with('0') => (value, 8),
        None => (value, 10),
    };
    i64::from_str_radix(digits, radix)
        .map_err(|_| BlockError::invalid(format!("Parameter '{name}' expects a number")))
}

fn boolean(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(BlockError::invalid(format!("Parameter '{name}' expects 'on' or 'off'"))),
    }
}

/// A value out of a list of names.
fn named<T: DeserializeOwned>(value: &str) -> Result<T> {
    serde_json::from_value(Value::String(value.to_owned()))
        .map_err(|_| BlockError::invalid(format!("invalid parameter value: {value}")))
}

fn unknown(name: &str) -> BlockError {
    BlockError::invalid(format!("Invalid parameter '{name}'"))
}

fn required(event: Option<DebugEvent>) -> Result<DebugEvent> {
    event.ok_or_else(|| BlockError::invalid("Missing event name for rule"))
}

fn inject_error(options: &[(&str, &str)]) -> Result<InjectError> {
    let mut event = None;
    let (mut state, mut iotype, mut errno, mut sector) = (None, None, None, None);
    let (mut once, mut immediately) = (None, None);
    for &(name, value) in options {
        match name {
            "event" => event = Some(named(value)?),
            "state" => state = Some(number(name, value)?),
            "iotype" => iotype = Some(named(value)?),
            "errno" => errno = Some(number(name, value)?),
            "sector" => sector = Some(number(name, value)?),
            "once" => once = Some(boolean(name, value)?),
            "immediately" => immediately = Some(boolean(name, value)?),
            _ => return Err(unknown(name)),
        }
    }
    Ok(InjectError { event: required(event)?, state, iotype, errno, sector, once, immediately })
}

fn set_state(options: &[(&str, &str)]) -> Result<SetState> {
    let (mut event, mut state, mut new_state) = (None, None, 0);
    for &(name, value) in options {
        match name {
            "event" => event = Some(named(value)?),
            "state" => state = Some(number(name, value)?),
            "new_state" => new_state = number(name, value)?,
            _ => return Err(unknown(name)),
        }
    }
    Ok(SetState { event: required(event)?, state, new_state })
}
