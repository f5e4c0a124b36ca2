//! The older option syntax of `--chardev`, `-o` and `--image-opts`.
//!
//! `key=value`, or alone `key` for `key=on` and `nokey` for `key=off`; `,,` in a value is a comma.
//! Keys are not checked here and not nested: the tables of each option know which keys there are,
//! and `--image-opts` calls [`Map::crumple`]. The rule: the sentences of this syntax, which differ
//! from keyval's, stay in this file.

use super::error::{Error, Kind};
use super::keyval::take_value;
use super::size::{self, BadSize};
use super::tree::{Map, Value, check_length};

/// What one argument said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parsed {
    /// The options, all text, dotted keys as they stand.
    pub options: Map,
    /// Keys that stood alone, as written; `--chardev` and `--image-opts` warn about them
    /// ([`short_form_warning`]). `help` and `?` are not among them.
    pub short_forms: Vec<String>,
    /// `help` or `?` stood among them: the caller prints help instead of acting.
    pub help: bool,
}

/// Reads one argument. `implied_key` is the key of a first value that stands without one
/// (`backend` for `--chardev`, `file` for `--image-opts`); such a value is never `help`, the caller
/// compares it.
pub fn parse(text: &str, implied_key: Option<&str>) -> Result<Parsed, Error> {
    check_length(text)?;
    let mut parsed = Parsed::default();
    let mut rest = text;
    let mut implied_key = implied_key;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (item, tail) = rest.split_at(end);
        let implied = implied_key.take();
        if let Some(tail) = tail.strip_prefix('=') {
            let (value, tail) = take_value(tail);
            set(&mut parsed.options, item, value)?;
            rest = tail;
        } else if let Some(key) = implied {
            let (value, tail) = take_value(rest);
            set(&mut parsed.options, key, value)?;
            rest = tail;
        } else {
            if matches!(item, "help" | "?") {
                parsed.help = true;
            } else {
                let (key, value) = long_form(item);
                set(&mut parsed.options, key, value.to_owned())?;
                parsed.short_forms.push(item.to_owned());
            }
            rest = tail.strip_prefix(',').unwrap_or_default();
        }
    }
    Ok(parsed)
}

fn set(options: &mut Map, key: &str, value: String) -> Result<(), Error> {
    match options.get_mut(key) {
        Some(slot) => *slot = Value::Text(value),
        None => options.push_new(key.to_owned(), Value::Text(value))?,
    }
    Ok(())
}

/// What a key that stands alone means.
fn long_form(item: &str) -> (&str, &'static str) {
    match item.strip_prefix("no") {
        Some(key) => (key, "off"),
        None => (item, "on"),
    }
}

/// The two lines that warn about a key that stands alone.
pub fn short_form_warning(item: &str) -> String {
    let (key, value) = long_form(item);
    format!("short-form boolean option '{item}' deprecated\nPlease use {key}={value} instead")
}

impl Map {
    /// Removes `key` and reads it as a size in bytes, in the words of this syntax.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>, Error> {
        let Some(text) = self.take_str(key)? else { return Ok(None) };
        size::parse(&text).map(Some).map_err(|bad| match bad {
            BadSize::NotASize => Error::not_a_size(key),
            BadSize::OutOfRange => {
                Error::message(format!("Value '{text}' is out of range for parameter '{key}'"))
            }
        })
    }

    /// Removes `key` and reads it as a number without unit, in the words of this syntax.
    pub fn take_number(&mut self, key: &str) -> Result<Option<u64>, Error> {
        let Some(text) = self.take_str(key)? else { return Ok(None) };
        let no_number = || Error::new(key, Kind::Expects("a number"));
        let digits = text.trim_ascii_start();
        let digits = digits.strip_prefix('+').unwrap_or(digits);
        let (radix, digits) = match digits.as_bytes() {
            [b'0', b'x' | b'X', ..] => (16, &digits[2..]),
            [b'0', _, ..] => (8, &digits[1..]),
            _ => (10, digits),
        };
        if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
            return Err(no_number());
        }
        u64::from_str_radix(digits, radix).map(Some).map_err(|_| {
            Error::message(format!("Value '{text}' is too large for parameter '{key}'"))
        })
    }

    /// Fails with the first key that is left, in the words of this syntax.
    pub fn finish_known(self) -> Result<(), Error> {
        match self.iter().next() {
            Some((key, _)) => Err(Error::new(key, Kind::BadName)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::json;
    use super::*;

    #[test]
    fn keys_alone_are_booleans_and_the_last_one_counts() {
        for (given, wanted, short) in [
            ("", "{}", ""),
            ("a,,b=c", r#"{"file": "a,b=c"}"#, ""),
            ("a,b", r#"{"file": "a", "b": "on"}"#, "b"),
            (",a", r#"{"file": "", "a": "on"}"#, "a"),
            ("help", r#"{"file": "help"}"#, ""),
            (
                "id=a,server,nowait",
                r#"{"id": "a", "server": "on", "wait": "off"}"#,
                "server nowait",
            ),
            ("x=1,no", r#"{"x": "1", "": "off"}"#, "no"),
            ("x=1,x=2,,3,", r#"{"x": "2,3"}"#, ""),
            ("x=1,=5", r#"{"x": "1", "": "5"}"#, ""),
            ("file.driver=a,no=1", r#"{"file.driver": "a", "no": "1"}"#, ""),
        ] {
            let parsed = parse(given, Some("file")).unwrap();
            assert_eq!(json::to_text(&parsed.options.into()), wanted, "{given}");
            assert_eq!(parsed.short_forms.join(" "), short, "{given}");
        }
        assert_eq!(parse("a", None).unwrap().short_forms, ["a"]);
        assert_eq!(
            short_form_warning("nowait"),
            "short-form boolean option 'nowait' deprecated\nPlease use wait=off instead"
        );
    }

    #[test]
    fn help_is_seen_behind_the_first_value() {
        assert!(parse("null,help", Some("backend")).unwrap().help);
        assert!(parse("?", None).unwrap().help);
        assert!(!parse("help=1", None).unwrap().help);
    }

    #[test]
    fn values_convert_in_the_words_of_this_syntax() {
        let size = |text: &str| {
            let mut options = parse(text, None).unwrap().options;
            options.take_size("x").map_err(|e| e.to_string())
        };
        let range = "expects a non-negative number below 2^64";
        assert_eq!(size("x=1.5k"), Ok(Some(1536)));
        assert_eq!(size("y"), Ok(None));
        assert_eq!(size("x"), Err(format!("Parameter 'x' {range}")));
        assert_eq!(size("x=16E"), Err("Value '16E' is out of range for parameter 'x'".into()));

        let number = |text: &str| {
            let mut options = parse(text, None).unwrap().options;
            options.take_number("x").map_err(|e| e.to_string())
        };
        assert_eq!(number("x=0x10"), Ok(Some(16)));
        for bad in ["x=", "x=1k", "x=-1", "x=++1", "x=0x"] {
            assert_eq!(number(bad), Err("Parameter 'x' expects a number".into()), "{bad}");
        }
        let huge = "99999999999999999999";
        let too_large = format!("Value '{huge}' is too large for parameter 'x'");
        assert_eq!(number(&format!("x={huge}")), Err(too_large));

        let left = parse("bogus=1", None).unwrap().options;
        assert_eq!(left.finish_known().unwrap_err().to_string(), "Invalid parameter 'bogus'");
    }
}
