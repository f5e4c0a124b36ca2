//! New images: qemu-img's options, their rules in QEMU's words, and the writing.
//!
//! The order: tables first, made durable, and the header last, so that what was not finished is no
//! image.

use super::extensions::{self, Extension};
use super::header::{Autoclear, Compatible, Compression, Header, Incompatible};
use super::layout;
use super::measure::measure;
use super::new_image::NewImage;
use crate::block::create::{CreateEntry, CreateOption, Creation, Made, ValueType};
use crate::block::new_file::NewFile;
use crate::block::{Error, Graph, Node, Preallocation, Registry, SECTOR, WriteFlags, ZeroFlags};
use crate::io::{IoResult, IoVec};
use crate::options::{Map, Value, bytes};
use std::sync::Arc;

pub(super) static CREATE: CreateEntry = CreateEntry {
    options: OPTIONS,
    create: |creation, map| Box::pin(create(creation, map)),
    measure: Some(|options, size, source| Box::pin(measure(options, size, source))),
    amend: super::amend::OPTIONS,
    on_nodes: Some(super::create_on_nodes::prepare),
};

const OPTIONS: &[CreateOption] = &[
    CreateOption::new(
        "encryption",
        ValueType::Bool,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    CreateOption::new(
        "encrypt.format",
        ValueType::Str,
        "Encrypt the image, format choices: 'aes', 'luks'",
    ),
    CreateOption::new(
        "encrypt.key-secret",
        ValueType::Str,
        "ID of secret providing qcow AES key or LUKS passphrase",
    ),
    CreateOption::new("encrypt.cipher-alg", ValueType::Str, "Name of encryption cipher algorithm"),
    CreateOption::new("encrypt.cipher-mode", ValueType::Str, "Name of encryption cipher mode"),
    CreateOption::new("encrypt.ivgen-alg", ValueType::Str, "Name of IV generator algorithm"),
    CreateOption::new(
        "encrypt.ivgen-hash-alg",
        ValueType::Str,
        "Name of IV generator hash algorithm",
    ),
    CreateOption::new("encrypt.hash-alg", ValueType::Str, "Name of encryption hash algorithm"),
    CreateOption::new(
        "encrypt.iter-time",
        ValueType::Number,
        "Time to spend in PBKDF in milliseconds",
    ),
    CreateOption {
        default: Some("65536"),
        ..CreateOption::new("cluster_size", ValueType::Size, "qcow2 cluster size")
    },
    CreateOption {
        default: Some("off"),
        ..CreateOption::new("extended_l2", ValueType::Bool, "Extended L2 tables")
    },
    CreateOption::preallocation(&Preallocation::ALL),
    CreateOption {
        default: Some("zlib"),
        ..CreateOption::new(
            "compression_type",
            ValueType::Str,
            "Compression method used for image cluster compression",
        )
    },
    CreateOption::new("size", ValueType::Size, "Virtual disk size"),
    CreateOption::new("compat", ValueType::Str, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    CreateOption::new("backing_file", ValueType::Str, "File name of a base image"),
    CreateOption::new("backing_fmt", ValueType::Str, "Image format of the base image"),
    CreateOption::new("data_file", ValueType::Str, "File name of an external data file"),
    CreateOption::new(
        "data_file_raw",
        ValueType::Bool,
        "The external data file must stay valid as a raw image",
    ),
    CreateOption {
        is_newer: true,
        ..CreateOption::new(
            "keep_data_file",
            ValueType::Bool,
            "The external data file is there, and is kept",
        )
    },
    CreateOption {
        default: Some("off"),
        ..CreateOption::new("lazy_refcounts", ValueType::Bool, "Postpone refcount updates")
    },
    CreateOption {
        default: Some("16"),
        ..CreateOption::new(
            "refcount_bits",
            ValueType::Number,
            "Width of a reference count entry in bits",
        )
    },
];

/// What was asked for, in types, and found to go together.
pub(super) struct Wanted {
    pub size: u64,
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    compression: Compression,
    pub preallocation: Preallocation,
    extended_l2: bool,
    lazy_refcounts: bool,
    backing_file: Option<String>,
    backing_format: Option<String>,
    data_file: Option<String>,
    data_file_raw: bool,
    keep_data_file: bool,
}

/// What the file that holds the data is asked for.
fn mode_of_file(mode: Preallocation) -> Option<&'static str> {
    match mode {
        Preallocation::Off | Preallocation::Metadata => None,
        Preallocation::Falloc | Preallocation::Full => Some(mode.name()),
    }
}

fn refused<T>(text: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(text))
}

/// `value` is none of those that a parameter can have.
fn not_accepted<T>(parameter: &str, value: &str) -> Result<T, Error> {
    let value = value.escape_debug();
    refused(format!("Parameter '{parameter}' does not accept value '{value}'"))
}

pub(super) fn is_on(options: &Map, name: &str) -> bool {
    options.get(name) == Some(&Value::Bool(true))
}

fn number(options: &Map, name: &str) -> u64 {
    match options.get(name) {
        Some(Value::Int(n)) => u64::try_from(*n).unwrap_or(0),
        _ => 0,
    }
}

pub(super) fn refuse_encryption(options: &Map) -> Result<(), Error> {
    let is_about_it = |name: &str| name.starts_with("encrypt.");
    if is_on(options, "encryption") || options.iter().any(|(name, _)| is_about_it(name)) {
        return refused("Encryption of qcow2 images is not supported");
    }
    Ok(())
}

pub(super) fn cluster_bits(options: &Map) -> Result<u32, Error> {
    let size = number(options, "cluster_size");
    let bits = layout::MIN_CLUSTER_BITS..=layout::MAX_CLUSTER_BITS;
    match size.is_power_of_two() && bits.contains(&size.trailing_zeros()) {
        true => Ok(size.trailing_zeros()),
        false => refused("Cluster size must be a power of two between 512 and 2048k"),
    }
}

/// Whether clusters are large enough to have subclusters.
pub(super) fn check_extended(cluster_bits: u32) -> Result<(), Error> {
    if cluster_bits < layout::MIN_EXTENDED_CLUSTER_BITS {
        return refused(format!(
            "Extended L2 entries are only supported with cluster sizes of at least {} bytes",
            1 << layout::MIN_EXTENDED_CLUSTER_BITS
        ));
    }
    Ok(())
}

pub(super) fn refcount_order(options: &Map) -> Result<u32, Error> {
    let bits = number(options, "refcount_bits");
    match bits.is_power_of_two() && bits.trailing_zeros() <= layout::MAX_REFCOUNT_ORDER {
        true => Ok(bits.trailing_zeros()),
        false => refused("Refcount width must be a power of two and may not exceed 64 bits"),
    }
}

impl Wanted {
    /// Reads the options, and checks them in QEMU's order.
    pub fn take(registry: &Registry, options: &Map) -> Result<Wanted, Error> {
        let text = |name: &str| options.get(name).and_then(Value::as_str);
        let on = |name: &str| is_on(options, name);
        refuse_encryption(options)?;
        let version = match text("compat") {
            Some("0.10" | "v2") => 2,
            None | Some("1.1" | "v3") => 3,
            Some(other) => return not_accepted("version", other),
        };
        let compression = match text("compression_type") {
            None | Some("zlib") => Compression::Zlib,
            Some("zstd") => Compression::Zstd,
            Some(other) => return not_accepted("compression-type", other),
        };
        let preallocation = match text("preallocation") {
            None => Preallocation::Off,
            Some(name) => match Preallocation::parse(name) {
                Some(mode) => mode,
                None => return not_accepted("preallocation", name),
            },
        };
        let backing_format = text("backing_fmt").map(str::to_owned);
        if let Some(format) = &backing_format
            && registry.get(format).is_none()
        {
            return not_accepted("backing-fmt", format);
        }
        let mut wanted = Wanted {
            size: number(options, "size"),
            version,
            cluster_bits: cluster_bits(options)?,
            refcount_order: 0,
            compression,
            preallocation,
            extended_l2: on("extended_l2"),
            lazy_refcounts: on("lazy_refcounts"),
            backing_file: text("backing_file").map(str::to_owned),
            backing_format,
            data_file: text("data_file").map(str::to_owned),
            data_file_raw: on("data_file_raw"),
            keep_data_file: on("keep_data_file"),
        };
        wanted.check(options)?;
        if wanted.data_file_raw && wanted.preallocation == Preallocation::Off {
            // Every byte of the data file is the disk's from the start.
            wanted.preallocation = Preallocation::Metadata;
        }
        Ok(wanted)
    }

    fn check(&mut self, options: &Map) -> Result<(), Error> {
        const NEWER: &str = "compatibility level 1.1 and above (use version=v3 or greater)";
        if self.extended_l2 {
            if self.version < 3 {
                return refused(format!("Extended L2 entries are only supported with {NEWER}"));
            }
            check_extended(self.cluster_bits)?;
        }
        if self.backing_file.is_some()
            && self.preallocation != Preallocation::Off
            && !self.extended_l2
        {
            return refused(
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on",
            );
        }
        if self.backing_format.is_some() && self.backing_file.is_none() {
            return refused("Backing format cannot be used without backing file");
        }
        if self.lazy_refcounts && self.version < 3 {
            return refused(format!("Lazy refcounts only supported with {NEWER}"));
        }
        self.refcount_order = refcount_order(options)?;
        if self.refcount_order != layout::DEFAULT_REFCOUNT_ORDER && self.version < 3 {
            return refused(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            );
        }
        if self.data_file_raw && self.data_file.is_none() {
            return refused("data-file-raw requires data-file");
        }
        if self.keep_data_file && self.data_file.is_none() {
            return refused("keep-data-file requires data-file");
        }
        if self.keep_data_file && mode_of_file(self.preallocation).is_some() {
            return refused(
                "Preallocating more than only metadata would overwrite the external data file's \
                 content and is therefore incompatible with 'keep_data_file=on'",
            );
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return refused("Backing file and data-file-raw cannot be used at the same time");
        }
        if self.data_file.is_some() && self.version < 3 {
            return refused(format!("External data files are only supported with {NEWER}"));
        }
        if self.compression != Compression::Zlib && self.version < 3 {
            return refused(format!("Non-zlib compression type is only supported with {NEWER}"));
        }
        let sectors = self.size.checked_next_multiple_of(SECTOR);
        match sectors.filter(|&size| i64::try_from(size).is_ok()) {
            Some(size) => self.size = size,
            None => return refused(TOO_LARGE),
        }
        Ok(())
    }

    /// The header without the places of the tables.
    fn header(&self) -> Header {
        let mut header = Header::new(self.cluster_bits, self.size);
        header.version = self.version;
        header.refcount_order = self.refcount_order;
        header.compression = self.compression;
        header.incompatible.set(Incompatible::DATA_FILE, self.data_file.is_some());
        header.incompatible.set(Incompatible::EXTENDED_L2, self.extended_l2);
        header.incompatible.set(Incompatible::COMPRESSION, self.compression != Compression::Zlib);
        header.compatible.set(Compatible::LAZY_REFCOUNTS, self.lazy_refcounts);
        header.autoclear.set(Autoclear::RAW_DATA_FILE, self.data_file_raw);
        header.backing_file = self.backing_file.as_deref().map(stored);
        let format = self.backing_format.as_deref().map(stored);
        header.extensions.extend(format.map(Extension::BackingFormat));
        let data_file = self.data_file.as_deref().map(stored);
        header.extensions.extend(data_file.map(Extension::DataFile));
        // In a small cluster the names would leave no room for a backing file's.
        if self.version >= 3 && self.cluster_bits > extensions::FEATURE_NAMES_MIN_CLUSTER_BITS {
            header.extensions.push(extensions::feature_names());
        }
        header
    }

    /// Whether every cluster of the disk has its place from the start.
    pub fn is_mapped(&self) -> bool {
        self.preallocation != Preallocation::Off
    }

    pub fn layout(&self) -> Result<Layout, Error> {
        let mut header = self.header();
        let image = NewImage::new(header.geometry(), self.size, self.is_mapped());
        let image = image.ok_or_else(|| Error::new(TOO_LARGE))?;
        header.l1_size = image.l1_size as u32;
        header.l1_table_offset = image.l1_table;
        header.refcount_table_offset = image.refcount_table;
        header.refcount_table_clusters = image.refcount_table_clusters as u32;
        let first_cluster = header.encode().map_err(|error| match error.errno() {
            Some(errno) => Error::os(could_not_assign(self), errno),
            None => error,
        })?;
        Ok(Layout { header, image, first_cluster })
    }
}

/// The tables of a new image.
pub(super) struct Layout {
    pub header: Header,
    pub image: NewImage,
    /// The header as it is stored.
    pub first_cluster: Vec<u8>,
}

const TOO_LARGE: &str = "The image size is too large for file format 'qcow2' (try using a larger \
                         cluster size)";

/// Makes an image. The file below is made with exactly the length that the tables need, and with
/// the disk's clusters if these are to have their places.
async fn create(creation: &Creation, mut options: Map) -> Result<Made, Error> {
    let wanted = Wanted::take(creation.registry(), &options)?;
    let Layout { header, image, first_cluster } = wanted.layout()?;
    let mapped = wanted.is_mapped();

    let in_file = match wanted.data_file {
        Some(_) => None,
        None => mode_of_file(wanted.preallocation),
    };
    options.insert("size", Value::Int(image.file_len().into()));
    options.insert("preallocation", Value::Str(in_file.unwrap_or("off").to_owned()));
    if let Some(name) = wanted.data_file.as_ref().filter(|_| wanted.keep_data_file) {
        check_data_file(creation, name, wanted.size).await?;
    }
    let new = NewFile::before(creation, creation.filename());
    let file = new.remove_unmade(creation.create_file(options).await)?;
    let filled = fill(creation, &wanted, &header, (&image, &first_cluster)).await;
    if filled.is_err() {
        new.remove();
    }
    // What the clusters show that have their places from the start.
    let data = filled?.unwrap_or(file);
    Ok(Made { reads_zeroes: !mapped || data.reads_zeroes })
}

/// What comes after the image's file: a data file beside it, and the metadata. Gives what was made of the data
/// file, where there is one.
async fn fill(
    creation: &Creation,
    wanted: &Wanted,
    header: &Header,
    (image, first_cluster): (&NewImage, &[u8]),
) -> Result<Option<Made>, Error> {
    let (mut new, mut data) = (None, None);
    match &wanted.data_file {
        None => {}
        Some(_) if wanted.keep_data_file => data = Some(Made { reads_zeroes: false }),
        Some(name) => {
            let file = NewFile::before(creation, name);
            let made = create_data_file(creation, name, wanted).await;
            data = Some(file.remove_unmade(made)?);
            new = Some(file);
        }
    }
    let write = async |node: &Arc<Node>| write_to(node, header, image, first_cluster).await;
    let written = creation.with_file(write).await;
    if written.is_err()
        && let Some(file) = new
    {
        file.remove();
    }
    written.map(|()| data)
}

/// Writes the tables and the header to a file that is long enough.
pub(super) async fn write_to(
    file: &Node,
    header: &Header,
    image: &NewImage,
    first_cluster: &[u8],
) -> Result<(), Error> {
    let written = write(file, header, image, first_cluster).await;
    written.map_err(|errno| Error::os("Could not write the new image's metadata", errno))
}

/// A name as the header has it.
fn stored(name: &str) -> Vec<u8> {
    bytes::bytes_of(name).into_owned()
}

/// What QEMU says first when a name does not fit into the header.
fn could_not_assign(wanted: &Wanted) -> String {
    let text = |name: &Option<String>| name.clone().unwrap_or_default();
    let (file, format) = (text(&wanted.backing_file), text(&wanted.backing_format));
    format!("Could not assign backing file '{file}' with format '{format}'")
}

fn check_apart(creation: &Creation, name: &str) -> Result<(), Error> {
    let same = |a: &str| std::fs::canonicalize(bytes::path_of(a)).ok();
    match same(name).is_some() && same(name) == same(creation.filename()) {
        true => refused(format!("'{name}' cannot be the image and its data file")),
        false => Ok(()),
    }
}

/// Whether a data file that is kept has a place for each byte of the disk. Asked before anything is written.
async fn check_data_file(creation: &Creation, name: &str, size: u64) -> Result<(), Error> {
    check_apart(creation, name)?;
    let graph = Graph::new(creation.registry());
    let mut file = creation.registry().file_options(name)?;
    file.insert("node-name", "kept");
    file.insert("read-only", true);
    let len = graph.open(file).await.map(|node| node.len());
    graph.close().await;
    match len {
        Ok(len) if len < size => refused(format!(
            "The data file '{name}' has {len} bytes and the disk {size}: it must not be shorter"
        )),
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The raw file of the disk's bytes, from whatever protocol its name says.
async fn create_data_file(creation: &Creation, name: &str, wanted: &Wanted) -> Result<Made, Error> {
    check_apart(creation, name)?;
    let mut options = Map::from_iter([("size", Value::Int(wanted.size.into()))]);
    if let Some(mode) = mode_of_file(wanted.preallocation) {
        options.insert("preallocation", Value::Str(mode.to_owned()));
    }
    creation.create_other(name, &options).await
}

async fn write(file: &Node, header: &Header, image: &NewImage, first_cluster: &[u8]) -> IoResult {
    let cluster_size = 1u64 << header.cluster_bits;
    // A file that was there before, or a disk, may have anything where nothing is written.
    let put = async |at: u64, len: u64, bytes: &[u8]| {
        file.write(at, &IoVec::from_ref(bytes), WriteFlags::empty()).await?;
        let written = bytes.len() as u64;
        match written < len {
            true => file.zero(at + written, len - written, ZeroFlags::empty()).await,
            false => Ok(()),
        }
    };
    file.zero(0, cluster_size, ZeroFlags::empty()).await?;
    let table = image.refcount_table_bytes();
    put(image.refcount_table, image.refcount_table_clusters * cluster_size, &table).await?;
    for (index, &block) in image.blocks.iter().enumerate() {
        put(block * cluster_size, cluster_size, &image.refcount_block(index)).await?;
    }
    for (index, &table) in image.l2_tables.iter().enumerate() {
        put(table * cluster_size, cluster_size, &image.l2_bytes(index)).await?;
    }
    let l1_len = image.l1_size * 8;
    if l1_len > 0 {
        put(image.l1_table, l1_len, &image.l1_bytes()).await?;
    }
    file.flush().await?;
    put(0, cluster_size, first_cluster).await?;
    file.flush().await
}
