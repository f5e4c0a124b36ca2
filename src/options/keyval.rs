//! The key-value syntax of `--blockdev`, `--export`, `--object` and `--nbd-server`.
//!
//! `key=value,key=value`; dots in keys nest, numbers between dots make lists, `,,` in a value is a
//! comma. All values are text. The rule: a key is a valid name, and is used in one way only.

use super::error::{Error, Kind};
use super::json;
use super::tree::{Map, OnRepeat, Value, check_length};
use std::borrow::Cow;

/// Longest part of a key between two dots, in bytes.
const MAX_FRAGMENT: usize = 127;

/// What one argument said.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Parsed {
    /// The options, as text from keyval, typed from JSON.
    pub options: Map,
    /// `help` or `?` stood among them: the caller prints help instead of acting.
    pub help: bool,
}

/// Reads one command line argument: JSON if it starts with `{`, keyval otherwise.
///
/// `implied_key` is the key of a first value that stands without one (`driver`, `type`,
/// `qom-type`), if the option has such a key.
pub fn parse_argument(text: &str, implied_key: Option<&str>) -> Result<Parsed, Error> {
    if !text.starts_with('{') {
        return parse(text, implied_key);
    }
    Ok(Parsed { options: json::parse_object(text)?, help: false })
}

/// Reads keyval syntax; see [`parse_argument`] for `implied_key`.
pub fn parse(text: &str, implied_key: Option<&str>) -> Result<Parsed, Error> {
    check_length(text)?;
    let mut parsed = Parsed::default();
    let mut rest = text;
    let mut implied_key = implied_key;
    while !rest.is_empty() {
        let (item, tail) = split_at_comma(rest);
        let bare = !item.contains('=');
        if bare && matches!(item, "help" | "?") {
            parsed.help = true;
            rest = tail;
        } else if let (true, false, Some(key)) = (bare, item.is_empty(), implied_key) {
            // A value without its key cannot hold a comma: `,,` would be an empty second item.
            set(&mut parsed.options, key, item.to_owned())?;
            rest = tail;
        } else {
            let key = &item[..item.find('=').unwrap_or(item.len())];
            check_key(key)?;
            if bare {
                return Err(Error::new(key, Kind::NoEquals));
            }
            let (value, tail) = take_value(&rest[key.len() + 1..]);
            set(&mut parsed.options, key, value)?;
            rest = tail;
        }
        implied_key = None;
    }
    parsed.options.numbers_to_lists()?;
    Ok(parsed)
}

fn set(options: &mut Map, key: &str, value: String) -> Result<(), Error> {
    options.place(&plain_indexes(key), Value::Text(value), 0, OnRepeat::Replace)
}

/// `key` with its list indexes as plain numbers: `a.00` is element 0 of `a`.
fn plain_indexes(key: &str) -> Cow<'_, str> {
    let is_padded = |part: &str| {
        part.len() > 1 && part.starts_with('0') && part.bytes().all(|b| b.is_ascii_digit())
    };
    if !key.split('.').any(is_padded) {
        return Cow::Borrowed(key);
    }
    let plain = |part: &'_ str| match part.trim_start_matches('0') {
        _ if !is_padded(part) => part.to_owned(),
        "" => "0".to_owned(),
        rest => rest.to_owned(),
    };
    Cow::Owned(key.split('.').map(plain).collect::<Vec<_>>().join("."))
}

/// The text up to the first comma, and what follows that comma.
fn split_at_comma(text: &str) -> (&str, &str) {
    text.split_once(',').unwrap_or((text, ""))
}

/// The value at the start of `text`, `,,` read as a comma, and what follows the comma that ends it.
pub(super) fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some((part, tail)) = rest.split_once(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(part);
        match tail.strip_prefix(',') {
            Some(tail) => {
                value.push(',');
                rest = tail;
            }
            None => return (value, tail),
        }
    }
}

/// Checks a dotted key: names and list indexes between the dots, a name first.
fn check_key(key: &str) -> Result<(), Error> {
    let mut rest = key;
    let mut first = true;
    loop {
        let length = match index_length(rest) {
            Some(length) if !first => length,
            _ => name_length(rest),
        };
        if length == 0 {
            return Err(Error::new(key, Kind::BadName));
        }
        let (fragment, tail) = rest.split_at(length);
        if length > MAX_FRAGMENT {
            let fragment_of_key = !(first && tail.is_empty());
            return Err(Error::new(fragment, Kind::TooLong { fragment: fragment_of_key }));
        }
        if tail.is_empty() {
            return Ok(());
        }
        rest = tail.strip_prefix('.').ok_or_else(|| Error::new(key, Kind::BadName))?;
        first = false;
    }
}

/// The length of the list index that fills the first part of `text`, if one does.
fn index_length(text: &str) -> Option<usize> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let ends = matches!(text.as_bytes().get(digits), None | Some(b'.'));
    (digits > 0 && ends).then_some(digits)
}

/// The length of the parameter name that `text` starts with, 0 if it starts with none: a letter,
/// then letters, digits, `-` and `_`; before it `__DOMAIN_` may stand, which marks vendor
/// extensions and may hold dots.
fn name_length(text: &str) -> usize {
    let prefix = match text.strip_prefix("__") {
        None => 0,
        Some(tail) => {
            let domain = tail
                .bytes()
                .take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'))
                .count();
            match (domain, tail.as_bytes().get(domain)) {
                (1.., Some(b'_')) => 2 + domain + 1,
                _ => return 0,
            }
        }
    };
    let name = &text.as_bytes()[prefix..];
    if !name.first().is_some_and(u8::is_ascii_alphabetic) {
        return 0;
    }
    let length =
        name.iter().take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')).count();
    prefix + length
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json_of(text: &str) -> Result<String, String> {
        parse_argument(text, Some("driver"))
            .map(|p| json::to_text(&p.options.into()))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn keys_nest_values_are_text_and_the_last_one_counts() {
        for (given, wanted) in [
            ("", r#"{}"#),
            ("file", r#"{"driver": "file"}"#),
            ("file,", r#"{"driver": "file"}"#),
            ("driver=file,node-name=f", r#"{"driver": "file", "node-name": "f"}"#),
            ("filename=a,,b,x=1", r#"{"filename": "a,b", "x": "1"}"#),
            ("x=a,,", r#"{"x": "a,"}"#),
            ("x=a,,,y=1", r#"{"x": "a,", "y": "1"}"#),
            ("x=a,,,,y=1", r#"{"x": "a,,y=1"}"#),
            ("x=,y==", r#"{"x": "", "y": "="}"#),
            ("a.b=1,a.c.d=2", r#"{"a": {"b": "1", "c": {"d": "2"}}}"#),
            ("a.1=y,a.0=x", r#"{"a": ["x", "y"]}"#),
            ("a.01=y,a.00=x", r#"{"a": ["x", "y"]}"#),
            ("a.0=x,a.00=y", r#"{"a": ["y"]}"#),
            ("a.0.b=y,a.0.c=x", r#"{"a": [{"b": "y", "c": "x"}]}"#),
            ("a=1,a=2", r#"{"a": "2"}"#),
            ("__org_foo-bar=1", r#"{"__org_foo-bar": "1"}"#),
            (r#"{"driver":"file","n":1}"#, r#"{"driver": "file", "n": 1}"#),
        ] {
            assert_eq!(json_of(given), Ok(wanted.to_owned()), "{given}");
        }
    }

    #[test]
    fn bad_arguments_are_refused_in_qemus_words() {
        let long = "a".repeat(128);
        for (given, wanted) in [
            ("driver=file,filename", "Expected '=' after parameter 'filename'".to_owned()),
            ("a,,b=c", "Invalid parameter ''".into()),
            (",a=b", "Invalid parameter ''".into()),
            ("=x", "Invalid parameter ''".into()),
            (".a=x", "Invalid parameter '.a'".into()),
            ("a.=x", "Invalid parameter 'a.'".into()),
            ("a..b=x", "Invalid parameter 'a..b'".into()),
            ("1a=x", "Invalid parameter '1a'".into()),
            ("0=x", "Invalid parameter '0'".into()),
            ("a.1x=x", "Invalid parameter 'a.1x'".into()),
            ("-a=x", "Invalid parameter '-a'".into()),
            ("_x=x", "Invalid parameter '_x'".into()),
            ("a b=x", "Invalid parameter 'a b'".into()),
            ("é=x", "Invalid parameter 'é'".into()),
            ("d,a%b", "Invalid parameter 'a%b'".into()),
            ("a=1,a.b=1", "Parameters 'a.*' used inconsistently".into()),
            ("a.b=1,a=1", "Parameters 'a.*' used inconsistently".into()),
            ("a.b=1,a.0=1", "Parameters 'a.*' used inconsistently".into()),
            ("a.b=1,a.b.c=2", "Parameters 'a.b.*' used inconsistently".into()),
            ("a.c.0=1,a.c.x=2", "Parameters 'a.c.*' used inconsistently".into()),
            ("a.0=1,a.2=2", "Parameter 'a.1' missing".into()),
            ("a.01=1", "Parameter 'a.0' missing".into()),
            ("a.99999999999999999999=1", "Parameter 'a.0' missing".into()),
            (&format!("{long}=1"), format!("Parameter '{long}' is too long")),
            (&format!("{long}.b=1"), format!("Parameter fragment '{long}' is too long")),
            (&format!("b.{long}=1"), format!("Parameter fragment '{long}' is too long")),
        ] {
            assert_eq!(json_of(given), Err(wanted), "{given}");
        }
    }

    #[test]
    fn help_is_seen_wherever_it_stands_alone() {
        for (given, wanted) in [
            ("help", true),
            ("?", true),
            ("help,driver=x", true),
            ("driver=x,help", true),
            ("driver=x,?", true),
            ("help=1", false),
            ("driver=help", false),
        ] {
            assert_eq!(parse(given, Some("driver")).unwrap().help, wanted, "{given}");
        }
        assert!(parse("helpx", None).is_err());
        assert!(parse("help", None).unwrap().help);
    }
}
