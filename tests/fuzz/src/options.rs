//! Fuzzing every parser of options with arbitrary text.
//!
//! There must be no panic, every error is one line, and what was read survives being written and read again.

use vublk::options::{Error, NodeRefOrNull, Size, Value};
use vublk::options::{filename, from_map, from_value, json, keyval, qemuopts, size, tree};

#[derive(serde::Deserialize, Default)]
#[serde(default)]
#[allow(dead_code, reason = "read only for what reading does")]
struct Anything {
    driver: String,
    a: Option<Vec<Value>>,
    file: Option<NodeRefOrNull>,
    on: Option<Size>,
}

/// Gives `data` to the parsers. The first byte chooses among the ways that they are called.
pub fn run(data: &[u8]) {
    let Some((&how, bytes)) = data.split_first() else { return };
    let text = &*String::from_utf8_lossy(bytes);
    let one_line = |error: Error| {
        let shown = error.to_string();
        assert!(!shown.contains('\n'), "{text:?}: an error of several lines: {shown:?}");
        // It may quote the text, once or twice, escaped; never more.
        assert!(shown.len() <= 1024 + 16 * text.len(), "{text:?}: an error of {}", shown.len());
    };
    let implied = (how & 1 != 0).then_some("driver");

    for parse in [keyval::parse, keyval::parse_argument] {
        match parse(text, implied) {
            Ok(parsed) => {
                flatten_and_back(parsed.options.clone(), text);
                from_map::<Anything>(parsed.options).map(drop).unwrap_or_else(one_line);
            }
            Err(error) => one_line(error),
        }
    }
    match qemuopts::parse(text, implied) {
        Ok(mut parsed) => {
            parsed.options.take_size("on").map(drop).unwrap_or_else(one_line);
            parsed.options.take_number("a").map(drop).unwrap_or_else(one_line);
            parsed.options.crumple().map(drop).unwrap_or_else(one_line);
        }
        Err(error) => one_line(error),
    }
    match json::parse(text) {
        Ok(value) => {
            let written = json::to_text(&value);
            assert_eq!(json::parse(&written).as_ref(), Ok(&value), "{text:?} became {written:?}");
            from_value::<Anything>(value).map(drop).unwrap_or_else(one_line);
        }
        Err(error) => one_line(error),
    }
    json::parse_object(text).map(drop).unwrap_or_else(one_line);

    filename::json_options(text).map(drop).unwrap_or_else(one_line);
    filename::split_protocol(text);
    let (base, name) = text.split_once('|').unwrap_or((text, "a"));
    filename::resolve(base, name).map(drop).unwrap_or_else(one_line);

    if let Ok(bytes) = size::parse(text) {
        size::human(bytes);
    }
    let unit = char::from(b"BKMGTPE"[usize::from(how >> 1) % 7]);
    if let Ok(bytes) = size::parse_with_unit(text, unit) {
        let again = bytes.to_string();
        assert_eq!(size::parse_with_unit(&again, 'B').ok(), Some(bytes), "{text:?}");
    }
}

/// What flat options say is what their tree says.
fn flatten_and_back(options: tree::Map, text: &str) {
    if let Ok(flat) = options.clone().flatten() {
        match flat.crumple() {
            Ok(again) => assert_eq!(again, options, "{text:?}"),
            Err(error) => panic!("{text:?} was read, flattened, and not read again: {error}"),
        }
    }
}
