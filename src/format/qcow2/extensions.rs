//! Header extensions, between the header's fields and the backing file's name.
//!
//! The rule kept here: what we do not know comes out as it went in.

use super::header::{CRYPT_LUKS, Incompatible};
use super::layout::{self, Geometry};
use crate::block::Error;
use crate::options::bytes::until_nul;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const ENCRYPTION: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;

/// Longest name of a backing file's format, in bytes.
const FORMAT_NAME_LIMIT: usize = 15;
/// Of an entry in the feature name table: type, bit, name.
pub const FEATURE_LEN: usize = 48;

/// One header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extension {
    /// The format of the backing file.
    BackingFormat(Vec<u8>),
    /// The name of the external data file.
    DataFile(Vec<u8>),
    /// Where a LUKS header is.
    Encryption(EncryptionPointer),
    /// The feature name table, whole.
    FeatureNames(Vec<u8>),
    Bitmaps(BitmapsPointer),
    Unknown {
        kind: u32,
        data: Vec<u8>,
    },
}

/// Where an encryption header is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncryptionPointer {
    pub offset: u64,
    pub len: u64,
}

/// Where the bitmap directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsPointer {
    pub nb_bitmaps: u32,
    reserved: u32,
    /// Bytes.
    pub directory_size: u64,
    pub directory_offset: u64,
}

impl BitmapsPointer {
    pub fn new(nb_bitmaps: u32, directory_size: u64, directory_offset: u64) -> BitmapsPointer {
        BitmapsPointer { nb_bitmaps, reserved: 0, directory_size, directory_offset }
    }
}

/// Reads the extensions in `area`: up to the one that says it is the last, or as many as there are.
///
/// # Errors
/// In QEMU's words, when one does not fit into the area or has the wrong length.
pub fn parse(area: &[u8]) -> Result<Vec<Extension>, Error> {
    let mut found = Vec::new();
    parse_into(&mut found, area)?;
    Ok(found)
}

/// As [`parse`]; before an error, `found` gets the extensions that make sense.
pub fn parse_into(found: &mut Vec<Extension>, mut area: &[u8]) -> Result<(), Error> {
    let too_large = || Error::new("Header extension too large");
    while let Some((kind, len, rest)) = split(area) {
        let data = rest.get(..len).ok_or_else(too_large)?;
        found.push(Extension::parse(kind, data)?);
        // The last one's padding may be cut off.
        area = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    // Not even a kind and a length fit.
    if (1..8).contains(&area.len()) { Err(too_large()) } else { Ok(()) }
}

/// The first extension's kind, the length of its data in bytes, and what follows these two; none at
/// the end.
fn split(area: &[u8]) -> Option<(u32, usize, &[u8])> {
    let (&kind, rest) = area.split_first_chunk()?;
    let (&len, rest) = rest.split_first_chunk()?;
    let kind = u32::from_be_bytes(kind);
    (kind != END).then_some((kind, u32::from_be_bytes(len) as usize, rest))
}

/// The bytes at the start of `area` that [`parse`] looks at, the end mark among them.
pub fn stored_len(area: &[u8]) -> usize {
    let mut left = area;
    while let Some((_, len, rest)) = split(left) {
        left = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    area.len() - left.len() + left.len().min(8)
}

/// The start of an extension that readers skip, and that is left out when the header is written
/// again: a feature name table of `len` bytes that do not matter, which ends within an entry.
pub fn filler(len: usize) -> [u8; 8] {
    debug_assert!(!len.is_multiple_of(FEATURE_LEN));
    let (kind, len) = (FEATURE_NAMES.to_be_bytes(), (len as u32).to_be_bytes());
    std::array::from_fn(|n| if n < 4 { kind[n] } else { len[n - 4] })
}

/// The extensions in the order that QEMU writes them, and the end mark. A [`filler`] is left out.
pub fn encode(extensions: &[Extension]) -> Vec<u8> {
    let mut sorted: Vec<_> = extensions.iter().filter(|one| !one.is_filler()).collect();
    sorted.sort_by_key(|extension| extension.rank());
    let mut out = Vec::new();
    for extension in sorted {
        let (kind, data) = extension.encode();
        out.extend(kind.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out.extend([0; 8]);
    out
}

impl Extension {
    fn parse(kind: u32, data: &[u8]) -> Result<Extension, Error> {
        let number = |at: usize| data[at..].first_chunk().map_or(0, |n| u64::from_be_bytes(*n));
        Ok(match kind {
            BACKING_FORMAT if data.len() > FORMAT_NAME_LIMIT => {
                return Err(Error::new(format!(
                    "ERROR: ext_backing_format: len={} too large (>={})",
                    data.len(),
                    FORMAT_NAME_LIMIT + 1
                )));
            }
            BACKING_FORMAT => Extension::BackingFormat(until_nul(data).to_vec()),
            FEATURE_NAMES => Extension::FeatureNames(data.to_vec()),
            DATA_FILE => Extension::DataFile(until_nul(data).to_vec()),
            ENCRYPTION if data.len() != 16 => {
                return Err(Error::new(format!(
                    "CRYPTO header extension size {} differs from the expected 16",
                    data.len()
                )));
            }
            ENCRYPTION => {
                Extension::Encryption(EncryptionPointer { offset: number(0), len: number(8) })
            }
            BITMAPS if data.len() != 24 => {
                return Err(Error::new("bitmaps_ext: Invalid extension length"));
            }
            BITMAPS => Extension::Bitmaps(BitmapsPointer {
                nb_bitmaps: (number(0) >> 32) as u32,
                reserved: number(0) as u32,
                directory_size: number(8),
                directory_offset: number(16),
            }),
            _ => Extension::Unknown { kind, data: data.to_vec() },
        })
    }

    fn encode(&self) -> (u32, Vec<u8>) {
        match self {
            Extension::BackingFormat(name) => (BACKING_FORMAT, name.clone()),
            Extension::DataFile(name) => (DATA_FILE, name.clone()),
            Extension::Encryption(EncryptionPointer { offset, len }) => {
                (ENCRYPTION, [offset.to_be_bytes(), len.to_be_bytes()].concat())
            }
            Extension::FeatureNames(table) => (FEATURE_NAMES, table.clone()),
            Extension::Bitmaps(at) => {
                let first = (at.nb_bitmaps as u64) << 32 | at.reserved as u64;
                let numbers = [first, at.directory_size, at.directory_offset];
                (BITMAPS, numbers.map(u64::to_be_bytes).concat())
            }
            Extension::Unknown { kind, data } => (*kind, data.clone()),
        }
    }

    /// Whether it is a table of feature names that ends within an entry.
    pub fn is_filler(&self) -> bool {
        matches!(self, Extension::FeatureNames(table) if !table.len().is_multiple_of(FEATURE_LEN))
    }

    fn rank(&self) -> u32 {
        match self {
            Extension::BackingFormat(_) => 0,
            Extension::DataFile(_) => 1,
            Extension::Encryption(_) => 2,
            Extension::FeatureNames(_) => 3,
            Extension::Bitmaps(_) => 4,
            Extension::Unknown { .. } => 5,
        }
    }

    /// What an extension says must fit the image.
    pub(super) fn check(&self, geometry: &Geometry, crypt_method: u32) -> Result<(), Error> {
        match self {
            Extension::Bitmaps(pointer) => pointer.check(geometry),
            Extension::Encryption(_) if crypt_method != CRYPT_LUKS => {
                Err(Error::new("CRYPTO header extension only expected with LUKS encryption method"))
            }
            Extension::Encryption(at) if !geometry.is_cluster_start(at.offset) => {
                Err(Error::new(format!(
                    "Encryption header offset '{}' is not a multiple of cluster size '{}'",
                    at.offset,
                    geometry.cluster_size()
                )))
            }
            _ => Ok(()),
        }
    }
}

impl BitmapsPointer {
    fn check(&self, geometry: &Geometry) -> Result<(), Error> {
        let refused = |text: String| Err(Error::new(text));
        if self.reserved != 0 {
            return refused("bitmaps_ext: Reserved field is not zero".into());
        }
        let (n, most) = (self.nb_bitmaps, layout::MAX_BITMAPS);
        if n > most {
            return refused(format!(
                "bitmaps_ext: Image has {n} bitmaps, exceeding the QEMU supported maximum of {most}"
            ));
        }
        if n == 0 {
            return refused("found bitmaps extension with zero bitmaps".into());
        }
        if !geometry.is_cluster_start(self.directory_offset) {
            return refused("bitmaps_ext: invalid bitmap directory offset".into());
        }
        let (size, most) = (self.directory_size, layout::MAX_BITMAP_DIRECTORY_BYTES);
        if size > most {
            return refused(format!(
                "bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size \
                 ({most})"
            ));
        }
        Ok(())
    }
}

/// What a program must do that does not know a feature's bit; the number stands for it in tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    Incompatible = 0,
    Compatible = 1,
    Autoclear = 2,
}

/// The names of the bits in `mask`, of features of one kind, as the image's own table has them; what
/// it does not name, as one number. Of several tables the last one counts.
pub fn names_of(extensions: &[Extension], kind: FeatureKind, mut mask: u64) -> String {
    let table = extensions.iter().rev().find_map(|extension| match extension {
        Extension::FeatureNames(table) => Some(&table[..]),
        _ => None,
    });
    let mut names = Vec::new();
    // The last entry may be cut off.
    for entry in table.unwrap_or_default().chunks(FEATURE_LEN) {
        let [of, bit, name @ ..] = entry else { break };
        // There are no bits beyond 63.
        let bit = 1u64.checked_shl((*bit).into()).unwrap_or(0);
        let name = until_nul(name);
        if *of != kind as u8 || mask & bit == 0 || name.is_empty() {
            continue;
        }
        mask &= !bit;
        names.push(String::from_utf8_lossy(name).escape_debug().to_string());
    }
    if mask != 0 {
        let kind = match kind {
            FeatureKind::Incompatible => "incompatible",
            FeatureKind::Compatible => "compatible",
            FeatureKind::Autoclear => "autoclear",
        };
        names.push(format!("Unknown {kind} feature: {mask:x}"));
    }
    names.join(", ")
}

/// QEMU writes the feature name table where clusters are larger than this.
pub const FEATURE_NAMES_MIN_CLUSTER_BITS: u32 = 12;

/// The feature name table as QEMU 7.2 writes it.
pub fn feature_names() -> Extension {
    use FeatureKind::{Autoclear, Compatible};
    let known = |mask: Incompatible, name| {
        (FeatureKind::Incompatible, mask.bits().trailing_zeros() as u8, name)
    };
    let features = [
        known(Incompatible::DIRTY, "dirty bit"),
        known(Incompatible::CORRUPT, "corrupt bit"),
        known(Incompatible::DATA_FILE, "external data file"),
        known(Incompatible::COMPRESSION, "compression type"),
        known(Incompatible::EXTENDED_L2, "extended L2 entries"),
        (Compatible, 0, "lazy refcounts"),
        (Autoclear, 0, "bitmaps"),
        (Autoclear, 1, "raw external data"),
    ];
    let mut table = Vec::with_capacity(features.len() * FEATURE_LEN);
    for (kind, bit, name) in features {
        let end = table.len() + FEATURE_LEN;
        table.extend([kind as u8, bit]);
        table.extend(name.as_bytes());
        table.resize(end, 0);
    }
    Extension::FeatureNames(table)
}
