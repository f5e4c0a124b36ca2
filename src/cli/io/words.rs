//! The words of a command: splitting, options, sizes and patterns, with QEMU's error messages.

use crate::cli::img::outln;
use crate::options::size::{self, BadSize};
use crate::tools::output::errln;

/// The words of a line. There is no quoting.
pub fn split(line: &str) -> Vec<&str> {
    line.split([' ', '\n']).filter(|word| !word.is_empty()).collect()
}

/// A command's options and operands.
pub struct Words<'a> {
    options: Vec<(char, &'a str)>,
    pub operands: Vec<&'a str>,
}

/// What getopt does with a command's words, in its words: `known` lists the letters, those with a value followed by a
/// colon. Errors are printed on standard error.
pub fn parse<'a>(name: &str, known: &str, words: &[&'a str]) -> Option<Words<'a>> {
    let mut parsed = Words { options: Vec::new(), operands: Vec::new() };
    let mut rest = words.iter();
    while let Some(&word) = rest.next() {
        if word == "--" {
            parsed.operands.extend(rest.by_ref());
            break;
        }
        let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
            parsed.operands.push(word);
            continue;
        };
        for (at, letter) in letters.char_indices() {
            let Some(found) = known.find(letter).filter(|_| letter != ':') else {
                errln!("{name}: invalid option -- '{letter}'");
                return None;
            };
            if !known[found + letter.len_utf8()..].starts_with(':') {
                parsed.options.push((letter, ""));
                continue;
            }
            let inline = &letters[at + letter.len_utf8()..];
            let value = if inline.is_empty() { rest.next().copied() } else { Some(inline) };
            let Some(value) = value else {
                errln!("{name}: option requires an argument -- '{letter}'");
                return None;
            };
            parsed.options.push((letter, value));
            break;
        }
    }
    Some(parsed)
}

impl<'a> Words<'a> {
    pub fn has(&self, letter: char) -> bool {
        self.options.iter().any(|(option, _)| *option == letter)
    }

    /// The last value given.
    pub fn get(&self, letter: char) -> Option<&'a str> {
        self.options.iter().rev().find(|(option, _)| *option == letter).map(|(_, value)| *value)
    }
}

/// A number of bytes. An error is printed on standard output.
pub fn number(text: &str) -> Option<u64> {
    match size::parse(text) {
        Ok(bytes) if bytes <= i64::MAX as u64 => Some(bytes),
        Ok(_) | Err(BadSize::OutOfRange) => {
            outln!("Parsing error: argument too large -- {text}");
            None
        }
        Err(BadSize::NotASize) => {
            outln!(
                "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
            );
            None
        }
    }
}

/// The length of one request, in bytes.
pub fn length(text: &str) -> Option<u64> {
    /// Whole sectors below 2 GiB.
    const MOST: u64 = 0x7fff_fe00;
    let bytes = number(text)?;
    if bytes > MOST {
        outln!("length cannot exceed {MOST}, given {text}");
        return None;
    }
    Some(bytes)
}

/// A byte, decimal, octal or hexadecimal as C writes it.
pub fn pattern(text: &str) -> Option<u8> {
    let byte = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => u8::from_str_radix(&text[2..], 16),
        [b'0', _, ..] => u8::from_str_radix(&text[1..], 8),
        _ => text.parse(),
    };
    if byte.is_err() {
        outln!("{text} is not a valid pattern byte");
    }
    byte.ok()
}

/// A number of bytes with a unit: `512 bytes`, `64 KiB`, `3.500 KiB`.
pub fn human(bytes: f64) -> String {
    let units = ["EiB", "PiB", "TiB", "GiB", "MiB", "KiB"];
    for (index, unit) in units.into_iter().enumerate() {
        let scale = (1u64 << (10 * (units.len() - index))) as f64;
        if bytes >= scale {
            let number = format!("{:.3}", bytes / scale);
            // Also of what is rounded to it.
            let number = number.strip_suffix(".000").unwrap_or(&number);
            return format!("{number} {unit}");
        }
    }
    match bytes.fract() == 0.0 {
        true => format!("{bytes:.0} bytes"),
        false => format!("{bytes:.6} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_no_more_decimals_than_they_need() {
        for (bytes, wanted) in [
            (0.0, "0 bytes"),
            (512.0, "512 bytes"),
            (1024.0, "1 KiB"),
            (3584.0, "3.500 KiB"),
            (1124.0, "1.098 KiB"),
            (1048576.0, "1 MiB"),
            (8388096.0, "8 MiB"),
            (1099511627264.0, "1024 GiB"),
            (0.157185, "0.157185 bytes"),
        ] {
            assert_eq!(human(bytes), wanted);
        }
    }

    #[test]
    fn options_stand_anywhere_and_take_values_as_getopt_does() {
        let words = split("0  -qP 7 512 -s9 -- -1");
        let words = parse("read", "qP:s:", &words).unwrap();
        assert_eq!(words.operands, ["0", "512", "-1"]);
        assert!(words.has('q') && !words.has('v'));
        assert_eq!((words.get('P'), words.get('s')), (Some("7"), Some("9")));
        assert!(parse("read", "qP:", &["-x"]).is_none());
        assert!(parse("read", "qP:", &["-P"]).is_none());
    }
}
