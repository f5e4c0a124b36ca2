//! Options of nodes from a user's words: a file name, `json:{…}`, or `--image-opts` text.

use crate::block::{Error, Kind, Registry, named};
use crate::options::{Map, Value, json, qemuopts};

/// The options of an image, as far as they follow from its name.
pub struct Named {
    /// What the name says itself, with the types that it has there.
    pub given: Map,
    /// Of the node, or of the nodes below it.
    pub options: Map,
    /// The format is to be found out: `options` are those of the format's node but for its driver,
    /// with the child `file` among them.
    pub probe: bool,
}

/// Reads a file's name. `format` is what was given with `-f`, `more` are further options of the image.
pub fn filename(
    registry: &Registry,
    name: &str,
    format: Option<&str>,
    more: Map,
) -> Result<Named, Error> {
    let mut given = more;
    if let Some(format) = format {
        registry.known(format)?;
        given.insert("driver", Value::Text(format.to_owned()));
    }
    // With the types that the user gave.
    let typed = name.strip_prefix("json:").map(json::parse_object);
    let typed = typed.and_then(Result::ok).map(|typed| (typed, given.clone()));
    let mut options = registry.image_options(name, given)?;
    let Some((typed, given)) = typed else {
        registry.plain_numbers(&mut options)?;
        let probe = !options.contains("driver");
        return Ok(Named { given: Map::new(), options, probe });
    };
    if format.is_some_and(|format| {
        registry.known(format).is_ok_and(|entry| entry.kind != Kind::Protocol)
    }) && !options.contains("file")
    {
        // The options are those of the format's node, whatever driver they say.
        return Err(Error::new("A block device must be specified for \"file\""));
    }
    let mut named = described(registry, options)?;
    named.given = registry.complete(named::overlay(typed.crumple()?, given));
    Ok(named)
}

/// Reads the string of options of `--image-opts`. Keys that stand alone, which are deprecated, are
/// told to `warn`.
pub fn image_opts(
    registry: &Registry,
    text: &str,
    more: Map,
    warn: impl Fn(&str),
) -> Result<Named, Error> {
    described(registry, named::overlay(option_string(registry, text, Some("file"), warn)?, more))
}

/// Reads a string of options of an image; a first value without a key is that of `implied`.
pub fn option_string(
    registry: &Registry,
    text: &str,
    implied: Option<&str>,
    warn: impl Fn(&str),
) -> Result<Map, Error> {
    let parsed = qemuopts::parse(text, implied)?;
    parsed.short_forms.iter().for_each(|item| warn(&qemuopts::short_form_warning(item)));
    Ok(whole_templates(registry, parsed.options)?.crumple()?)
}

/// The value of an option beside those of single kinds below it is that of all others, which drivers know as
/// `OPTION.template`: `overlap-check=all,overlap-check.active-l1=off`.
fn whole_templates(registry: &Registry, options: Map) -> Result<Map, Error> {
    let is_known = |name: &str| {
        registry.iter().any(|entry| entry.options.iter().any(|option| option.name == name))
    };
    let mut whole = Map::new();
    for (key, value) in options.iter() {
        let name = key.rsplit('.').next().unwrap_or_default();
        let (template, kinds) = (format!("{key}.template"), format!("{key}."));
        let stands_beside = options.iter().any(|(other, _)| other.starts_with(&kinds));
        if !stands_beside || !is_known(&format!("{name}.template")) {
            whole.insert(key, value.clone());
            continue;
        }
        match options.get(&template) {
            Some(other) if other != value => {
                let [value, other] = [value, other].map(|v| v.as_str().unwrap_or_default());
                return Err(Error::new(format!(
                    "Conflicting values for options '{key}' ('{value}') and '{template}' ('{other}')"
                )));
            }
            _ => whole.insert(template, value.clone()),
        };
    }
    Ok(whole)
}

/// A node that is described by options, whose driver may be left to probing.
fn described(registry: &Registry, options: Map) -> Result<Named, Error> {
    let mut options = registry.complete(options);
    let driver = options.get("driver").and_then(Value::as_str).map(str::to_owned);
    match driver {
        Some(driver) => {
            let entry = registry.known(&driver)?;
            if entry.kind == Kind::Format && !options.contains("file") {
                let Some(filename) = options.take("filename") else {
                    return Err(Error::new("A block device must be specified for \"file\""));
                };
                let file = Map::from_iter([("filename", filename)]);
                options.insert("file", Value::Map(file));
                options = registry.complete(options);
            }
            let given = options.clone();
            registry.plain_numbers(&mut options)?;
            Ok(Named { given, options, probe: false })
        }
        None if options.contains("file") => {
            let given = options.clone();
            registry.plain_numbers(&mut options)?;
            Ok(Named { given, options, probe: true })
        }
        None => Err(Error::new("Must specify either driver or file")),
    }
}
