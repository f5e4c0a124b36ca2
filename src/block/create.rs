//! Creation of images: options of the format and the protocol, and the order of the steps.

use super::policy::{FollowBacking, OpenPolicy};
use super::registry::{DriverEntry, Kind, Registry};
use super::{Attachment, Error, Graph, LocalFuture, Node, Perm, Perms, Preallocation, probe};
use crate::options::{self, Map, Value, filename};
use serde::de::Error as _;
use std::fmt::Write;
use std::sync::Arc;

/// How a driver makes a new image.
pub struct CreateEntry {
    /// In the order in which they are shown.
    pub options: &'static [CreateOption],
    pub create: CreateFn,
    /// How long the file of a new image would be, for formats that can tell.
    pub measure: Option<MeasureFn>,
    /// What can be changed of an image that is there ([`Image::amend`](super::Image::amend)); empty
    /// where nothing can.
    pub amend: &'static [CreateOption],
    /// How QMP's `blockdev-create` makes an image; none where it cannot.
    pub on_nodes: Option<OnNodesFn>,
}

/// Reads the options of a new image as QMP has them (BlockdevCreateOptions without `driver`), and gives what makes
/// it: of the nodes of a graph, where a format needs some.
pub type OnNodesFn = fn(&'static Registry, Map) -> Result<MakeFn, options::Error>;

/// Makes an image. Runs on a worker.
pub type MakeFn = Box<dyn for<'a> FnOnce(&'a Graph) -> LocalFuture<'a, Result<Made, Error>> + Send>;

/// Tells how long a new image's file would be, from what was given of the format's and the file's options, for an
/// empty disk of this many bytes or for one with the contents of a node.
pub type MeasureFn =
    for<'a> fn(Map, u64, Option<&'a Arc<Node>>) -> LocalFuture<'a, Result<Measurement, Error>>;

/// How long the file of a new image would be, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    pub required: u64,
    /// When all of the disk has been written.
    pub fully_allocated: u64,
    /// What the source's persistent bitmaps take; none where they cannot be kept.
    pub bitmaps: Option<u64>,
}

/// Makes an image. A protocol finds all that was given for it in the map: its own options by the
/// names in [`CreateEntry::options`], in their types ([`Value::Bool`], [`Value::Int`],
/// [`Value::Str`]), and `filename`. A format finds its own, and its protocol's, which it hands on
/// ([`Creation::create_file`]).
pub type CreateFn = for<'a> fn(&'a Creation, Map) -> LocalFuture<'a, Result<Made, Error>>;

/// What a driver reports of the image or file that it has just made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    /// The whole disk reads as zeroes, except where a backing file shows.
    pub reads_zeroes: bool,
}

/// Refuses every mode but `off` among the options of a new image on a device, in QEMU's words.
pub fn refuse_preallocation(options: &Map) -> Result<(), Error> {
    let Some(mode) = options.get("preallocation").and_then(Value::as_str) else { return Ok(()) };
    match Preallocation::parse(mode) {
        Some(Preallocation::Off) => Ok(()),
        Some(_) => Err(Error::new(format!("Unsupported preallocation mode '{mode}'"))),
        None => Err(Error::new(format!("invalid parameter value: {mode}"))),
    }
}

/// One option of `create -o`.
#[derive(Clone, Copy, Debug)]
pub struct CreateOption {
    pub name: &'static str,
    pub value: ValueType,
    pub help: &'static str,
    /// What is used, and shown, when it is not given; as it would be typed.
    pub default: Option<&'static str>,
    /// QEMU 7.2 does not have it, so that it is not listed under its name.
    pub is_newer: bool,
}

/// What the value of a [`CreateOption`] looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    Str,
    /// `on` or `off`.
    Bool,
    /// Bytes, with the usual suffixes.
    Size,
    Number,
    /// One of these modes.
    Preallocation(&'static [Preallocation]),
}

/// An image that is being made.
pub struct Creation {
    registry: &'static Registry,
    format: &'static DriverEntry,
    protocol: &'static DriverEntry,
    filename: String,
    /// What the name stands for, for the protocol.
    file: Map,
    /// All that there are.
    known: Vec<CreateOption>,
    /// What was given, and defaults.
    options: Map,
}

/// The reaction to the backing file of a new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewBacking {
    /// It is opened, and if no size was given, the new image has its size.
    Opened,
    /// It is recorded as it was given, whether it is there or not.
    Unseen,
}

fn refused(kind: &str, entry: &DriverEntry) -> Error {
    Error::new(format!("{kind} driver '{}' does not support image creation", entry.name))
}

/// The options of a format together with those of the protocol below it, in the order in which they
/// are shown. A name that both have means the format's.
pub fn create_options(
    format: &'static DriverEntry,
    protocol: Option<&'static DriverEntry>,
) -> Result<Vec<CreateOption>, Error> {
    let own = format.create.ok_or_else(|| refused("Format", format))?.options;
    let below = match protocol {
        Some(entry) => entry.create.ok_or_else(|| refused("Protocol", entry))?.options,
        None => &[],
    };
    let mut all = own.to_vec();
    all.extend(below.iter().filter(|option| own.iter().all(|o| o.name != option.name)));
    Ok(all)
}

/// What was given of the known options, each in its type, and the defaults of the others.
///
/// # Errors
/// In QEMU's words: a wrong value, or an option that is none.
pub fn take_options(known: &[CreateOption], mut given: Map) -> Result<Map, options::Error> {
    let mut options = Map::new();
    for option in known {
        if let Some(default) = option.default
            && !given.contains(option.name)
        {
            given.insert(option.name, Value::Text(default.to_owned()));
        }
        if let Some(value) = option.take(&mut given)? {
            options.insert(option.name, value);
        }
    }
    given.finish_known().map_err(|e| e.meant(known.iter().map(|option| option.name)))?;
    Ok(options)
}

/// Whether there is a driver for the format that `blockdev-create` is to record of a backing file.
///
/// # Errors
/// In QEMU's words.
pub fn check_backing_format(
    registry: &Registry,
    format: Option<&str>,
) -> Result<(), options::Error> {
    match format {
        Some(format) if registry.get(format).is_none() => {
            Err(options::Error::unknown_variant(format, &[]).under("backing-fmt"))
        }
        _ => Ok(()),
    }
}

impl Creation {
    /// Checks what was asked for: the name of a format; a file's name and what it stands for
    /// ([`options::filename`]); the options of `-o`, as text; and the size, if it was given by
    /// itself.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn new(
        registry: &'static Registry,
        format: &str,
        (filename, mut file): (&str, Map),
        mut given: Map,
        size: Option<u64>,
    ) -> Result<Creation, Error> {
        let unknown = |what, name| Error::new(format!("Unknown {what} '{name}'"));
        let format = registry.get(format).ok_or_else(|| {
            unknown("file format", format).with_advice(Some(registry.advice(format)))
        })?;
        let driver = file.take_required_str("driver")?;
        let protocol = registry.get(&driver).ok_or_else(|| unknown("protocol", &driver))?;
        if protocol.kind == Kind::Format {
            // `json:` can name one: it would make its own file, and that one its own.
            let prefix = filename::split_protocol(filename).map_or(&*driver, |(prefix, _)| prefix);
            return Err(unknown("protocol", prefix));
        }
        let known = create_options(format, Some(protocol))?;
        if let Some(size) = size
            && given.insert("size", Value::Text(size.to_string())).is_some()
        {
            return Err(Error::new("The image size must be specified only once"));
        }
        let options = take_options(&known, given)?;
        let filename = filename.to_owned();
        let creation = Creation { registry, format, protocol, filename, file, known, options };
        match creation.text("backing_file") {
            // The backing file may tell the size.
            Some(_) => Ok(creation),
            None => creation.with_size(),
        }
    }

    /// Looks at the backing file, if there is one, as far as `backing` says. Runs on a worker.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn check_backing(mut self, backing: NewBacking) -> Result<Creation, Error> {
        let Some(name) = self.text("backing_file").map(str::to_owned) else { return Ok(self) };
        if name.is_empty() {
            return Err(Error::new("Expected backing file name, got empty string"));
        }
        if name == self.filename {
            return Err(Error::new(
                "Error: Trying to create an image with the same filename as the backing file",
            ));
        }
        let no_format = || Error::new("Backing file specified without backing format");
        let format = self.text("backing_fmt").map(str::to_owned);
        if backing == NewBacking::Opened {
            let opened = self.backing_len(&name, format.as_deref()).await;
            let (len, found) = opened.map_err(|e| e.with_hint("Could not open backing image."))?;
            if format.is_none() {
                return Err(no_format().with_hint(format!("Detected format of {found}.")));
            }
            if !self.options.contains("size") {
                self.options.insert("size", Value::Int(len.into()));
            }
        } else if format.is_none() {
            return Err(no_format());
        }
        self.with_size()
    }

    /// The length of the backing file's disk, in bytes, and its format.
    async fn backing_len(
        &self,
        name: &str,
        format: Option<&str>,
    ) -> Result<(u64, &'static str), Error> {
        let look = async |node: &Arc<Node>| Ok((node.len(), node.driver().entry().name));
        self.with_backing(name, format, look).await
    }

    /// Opens a backing file, called as the image is to record it, for what it reports about itself, and lets `work`
    /// look at it.
    ///
    /// # Errors
    /// In QEMU's words: it cannot be opened; or those of `work`.
    pub async fn with_backing<T>(
        &self,
        name: &str,
        format: Option<&str>,
        work: impl AsyncFnOnce(&Arc<Node>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let name = filename::resolve(&self.filename, name)?;
        let policy = OpenPolicy {
            backing: FollowBacking::Probe,
            readers_share: true,
            for_info: true,
            ..OpenPolicy::default()
        };
        let graph = Graph::with_policy(self.registry, policy);
        let mut options = self.registry.recorded_options(&name, format, Map::new())?;
        let format = match (options.get("driver").and_then(Value::as_str), options.get("file")) {
            (Some(driver), _) => self.registry.known(driver)?,
            (None, Some(Value::Map(file))) => {
                let node = graph.open(read_only(file.clone(), "probed")).await?;
                probe::probe(self.registry, &node, &name).await?
            }
            (None, _) => return Err(Error::new("Must specify either driver or file")),
        };
        options.insert("driver", format.name);
        self.registry.plain_numbers(&mut options)?;
        let found = match graph.open(read_only(options, "backing")).await {
            Ok(node) => work(&node).await,
            Err(error) => Err(error),
        };
        graph.close().await;
        found
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.options.get(name).and_then(Value::as_str)
    }

    fn with_size(self) -> Result<Creation, Error> {
        if !self.options.contains("size") {
            return Err(Error::new("Image creation needs a size parameter"));
        }
        Ok(self)
    }

    pub fn registry(&self) -> &'static Registry {
        self.registry
    }

    /// As the user gave it.
    pub fn filename(&self) -> &str {
        &self.filename
    }

    /// The line that tells what is being made, as qemu-img prints it.
    pub fn describe(&self) -> String {
        let mut line = format!("Formatting '{}', fmt={}", self.filename, self.format.name);
        for option in &self.known {
            let Some(Value::Text(text)) =
                self.options.get(option.name).map(|v| v.clone().into_text())
            else {
                continue;
            };
            // As it would be typed. A string is a `Vec` of bytes: writing to it cannot fail.
            let _ = write!(line, " {}={}", option.name, text.replace(',', ",,"));
        }
        line
    }

    /// Makes the image. Runs on a worker.
    pub async fn run(&self) -> Result<Made, Error> {
        match self.format.create {
            // The file is the image.
            Some(_) if self.format.kind == Kind::Protocol => {
                self.create_file(self.options.clone()).await
            }
            Some(entry) => (entry.create)(self, self.options.clone()).await,
            None => Err(Error::new("no format that makes images")),
        }
    }

    /// For a format: makes the file below it, with those of `options` that the protocol knows.
    pub async fn create_file(&self, options: Map) -> Result<Made, Error> {
        self.make(self.protocol, self.file.clone(), &options).await
    }

    /// For a format: makes another file, by its name, with those of `options` that its protocol knows.
    pub async fn create_other(&self, name: &str, options: &Map) -> Result<Made, Error> {
        let mut file = self.registry.new_file(name)?;
        let protocol = self.registry.known(&file.take_required_str("driver")?)?;
        self.make(protocol, file, options).await
    }

    async fn make(
        &self,
        protocol: &DriverEntry,
        mut file: Map,
        options: &Map,
    ) -> Result<Made, Error> {
        let entry = protocol.create.ok_or_else(|| refused("Protocol", protocol))?;
        for option in entry.options {
            if let Some(value) = options.get(option.name) {
                file.insert(option.name, value.clone());
            }
        }
        (entry.create)(self, file).await
    }

    /// For a format: works on the file that [`Creation::create_file`] made, in a graph of its own. Nobody else writes
    /// to it or resizes it meanwhile.
    pub async fn with_file(
        &self,
        work: impl AsyncFnOnce(&Arc<Node>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut file = self.file.clone();
        file.insert("driver", self.protocol.name);
        self.with_node(file, work).await
    }

    /// Does the same with another file that [`Creation::create_other`] made.
    pub async fn with_other(
        &self,
        name: &str,
        work: impl AsyncFnOnce(&Arc<Node>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.with_node(self.registry.new_file(name)?, work).await
    }

    async fn with_node(
        &self,
        file: Map,
        work: impl AsyncFnOnce(&Arc<Node>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (graph, hold) = self.open_file(file).await?;
        let result = work(hold.node()).await;
        hold.detach().await;
        graph.close().await;
        result
    }

    async fn open_file(&self, mut file: Map) -> Result<(Graph, Attachment), Error> {
        let graph = Graph::new(self.registry);
        file.insert("node-name", "new-image");
        let node = graph.open(file).await?;
        let held = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
        let perms = Perms { held, shared: Perm::CONSISTENT_READ };
        let hold = graph.attach(&node, "create", perms, None)?;
        Ok((graph, hold))
    }
}

/// The options of a node that is only looked at, while another process may be writing to it: its length stays
/// what it is.
fn read_only(mut options: Map, name: &str) -> Map {
    options.insert("node-name", name);
    options.insert("read-only", true);
    options.insert("force-share", true);
    options
}

impl CreateOption {
    /// An option without a default.
    pub const fn new(name: &'static str, value: ValueType, help: &'static str) -> CreateOption {
        CreateOption { name, value, help, default: None, is_newer: false }
    }

    /// The option for how new space is allocated.
    pub const fn preallocation(modes: &'static [Preallocation]) -> CreateOption {
        CreateOption::new("preallocation", ValueType::Preallocation(modes), "Preallocation mode")
    }

    /// Takes the option out of what was given, in its type.
    fn take(&self, given: &mut Map) -> Result<Option<Value>, options::Error> {
        let number = |n: u64| Value::Int(n.into());
        Ok(match self.value {
            ValueType::Str | ValueType::Preallocation(_) => {
                given.take_str(self.name)?.map(Value::Str)
            }
            ValueType::Bool => given.take_opt_bool(self.name)?.map(Value::Bool),
            ValueType::Size => given.take_size(self.name)?.map(number),
            ValueType::Number => given.take_number(self.name)?.map(number),
        })
    }
}

#[cfg(test)]
#[path = "create_tests.rs"]
mod tests;
