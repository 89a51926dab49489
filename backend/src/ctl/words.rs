//! Command lines of words: splitting a line with quotes, and words of `key=value` to a tree of strings.
//!
//! Used by the prompt and for the arguments of the program. Knows no command.

use qmp::keyval::{self, Dialect, Parsed};
use serde_json::Value;

use super::failure::Failure;

/// What stands behind a command.
pub enum Arguments {
    /// Nothing.
    None,
    /// JSON, as it was given.
    Json(Value),
    /// Members whose values are strings yet.
    Words(Value),
}

/// Reads the words behind a command.
///
/// # Errors
/// A word without `=`, bad JSON, keys that contradict each other.
pub fn parse(words: &[String]) -> Result<Arguments, Failure> {
    let Some(first) = words.first() else { return Ok(Arguments::None) };
    if first.trim_start().starts_with('{') {
        // Somebody may have left out the quotes around it.
        let text = words.join(" ");
        return qmp::json::parse(&text).map(Arguments::Json).map_err(Failure::Usage);
    }
    let mut text = String::new();
    for word in words {
        if !word.contains('=') {
            return Err(Failure::Usage(format!("expected key=value or one JSON object, not '{word}'")));
        }
        if !text.is_empty() {
            text.push(',');
        }
        // A comma is part of the value here: words are apart already.
        text.push_str(&word.replace(',', ",,"));
    }
    match keyval::parse(&text, &Dialect::default()) {
        Ok(Parsed::Keyval(tree) | Parsed::Json(tree)) => Ok(Arguments::Words(tree)),
        Ok(Parsed::Help) => Ok(Arguments::None),
        Err(e) => Err(Failure::Usage(e.desc)),
    }
}

/// The words of a line, and whether the last one is open still (no blank after it). Quotes of both sorts keep blanks
/// together; what begins with `{` is one word up to the end of the line.
pub fn split(line: &str) -> (Vec<String>, bool) {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut rest = line.chars();
    while let Some(c) = rest.next() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some('"'), '\\') => word.get_or_insert_default().extend(rest.next()),
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '{') if word.is_none() => {
                words.push(format!("{{{}", rest.as_str()));
                return (words, true);
            }
            (None, '\\') => word.get_or_insert_default().extend(rest.next()),
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    let open = word.is_some();
    words.extend(word);
    (words, open)
}
