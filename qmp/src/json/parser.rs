//! Tokens of one whole message to a value. Called by the framer, which has bounded size and depth: the recursion here
//! is at most as deep as the framer's limit.

use serde_json::{Map, Number, Value};

use super::framer::{Token, TokenKind};

/// Parses the tokens of one message.
pub(super) fn parse(text: &[u8], tokens: &[Token]) -> Result<Value, String> {
    let mut parser = Parser { text, tokens: tokens.iter() };
    parser.value().map_err(|e| format!("JSON parse error, {e}"))
}

struct Parser<'a> {
    text: &'a [u8],
    tokens: std::slice::Iter<'a, Token>,
}

impl Parser<'_> {
    fn next(&mut self) -> Result<Token, String> {
        self.tokens.next().copied().ok_or_else(|| "premature EOI".to_owned())
    }

    fn peek(&self) -> Option<TokenKind> {
        self.tokens.as_slice().first().map(|t| t.kind)
    }

    fn bytes(&self, token: Token) -> &[u8] {
        self.text.get(token.start..token.end).unwrap_or(&[])
    }

    fn value(&mut self) -> Result<Value, String> {
        let token = self.next()?;
        match token.kind {
            TokenKind::LeftBrace => self.object(),
            TokenKind::LeftBracket => self.array(),
            TokenKind::String => unescape(self.bytes(token)).map(Value::String),
            TokenKind::Number => number(self.bytes(token)),
            TokenKind::Keyword => match self.bytes(token) {
                b"true" => Ok(Value::Bool(true)),
                b"false" => Ok(Value::Bool(false)),
                b"null" => Ok(Value::Null),
                other => Err(format!("invalid keyword '{}'", String::from_utf8_lossy(other))),
            },
            TokenKind::RightBrace | TokenKind::RightBracket | TokenKind::Colon | TokenKind::Comma => {
                Err("expecting value".to_owned())
            }
        }
    }

    fn object(&mut self) -> Result<Value, String> {
        let mut map = Map::new();
        if self.peek() == Some(TokenKind::RightBrace) {
            self.tokens.next();
            return Ok(Value::Object(map));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err("key is not a string in object".to_owned());
            };
            if self.next()?.kind != TokenKind::Colon {
                return Err("missing : in object pair".to_owned());
            }
            let value = self.value()?;
            if map.insert(key, value).is_some() {
                return Err("duplicate key".to_owned());
            }
            match self.next()?.kind {
                TokenKind::Comma => {}
                TokenKind::RightBrace => return Ok(Value::Object(map)),
                _ => return Err("expected separator in dict".to_owned()),
            }
        }
    }

    fn array(&mut self) -> Result<Value, String> {
        let mut list = Vec::new();
        if self.peek() == Some(TokenKind::RightBracket) {
            self.tokens.next();
            return Ok(Value::Array(list));
        }
        loop {
            list.push(self.value()?);
            match self.next()?.kind {
                TokenKind::Comma => {}
                TokenKind::RightBracket => return Ok(Value::Array(list)),
                _ => return Err("expected separator in list".to_owned()),
            }
        }
    }
}

/// Integers stay integers as long as 64 bits hold them; everything else is a double, as in QEMU.
fn number(bytes: &[u8]) -> Result<Value, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "expecting value".to_owned())?;
    if let Ok(v) = text.parse::<i64>() {
        return Ok(v.into());
    }
    if let Ok(v) = text.parse::<u64>() {
        return Ok(v.into());
    }
    text.parse::<f64>()
        .ok()
        .and_then(Number::from_f64)
        .map(Value::Number)
        .ok_or_else(|| format!("number '{text}' is out of range"))
}

/// The content of a string token, whose first and last byte are its quotes.
fn unescape(token: &[u8]) -> Result<String, String> {
    let body = token.get(1..token.len().saturating_sub(1)).unwrap_or(&[]);
    let mut out = String::with_capacity(body.len());
    let mut rest = body;
    loop {
        let plain = rest.iter().position(|b| *b == b'\\').unwrap_or(rest.len());
        let (head, tail) = rest.split_at(plain);
        out.push_str(std::str::from_utf8(head).map_err(|_| "invalid UTF-8 sequence in string".to_owned())?);
        let [_, escape, after @ ..] = tail else {
            return Ok(out);
        };
        rest = after;
        match escape {
            b'"' => out.push('"'),
            b'\'' => out.push('\''),
            b'\\' => out.push('\\'),
            b'/' => out.push('/'),
            b'b' => out.push('\u{8}'),
            b'f' => out.push('\u{c}'),
            b'n' => out.push('\n'),
            b'r' => out.push('\r'),
            b't' => out.push('\t'),
            b'u' => {
                // Shown with the closing quote, as in QEMU, when the digits run into it.
                let shown_from = token.len() - 1 - after.len() - 2;
                let bad = || {
                    let shown = token.get(shown_from..token.len().min(shown_from + 6)).unwrap_or(&[]);
                    format!("{} is not a valid Unicode character", String::from_utf8_lossy(shown))
                };
                let (unit, after) = hex4(rest).ok_or_else(bad)?;
                rest = after;
                let point = match unit {
                    0xD800..=0xDBFF => {
                        let low = rest.strip_prefix(b"\\u").and_then(hex4);
                        let (low, after) =
                            low.filter(|(u, _)| (0xDC00..=0xDFFF).contains(u)).ok_or_else(bad)?;
                        rest = after;
                        0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)
                    }
                    other => other,
                };
                out.push(char::from_u32(point).ok_or_else(bad)?);
            }
            _ => return Err("invalid escape sequence in string".to_owned()),
        }
    }
}

fn hex4(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (digits, rest) = bytes.split_at_checked(4)?;
    let mut value = 0;
    for d in digits {
        value = value * 16 + char::from(*d).to_digit(16)?;
    }
    Some((value, rest))
}
