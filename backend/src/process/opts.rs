//! `key=value,key=value`: the flat option syntax of `--chardev`, `--monitor` and `--trace`.
//!
//! Used by the option parsers next door. Nested (dotted) keys and typed values of block devices, exports and
//! objects are none of its business: those belong to the control channel's parser.

use std::fmt;

/// Longest text accepted for one option, in bytes. Far above any real use; keeps error lines and copies small.
pub const MAX_TEXT: usize = 64 * 1024;

/// What is wrong with one option's text: a sentence without the option's name, which the caller puts in front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptError(pub String);

impl fmt::Display for OptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OptError {}

/// Shorthand for building an [`OptError`].
pub(crate) fn err<T>(text: impl Into<String>) -> Result<T, OptError> {
    Err(OptError(text.into()))
}

/// How a member without `=` is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bare {
    /// An error, as everywhere in QAPI syntax.
    Refused,
    /// `server` means `server=on`, `nowait` means `wait=off`, as in the older syntax `--chardev` keeps.
    Flag,
}

/// Members of one option in the order written. A key given twice keeps its last value, as in QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    entries: Vec<(String, String)>,
}

impl Members {
    /// Splits `text`. The first member may be a bare value of `implied`; `,,` stands for a comma inside a value.
    ///
    /// # Errors
    ///
    /// An empty key, a bare member where [`Bare::Refused`], a NUL byte, or more than [`MAX_TEXT`] bytes.
    pub fn parse(text: &str, implied: &str, bare: Bare) -> Result<Self, OptError> {
        if text.len() > MAX_TEXT {
            return err(format!("longer than {MAX_TEXT} bytes"));
        }
        if text.contains('\0') {
            return err("contains a NUL byte");
        }
        let mut entries: Vec<(String, String)> = Vec::new();
        for (index, piece) in split_commas(text).into_iter().enumerate() {
            let (key, value) = match piece.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None if index == 0 => (implied.to_owned(), piece),
                None if bare == Bare::Refused => {
                    return err(format!("Expected '=' after parameter '{piece}'"));
                }
                None => match piece.strip_prefix("no") {
                    Some(rest) if !rest.is_empty() && rest != "delay" => (rest.to_owned(), "off".to_owned()),
                    _ => (piece, "on".to_owned()),
                },
            };
            if key.is_empty() {
                return err(format!("Invalid parameter '': a name is missing before '={value}'"));
            }
            entries.push((key, value));
        }
        Ok(Self { entries })
    }

    /// Removes a member and returns its last value.
    pub fn take(&mut self, key: &str) -> Option<String> {
        let found = self.entries.iter().rposition(|(k, _)| k == key).map(|i| self.entries[i].1.clone());
        self.entries.retain(|(k, _)| k != key);
        found
    }

    /// Removes a boolean member. Accepts what QEMU accepts: on, yes, true, y; off, no, false, n.
    ///
    /// # Errors
    ///
    /// Any other word.
    pub fn take_bool(&mut self, key: &str) -> Result<Option<bool>, OptError> {
        match self.take(key).as_deref() {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => err(format!("Parameter '{key}' expects 'on' or 'off'")),
        }
    }

    /// The first member nobody has taken.
    #[must_use]
    pub fn first_left(&self) -> Option<&str> {
        self.entries.first().map(|(k, _)| k.as_str())
    }
}

/// Whether the text asks for help: `help` or `?`, alone or as a member of its own. JSON never does.
#[must_use]
pub fn asks_for_help(text: &str) -> bool {
    !text.starts_with('{') && split_commas(text).iter().any(|piece| piece == "help" || piece == "?")
}

/// Splits at single commas; `,,` is one literal comma.
#[must_use]
pub fn split_commas(text: &str) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut piece = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            piece.push(c);
        } else if chars.next_if_eq(&',').is_some() {
            piece.push(',');
        } else {
            pieces.push(std::mem::take(&mut piece));
        }
    }
    // A trailing comma ends the last member; it does not open an empty one. An empty text has no members.
    if !piece.is_empty() {
        pieces.push(piece);
    }
    pieces
}

/// Whether a name is what QEMU calls an identifier: letters, digits, `-`, `.`, `_`, starting with a letter.
#[must_use]
pub fn is_identifier(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// Checks an `id` member.
///
/// # Errors
///
/// The name is not an identifier ([`is_identifier`]).
pub fn check_id(id: &str) -> Result<(), OptError> {
    if is_identifier(id) {
        return Ok(());
    }
    err("Parameter 'id' expects an identifier: letters, digits, '-', '.', '_', starting with a letter")
}

#[cfg(test)]
mod tests;
