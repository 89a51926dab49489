//! Cuts a byte stream into JSON messages: a lexer that can stop at any byte, and the bracket counts that say when a
//! message is whole. Called by [`super::parse`] and by sessions; builds no values itself.

use serde_json::Value;

use super::parser;

/// What a peer may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one message, white space between tokens not counted.
    pub bytes: usize,
    /// Tokens of one message.
    pub tokens: usize,
    /// Objects and arrays around a value.
    pub depth: usize,
}

impl Default for Limits {
    /// 1 MiB, 131072 tokens (QEMU: 64 MiB, 2 Mi tokens), depth 1024 as QEMU.
    fn default() -> Self {
        Limits { bytes: 1 << 20, tokens: 1 << 17, depth: 1024 }
    }
}

/// A kind of token; its text is a range of the message's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenKind {
    LeftBrace,
    RightBrace,
    LeftBracket,
    RightBracket,
    Colon,
    Comma,
    String,
    Number,
    Keyword,
}

/// One token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token {
    pub kind: TokenKind,
    pub start: usize,
    pub end: usize,
}

/// Where the lexer is inside a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    /// After a lexical error: skip to something that promises a new beginning.
    Recovery,
    Text {
        quote: u8,
        escaped: bool,
    },
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
}

/// What the bytes so far amount to.
type Message = Result<Value, String>;

/// The incremental parser of one stream.
#[derive(Debug)]
pub struct Framer {
    limits: Limits,
    state: State,
    /// Bytes of the current message's tokens.
    text: Vec<u8>,
    tokens: Vec<Token>,
    token_start: usize,
    braces: i64,
    brackets: i64,
    /// A limit was exceeded: nothing is kept until the message ends.
    discarding: bool,
}

impl Framer {
    /// A parser at the beginning of a stream.
    pub fn new(limits: Limits) -> Self {
        Framer {
            limits,
            state: State::Start,
            text: Vec::new(),
            tokens: Vec::new(),
            token_start: 0,
            braces: 0,
            brackets: 0,
            discarding: false,
        }
    }

    /// Reads bytes and hands each message, or what is wrong with it, to `sink`, until that says `false`. Returns how many
    /// bytes were used.
    pub fn feed(&mut self, bytes: &[u8], sink: &mut dyn FnMut(Message) -> bool) -> usize {
        let mut go = true;
        let mut watched = |m: Message| {
            go = sink(m);
            go
        };
        for (index, byte) in bytes.iter().enumerate() {
            if !self.byte(*byte, &mut watched) {
                // The byte may have ended one message and begun the next: it is used either way.
                return index + 1;
            }
        }
        bytes.len()
    }

    /// The stream ends here: a number or keyword is complete, anything else unfinished is an error.
    pub fn finish(&mut self, sink: &mut dyn FnMut(Message) -> bool) {
        match self.state {
            State::Zero | State::Digits | State::Fraction | State::ExponentDigits => {
                self.token(TokenKind::Number, sink);
            }
            State::Keyword => {
                self.token(TokenKind::Keyword, sink);
            }
            State::Start | State::Recovery => {}
            _ => {
                if !self.discarding {
                    let stray = String::from_utf8_lossy(self.text.get(self.token_start..).unwrap_or(&[]))
                        .into_owned();
                    sink(Err(format!("JSON parse error, stray '{stray}'")));
                }
                self.reset();
            }
        }
        if !self.tokens.is_empty() {
            sink(parser::parse(&self.text, &self.tokens));
        }
        self.reset();
        self.state = State::Start;
    }

    /// Whether a message has begun and is not whole.
    pub fn in_message(&self) -> bool {
        self.discarding || !self.tokens.is_empty() || !matches!(self.state, State::Start | State::Recovery)
    }

    fn reset(&mut self) {
        // What a large message needed is not kept for small ones.
        if self.text.capacity() > 64 * 1024 {
            self.text = Vec::new();
        }
        if self.tokens.capacity() > 4096 {
            self.tokens = Vec::new();
        }
        self.text.clear();
        self.tokens.clear();
        self.token_start = 0;
        self.braces = 0;
        self.brackets = 0;
        self.discarding = false;
    }

    /// Returns whether the sink wants more.
    fn byte(&mut self, byte: u8, sink: &mut dyn FnMut(Message) -> bool) -> bool {
        let mut more = true;
        loop {
            let next = match self.state {
                State::Start => {
                    self.token_start = self.text.len();
                    match byte {
                        b' ' | b'\t' | b'\r' | b'\n' => return more,
                        b'{' | b'}' | b'[' | b']' | b':' | b',' => {
                            let kind = match byte {
                                b'{' => TokenKind::LeftBrace,
                                b'}' => TokenKind::RightBrace,
                                b'[' => TokenKind::LeftBracket,
                                b']' => TokenKind::RightBracket,
                                b':' => TokenKind::Colon,
                                _ => TokenKind::Comma,
                            };
                            return self.end(byte, kind, sink) && more;
                        }
                        b'"' | b'\'' => State::Text { quote: byte, escaped: false },
                        b'-' => State::Minus,
                        b'0' => State::Zero,
                        b'1'..=b'9' => State::Digits,
                        b'a'..=b'z' => State::Keyword,
                        _ => return self.stray(byte, sink) && more,
                    }
                }
                State::Recovery => match byte {
                    // Structure and line ends are likely beginnings; the other controls and impossible UTF-8 are how a
                    // client asks for one.
                    b'{' | b'}' | b'[' | b']' | b':' | b',' | 0..=8 | 10..=31 | 0xFE | 0xFF => {
                        self.state = State::Start;
                        continue;
                    }
                    _ => return more,
                },
                State::Text { quote, escaped } => match byte {
                    0..=31 | 0xFE | 0xFF => return self.stray(byte, sink) && more,
                    _ if escaped => State::Text { quote, escaped: false },
                    b'\\' => State::Text { quote, escaped: true },
                    _ if byte == quote => {
                        return self.end(byte, TokenKind::String, sink) && more;
                    }
                    _ => State::Text { quote, escaped: false },
                },
                State::Minus => match byte {
                    b'0' => State::Zero,
                    b'1'..=b'9' => State::Digits,
                    _ => return self.stray(byte, sink) && more,
                },
                State::Point => match byte {
                    b'0'..=b'9' => State::Fraction,
                    _ => return self.stray(byte, sink) && more,
                },
                State::Exponent => match byte {
                    b'+' | b'-' => State::ExponentSign,
                    b'0'..=b'9' => State::ExponentDigits,
                    _ => return self.stray(byte, sink) && more,
                },
                State::ExponentSign => match byte {
                    b'0'..=b'9' => State::ExponentDigits,
                    _ => return self.stray(byte, sink) && more,
                },
                // A leading zero is a mistake, not two numbers.
                State::Zero if byte.is_ascii_digit() => return self.stray(byte, sink) && more,
                State::Digits if byte.is_ascii_digit() => State::Digits,
                State::Zero | State::Digits if byte == b'.' => State::Point,
                State::Fraction if byte.is_ascii_digit() => State::Fraction,
                State::Zero | State::Digits | State::Fraction if matches!(byte, b'e' | b'E') => {
                    State::Exponent
                }
                State::ExponentDigits if byte.is_ascii_digit() => State::ExponentDigits,
                State::Keyword if byte.is_ascii_lowercase() => State::Keyword,
                State::Zero | State::Digits | State::Fraction | State::ExponentDigits => {
                    more &= self.token(TokenKind::Number, sink);
                    continue;
                }
                State::Keyword => {
                    more &= self.token(TokenKind::Keyword, sink);
                    continue;
                }
            };
            self.state = next;
            return self.keep(byte, sink) && more;
        }
    }

    /// Stores a byte of the current token within the limit.
    fn keep(&mut self, byte: u8, sink: &mut dyn FnMut(Message) -> bool) -> bool {
        if self.discarding {
            return true;
        }
        if self.text.len() >= self.limits.bytes {
            let limit = self.limits.bytes;
            return self.discard(format!("JSON message size limit exceeded ({limit} bytes)"), sink);
        }
        self.text.push(byte);
        true
    }

    /// Stores the last byte of a token that says itself where it ends.
    fn end(&mut self, byte: u8, kind: TokenKind, sink: &mut dyn FnMut(Message) -> bool) -> bool {
        let kept = self.keep(byte, sink);
        self.token(kind, sink) && kept
    }

    /// Gives up on the message but stays in step with its structure.
    fn discard(&mut self, why: String, sink: &mut dyn FnMut(Message) -> bool) -> bool {
        let (braces, brackets) = (self.braces, self.brackets);
        self.reset();
        self.braces = braces;
        self.brackets = brackets;
        self.discarding = true;
        sink(Err(why))
    }

    /// A lexical error: the message is lost.
    fn stray(&mut self, byte: u8, sink: &mut dyn FnMut(Message) -> bool) -> bool {
        let quiet = self.discarding;
        let mut text = self.text.split_off(self.token_start.min(self.text.len()));
        text.push(byte);
        self.reset();
        self.state = State::Recovery;
        if quiet {
            return true;
        }
        // A long string that goes wrong at its end need not be sent back whole.
        let shown =
            String::from_utf8_lossy(text.get(text.len().saturating_sub(256)..).unwrap_or(&[])).into_owned();
        sink(Err(format!("JSON parse error, stray '{shown}'")))
    }

    /// A token is complete.
    fn token(&mut self, kind: TokenKind, sink: &mut dyn FnMut(Message) -> bool) -> bool {
        self.state = State::Start;
        match kind {
            TokenKind::LeftBrace => self.braces += 1,
            TokenKind::RightBrace => self.braces -= 1,
            TokenKind::LeftBracket => self.brackets += 1,
            TokenKind::RightBracket => self.brackets -= 1,
            _ => {}
        }
        let mut more = true;
        if !self.discarding {
            if self.braces.saturating_add(self.brackets)
                > i64::try_from(self.limits.depth).unwrap_or(i64::MAX)
            {
                more = self.discard("JSON nesting depth limit exceeded".to_owned(), sink);
            } else if self.tokens.len() >= self.limits.tokens {
                more = self.discard("JSON token count limit exceeded".to_owned(), sink);
            } else {
                self.tokens.push(Token { kind, start: self.token_start, end: self.text.len() });
            }
        }
        let open = (self.braces > 0 || self.brackets > 0) && self.braces >= 0 && self.brackets >= 0;
        if open {
            return more;
        }
        if !self.discarding {
            let message = parser::parse(&self.text, &self.tokens);
            self.reset();
            return sink(message);
        }
        self.reset();
        more
    }
}
