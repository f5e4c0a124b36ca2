//! Options that are combined with a file name, for a node and for its children.
//!
//! The rule held here: what is given counts, and the name says only what is left open. So options for a child
//! that nobody named (`file.locking=off`) are merged with those that the name stands for, at every depth.

use super::registry::{DriverEntry, Kind, Naming, Registry};
use super::{Error, Role};
use crate::options::size::{self, BadSize};
use crate::options::{self, Map, Value, filename, similar};

/// What a driver reads from a name of its own syntax.
pub struct NameParts {
    pub options: Map,
    /// The child that the rest of the name is of, and that rest.
    pub below: Option<(Role, String)>,
}

impl Registry {
    /// The options of the node of storage that a file's name stands for: a device, what its prefix or
    /// `json:` says, or a plain file.
    pub fn file_options(&self, name: &str) -> Result<Map, Error> {
        self.storage(name, Map::new())
    }

    /// As [`Registry::file_options`], of a file that is to be made. `json:` describes what there is: making a file
    /// by it could empty the file of another image.
    pub fn new_file(&self, name: &str) -> Result<Map, Error> {
        let (entry, name) = match name {
            // The driver that makes files refuses this name.
            "" => (self.of_files()?, name),
            name if name.starts_with("json:") => {
                return Err(Error::new("Unknown protocol 'json'"));
            }
            name => self.read_name(name)?,
        };
        let text = |text: &str| Value::Text(text.to_owned());
        Ok(Map::from_iter([("driver", text(entry.name)), ("filename", text(name))]))
    }

    /// The driver that a file's name is for, and what of the name is that driver's to read. A name is tried as a
    /// device, then as `protocol:rest`, and is a plain file otherwise.
    fn read_name<'n>(&self, name: &'n str) -> Result<(&'static DriverEntry, &'n str), Error> {
        if name.contains('\0') {
            return Err(Error::new("A file name cannot hold a zero byte"));
        }
        let (entry, name) = match (self.of_device(name), filename::split_protocol(name)) {
            (Some(device), _) => (device, name),
            (None, None) => (self.of_files()?, name),
            (None, Some((prefix, _))) => match self.by_prefix(prefix) {
                Some(entry) => (entry, entry.path_in(name)),
                None => return Err(Error::new(format!("Unknown protocol '{prefix}'"))),
            },
        };
        match name {
            "" => {
                Err(Error::new(format!("The '{}' block driver requires a file name", entry.name)))
            }
            _ => Ok((entry, name)),
        }
    }

    /// The options of the image of this name, and of `given` for it and for the nodes below it. If they have no
    /// `driver`, the format is that of what is in their `file`.
    pub fn image_options(&self, name: &str, given: Map) -> Result<Map, Error> {
        if let Some(said) = filename::json_options(name)? {
            return Ok(self.complete(overlay(said, given)));
        }
        match self.driver_in(&given)? {
            Some(entry) if takes_name(entry) => self.take_name(entry, entry.path_in(name), given),
            _ => self.name_below(Role::File, name, given),
        }
    }

    /// The options of an image that another image records. `format` is recorded beside the name. The name is not
    /// looked at where `given` say what the image is in.
    pub fn recorded_options(
        &self,
        name: &str,
        format: Option<&str>,
        mut given: Map,
    ) -> Result<Map, Error> {
        let said = filename::json_options(name)?.map(|said| self.as_format(said, format));
        if let (Some(format), false) = (format, given.contains("driver")) {
            self.known(format)?;
            given.insert("driver", Value::Text(format.to_owned()));
        }
        match said {
            _ if !self.wants_name(&given)? => Ok(self.complete(given)),
            Some(said) => Ok(self.complete(overlay(said, given))),
            None => Ok(self.complete(self.image_options(name, given)?)),
        }
    }

    /// The options of storage whose name an image records, a plain path; `given` as in
    /// [`Registry::recorded_options`].
    pub fn recorded_file_options(&self, path: &str, given: Map) -> Result<Map, Error> {
        if !self.wants_name(&given)? {
            return Ok(self.complete_storage(given));
        }
        if given.is_empty() {
            // As it is recorded, whatever it looks like.
            return Ok(Map::from_iter([("driver", self.of_path(path)?.name), ("filename", path)]));
        }
        self.storage(&filename::plain(path), given)
    }

    /// Names the drivers of storage that are left open: a `filename` is that of a device or a plain file.
    pub fn complete(&self, mut options: Map) -> Map {
        for role in Role::GIVEN {
            let Some(Value::Map(child)) = options.get_mut(role.name()) else { continue };
            let given = std::mem::take(child);
            *child = match role.is_backing() {
                true => self.complete(given),
                false => self.complete_storage(given),
            };
        }
        options
    }

    fn complete_storage(&self, options: Map) -> Map {
        let mut options = self.complete(options);
        if !options.contains("driver")
            && let Some(filename) = options.get("filename").and_then(Value::as_str)
            && let Ok(entry) = self.of_path(filename)
        {
            options.insert("driver", Value::Text(entry.name.to_owned()));
        }
        options
    }

    /// Turns numbers with a suffix, which the tools' options may have, to plain ones, at every depth.
    pub fn plain_numbers(&self, options: &mut Map) -> Result<(), Error> {
        let driver = options.get("driver").and_then(Value::as_str);
        let numbers =
            driver.and_then(|driver| self.get(driver)).into_iter().flat_map(|entry| entry.options);
        for option in numbers.filter(|option| option.value == "int") {
            let Some(Value::Text(text)) = options.get_mut(option.name) else { continue };
            match size::parse(text) {
                Ok(bytes) => *text = bytes.to_string(),
                Err(BadSize::NotASize) => {
                    return Err(options::Error::not_a_size(option.name).into());
                }
                Err(BadSize::OutOfRange) => {}
            }
        }
        for role in Role::GIVEN {
            if let Some(Value::Map(child)) = options.get_mut(role.name()) {
                self.plain_numbers(child)?;
            }
        }
        Ok(())
    }

    /// What `json:` says of an image, as options of its format's node: they may be those of what it is in.
    fn as_format(&self, mut said: Map, format: Option<&str>) -> Map {
        let Some(format) = format else { return said };
        let kind = |name: &str| self.get(name).map(|entry| entry.kind);
        let driver = said.get("driver").and_then(Value::as_str);
        let is_below = driver.is_some_and(|driver| {
            driver != format && kind(driver).is_some_and(|kind| kind != Kind::Format)
        });
        if is_below && kind(format) == Some(Kind::Format) {
            return Map::from_iter([(Role::File.name(), said)]);
        }
        said.take("driver");
        said
    }

    /// Whether the options leave open which file the node is in.
    pub(super) fn wants_name(&self, given: &Map) -> Result<bool, Error> {
        if given.contains("filename") {
            return Ok(false);
        }
        let below = [Role::File, Role::Image].iter().find_map(|role| given.get(role.name()));
        match (self.driver_in(given)?, below) {
            (Some(entry), _) if entry.kind == Kind::Protocol => Ok(entry.takes_paths()),
            (_, None) => Ok(true),
            (_, Some(Value::Map(below))) => self.wants_name(below),
            (_, Some(_)) => Ok(false),
        }
    }

    /// [`Registry::file_options`], with `given` for it and for the nodes below it.
    fn storage(&self, name: &str, mut given: Map) -> Result<Map, Error> {
        if let Some(said) = filename::json_options(name)? {
            return Ok(self.complete(overlay(said, given)));
        }
        let Some(entry) = self.driver_in(&given)? else {
            let (entry, name) = self.read_name(name)?;
            given.insert("driver", Value::Text(entry.name.to_owned()));
            return self.take_name(entry, name, given);
        };
        match takes_name(entry) {
            true => self.take_name(entry, entry.path_in(name), given),
            false => self.name_below(Role::File, name, given),
        }
    }

    /// The options of a node whose driver takes the name itself.
    fn take_name(&self, entry: &DriverEntry, name: &str, mut given: Map) -> Result<Map, Error> {
        if given.contains("filename") {
            return Err(Error::new("Can't specify 'file' and 'filename' options at the same time"));
        }
        let Naming::Own(read) = entry.naming else {
            given.insert("filename", Value::Text(name.to_owned()));
            return Ok(given);
        };
        let NameParts { options, below } = read(name)?;
        let options = overlay(options, given);
        match below {
            Some((role, name)) => self.name_below(role, &name, options),
            None => Ok(options),
        }
    }

    /// The options of a node that has the file of this name as its child.
    fn name_below(&self, role: Role, name: &str, mut given: Map) -> Result<Map, Error> {
        let child = match given.take(role.name()) {
            None => Map::new(),
            Some(Value::Map(child)) => child,
            Some(_) => {
                return Err(Error::new(
                    "Cannot reference an existing block device with additional options or a new \
                     filename",
                ));
            }
        };
        given.insert(role.name(), self.storage(name, child)?);
        Ok(given)
    }

    fn driver_in(&self, options: &Map) -> Result<Option<&'static DriverEntry>, Error> {
        let driver = options.get("driver").and_then(Value::as_str);
        driver.map(|driver| self.known(driver)).transpose()
    }

    /// The driver of this name.
    pub fn known(&self, name: &str) -> Result<&'static DriverEntry, Error> {
        let unknown = || {
            let error = Error::new(format!("Unknown driver '{}'", name.escape_debug()));
            error.with_advice(Some(self.advice(name)))
        };
        self.get(name).ok_or_else(unknown)
    }

    /// Advice on a name that no driver has: the driver that may have been meant, or the formats that there are.
    pub fn advice(&self, name: &str) -> String {
        similar::did_you_mean(name, self.iter().map(|entry| entry.name)).unwrap_or_else(|| {
            let formats = self.iter().filter(|entry| entry.kind == Kind::Format);
            let formats: Vec<_> = formats.map(|entry| entry.name).collect();
            format!("The formats are {}.", formats.join(", "))
        })
    }
}

/// Whether the driver reads names itself; others pass them to the node below them.
fn takes_name(entry: &DriverEntry) -> bool {
    entry.kind == Kind::Protocol || !matches!(entry.naming, Naming::Below)
}

/// The name of the file at the bottom of what the options describe, if they describe it all.
pub fn file_in(options: &Map) -> Option<&str> {
    let mut storage = Role::GIVEN.iter().filter(|role| !role.is_backing());
    let child = storage.find_map(|role| options.get(role.name()));
    match child {
        Some(Value::Map(child)) => file_in(child),
        Some(_) => None,
        None => options.get("filename").and_then(Value::as_str),
    }
}

/// `base` with `given`, which counts where both say something.
pub fn overlay(mut base: Map, given: Map) -> Map {
    for (key, value) in given {
        match base.get_mut(&key) {
            Some(slot) => overlay_value(slot, value),
            None => drop(base.insert(key, value)),
        }
    }
    base
}

fn overlay_value(base: &mut Value, given: Value) {
    match (base, given) {
        (Value::Map(base), Value::Map(given)) => *base = overlay(std::mem::take(base), given),
        (Value::List(base), Value::List(given)) => {
            let rest = base.len().min(given.len());
            let mut given = given.into_iter();
            base.iter_mut().zip(given.by_ref().take(rest)).for_each(|(base, given)| {
                overlay_value(base, given);
            });
            base.extend(given);
        }
        (base, given) => *base = given,
    }
}

#[cfg(test)]
mod tests {
    use super::super::registry::OpenFn;
    use super::*;

    const OPEN: OpenFn = |_, _| Box::pin(std::future::ready(Err(Error::new("not here"))));

    static FILES: DriverEntry = DriverEntry {
        prefixes: &["files"],
        naming: Naming::Path,
        ..DriverEntry::new("files", Kind::Protocol, OPEN)
    };
    static DEVICES: DriverEntry = DriverEntry {
        prefixes: &["devices"],
        naming: Naming::Device(|name| name == "/dev/sda" || name == "net:x"),
        ..DriverEntry::new("devices", Kind::Protocol, OPEN)
    };
    static NET: DriverEntry = DriverEntry {
        prefixes: &["net", "net+unix"],
        ..DriverEntry::new("net", Kind::Protocol, OPEN)
    };

    fn read(name: &str) -> Result<(&'static str, &str), String> {
        let registry = Registry::new(&[&[&FILES, &DEVICES, &NET]]);
        let read = registry.read_name(name).map(|(entry, name)| (entry.name, name));
        read.map_err(|error| error.to_string())
    }

    #[test]
    fn a_name_means_a_device_then_a_protocol_then_a_file() {
        for (name, driver, filename) in [
            ("a.raw", "files", "a.raw"),
            ("./x:y", "files", "./x:y"),
            ("dir/x:y", "files", "dir/x:y"),
            ("files:x:y", "files", "x:y"),
            ("files:files:x", "files", "files:x"),
            ("files:///a", "files", "///a"),
            ("/dev/sda", "devices", "/dev/sda"),
            ("net:x", "devices", "net:x"),
            ("devices:a", "devices", "a"),
            ("/dev/fdset/1", "files", "/dev/fdset/1"),
            ("net://h/x", "net", "net://h/x"),
            ("net+unix:///x?socket=s", "net", "net+unix:///x?socket=s"),
            ("json", "files", "json"),
        ] {
            assert_eq!(read(name), Ok((driver, filename)), "{name}");
        }
    }

    #[test]
    fn names_that_mean_nothing_are_refused() {
        for (name, wanted) in [
            ("", "The 'files' block driver requires a file name"),
            ("files:", "The 'files' block driver requires a file name"),
            ("bogus:a", "Unknown protocol 'bogus'"),
            ("bogus://a", "Unknown protocol 'bogus'"),
            ("Files:a", "Unknown protocol 'Files'"),
            (":a", "Unknown protocol ''"),
            ("a\0b", "A file name cannot hold a zero byte"),
        ] {
            assert_eq!(read(name), Err(wanted.to_owned()), "{name}");
        }
    }
}
