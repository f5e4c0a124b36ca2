//! The syntax of file names: `json:{…}`, `protocol:rest`, or a path.
//!
//! Only names go through here; a `filename` option (`file.filename=a:b`) is taken literally. Which driver a name
//! is for, the block layer knows ([`crate::block::named`]).

use super::error::Error;
use super::json;
use super::tree::{Map, Value, check_length};
use std::borrow::Cow;

/// The options that a name `json:{…}` says, dotted keys nested and all plain values as text; `None` for
/// other names.
pub fn json_options(name: &str) -> Result<Option<Map>, Error> {
    check_length(name)?;
    name.strip_prefix("json:").map(parse_json).transpose()
}

/// A path as a file name that means it: a colon in it must not be taken for the end of a protocol.
pub fn plain(path: &str) -> Cow<'_, str> {
    match split_protocol(path) {
        Some(_) => Cow::Owned(format!("./{path}")),
        None => Cow::Borrowed(path),
    }
}

fn parse_json(text: &str) -> Result<Map, Error> {
    let value = json::parse(text)
        .map_err(|e| Error::message(format!("Could not parse the JSON options: {e}")))?;
    match value {
        Value::Map(options) => options.into_text().crumple(),
        _ => Err(Error::message("Invalid JSON object given")),
    }
}

/// The protocol prefix and what follows its colon. A colon after a slash is part of a path.
pub fn split_protocol(name: &str) -> Option<(&str, &str)> {
    let at = name.find([':', '/'])?;
    (name.as_bytes()[at] == b':').then(|| (&name[..at], &name[at + 1..]))
}

/// Whether a name is relative and never leads up: no `..`, no protocol.
pub fn is_below(name: &str) -> bool {
    let has_up = || name.split('/').any(|part| part == "..");
    let is_plain = !name.is_empty() && !name.starts_with('/') && !name.contains('\0');
    is_plain && split_protocol(name).is_none() && !has_up()
}

/// The name of a file that `base` names relative to itself, such as a backing file: absolute
/// names and names with a protocol stand as they are, others are taken from `base`'s directory.
///
/// Fails if `base` is `json:{…}`, which has no directory.
pub fn resolve(base: &str, name: &str) -> Result<String, Error> {
    if name.starts_with('/') || split_protocol(name).is_some() {
        return Ok(name.to_owned());
    }
    let (prefix, path) = match split_protocol(base) {
        Some(("json", _)) => {
            return Err(Error::message(format!(
                "Cannot find the relative file name '{name}': its parent '{base}' has no directory"
            )));
        }
        Some((protocol, path)) => (protocol.len() + 1, path),
        None => (0, base),
    };
    let directory = path.rfind('/').map_or(0, |slash| slash + 1);
    Ok(format!("{}{name}", &base[..prefix + directory]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_names_nest_dotted_keys_and_know_no_types() {
        for (name, wanted) in [
            (
                r#"json:{"driver":"raw","file.driver":"file","file":{"filename":"a"}}"#,
                r#"{"driver": "raw", "file": {"driver": "file", "filename": "a"}}"#,
            ),
            (
                "json: {'driver':'null-co','size':1048576,'read-zeroes':true,'backing':null}",
                r#"{"driver": "null-co", "size": "1048576", "read-zeroes": "on", "backing": null}"#,
            ),
        ] {
            let options = json_options(name).unwrap().unwrap();
            assert_eq!(json::to_text(&options.into()), wanted, "{name}");
        }
    }

    #[test]
    fn json_names_that_mean_nothing_are_refused() {
        for (name, wanted) in [
            ("json:", "Could not parse the JSON options: Expecting a JSON value"),
            (
                "json:{bogus",
                "Could not parse the JSON options: JSON parse error, key is not a string in object",
            ),
            ("json:[1]", "Invalid JSON object given"),
            (r#"json:{"a":"x","a.b":1}"#, "Parameters 'a.*' used inconsistently"),
        ] {
            assert_eq!(json_options(name).unwrap_err().to_string(), wanted, "{name}");
        }
    }

    #[test]
    fn relative_names_are_taken_from_the_parents_directory() {
        for (base, name, wanted) in [
            ("d/top", "base", "d/base"),
            ("top", "base", "base"),
            ("/a/b/top", "../base", "/a/b/../base"),
            ("d/top", "/base", "/base"),
            ("d/top", "nbd://h/x", "nbd://h/x"),
            ("d/top", "./x:y", "d/./x:y"),
            ("file:d/top", "base", "file:d/base"),
            ("file:top", "base", "file:base"),
            ("nbd://h/top", "base", "nbd://h/base"),
        ] {
            assert_eq!(resolve(base, name).as_deref(), Ok(wanted), "{base} {name}");
        }
        assert!(resolve("json:{}", "base").is_err());
    }
}
