//! The boundaries of JSON values in a stream without other framing.
//!
//! The rule held here: whatever a client sends, what is kept of it is bounded, and after a mistake
//! the next value is found again. The values themselves are read by [`crate::options::json`].

use crate::options::{Value, json};

/// Bytes of one value at most.
pub const MAX_MESSAGE: usize = 1 << 20;

/// Objects and lists inside one another at most; the reader of values has the same limit.
const MAX_DEPTH: usize = 64;

/// Cuts a stream of bytes into values.
#[derive(Default)]
pub struct Framing {
    /// What has come and was not looked at yet.
    input: Vec<u8>,
    /// How much of `input` was looked at.
    at: usize,
    /// The value that has begun.
    value: Vec<u8>,
    /// Where in `value` the last token begins.
    token: usize,
    state: State,
    braces: isize,
    brackets: isize,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Between,
    /// In a number or a keyword.
    Word,
    Text {
        quote: u8,
        escaped: bool,
    },
    /// After a mistake, until something that may begin a value.
    Recovering,
}

impl Framing {
    /// Takes what has come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.input.drain(..self.at);
        self.at = 0;
        self.input.extend_from_slice(bytes);
    }

    /// Whether there may be another value in what has come already.
    pub fn has_input(&self) -> bool {
        self.unread() > 0
    }

    /// Bytes that have come and were not looked at yet.
    pub fn unread(&self) -> usize {
        self.input.len() - self.at
    }

    /// The next whole value, or what is wrong with it in QEMU's words.
    pub fn next_value(&mut self) -> Option<Result<Value, String>> {
        while let Some(&byte) = self.input.get(self.at) {
            // The byte after a word is not part of it, and is looked at once more.
            if self.state == State::Word && !is_word(byte) {
                self.state = State::Between;
                if self.is_whole() {
                    return Some(self.take());
                }
                continue;
            }
            self.at += 1;
            if let Some(result) = self.byte(byte) {
                return Some(result);
            }
        }
        None
    }

    fn byte(&mut self, byte: u8) -> Option<Result<Value, String>> {
        if self.state == State::Recovering {
            if !matches!(byte, b'{' | b'}' | b'[' | b']' | b':' | b',' | b'\n') {
                return None;
            }
            self.state = State::Between;
        }
        if self.value.is_empty() && self.state == State::Between && byte.is_ascii_whitespace() {
            return None;
        }
        if self.value.len() >= MAX_MESSAGE {
            return Some(self.give_up("JSON token size limit exceeded".into()));
        }
        if self.state == State::Between {
            self.token = self.value.len();
        }
        self.value.push(byte);
        match self.state {
            State::Text { escaped: false, quote } if byte == quote => self.state = State::Between,
            State::Text { quote, escaped } => {
                // No control characters, and nothing that is in no UTF-8 text.
                if byte < b' ' || matches!(byte, 0xc0 | 0xc1 | 0xf5..) {
                    return Some(self.stray());
                }
                let escaped = !escaped && byte == b'\\';
                self.state = State::Text { quote, escaped };
                return None;
            }
            State::Word => return None,
            State::Between | State::Recovering => match byte {
                b' ' | b'\t' | b'\r' | b'\n' => return None,
                b'"' | b'\'' => {
                    self.state = State::Text { quote: byte, escaped: false };
                    return None;
                }
                b'-' | b'0'..=b'9' | b'a'..=b'z' => {
                    self.state = State::Word;
                    return None;
                }
                b'{' => self.braces += 1,
                b'}' => self.braces -= 1,
                b'[' => self.brackets += 1,
                b']' => self.brackets -= 1,
                b':' | b',' => {}
                _ => return Some(self.stray()),
            },
        }
        if self.braces + self.brackets > MAX_DEPTH as isize {
            return Some(self.give_up("JSON nesting depth limit exceeded".into()));
        }
        self.is_whole().then(|| self.take())
    }

    /// Whether nothing is open any more, or more was closed than opened.
    fn is_whole(&self) -> bool {
        let open = self.braces > 0 || self.brackets > 0;
        !open || self.braces < 0 || self.brackets < 0
    }

    fn take(&mut self) -> Result<Value, String> {
        let text = std::mem::take(&mut self.value);
        (self.braces, self.brackets) = (0, 0);
        let text = str::from_utf8(&text)
            .map_err(|_| "JSON parse error, invalid UTF-8 sequence in string".to_owned())?;
        json::parse(text).map_err(|error| error.to_string())
    }

    /// The last token cannot continue with the last byte.
    fn stray(&mut self) -> Result<Value, String> {
        /// Bytes of the token that the message repeats at most.
        const SHOWN: usize = 200;
        let token = &self.value[self.token..];
        let token = String::from_utf8_lossy(&token[token.len().saturating_sub(SHOWN)..]);
        let text = format!("JSON parse error, stray '{token}'");
        self.give_up(text)
    }

    fn give_up(&mut self, error: String) -> Result<Value, String> {
        self.value = Vec::new();
        (self.braces, self.brackets) = (0, 0);
        self.state = State::Recovering;
        Err(error)
    }
}

/// Whether a number or keyword that has begun may continue with this.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(framing: &mut Framing, bytes: &[u8]) -> Vec<String> {
        framing.push(bytes);
        let mut all = Vec::new();
        while let Some(one) = framing.next_value() {
            all.push(one.map_or_else(|error| error, |value| json::to_text(&value)));
        }
        all
    }

    fn check(text: &[u8], wanted: &[&str]) {
        // Whole, and one byte at a time.
        assert_eq!(read(&mut Framing::default(), text), wanted);
        let mut framing = Framing::default();
        let single: Vec<_> = text.iter().flat_map(|b| read(&mut framing, &[*b])).collect();
        assert_eq!(single, wanted);
    }

    #[test]
    fn values_are_cut_where_they_end() {
        check(
            br#"{"a":1}{'b':'}'} [1,{"c":"\"]"}]"#,
            &[r#"{"a": 1}"#, r#"{"b": "}"}"#, r#"[1, {"c": "\"]"}]"#],
        );
        check(b" \r\n12 null\n\"x\"", &["12", "null", "\"x\""]);
        check(b"{\"a\"", &[]);
    }

    #[test]
    fn after_a_mistake_the_next_value_is_found() {
        let value = "JSON parse error, expecting value";
        check(b"}{]{}", &[value, value, "{}"]);
        check(b",,{}", &[value, value, "{}"]);
        check(b"# {}", &["JSON parse error, stray '#'", "{}"]);
        check(b"\xff{}", &["JSON parse error, stray '\u{fffd}'", "{}"]);
        check(b"{\"a\":\"b\nc\"}{}", &["JSON parse error, stray '\"b\n'", value, "{}"]);
        check(b"abc {}", &["JSON parse error, invalid keyword 'abc'", "{}"]);
        check(b"\"\xe9\"{}", &["JSON parse error, invalid UTF-8 sequence in string", "{}"]);
    }

    #[test]
    fn length_and_depth_are_bounded() {
        let mut framing = Framing::default();
        let mut found = read(&mut framing, b"{\"a\": \"");
        for _ in 0..(3 * MAX_MESSAGE / 4096) {
            found.extend(read(&mut framing, &[b'x'; 4096]));
            assert!(framing.value.capacity() <= 2 * MAX_MESSAGE);
        }
        found.extend(read(&mut framing, b"\n{}"));
        assert_eq!(found, ["JSON token size limit exceeded", "{}"]);
        let deep = read(&mut Framing::default(), &[b'['; MAX_DEPTH + 1]);
        assert_eq!(deep, ["JSON nesting depth limit exceeded"]);
    }

    #[test]
    fn random_bytes_neither_panic_nor_pile_up() {
        let seed = std::env::var("VUBLK_SEED").ok().and_then(|s| s.parse().ok());
        let seed = seed.unwrap_or(1u64);
        println!("VUBLK_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let pieces: [&[u8]; 16] = [
            b"{",
            b"}",
            b"[",
            b"]",
            b":",
            b",",
            b"\"a\"",
            b"'",
            b"\"",
            b"\\",
            b"1.5e3",
            b"true",
            b"\n",
            b" ",
            b"\xc3\xa9",
            b"\\ud800",
        ];
        for _ in 0..2000 {
            let mut framing = Framing::default();
            let mut text = Vec::new();
            for _ in 0..random.usize(..200) {
                match random.usize(..20) {
                    n @ 0..16 => text.extend_from_slice(pieces[n]),
                    _ => text.push(random.u8(..)),
                }
            }
            let count = read(&mut framing, &text).len();
            assert!(count <= text.len() && !framing.has_input());
            // A broken line at most is lost: what follows is read.
            let after = read(&mut framing, b"\n\x01\n\x01\n{\"id\":1}");
            assert_eq!(after.last().map(String::as_str), Some(r#"{"id": 1}"#), "{text:?}");
        }
    }
}
