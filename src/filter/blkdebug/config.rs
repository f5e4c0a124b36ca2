//! blkdebug's configuration file: rules in the format of QEMU's `-readconfig`.
//!
//! A section `[inject-error]` or `[set-state]` for each rule, below it lines `name = "value"`, `#`
//! before a comment. The texts of errors are QEMU's.

use super::rules::{InjectError, SetState};
use crate::block::Error;
use crate::options::{self, Map, Value, bytes};
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

/// Bytes of a configuration that are read; a longer one is refused.
const LIMIT: u64 = 1 << 20;

const INJECT: &[&str] = &["event", "state", "iotype", "errno", "sector", "once", "immediately"];
const SET: &[&str] = &["event", "state", "new_state"];

/// Reads the rules of a file. Blocks.
pub fn read(filename: &str) -> Result<(Vec<InjectError>, Vec<SetState>), Error> {
    parse(&load(filename)?)
}

fn load(filename: &str) -> Result<String, Error> {
    let failed = |e: std::io::Error| Error::os("Could not read blkdebug config file", e);
    // A fifo must not hold the opening up.
    let file =
        File::options().read(true).custom_flags(libc::O_NONBLOCK).open(bytes::path_of(filename));
    let file = file.map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(Error::new("Could not read blkdebug config file: it is not a regular file"));
    }
    let mut text = String::new();
    file.take(LIMIT + 1).read_to_string(&mut text).map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidData => {
            Error::new("Could not read blkdebug config file: it is not text")
        }
        _ => failed(e),
    })?;
    if text.len() as u64 > LIMIT {
        return Err(Error::new(format!(
            "Could not read blkdebug config file: it is longer than {LIMIT} bytes"
        )));
    }
    Ok(text)
}

fn parse(text: &str) -> Result<(Vec<InjectError>, Vec<SetState>), Error> {
    let mut sections: Vec<(&str, Map)> = Vec::new();
    for line in text.lines() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(head) = line.strip_prefix('[') {
            let group = head.split(|c: char| c == ']' || c.is_whitespace()).next().unwrap_or(head);
            if !matches!(group, "inject-error" | "set-state") {
                let group = group.escape_debug();
                return Err(Error::new(format!("There is no option group '{group}'")));
            }
            sections.push((group, Map::new()));
            continue;
        }
        let Some((group, options)) = sections.last_mut() else {
            return Err(Error::new("no group defined"));
        };
        let (name, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let known = if *group == "inject-error" { INJECT } else { SET };
        if !known.contains(&name) {
            return Err(Error::new(format!("Invalid parameter '{}'", name.escape_debug())));
        }
        options.insert(name, Value::Text(unquote(value).to_owned()));
    }
    let (mut errors, mut transitions) = (Vec::new(), Vec::new());
    for (group, mut options) in sections {
        if group == "inject-error" {
            errors.push(rule::<InjectError>(options)?);
        } else {
            // It may be left out here, and not in options.
            if !options.contains("new_state") {
                options.insert("new_state", 0i64);
            }
            transitions.push(rule::<SetState>(options)?);
        }
    }
    Ok((errors, transitions))
}

/// What is in quotation marks behind `=`; nothing, if it does not look so.
fn unquote(text: &str) -> &str {
    let quoted = text.trim_start().strip_prefix('=').map(str::trim_start);
    let quoted = quoted.and_then(|text| text.strip_prefix('"'));
    quoted.and_then(|text| text.split('"').next()).unwrap_or("")
}

fn rule<T: DeserializeOwned>(options: Map) -> Result<T, Error> {
    if !options.contains("event") {
        return Err(Error::new("Missing event name for rule"));
    }
    for name in ["event", "iotype"] {
        let value = options.get(name).cloned();
        if let Some(value) = &value
            && let Some(text) = value.as_str()
            && !is_name(name, value)
        {
            return Err(Error::new(format!("invalid parameter value: {}", text.escape_debug())));
        }
    }
    for name in ["state", "new_state", "errno", "sector"] {
        let Some(text) = options.get(name).and_then(Value::as_str) else { continue };
        if options::from_value::<i64>(Value::Text(text.to_owned())).is_err() {
            return Err(Error::new(format!("Parameter '{name}' expects a number")));
        }
    }
    for name in ["once", "immediately"] {
        let Some(value) = options.get(name).cloned() else { continue };
        if options::from_value::<bool>(value).is_err() {
            return Err(Error::new(format!("Parameter '{name}' expects 'on' or 'off'")));
        }
    }
    Ok(options::from_map(options)?)
}

fn is_name(option: &str, value: &Value) -> bool {
    let value = value.clone();
    match option {
        "event" => options::from_value::<crate::block::Event>(value).is_ok(),
        _ => options::from_value::<super::rules::IoType>(value).is_ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Event;
    use crate::filter::blkdebug::rules::IoType;

    #[test]
    fn sections_are_rules() {
        let text = "# two rules\n[inject-error]\n  event\t=  \"read_aio\"  # the first\n\n\
                    errno = \"0x1c\"\niotype = \"write-zeroes\"\nsector = \"7\"\nonce = \"yes\"\n\
                    [set-state \"id\"]\nevent = \"l2_load\"\nstate = \"1\"\nnew_state = \"2\"\n\
                    [set-state]\nevent = \"none\"";
        let (errors, transitions) = parse(text).unwrap();
        let [error] = &errors[..] else { panic!("{errors:?}") };
        assert_eq!((error.event, error.errno), (Event::ReadAio, 28));
        assert_eq!((error.iotype, error.sector), (Some(IoType::WriteZeroes), Some(7)));
        assert!(error.once && !error.immediately && error.state == 0);
        let [one, other] = &transitions[..] else { panic!("{transitions:?}") };
        assert_eq!((one.event, one.state, one.new_state), (Event::L2Load, 1, 2));
        assert_eq!((other.event, other.new_state), (Event::None, 0));
        assert!(parse("").unwrap().0.is_empty());
    }

    #[test]
    fn wrong_files_are_refused_in_qemus_words() {
        for (text, wanted) in [
            ("[bogus]\nevent = \"none\"", "There is no option group 'bogus'"),
            ("event = \"none\"", "no group defined"),
            ("[inject-error]\nbogus = \"1\"", "Invalid parameter 'bogus'"),
            ("[inject-error]\nnew_state = \"1\"", "Invalid parameter 'new_state'"),
            ("[inject-error]\nevent=\"read_aio\"", "Invalid parameter 'event=\\\"read_aio\\\"'"),
            ("[inject-error]\nevent = none", "invalid parameter value: "),
            ("[inject-error]\nevent = \"nope\"", "invalid parameter value: nope"),
            ("[inject-error]\nerrno = \"5\"", "Missing event name for rule"),
            (
                "[inject-error]\nevent = \"none\"\nerrno = \"x\"",
                "Parameter 'errno' expects a number",
            ),
            (
                "[inject-error]\nevent = \"none\"\nonce = \"1\"",
                "Parameter 'once' expects 'on' or 'off'",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), wanted, "{text}");
        }
    }

    #[test]
    fn files_that_cannot_be_read_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |path: &std::path::Path| load(path.to_str().unwrap()).unwrap_err();
        let wanted = "Could not read blkdebug config file: No such file or directory";
        assert_eq!(refused(&dir.path().join("none")).to_string(), wanted);
        let wanted = "Could not read blkdebug config file: it is not a regular file";
        assert_eq!(refused(dir.path()).to_string(), wanted);
        let long = dir.path().join("long");
        std::fs::write(&long, vec![b'#'; LIMIT as usize + 1]).unwrap();
        let wanted = "Could not read blkdebug config file: it is longer than 1048576 bytes";
        assert_eq!(refused(&long).to_string(), wanted);
        std::fs::write(&long, [0xff]).unwrap();
        let wanted = "Could not read blkdebug config file: it is not text";
        assert_eq!(refused(&long).to_string(), wanted);
    }
}
