//! JSON text to option trees and back.
//!
//! The reader takes what QEMU's takes: RFC 8259, plus strings in single quotes, which `json:{…}`
//! file names in the wild use. Integers stay exact, a key given twice and anything after the value
//! are refused, and depth is bounded by [`MAX_DEPTH`]. The writer spaces
//! and escapes as QEMU's does, so that names made of it compare equal.

use std::fmt::Write;

use super::bytes;
use super::error::Error;
use super::tree::{MAX_DEPTH, Map, Value, check_length};

/// Reads exactly one JSON value.
pub fn parse(text: &str) -> Result<Value, Error> {
    check_length(text)?;
    let mut reader = Reader { text, at: 0 };
    if reader.peek().is_none() {
        return Err(Error::message("Expecting a JSON value"));
    }
    let value = reader.value(0)?;
    if reader.peek().is_some() {
        return Err(Error::message("Expecting at most one JSON value"));
    }
    Ok(value)
}

/// Reads exactly one JSON object.
pub fn parse_object(text: &str) -> Result<Map, Error> {
    match parse(text)? {
        Value::Map(m) => Ok(m),
        _ => Err(Error::message("Invalid JSON object given")),
    }
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::message(format!("JSON parse error, {what}"))
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    /// The next byte after white space, not consumed.
    fn peek(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        let blanks = rest.iter().take_while(|b| matches!(b, b' ' | b'\t' | b'\r' | b'\n'));
        self.at += blanks.count();
        self.text.as_bytes().get(self.at).copied()
    }

    /// The next byte after white space, not consumed; there must be one.
    fn need(&mut self) -> Result<u8, Error> {
        self.peek().ok_or_else(|| bad("premature EOI"))
    }

    fn value(&mut self, depth: usize) -> Result<Value, Error> {
        match self.need()? {
            b'{' | b'[' if depth == MAX_DEPTH => {
                Err(bad(format_args!("nesting is deeper than {MAX_DEPTH} levels")))
            }
            b'{' => self.object(depth + 1),
            b'[' => self.list(depth + 1),
            quote @ (b'"' | b'\'') => Ok(Value::Str(self.string(quote)?)),
            b'-' | b'0'..=b'9' => self.number(),
            b'a'..=b'z' => self.keyword(),
            b'}' | b']' | b',' | b':' => Err(bad("expecting value")),
            _ => Err(self.stray(self.at)),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, Error> {
        self.at += 1;
        let mut map = Map::new();
        if self.need()? == b'}' {
            self.at += 1;
            return Ok(Value::Map(map));
        }
        loop {
            let key = match self.need()? {
                quote @ (b'"' | b'\'') => self.string(quote)?,
                b'}' | b']' | b',' | b':' => return Err(bad("expecting value")),
                _ => return Err(bad("key is not a string in object")),
            };
            if self.need()? != b':' {
                return Err(bad("missing : in object pair"));
            }
            self.at += 1;
            let value = self.value(depth)?;
            if map.contains(&key) {
                return Err(bad("duplicate key"));
            }
            map.push_new(key, value)?;
            match self.need()? {
                b',' => self.at += 1,
                b'}' => {
                    self.at += 1;
                    return Ok(Value::Map(map));
                }
                _ => return Err(bad("expected separator in dict")),
            }
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value, Error> {
        self.at += 1;
        let mut list = Vec::new();
        if self.need()? == b']' {
            self.at += 1;
            return Ok(Value::List(list));
        }
        loop {
            list.push(self.value(depth)?);
            match self.need()? {
                b',' => self.at += 1,
                b']' => {
                    self.at += 1;
                    return Ok(Value::List(list));
                }
                _ => return Err(bad("expected separator in list")),
            }
        }
    }

    fn keyword(&mut self) -> Result<Value, Error> {
        let start = self.at;
        let rest = &self.text.as_bytes()[start..];
        self.at += rest.iter().take_while(|b| b.is_ascii_lowercase()).count();
        match &self.text[start..self.at] {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            "null" => Ok(Value::Null),
            other => Err(bad(format_args!("invalid keyword '{other}'"))),
        }
    }

    /// `-? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?`
    fn number(&mut self) -> Result<Value, Error> {
        let start = self.at;
        if self.byte() == Some(b'-') {
            self.at += 1;
        }
        let leading_zero = self.byte() == Some(b'0');
        let digits = self.digits();
        if leading_zero && digits > 1 {
            self.at -= digits - 1;
            return Err(self.stray(start));
        }
        if digits == 0 {
            return Err(self.stray(start));
        }
        let mut integer = true;
        if self.byte() == Some(b'.') {
            self.at += 1;
            integer = false;
            if self.digits() == 0 {
                return Err(self.stray(start));
            }
        }
        if matches!(self.byte(), Some(b'e' | b'E')) {
            self.at += 1;
            integer = false;
            if matches!(self.byte(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            if self.digits() == 0 {
                return Err(self.stray(start));
            }
        }
        let text = &self.text[start..self.at];
        if integer
            && let Ok(n) = text.parse::<i128>()
            && (i128::from(i64::MIN)..=i128::from(u64::MAX)).contains(&n)
        {
            return Ok(Value::Int(n));
        }
        match text.parse::<f64>() {
            Ok(n) if n.is_finite() => Ok(Value::Num(n)),
            _ => Err(bad("number out of range")),
        }
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn digits(&mut self) -> usize {
        let rest = &self.text.as_bytes()[self.at..];
        let n = rest.iter().take_while(|b| b.is_ascii_digit()).count();
        self.at += n;
        n
    }

    /// A string; `self.at` is on its opening quote.
    fn string(&mut self, quote: u8) -> Result<String, Error> {
        let start = self.at;
        self.at += 1;
        let mut out = String::new();
        loop {
            let rest = &self.text[self.at..];
            let plain = rest.bytes().take_while(|&b| b != quote && b != b'\\' && b >= b' ').count();
            out.push_str(&rest[..plain]);
            self.at += plain;
            match self.byte() {
                Some(b) if b == quote => {
                    self.at += 1;
                    // Text of a command line may hold what was no UTF-8.
                    return match bytes::is_plain(&out) {
                        true => Ok(out),
                        false => Err(bad("invalid UTF-8 sequence in string")),
                    };
                }
                Some(b'\\') => out.push(self.escape()?),
                _ => return Err(self.stray(start)),
            }
        }
    }

    /// One escape sequence; `self.at` is on its backslash.
    fn escape(&mut self) -> Result<char, Error> {
        const BAD: &str = "invalid escape sequence in string";
        let letter = self.text.as_bytes().get(self.at + 1).copied();
        let plain = match letter.ok_or_else(|| bad("premature EOI"))? {
            b @ (b'"' | b'\'' | b'\\' | b'/') => char::from(b),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let first = self.hex4().ok_or_else(|| bad(BAD))?;
                return self.code_point(first);
            }
            _ => return Err(bad(BAD)),
        };
        self.at += 2;
        Ok(plain)
    }

    /// The four digits of `\uXXXX`; `self.at` is on the backslash and moves behind the digits.
    fn hex4(&mut self) -> Option<u32> {
        let digits = self.text.as_bytes().get(self.at..self.at + 6)?;
        let digits = digits.strip_prefix(b"\\u")?;
        let n = digits.iter().try_fold(0, |n, &b| Some(n << 4 | char::from(b).to_digit(16)?))?;
        self.at += 6;
        Some(n)
    }

    /// A code point that starts with `first`, or a surrogate pair that does.
    fn code_point(&mut self, first: u32) -> Result<char, Error> {
        let lone = || bad(format_args!("\\u{first:04x} is not a valid Unicode character"));
        // An embedded zero would cut the text short wherever it is handed to the kernel.
        if first == 0 {
            return Err(lone());
        }
        if !(0xd800..0xdc00).contains(&first) {
            return char::from_u32(first).ok_or_else(lone);
        }
        match self.hex4() {
            Some(second @ 0xdc00..0xe000) => {
                let n = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
                char::from_u32(n).ok_or_else(lone)
            }
            _ => Err(lone()),
        }
    }

    /// The token that began at `start` cannot continue with the character at `self.at`.
    fn stray(&self, start: usize) -> Error {
        let wrong = self.text[self.at..].chars().next().map_or(0, char::len_utf8);
        bad(format_args!("stray '{}'", &self.text[start..self.at + wrong]))
    }
}

/// The value as JSON on one line, spaced and escaped as QEMU does: `{"a": [1, "\u00E9"]}`.
///
/// [`Value::Text`] is written as a string: its type was never known.
pub fn to_text(value: &Value) -> String {
    let mut out = String::new();
    write_value(&mut out, value);
    out
}

fn write_value(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Int(n) => push(out, format_args!("{n}")),
        // Debug keeps `.0` or an exponent, so that the number is read back as what it was.
        Value::Num(n) if n.is_finite() => push(out, format_args!("{n:?}")),
        Value::Num(_) => out.push_str("null"),
        Value::Text(s) | Value::Str(s) => write_string(out, s),
        Value::List(l) => {
            out.push('[');
            for (i, v) in l.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                write_value(out, v);
            }
            out.push(']');
        }
        Value::Map(m) => {
            out.push('{');
            for (i, (k, v)) in m.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                write_string(out, k);
                out.push_str(": ");
                write_value(out, v);
            }
            out.push('}');
        }
    }
}

/// The value as JSON on several lines, four spaces to a level.
pub fn to_pretty_text(value: &Value) -> String {
    let mut out = String::new();
    write_pretty(&mut out, value, 0);
    out
}

fn write_pretty(out: &mut String, value: &Value, depth: usize) {
    let line = |out: &mut String, i: usize, depth: usize| {
        out.push_str(if i == 0 { "\n" } else { ",\n" });
        (0..depth).for_each(|_| out.push_str("    "));
    };
    match value {
        // In QEMU's way, an empty one inside of something has two lines, too.
        Value::List(l) if depth > 0 || !l.is_empty() => {
            out.push('[');
            for (i, v) in l.iter().enumerate() {
                line(out, i, depth + 1);
                write_pretty(out, v, depth + 1);
            }
            line(out, 0, depth);
            out.push(']');
        }
        Value::Map(m) if !m.is_empty() => {
            out.push('{');
            for (i, (k, v)) in m.iter().enumerate() {
                line(out, i, depth + 1);
                write_string(out, k);
                out.push_str(": ");
                write_pretty(out, v, depth + 1);
            }
            line(out, 0, depth);
            out.push('}');
        }
        plain => write_value(out, plain),
    }
}

fn write_string(out: &mut String, s: &str) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            // JSON has no way to say it.
            _ if bytes::byte_of(c).is_some() => out.push_str("\\uFFFD"),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    push(out, format_args!("\\u{unit:04X}"));
                }
            }
        }
    }
    out.push('"');
}

fn push(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("writing to a String cannot fail");
}

#[cfg(test)]
impl From<serde_json::Value> for Value {
    /// To compare with a reader that is not ours.
    fn from(value: serde_json::Value) -> Self {
        match value {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(b) => Value::Bool(b),
            serde_json::Value::Number(n) => match (n.as_u64(), n.as_i64(), n.as_f64()) {
                (Some(n), _, _) => Value::Int(n.into()),
                (_, Some(n), _) => Value::Int(n.into()),
                (_, _, Some(n)) => Value::Num(n),
                _ => Value::Null,
            },
            serde_json::Value::String(s) => Value::Str(s),
            serde_json::Value::Array(l) => Value::List(l.into_iter().map(Into::into).collect()),
            serde_json::Value::Object(m) => Value::Map(m.into_iter().collect()),
        }
    }
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
