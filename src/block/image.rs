//! Operations on a whole disk: its length, its allocation, its health, its description.

use super::{Error, LocalFuture, Node, SnapshotInfo, Snapshots};
use crate::io::{Errno, IoResult, IoVec};
use crate::options::{Map, Value};
use serde::Deserialize;
use std::sync::Arc;

/// The disk as a whole that a node's length is changed through.
///
/// # Errors
/// In QEMU's words: its driver has none.
pub fn resizable(node: &Node) -> Result<&dyn Image, Error> {
    let image = node.driver().image();
    image.ok_or_else(|| Error::new("Image format driver does not support resize"))
}

/// Bytes that a disk occupies which is in another node: those of that node ([`Image::allocated`]).
pub fn allocated_in(node: Arc<Node>) -> LocalFuture<'static, IoResult<u64>> {
    Box::pin(async move { node.driver().image().ok_or(Errno::ENOTSUP)?.allocated().await })
}

impl Node {
    /// Sets the length ([`Image::resize`]).
    pub async fn resize(&self, len: u64, shrink: bool) -> Result<(), Error> {
        let _writing = self.writing();
        resizable(self)?.resize(len, shrink).await
    }

    /// Makes the disk longer ([`Image::grow`]).
    pub async fn grow(&self, len: u64, preallocation: Preallocation) -> Result<(), Error> {
        let _writing = self.writing();
        resizable(self)?.grow(len, preallocation).await
    }
}

/// Operations on the disk as a whole. What a driver does not have, it refuses.
pub trait Image: Send + Sync {
    /// Sets the length, in bytes, to exactly that. New bytes read as zeroes. Shrinking is refused unless
    /// `shrink`. Called with no other request in flight on the node.
    fn resize(&self, len: u64, shrink: bool) -> LocalFuture<'_, Result<(), Error>>;

    /// Makes the disk at least so long, its new space allocated as `preallocation` says. What has the
    /// length that it has, a device, may be longer. Otherwise as [`Image::resize`].
    fn grow(&self, len: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        if preallocation == Preallocation::Off {
            return self.resize(len, false);
        }
        Box::pin(std::future::ready(Err(preallocation.unsupported())))
    }

    /// Changes options that the image was made with, given in their types, of those that its format
    /// lists ([`CreateEntry::amend`](super::create::CreateEntry::amend)). Called with no other request
    /// in flight on a writable node; nothing is written to it afterwards until it is opened again.
    ///
    /// # Errors
    /// In QEMU's words what cannot be, before anything has changed; or I/O failed halfway, and the
    /// image is sound.
    fn amend(&self, changes: Map) -> LocalFuture<'_, Result<(), Error>> {
        let _ = changes;
        let error = Error::new("This image format does not support option amendment");
        Box::pin(std::future::ready(Err(error)))
    }

    /// Bytes that the disk occupies on its storage, where that can be told. Called at any time.
    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>>;

    /// Checks the image's metadata and repairs of it what `fix` names, telling `say` one line at a
    /// time what is found and done. Called with no other request in flight on the node; to repair,
    /// the node must be writable.
    ///
    /// # Errors
    /// When the image cannot be read so far that counting makes sense, or a repair fails; ENOTSUP
    /// where there is nothing to check.
    fn check<'a>(
        &'a self,
        fix: Fix,
        say: &'a mut dyn FnMut(&str),
    ) -> LocalFuture<'a, Result<CheckReport, Error>> {
        let _ = (fix, say);
        Box::pin(std::future::ready(Err(Error::new("This image format does not support checks")
            .with_errno(Errno(libc::ENOTSUP)))))
    }

    /// Internal snapshots, where the format has them.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }

    /// Records another backing file, by the name and the format that the image is to hold; none for no backing file.
    /// `node` is what the name stands for, where that is known: some images also record which contents it has. The
    /// nodes below it stay as they are. Durable when it is done, and a crash leaves the old record or the new one.
    ///
    /// # Errors
    /// ENOTSUP where an image cannot have one, ENOSPC where there is no room for the name.
    fn set_backing<'a>(
        &'a self,
        name: Option<&'a str>,
        format: Option<&'a str>,
        node: Option<&'a Arc<Node>>,
    ) -> LocalFuture<'a, Result<(), Error>> {
        let _ = (name, format, node);
        Box::pin(std::future::ready(Err(unsupported())))
    }

    /// Gives up everything that the image itself has, so that its backing file shows, which must have
    /// the same contents, durably: meanwhile, and after a crash, parts of both are seen. Its file becomes as
    /// short as it can. Called with no other request in flight on the node.
    ///
    /// # Errors
    /// ENOTSUP where an image cannot.
    fn make_empty(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(std::future::ready(Err(unsupported())))
    }

    /// Reads the state of a virtual machine that the image keeps beside its disk, from byte `at` of the
    /// state on; zeroes where nothing was written.
    ///
    /// # Errors
    /// ENOTSUP where an image has no place for it.
    fn read_machine<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        let _ = (at, into);
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// Writes of it. Called with no other request in flight on the node, which must be writable.
    ///
    /// # Errors
    /// As for reading, or EFBIG, or I/O failed.
    fn write_machine<'a>(&'a self, at: u64, from: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        let _ = (at, from);
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// Whether the image says anything of itself; if not, listings do not say either whether it was closed cleanly.
    fn has_info(&self) -> bool {
        true
    }

    /// The description of the image. Called at any time.
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }
}

/// An image as listings show it.
pub struct Listed<'a> {
    /// As it is named there.
    pub filename: &'a str,
    pub format: &'a str,
    /// Bytes of the disk.
    pub len: u64,
    /// Bytes that it occupies, if that is known.
    pub allocated: Option<u64>,
    /// Where the backing file is, seen from here.
    pub full_backing: Option<&'a str>,
    /// Whether the driver describes itself at all.
    pub is_known: bool,
    pub info: &'a ImageInfo,
}

impl Listed<'_> {
    /// ImageInfo of QMP, its keys in qemu-img's order.
    pub fn to_value(&self) -> Map {
        let info = self.info;
        let mut map = Map::new();
        let mut add = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                map.insert(key, value);
            }
        };
        let text = |text: &String| Value::Str(text.clone());
        let snapshots: Vec<_> = info.snapshots.iter().map(SnapshotInfo::to_value).collect();
        add("snapshots", (!snapshots.is_empty()).then_some(Value::List(snapshots)));
        add("backing-filename-format", info.backing_format.as_ref().map(text));
        add("virtual-size", Some(self.len.into()));
        add("filename", Some(self.filename.into()));
        add("cluster-size", info.cluster_size.map(Value::from));
        add("format", Some(self.format.into()));
        add("actual-size", self.allocated.map(Value::from));
        add("encrypted", info.is_encrypted.then_some(Value::Bool(true)));
        add("format-specific", info.specific.clone());
        add("full-backing-filename", self.full_backing.map(Value::from));
        add("backing-filename", info.backing_filename.as_ref().map(text));
        add("dirty-flag", self.is_known.then_some(Value::Bool(info.is_dirty)));
        map
    }
}

fn unsupported() -> Error {
    Error::new("Operation not supported").with_errno(Errno::ENOTSUP)
}

/// Whether new space of a disk has its place at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preallocation {
    #[default]
    Off,
    /// What a format needs to tell where it is: known to formats only.
    Metadata,
    /// Allocated, not written.
    Falloc,
    /// Written.
    Full,
}

impl Preallocation {
    pub const ALL: [Preallocation; 4] = [Self::Off, Self::Metadata, Self::Falloc, Self::Full];

    /// Reads a mode's name.
    pub fn parse(name: &str) -> Option<Preallocation> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }

    /// The refusal by drivers that cannot allocate so, in QEMU's words.
    pub fn unsupported(self) -> Error {
        Error::new(format!("Unsupported preallocation mode: {}", self.name()))
    }
}

/// What a check may repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Fix {
    #[default]
    Nothing,
    /// Clusters that are counted but not used. Fails where that cannot be done safely.
    Leaks,
    /// Everything that can be.
    All,
}

/// What a check found and repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// Mistakes that can lose data, and were not repaired.
    pub corruptions: u64,
    /// Clusters that nothing uses and nobody else can, and that were not given back.
    pub leaks: u64,
    /// What could not be checked.
    pub check_errors: u64,
    pub corruptions_fixed: u64,
    pub leaks_fixed: u64,
    /// Where the last cluster in use ends, in bytes; 0 if that was not found out.
    pub image_end_offset: u64,
    /// Clusters of the disk, and how many of them are stored, apart from their predecessors, or
    /// compressed.
    pub total_clusters: u64,
    pub allocated_clusters: u64,
    pub fragmented_clusters: u64,
    pub compressed_clusters: u64,
}

/// The description of an image, as QMP's ImageInfo has it.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct ImageInfo {
    /// Bytes.
    pub cluster_size: Option<u64>,
    /// Where the state of a machine is kept, as seen from the disk's beginning, in bytes; 0 where it cannot be.
    pub vm_state_offset: u64,
    /// The image was not closed cleanly.
    pub is_dirty: bool,
    pub is_encrypted: bool,
    /// As it is stored in the image.
    pub backing_filename: Option<String>,
    pub backing_format: Option<String>,
    pub snapshots: Vec<SnapshotInfo>,
    /// ImageInfoSpecific of QMP: `type`, and `data` with keys in the order in which people read
    /// them.
    pub specific: Option<Value>,
}
