//! File names to options: which protocol a name means, and what is left for that protocol to read.
//!
//! The rule: a name is tried as `json:{…}`, then as a device, then as `protocol:rest`, and is a
//! plain file otherwise. Whatever looks at the file system belongs to the caller, who passes it in.
//! Only names go through here; a `filename` option (`file.filename=a:b`) is taken literally.

use super::error::Error;
use super::json;
use super::tree::{Map, Value, check_length};
use std::borrow::Cow;

/// Reads a file name into the options it stands for: `driver` and `filename`, or for `json:{…}`
/// whatever it says, with dotted keys nested and all plain values as text.
///
/// * `device_driver` answers for an existing block or character device with its driver
///   (`host_device`, `host_cdrom`), `None` for everything else.
/// * `protocol_driver` answers for a known prefix with its driver: `nbd+unix` is `nbd`.
///
/// The names `file:a:b`, `host_device:a` and `host_cdrom:a` lose their prefix, for the rest is a
/// path. Every other protocol gets the whole name and reads it itself.
pub fn parse<'d>(
    name: &str,
    device_driver: impl Fn(&str) -> Option<&'d str>,
    protocol_driver: impl Fn(&str) -> Option<&'d str>,
) -> Result<Map, Error> {
    if let Some(options) = json_options(name)? {
        return Ok(options);
    }
    if name.contains('\0') {
        return Err(Error::message("A file name cannot hold a zero byte"));
    }
    let (driver, filename) = match (device_driver(name), split_protocol(name)) {
        (Some(driver), _) => (driver, name),
        (None, None) => ("file", name),
        (None, Some(("file", _))) => ("file", path_for("file", name)),
        (None, Some((prefix, _))) => match protocol_driver(prefix) {
            Some(driver) => (driver, path_for(driver, name)),
            None => return Err(Error::message(format!("Unknown protocol '{prefix}'"))),
        },
    };
    if filename.is_empty() {
        return Err(Error::message(format!("The '{driver}' block driver requires a file name")));
    }
    let text = |s: &str| Value::Text(s.to_owned());
    Ok(Map::from_iter([("driver", text(driver)), ("filename", text(filename))]))
}

/// The options that a name `json:{…}` says, dotted keys nested and all plain values as text; `None` for
/// other names.
pub fn json_options(name: &str) -> Result<Option<Map>, Error> {
    check_length(name)?;
    name.strip_prefix("json:").map(parse_json).transpose()
}

/// What a driver makes of a name: those whose names are paths take their own prefix off.
pub fn path_for<'n>(driver: &str, name: &'n str) -> &'n str {
    match (driver, split_protocol(name)) {
        ("file" | "host_device" | "host_cdrom", Some((prefix, path))) if prefix == driver => path,
        _ => name,
    }
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

    fn read(name: &str) -> Result<String, String> {
        let device = |name: &str| (name == "/dev/sda" || name == "nbd:x").then_some("host_device");
        let protocol = |prefix: &str| match prefix {
            "nbd" | "nbd+unix" => Some("nbd"),
            "host_device" => Some("host_device"),
            _ => None,
        };
        parse(name, device, protocol)
            .map(|options| json::to_text(&options.into()))
            .map_err(|e| e.to_string())
    }

    fn options(driver: &str, filename: &str) -> Result<String, String> {
        Ok(format!(r#"{{"driver": "{driver}", "filename": "{filename}"}}"#))
    }

    #[test]
    fn a_name_means_json_then_a_device_then_a_protocol_then_a_file() {
        for (name, driver, filename) in [
            ("a.raw", "file", "a.raw"),
            ("./x:y", "file", "./x:y"),
            ("dir/x:y", "file", "dir/x:y"),
            ("file:x:y", "file", "x:y"),
            ("file:file:x", "file", "file:x"),
            ("file:///a", "file", "///a"),
            ("/dev/sda", "host_device", "/dev/sda"),
            ("nbd:x", "host_device", "nbd:x"),
            ("host_device:a", "host_device", "a"),
            ("/dev/fdset/1", "file", "/dev/fdset/1"),
            ("nbd://h/x", "nbd", "nbd://h/x"),
            ("nbd+unix:///x?socket=s", "nbd", "nbd+unix:///x?socket=s"),
            ("json", "file", "json"),
        ] {
            assert_eq!(read(name), options(driver, filename), "{name}");
        }
    }

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
            assert_eq!(read(name), Ok(wanted.to_owned()), "{name}");
        }
    }

    #[test]
    fn names_that_mean_nothing_are_refused() {
        for (name, wanted) in [
            ("", "The 'file' block driver requires a file name"),
            ("file:", "The 'file' block driver requires a file name"),
            ("bogus:a", "Unknown protocol 'bogus'"),
            ("bogus://a", "Unknown protocol 'bogus'"),
            ("File:a", "Unknown protocol 'File'"),
            (":a", "Unknown protocol ''"),
            ("a\0b", "A file name cannot hold a zero byte"),
            ("json:", "Could not parse the JSON options: Expecting a JSON value"),
            (
                "json:{bogus",
                "Could not parse the JSON options: JSON parse error, key is not a string in object",
            ),
            ("json:[1]", "Invalid JSON object given"),
            (r#"json:{"a":"x","a.b":1}"#, "Parameters 'a.*' used inconsistently"),
        ] {
            assert_eq!(read(name), Err(wanted.to_owned()), "{name}");
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
