//! `--object`: what images can need beside files: secrets.

use super::{Failed, outln};
use crate::crypto::object;
use crate::options::{Map, OBJECT_TYPES, keyval};

/// Makes the object that `text` describes. Whether it asked for help, which was given.
pub fn add(text: &str) -> Result<bool, Failed> {
    let parsed = keyval::parse_argument(text, Some("qom-type")).map_err(|e| e.to_string())?;
    if parsed.help {
        let about = parsed.options.get("qom-type").and_then(|name| name.as_str());
        match about.and_then(object::help) {
            Some(text) => outln!("{}", text.trim_end()),
            None => {
                let lines = object::TYPES.map(|name| format!("  {name}"));
                outln!("List of user creatable objects:\n{}", lines.join("\n"));
            }
        }
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
    if !object::TYPES.contains(&&*qom_type) {
        options.take_required_str("id").map_err(text)?;
        return Err(format!("objects of type '{qom_type}' are not available").into());
    }
    object::add(&qom_type, options).map_err(text)
}
