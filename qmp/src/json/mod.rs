//! JSON out of a byte stream, as QEMU's monitor reads it: values need no terminator, several may arrive together, one
//! may arrive in pieces, and a syntax error costs the message, not the connection.
//!
//! Used by sessions ([`Framer`]) and by the command line ([`parse`]). Knows nothing of QMP. Input is hostile: size,
//! token count and nesting are bounded before anything is built.
//!
//! What is accepted beyond RFC 8259, because QEMU accepts it: strings in single quotes and the escape `\'`. What is
//! refused beyond it: duplicate keys. Bytes 0xFE and 0xFF are errors in every state and so reset the parser, which clients
//! use to get back in step (QMP specification, "QMP input").

mod framer;
mod parser;
#[cfg(test)]
mod tests;

use serde_json::Value;

pub use framer::{Framer, Limits};

/// Parses a text that holds exactly one JSON value, with QEMU's words for what is wrong.
///
/// # Errors
/// The sentence for the user, e.g. `JSON parse error, premature EOI`.
pub fn parse(text: &str) -> Result<Value, String> {
    let mut framer = Framer::new(Limits::default());
    let mut found = Vec::new();
    framer.feed(text.as_bytes(), &mut |v| {
        found.push(v);
        found.len() < 2
    });
    framer.finish(&mut |v| {
        found.push(v);
        true
    });
    // The first error explains more than what it leads to.
    if let Some(position) = found.iter().position(Result::is_err) {
        return found.swap_remove(position);
    }
    match found.len() {
        0 => Err("JSON parse error, expecting value".to_owned()),
        1 => found.remove(0),
        _ => Err("JSON parse error, more than one value".to_owned()),
    }
}
