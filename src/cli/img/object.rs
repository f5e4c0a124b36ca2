//! `--object`: objects that images may need besides files.
//!
//! No format here needs any yet, so an object is checked as far as it could be made, and dropped.

use super::{Failed, outln};
use crate::options::{Map, OBJECT_TYPES, is_identifier, keyval};

/// Makes the object that `text` describes. Whether it asked for help, which was given.
pub fn add(text: &str) -> Result<bool, Failed> {
    let parsed = keyval::parse_argument(text, Some("qom-type")).map_err(|e| e.to_string())?;
    if parsed.help {
        outln!("List of user creatable objects:\n  secret");
        return Ok(true);
    }
    make(parsed.options).map(|()| false)
}

fn make(mut options: Map) -> Result<(), Failed> {
    let text = |e: crate::options::Error| Failed::from(e.to_string());
    let qom_type = options.take_required_str("qom-type").map_err(text)?;
    if qom_type == "iothread" {
        return Err(format!("invalid object type: {qom_type}").into());
    }
    if !OBJECT_TYPES.contains(&&*qom_type) {
        return Err(format!("Parameter 'qom-type' does not accept value '{qom_type}'").into());
    }
    let id = options.take_required_str("id").map_err(text)?;
    if qom_type != "secret" {
        return Err(format!("objects of type '{qom_type}' are not available").into());
    }
    let data = options.take_str("data").map_err(text)?;
    let file = options.take_str("file").map_err(text)?;
    for known in ["format", "keyid", "iv", "loaded"] {
        options.take(known);
    }
    options.finish().map_err(text)?;
    if !is_identifier(&id) {
        return Err("Parameter 'id' expects an identifier".into());
    }
    match (data, file) {
        (Some(_), Some(_)) => Err("'file' and 'data' are mutually exclusive".into()),
        (None, None) => Err("Either 'file' or 'data' must be provided".into()),
        (Some(_), None) => Ok(()),
        (None, Some(file)) => match std::fs::read(&file) {
            Ok(_) => Ok(()),
            Err(error) => {
                let why = crate::io::Errno::from(error);
                Err(format!("Unable to read {file}: Failed to open file “{file}”: {why}").into())
            }
        },
    }
}
