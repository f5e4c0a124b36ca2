//! From what the user wrote to the options of nodes: a file's name, `json:{…}`, or with
//! `--image-opts` a string of options.

use crate::block::{DriverEntry, Error, Kind, Registry};
use crate::options::size::BadSize;
use crate::options::{self, Map, Value, json, qemuopts, size};

/// The options of an image, as far as they follow from its name.
pub struct Named {
    /// How listings call it, if not by its file's name.
    pub shown: Option<String>,
    /// Of the node, or of what it stands on.
    pub options: Map,
    /// The format is to be found out: `options` are those of the format's node but for its driver,
    /// with the child `file` among them.
    pub probe: bool,
}

/// Reads a file's name. `format` is what was given with `-f`.
pub fn filename(registry: &Registry, name: &str, format: Option<&str>) -> Result<Named, Error> {
    let mut options = registry.file_options(name)?;
    let driver = options.get("driver").and_then(Value::as_str).and_then(|name| registry.get(name));
    let takes_name = |entry: &DriverEntry| entry.options.iter().any(|o| o.name == "filename");
    if driver.is_some_and(|entry| entry.kind == Kind::Protocol && !takes_name(entry)) {
        // `null-co://` says all that there is to say.
        options.take("filename");
    }
    if name.starts_with("json:") {
        if let Some(format) = format {
            // The options are those of the format's node, whatever driver they say.
            let entry = registry.get(format);
            let entry = entry.ok_or_else(|| Error::new(format!("Unknown driver '{format}'")))?;
            if entry.kind != Kind::Protocol && !options.contains("file") {
                return Err(Error::new("A block device must be specified for \"file\""));
            }
            options.insert("driver", Value::Text(format.to_owned()));
        }
        let mut named = described(registry, options)?;
        // With the types that the user gave.
        let typed = name.strip_prefix("json:").map(json::parse_object);
        if let (Some(shown), Some(Ok(typed))) = (&mut named.shown, typed) {
            let mut typed = typed.crumple()?;
            if let Some(format) = format {
                typed.insert("driver", format);
            }
            *shown = json_name(&complete(registry, typed)).unwrap_or_default();
        }
        return Ok(named);
    }
    let mut node = Map::new();
    let Some(format) = format else {
        node.insert("file", Value::Map(options));
        return Ok(Named { shown: None, options: node, probe: true });
    };
    let entry = registry.get(format);
    let entry = entry.ok_or_else(|| Error::new(format!("Unknown driver '{format}'")))?;
    if entry.kind == Kind::Protocol {
        let mut options = options;
        options.insert("driver", Value::Text(format.to_owned()));
        return Ok(Named { shown: None, options, probe: false });
    }
    node.insert("driver", Value::Text(format.to_owned()));
    node.insert("file", Value::Map(complete(registry, options)));
    Ok(Named { shown: None, options: node, probe: false })
}

/// Reads the string of options of `--image-opts`. Keys that stand alone, which are deprecated, are
/// told to `warn`.
pub fn image_opts(registry: &Registry, text: &str, warn: impl Fn(&str)) -> Result<Named, Error> {
    let parsed = qemuopts::parse(text, Some("file"))?;
    parsed.short_forms.iter().for_each(|item| warn(&qemuopts::short_form_warning(item)));
    described(registry, whole_templates(registry, parsed.options)?.crumple()?)
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

/// What a described image is called in listings, if it is more than its file's name says: options
/// that change what is read from it, in the order in which qemu-img shows them.
fn json_name(options: &Map) -> Option<String> {
    let (shown, says_more) = telling(options);
    says_more.then(|| format!("json:{}", json::to_text(&Value::Map(shown))))
}

/// The telling options, and whether there are any beside files' names.
fn telling(options: &Map) -> (Map, bool) {
    /// The order is that of QEMU's dictionaries.
    const TELLING: [&str; 6] = ["offset", "read-zeroes", "driver", "size", "file", "filename"];
    let mut shown = Map::new();
    let mut says_more = false;
    for key in TELLING {
        match options.get(key) {
            Some(Value::Map(file)) => {
                let (file, more) = telling(file);
                shown.insert(key, Value::Map(file));
                says_more |= more;
            }
            Some(value) => {
                shown.insert(key, value.clone());
                says_more |= !matches!(key, "driver" | "filename");
            }
            None => {}
        }
    }
    (shown, says_more)
}

/// Numbers with a suffix, which these options may have, as plain numbers.
pub fn plain_numbers(registry: &Registry, options: &mut Map) -> Result<(), Error> {
    if let Some(Value::Map(file)) = options.get_mut("file") {
        plain_numbers(registry, file)?;
    }
    let driver = options.get("driver").and_then(Value::as_str);
    let Some(entry) = driver.and_then(|driver| registry.get(driver)) else { return Ok(()) };
    for option in entry.options.iter().filter(|option| option.value == "int") {
        let Some(Value::Text(text)) = options.get_mut(option.name) else { continue };
        match size::parse(text) {
            Ok(bytes) => *text = bytes.to_string(),
            Err(BadSize::NotASize) => return Err(options::Error::not_a_size(option.name).into()),
            Err(BadSize::OutOfRange) => {}
        }
    }
    Ok(())
}

/// A node that is described by options, whose driver may be left to probing.
fn described(registry: &Registry, options: Map) -> Result<Named, Error> {
    let mut options = complete(registry, options);
    let driver = options.get("driver").and_then(Value::as_str).map(str::to_owned);
    match driver {
        Some(driver) => {
            let entry = registry.get(&driver);
            let entry = entry.ok_or_else(|| Error::new(format!("Unknown driver '{driver}'")))?;
            if entry.kind == Kind::Format && !options.contains("file") {
                let Some(filename) = options.take("filename") else {
                    return Err(Error::new("A block device must be specified for \"file\""));
                };
                let file = Map::from_iter([("filename", filename)]);
                options.insert("file", Value::Map(file));
                options = complete(registry, options);
            }
            let shown = json_name(&options);
            plain_numbers(registry, &mut options)?;
            Ok(Named { shown, options, probe: false })
        }
        None if options.contains("file") => {
            plain_numbers(registry, &mut options)?;
            Ok(Named { shown: None, options, probe: true })
        }
        None => Err(Error::new("Must specify either driver or file")),
    }
}

/// Names the drivers of files below that are left open: a `filename` is a device or a plain file.
fn complete(registry: &Registry, mut options: Map) -> Map {
    /// The children that are storage, and the one that is another image.
    const FILES: [&str; 3] = ["file", "data-file", "image"];
    for key in FILES.into_iter().chain(["backing"]) {
        let Some(Value::Map(child)) = options.get_mut(key) else { continue };
        *child = complete(registry, std::mem::take(child));
        if FILES.contains(&key)
            && !child.contains("driver")
            && let Some(filename) = child.get("filename").and_then(Value::as_str)
        {
            let driver = registry.driver_of_path(filename);
            child.insert("driver", Value::Text(driver.to_owned()));
        }
    }
    options
}
