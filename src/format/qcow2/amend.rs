//! Changing the options of an existing image.
//!
//! All that is asked for is checked before anything changes. The order then: what the open image can
//! do goes first; then the image is brought to a rest, as when it is closed, and what changes how its
//! tables are to be read is changed in the file: the width of refcounts, the version. [`super::downgrade`]
//! takes out what version 2 cannot have.

use super::extensions::{self, Extension};
use super::header::{Autoclear, Compatible, Compression, Header, Incompatible};
use super::layout;
use super::unclosed::set_mark;
use super::{Qcow2, check, hand_over, header_cluster, header_steps};
use crate::block::Error;
use crate::block::create::{CreateOption, ValueType};
use crate::cow::Stop;
use crate::options::{Map, Value, bytes};

/// In the order in which they are shown.
pub(super) const OPTIONS: &[CreateOption] = &[
    CreateOption::new("backing_file", ValueType::Str, "File name of a base image"),
    CreateOption::new("backing_fmt", ValueType::Str, "Image format of the base image"),
    CreateOption::new("compat", ValueType::Str, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    CreateOption::new("data_file", ValueType::Str, "File name of an external data file"),
    CreateOption::new(
        "data_file_raw",
        ValueType::Bool,
        "The external data file must stay valid as a raw image",
    ),
    CreateOption::new(
        "encrypt.iter-time",
        ValueType::Number,
        "Time to spend in PBKDF in milliseconds",
    ),
    CreateOption::new(
        "encrypt.keyslot",
        ValueType::Number,
        "Select a single keyslot to modify explicitly",
    ),
    CreateOption::new(
        "encrypt.new-secret",
        ValueType::Str,
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    CreateOption::new(
        "encrypt.old-secret",
        ValueType::Str,
        "Select all keyslots that match this password",
    ),
    CreateOption::new(
        "encrypt.state",
        ValueType::Str,
        "Select new state of affected keyslots (active/inactive)",
    ),
    CreateOption::new("lazy_refcounts", ValueType::Bool, "Postpone refcount updates"),
    CreateOption::new(
        "refcount_bits",
        ValueType::Number,
        "Width of a reference count entry in bits",
    ),
    CreateOption::new("size", ValueType::Size, "Virtual disk size"),
];

const NEWER: &str = "compatibility level 1.1 and above (use compat=1.1 or greater)";

/// What was asked for.
struct Wanted {
    version: u32,
    refcount_order: u32,
    lazy_refcounts: Option<bool>,
    /// An empty name is none.
    data_file: Option<String>,
    data_file_raw: Option<bool>,
    size: Option<u64>,
}

fn refused<T>(text: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(text))
}

impl Wanted {
    /// Reads the changes, and checks them against the image in QEMU's words.
    fn take(header: &Header, changes: &Map) -> Result<Wanted, Error> {
        let text = |name: &str| changes.get(name).and_then(Value::as_str).map(str::to_owned);
        let on = |name: &str| changes.get(name).map(|value| *value == Value::Bool(true));
        let number = |name: &str| match changes.get(name) {
            Some(Value::Int(n)) => Some(u64::try_from(*n).unwrap_or(0)),
            _ => None,
        };
        let version = match text("compat").as_deref() {
            None => header.version,
            Some("0.10" | "v2") => 2,
            Some("1.1" | "v3") => 3,
            Some(other) => {
                return refused(format!("Unknown compatibility level {}", other.escape_debug()));
            }
        };
        if changes.iter().any(|(name, _)| name.starts_with("encrypt.")) {
            return refused("Can't amend encryption options - encryption not present");
        }
        if changes.iter().any(|(name, _)| name.starts_with("backing_")) {
            return refused("Cannot amend the backing file");
        }
        let bits = number("refcount_bits");
        let refcount_order = match bits {
            None => header.refcount_order,
            Some(bits) if bits.is_power_of_two() && bits <= 1 << layout::MAX_REFCOUNT_ORDER => {
                bits.trailing_zeros()
            }
            Some(_) => {
                return refused("Refcount width must be a power of two and may not exceed 64 bits");
            }
        };
        let wanted = Wanted {
            version,
            refcount_order,
            lazy_refcounts: on("lazy_refcounts"),
            data_file: text("data_file"),
            data_file_raw: on("data_file_raw"),
            size: number("size"),
        };
        wanted.check(header, bits.is_some())?;
        Ok(wanted)
    }

    fn check(&self, header: &Header, names_width: bool) -> Result<(), Error> {
        let has_data_file = header.incompatible.contains(Incompatible::DATA_FILE);
        if self.data_file.is_some() && !has_data_file {
            return refused("data-file can only be set for images that use an external data file");
        }
        if self.data_file_raw == Some(true) && !header.autoclear.contains(Autoclear::RAW_DATA_FILE)
        {
            return refused("data-file-raw cannot be set on existing images");
        }
        if self.lazy_refcounts == Some(true) && self.version < 3 {
            return refused(format!("Lazy refcounts only supported with {NEWER}"));
        }
        if self.version < 3 && self.refcount_order != layout::DEFAULT_REFCOUNT_ORDER {
            return match names_width {
                true => refused(
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above \
                     (use compat=1.1 or greater)",
                ),
                false => refused("compat=0.10 requires refcount_bits=16"),
            };
        }
        if self.version < header.version {
            if has_data_file {
                return refused("Cannot downgrade an image with a data file");
            }
            // Whether there is anything compressed is in the tables.
            let features = header.incompatible - Incompatible::DIRTY - Incompatible::COMPRESSION;
            if !features.is_empty() {
                return refused(format!(
                    "Cannot downgrade an image with incompatible features 0x{:x} set",
                    features.bits()
                ));
            }
        }
        Ok(())
    }
}

impl Wanted {
    /// The header that all this comes to, but for the width of refcounts.
    fn applied_to(&self, old: &Header) -> Header {
        let mut new = old.clone();
        new.version = self.version;
        // Another width of refcounts leaves out what nothing refers to.
        set_mark(&mut new, None);
        if let Some(lazy) = self.lazy_refcounts {
            new.compatible.set(Compatible::LAZY_REFCOUNTS, lazy);
        }
        if self.data_file_raw == Some(false) {
            new.autoclear -= Autoclear::RAW_DATA_FILE;
        }
        if let Some(name) = &self.data_file {
            new.extensions.retain(|extension| !matches!(extension, Extension::DataFile(_)));
            if !name.is_empty() {
                new.extensions.push(Extension::DataFile(bytes::bytes_of(name).into_owned()));
            }
        }
        let is_names = |extension: &Extension| matches!(extension, Extension::FeatureNames(_));
        if new.version < 3 {
            new.compatible = Compatible::empty();
            new.autoclear = Autoclear::empty();
            new.incompatible = Incompatible::empty();
            new.compression = Compression::Zlib;
            new.extensions.retain(|extension| !is_names(extension));
        } else if old.version < 3 && new.cluster_bits > extensions::FEATURE_NAMES_MIN_CLUSTER_BITS {
            new.extensions.push(extensions::feature_names());
        }
        new
    }
}

impl Qcow2 {
    /// As [`Image::amend`](crate::block::Image::amend).
    pub(super) async fn amend_to(&self, changes: &Map) -> Result<(), Error> {
        let old = self.header.now();
        let wanted = Wanted::take(&old, changes)?;
        let failed = |errno| Error::os("Failed to amend the image", errno);
        self.snapshots.check()?;
        if wanted.version < old.version {
            self.check_downgrade(wanted.size.unwrap_or(self.size())).await?;
        }
        header_steps::check(&old, wanted.applied_to(&old))?;
        if wanted.version > old.version {
            self.complete_snapshots().await.map_err(failed)?;
        }
        if wanted.refcount_order != old.refcount_order {
            self.space.check_table(self.metadata()).await.map_err(failed)?;
        }
        if let Some(size) = wanted.size.filter(|&size| size != self.size()) {
            if hand_over::has_bitmaps(&old) {
                // They would have to be resized, too, which is the node's to do.
                return refused(
                    "The size of an image with dirty bitmaps is not amended: resize it",
                );
            }
            let version = wanted.version;
            self.resize_for_version(version, size, true, Default::default()).await?;
        }
        if wanted.version < old.version {
            self.expand_zeroes().await?;
        }
        // That ends fast writes, too.
        self.close_image().await.map_err(failed)?;
        // From here on the file is not as this node has it in memory.
        self.mapping.tables().stopped.stop(Stop::ForGood);
        self.life.rest();
        // Version 2 has one width only.
        if wanted.version >= old.version {
            self.rewrite_header(&wanted).await?;
        }
        if wanted.refcount_order != old.refcount_order {
            check::set_refcount_width(&self.file(), wanted.refcount_order).await?;
        }
        match wanted.version < old.version {
            true => self.rewrite_header(&wanted).await,
            false => Ok(()),
        }
    }

    /// Writes the header that all this comes to, durably.
    async fn rewrite_header(&self, wanted: &Wanted) -> Result<(), Error> {
        let file = self.file();
        let old = super::open::read_header(&file).await?;
        let new = wanted.applied_to(&old);
        if new != old {
            header_cluster::rewrite(&file, &old, new).await?;
        }
        Ok(())
    }
}
