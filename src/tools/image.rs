//! An image that a tool has open.
//!
//! The rule held here: QEMU's tools guess a format that is not named, so these do; but on an image
//! that was guessed to be raw, nothing is written to the first sector that would make it look like
//! another format the next time.

use super::cache::Cache;
use super::naming::{self, Named};
use crate::block::policy::FollowBacking;
use crate::block::{
    Attachment, DriverEntry, Error, Graph, Node, OpenPolicy, Perm, Perms, Preallocation, Registry,
    Role, TemporaryImage, flush_record, name, probe, resizable,
};
use crate::copy::Disk;
use crate::io::Errno;
use crate::options::{Map, Value};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

/// The format of temporary overlays.
const OVERLAY_FORMAT: &str = "qcow2";

/// The filter that writes to an image what is read from its backing files.
const COPIER: &str = "copy-on-read";

/// How conflicts call a tool's use of an image.
const USER: &str = "an unnamed block device";

/// The image to open, and the purpose.
#[derive(Clone, Debug, Default)]
pub struct Wanted<'a> {
    /// A file's name, or the options of `--image-opts`.
    pub name: &'a str,
    pub image_opts: bool,
    /// `-f`; none to guess.
    pub format: Option<&'a str>,
    pub writable: bool,
    /// The length will be changed.
    pub resize: bool,
    /// Zeroing may give space back, and discards are passed on.
    pub unmap: bool,
    /// `-U`: share the image with writers.
    pub force_share: bool,
    /// Nobody else may write meanwhile.
    pub exclusive: bool,
    /// Without its backing file, which may be missing.
    pub no_backing: bool,
    /// Writes go to a file that is gone afterwards; the image stays as it is.
    pub snapshot: bool,
    /// What is read from backing files is written to the image.
    pub copy_on_read: bool,
    pub cache: Cache,
    /// More options of the node, that the name says nothing of.
    pub more: Map,
}

/// The images that one run of a tool has open. They share a graph.
pub struct Images {
    graph: Graph,
    /// Of the images opened so far.
    count: Cell<usize>,
    /// Records of failed flushes that were reported to the user.
    reported: RefCell<BTreeSet<PathBuf>>,
    /// Prints a warning for the user.
    warn: Box<dyn Fn(&str)>,
}

/// An open image, which is read and written as a [`Disk`].
pub struct Opened {
    disk: Disk,
    attachment: Attachment,
    /// The image itself, if this is a temporary overlay of it.
    below: Option<String>,
    /// What is read through, if that copies.
    copier: Option<Attachment>,
    registry: &'static Registry,
    /// As the user named it.
    pub name: String,
    /// The options that its name says, as they were written.
    given: Map,
    /// The format was guessed.
    pub guessed_raw: bool,
}

impl Deref for Opened {
    type Target = Disk;

    fn deref(&self) -> &Disk {
        &self.disk
    }
}

impl Images {
    pub fn new(registry: &'static Registry, warn: impl Fn(&str) + 'static) -> Images {
        Images::with_policy(registry, OpenPolicy::default(), warn)
    }

    /// Images that are opened to be checked, and do nothing else.
    pub fn for_check(registry: &'static Registry, warn: impl Fn(&str) + 'static) -> Images {
        let policy = OpenPolicy { for_check: true, ..OpenPolicy::default() };
        Images::with_policy(registry, policy, warn)
    }

    /// Images that are opened for their metadata, and not read.
    pub fn for_info(registry: &'static Registry, warn: impl Fn(&str) + 'static) -> Images {
        let policy = OpenPolicy { for_info: true, ..OpenPolicy::default() };
        Images::with_policy(registry, policy, warn)
    }

    fn with_policy(
        registry: &'static Registry,
        policy: OpenPolicy,
        warn: impl Fn(&str) + 'static,
    ) -> Images {
        let policy = OpenPolicy { backing: FollowBacking::Probe, readers_share: true, ..policy };
        let graph = Graph::with_policy(registry, policy);
        Images { graph, count: Cell::new(0), reported: RefCell::default(), warn: Box::new(warn) }
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Opens an image.
    ///
    /// # Errors
    /// `Could not open 'NAME': …`
    pub async fn open(&self, wanted: &Wanted<'_>) -> Result<Opened, Error> {
        self.open_unnamed(wanted)
            .await
            .map_err(|error| error.at(format!("Could not open '{}'", wanted.name)))
    }

    async fn open_unnamed(&self, wanted: &Wanted<'_>) -> Result<Opened, Error> {
        let registry = self.graph.registry();
        let more = wanted.more.clone();
        let named = match wanted.image_opts {
            true => naming::image_opts(registry, wanted.name, more, &self.warn)?,
            false => naming::filename(registry, wanted.name, wanted.format, more)?,
        };
        let Named { given, mut options, probe } = named;
        let mut guessed_raw = false;
        if probe {
            let format = self.guess(&options, wanted).await?;
            guessed_raw = format.is_raw();
            options.insert("driver", format.name);
            registry.plain_numbers(&mut options)?;
        }
        let writable = wanted.writable && !wanted.snapshot;
        common_options(&mut options, &Wanted { writable, ..wanted.clone() });
        options.insert("node-name", self.next_name());
        if wanted.no_backing && probe_has_backing(registry, &options) {
            options.insert(Role::Backing.name(), Value::Null);
        }
        let mut node = self.graph.open(options).await?;
        self.warn_of_losses(&node);
        let mut below = None;
        if wanted.snapshot {
            below = Some(node.name().to_owned());
            node = self.open_overlay(&node, wanted).await?;
            guessed_raw = false;
        }
        let attachment = self.graph.attach(&node, USER, permissions(wanted), None)?;
        let copier = match wanted.copy_on_read {
            true => Some(self.open_copier(&node, wanted).await?),
            false => None,
        };
        if guessed_raw && wanted.writable {
            (self.warn)(&format!(
                "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
                 Automatically detecting the format is dangerous for raw images, write operations \
                 on block 0 will be restricted.\n         \
                 Specify the 'raw' format explicitly to remove the restrictions.",
                wanted.name
            ));
        }
        let mut disk = Disk::new(node).write_through(wanted.cache.write_through);
        if let Some(copier) = &copier {
            disk = disk.read_through(copier.node().clone());
        }
        if guessed_raw {
            let name = wanted.name.to_owned();
            disk = disk.guarded(Arc::new(move |sector| {
                let found = registry.probe(sector, &name);
                let stays_raw = found.is_none_or(|guess| guess.is_raw());
                if stays_raw { Ok(()) } else { Err(Errno::EPERM) }
            }));
        }
        Ok(Opened {
            disk,
            attachment,
            below,
            copier,
            registry,
            name: wanted.name.to_owned(),
            given,
            guessed_raw,
        })
    }

    /// Tells of each failed flush that is recorded beside the image or one below it, once.
    fn warn_of_losses(&self, node: &Node) {
        for record in flush_record::find(&node.files(|_| true)) {
            let text = format!(
                "WARNING: '{}' says that a flush failed: data written to the image before it may be lost",
                record.display()
            );
            if self.reported.borrow_mut().insert(record) {
                (self.warn)(&text);
            }
        }
    }

    /// An overlay that takes the writes to `node`, as long as it is open.
    async fn open_overlay(&self, node: &Node, wanted: &Wanted<'_>) -> Result<Arc<Node>, Error> {
        let image =
            TemporaryImage::create(self.graph.registry(), OVERLAY_FORMAT, node.len()).await?;
        let mut options = image.options(self.graph.registry(), &self.next_name(), node.name())?;
        options.insert("read-only", on_off(!wanted.writable));
        self.graph.open(options).await
    }

    /// What reads of `node` go through, so that it gets what they find in its backing files.
    async fn open_copier(&self, node: &Node, wanted: &Wanted<'_>) -> Result<Attachment, Error> {
        if !wanted.writable {
            return Err(Error::new("Can't use copy-on-read on read-only device"));
        }
        let (name, file) = (self.next_name(), node.name().to_owned());
        let options =
            Map::from_iter([("driver", COPIER.into()), ("node-name", name), ("file", file)]);
        let copier = self.graph.open(options).await?;
        let perms = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
        self.graph.attach(&copier, USER, perms, None)
    }

    /// The format of what `options` have as their `file`.
    async fn guess(
        &self,
        options: &Map,
        wanted: &Wanted<'_>,
    ) -> Result<&'static DriverEntry, Error> {
        let Some(Value::Map(file)) = options.get("file") else {
            let name = options.get("file").and_then(Value::as_str).unwrap_or_default();
            return Err(Error::new(format!("Cannot find device='{name}' nor node-name='{name}'")));
        };
        let mut file = file.clone();
        // What is looked at needs no lock: the image itself is locked before it is used.
        let read_only = Wanted { writable: false, force_share: true, ..wanted.clone() };
        file.take("read-only");
        common_options(&mut file, &read_only);
        let name = self.next_name();
        file.insert("node-name", &*name);
        let node = self.graph.open(file).await?;
        let perms = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
        let hold = self.graph.attach(&node, USER, perms, None)?;
        let found = probe::probe(self.graph.registry(), &node, wanted.name).await;
        drop(node);
        drop(hold);
        self.graph.delete(&name).await?;
        found
    }

    fn next_name(&self) -> String {
        self.count.set(self.count.get() + 1);
        format!("image{}", self.count.get())
    }

    /// Closes an image: what was written reaches its storage.
    pub async fn close(&self, image: Opened) -> Result<(), Error> {
        let node = image.node().clone();
        let (name, below) = (node.name().to_owned(), image.below.clone());
        let flushed = match image.is_writable() {
            true => node.flush().await,
            false => Ok(()),
        };
        drop(node);
        let copier = image.copier.as_ref().map(|copier| copier.node().name().to_owned());
        drop(image);
        if let Some(copier) = copier {
            self.graph.delete(&copier).await?;
        }
        self.graph.delete(&name).await?;
        if let Some(below) = below {
            self.graph.delete(&below).await?;
        }
        flushed.map_err(|errno| Error::os("Could not flush the image", errno))
    }

    /// Closes whatever is still open.
    pub async fn end(&self) {
        self.graph.close().await;
    }
}

/// Whether the driver takes a backing file at all.
fn probe_has_backing(registry: &Registry, options: &Map) -> bool {
    let driver = options.get("driver").and_then(Value::as_str);
    let entry = driver.and_then(|name| registry.get(name));
    entry.is_some_and(DriverEntry::has_backing)
}

fn on_off(value: bool) -> Value {
    Value::Text(if value { "on" } else { "off" }.into())
}

/// Fills in the options that all nodes have, where the user has not given them.
fn common_options(options: &mut Map, wanted: &Wanted<'_>) {
    let mut default = |key: &str, value: Value| {
        if !options.contains(key) {
            options.insert(key, value);
        }
    };
    default("read-only", on_off(!wanted.writable));
    if wanted.force_share {
        default("force-share", on_off(true));
    }
    if wanted.unmap {
        default("discard", Value::Text("unmap".into()));
    }
    if let Some(Value::Map(_)) | None = options.get("cache") {
        let mut cache = match options.take("cache") {
            Some(Value::Map(cache)) => cache,
            _ => Map::new(),
        };
        for (key, value) in [("direct", wanted.cache.direct), ("no-flush", wanted.cache.no_flush)] {
            if !cache.contains(key) {
                cache.insert(key, on_off(value));
            }
        }
        options.insert("cache", Value::Map(cache));
    }
}

fn permissions(wanted: &Wanted<'_>) -> Perms {
    let mut held = Perm::CONSISTENT_READ;
    held.set(Perm::WRITE, wanted.writable);
    held.set(Perm::RESIZE, wanted.resize);
    let shared = match wanted.exclusive && !wanted.force_share {
        true => Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        false => Perm::all(),
    };
    Perms { held, shared }
}

impl Opened {
    /// The disk, for work that outlives a borrow. The image stays open as long as this is.
    pub fn disk(&self) -> Disk {
        self.disk.clone()
    }

    /// The driver's name.
    pub fn format(&self) -> &'static str {
        self.node().driver().name()
    }

    pub fn is_writable(&self) -> bool {
        !self.node().options().read_only
    }

    /// What the image is called in listings: a name that opens the same disk, but for its backing file.
    pub fn filename(&self) -> String {
        name::name_without_backing(self.node(), self.registry, &self.given)
    }

    /// Takes or gives up the right to change the length.
    pub fn allow_resize(&self, allowed: bool) -> Result<(), Error> {
        let mut held = Perm::CONSISTENT_READ | Perm::WRITE;
        held.set(Perm::RESIZE, allowed);
        self.attachment.change(Perms { held, shared: Perm::all() })
    }

    /// Sets the disk's length, in bytes, to exactly that; shrinks it, too. For images opened with
    /// [`Wanted::resize`].
    pub async fn resize(&self, len: u64, preallocation: Preallocation) -> Result<(), Error> {
        self.set_len(len, preallocation, true).await
    }

    /// As [`Opened::resize`], but a device may be longer than is asked for.
    pub async fn truncate(&self, len: u64, preallocation: Preallocation) -> Result<(), Error> {
        self.set_len(len, preallocation, false).await
    }

    async fn set_len(
        &self,
        len: u64,
        preallocation: Preallocation,
        exactly: bool,
    ) -> Result<(), Error> {
        let node = self.node();
        resizable(node)?;
        node.check_bitmaps_for_resize()?;
        match preallocation == Preallocation::Off && (exactly || len < self.len()) {
            true => node.resize(len, true).await?,
            false => node.grow(len, preallocation).await?,
        }
        node.bitmaps().resize(node.len(), &node.members());
        Ok(())
    }
}
