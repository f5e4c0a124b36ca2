//! The format extension: a cluster of features, of which dirty bitmaps are known (QEMU's docs/interop/parallels).
//!
//! It is read and shown, and dropped when the image is written. One that makes no sense is as good as none: the image's data
//! does not depend on it.

use super::header::Header;
use crate::block::{Error, Node, SECTOR};
use crate::cow::read_padded;
use crate::io::{AlignedBuf, Errno};
use crate::options::{Map, Value};
use md5::{Digest, Md5};
use std::collections::BTreeSet;

const MAGIC: u64 = 0xab23_4cef_23dc_ea87;
/// The identifiers of features: the last one, and dirty bitmaps.
const END: u64 = 0;
const BITMAP: u64 = 0x2038_5fae_252c_b34a;
/// An image with a feature that is not known and has this flag must not be changed.
const NECESSARY: u64 = 1;
/// Bytes before the features, of which the magic and the checksum are not summed up; bytes of the header of each.
const HEAD: usize = 24;
const FEATURE_HEAD: usize = 24;
/// Bytes of a bitmap's fields before its table.
const BITMAP_HEAD: usize = 32;
/// Largest cluster whose extension is read: what is known of one fits into far less.
const MOST: u64 = 64 << 20;

/// What an extension has.
#[derive(Debug, Default, PartialEq)]
pub struct Extension {
    pub bitmaps: Vec<Bitmap>,
    /// A feature that is not known, without which the image must not be changed.
    pub needed: Option<u64>,
    /// There are features that are not known, which may have clusters in the file.
    pub has_unknown: bool,
    /// Where its clusters are in the file, its own among them, in bytes.
    pub places: Vec<u64>,
}

/// A dirty bitmap.
#[derive(Clone, Debug, PartialEq)]
pub struct Bitmap {
    /// Its identifier.
    pub name: String,
    /// Bytes of the disk for each bit.
    pub granularity: u64,
}

impl Bitmap {
    /// As listings show it.
    pub fn to_value(&self) -> Value {
        let mut map = Map::new();
        map.insert("name", Value::Str(self.name.clone()));
        map.insert("granularity", Value::from(self.granularity));
        Value::Map(map)
    }
}

/// The extension that the header of an image names, if it names one.
///
/// # Errors
/// It makes no sense, in QEMU's words where it has some, or it cannot be read.
pub async fn read(file: &Node, header: &Header) -> Result<Option<Extension>, Error> {
    if header.state.extension == 0 {
        return Ok(None);
    }
    let (cluster, file_len) = (header.cluster_size(), file.driver().len());
    let place = header.state.extension.checked_mul(SECTOR);
    let place =
        place.filter(|&at| at >= header.catalogue_end() && at < file_len).ok_or_else(|| {
            Error::new(format!(
                "The Format Extension at sector {:#x} is outside the image",
                header.state.extension
            ))
        })?;
    if cluster > MOST {
        return Err(Error::new(format!(
            "A Format Extension in a cluster of {cluster} bytes is not read: {MOST} is the most"
        )));
    }
    let failed = |errno| Error::os("Could not read the Format Extension", errno);
    let mut bytes = AlignedBuf::new(cluster as usize, 4096).ok_or_else(|| failed(Errno::ENOMEM))?;
    read_padded(file, place, &bytes.io_vec().slice(0, cluster)).await.map_err(failed)?;
    let mut extension = parse(&bytes[..cluster as usize], header, file_len)?;
    extension.places.push(place);
    Ok(Some(extension))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads the cluster of an extension.
fn parse(bytes: &[u8], header: &Header, file_len: u64) -> Result<Extension, Error> {
    let too_long = || Error::new("Feature data_size exceedes Format Extension cluster");
    let magic = u64_at(bytes, 0).unwrap_or(0);
    if magic != MAGIC {
        return Err(Error::new(format!(
            "Wrong parallels Format Extension magic: {magic:#x}, expected: {MAGIC:#x}"
        )));
    }
    let rest = bytes.get(HEAD..).ok_or_else(too_long)?;
    if bytes.get(8..HEAD) != Some(&Md5::digest(rest)[..]) {
        return Err(Error::new(
            "Wrong checksum in Format Extension header. Format extension is corrupted.",
        ));
    }
    let mut found = Extension::default();
    let mut names = BTreeSet::new();
    let mut at = 0;
    loop {
        let feature = rest.get(at..).unwrap_or(&[]);
        let fields = (u64_at(feature, 0), u64_at(feature, 8), u32_at(feature, 16));
        let (Some(magic), Some(flags), Some(len)) = fields else { return Err(too_long()) };
        if magic == END {
            return Ok(found);
        }
        let end = FEATURE_HEAD.saturating_add(len as usize);
        let data = feature.get(FEATURE_HEAD..end).ok_or_else(too_long)?;
        if magic == BITMAP {
            let bitmap = bitmap(data, header, file_len, &mut found.places)?;
            if !names.insert(bitmap.name.clone()) {
                return Err(Error::new(format!("Bitmap already exists: {}", bitmap.name)));
            }
            found.bitmaps.push(bitmap);
        } else {
            found.has_unknown = true;
            found.needed = found.needed.or((flags & NECESSARY != 0).then_some(magic));
        }
        at += end.next_multiple_of(8);
    }
}

/// Reads the data of a dirty bitmap; its clusters come to `places`.
fn bitmap(
    data: &[u8],
    header: &Header,
    file_len: u64,
    places: &mut Vec<u64>,
) -> Result<Bitmap, Error> {
    let fields = (u64_at(data, 0), data.get(8..24), u32_at(data, 24), u32_at(data, 28));
    let (Some(sectors), Some(id), Some(granularity), Some(entries)) = fields else {
        return Err(Error::new(format!(
            "Too small Bitmap Feature area in Parallels Format Extension: {} bytes, expected at least {BITMAP_HEAD} \
             bytes",
            data.len()
        )));
    };
    let disk = header.size / SECTOR;
    if sectors != disk {
        return Err(Error::new(format!(
            "Bitmap size (in sectors) {sectors} differs from disk size in sectors {disk}"
        )));
    }
    if !granularity.is_power_of_two() {
        return Err(Error::new(format!(
            "The granularity of a bitmap is no power of two: {granularity} sectors"
        )));
    }
    let table = data.get(BITMAP_HEAD..).unwrap_or(&[]).chunks_exact(8);
    if table.len() < entries as usize {
        return Err(Error::new("Bitmaps feature corrupted: l1 table exceeds extension data_size"));
    }
    // Bits of a cluster.
    let expected = sectors.div_ceil(granularity.into()).div_ceil(header.cluster_size() * 8);
    if u64::from(entries) != expected {
        return Err(Error::new(format!(
            "Bitmap table size {entries} does not correspond to bitmap size and cluster size. Expected {expected}"
        )));
    }
    let name = uuid::Uuid::from_slice(id).unwrap_or_default().hyphenated().to_string();
    for entry in table.take(entries as usize).filter_map(|entry| u64_at(entry, 0)) {
        // All of its bits are clear, or set.
        if entry <= 1 {
            continue;
        }
        let place = entry.checked_mul(SECTOR);
        let inside = place.filter(|&at| at >= header.catalogue_end() && at < file_len);
        places.push(inside.ok_or_else(|| {
            Error::new(format!("A cluster of the bitmap {name} is outside the image"))
        })?);
    }
    Ok(Bitmap { name, granularity: u64::from(granularity) * SECTOR })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: usize = 4096;

    fn header() -> Header {
        Header::for_new(64 << 20, CLUSTER as u64).unwrap()
    }

    /// A cluster with features: their identifiers, flags and data.
    fn cluster(features: &[(u64, u64, Vec<u8>)]) -> Vec<u8> {
        let mut rest = Vec::new();
        for (magic, flags, data) in features {
            rest.extend([*magic, *flags, data.len() as u64].map(u64::to_le_bytes).concat());
            rest.extend(data);
            rest.resize(rest.len().next_multiple_of(8), 0);
        }
        rest.resize(CLUSTER - HEAD, 0);
        [&MAGIC.to_le_bytes()[..], &Md5::digest(&rest)[..], &rest].concat()
    }

    fn bitmap(sectors: u64, granularity: u32, table: &[u64]) -> Vec<u8> {
        let id: Vec<u8> = (1..=16).collect();
        let fields = [granularity, table.len() as u32].map(u32::to_le_bytes).concat();
        let table: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        [&sectors.to_le_bytes()[..], &id, &fields, &table].concat()
    }

    fn read(bytes: &[u8]) -> Result<Extension, String> {
        parse(bytes, &header(), 1 << 20).map_err(|error| error.to_string())
    }

    #[test]
    fn bitmaps_are_read_and_features_that_are_needed_are_told() {
        let sectors = (64 << 20) / SECTOR;
        let features = [
            (BITMAP, 0, bitmap(sectors, 8, &[2040])),
            (7, 2, vec![1, 2, 3]),
            (9, NECESSARY, vec![]),
        ];
        let found = read(&cluster(&features)).unwrap();
        let name = "01020304-0506-0708-090a-0b0c0d0e0f10".to_owned();
        assert_eq!(found.bitmaps, [Bitmap { name, granularity: 4096 }]);
        assert_eq!((found.needed, found.places), (Some(9), vec![2040 * SECTOR]));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let sectors = (64 << 20) / SECTOR;
        let one = |data: Vec<u8>| cluster(&[(BITMAP, 0, data)]);
        let mut torn = one(bitmap(sectors, 8, &[1]));
        torn[100] ^= 1;
        let mut long = cluster(&[]);
        long[HEAD..HEAD + 24]
            .copy_from_slice(&[5, 0, u64::from(u32::MAX)].map(u64::to_le_bytes).concat());
        let sum = Md5::digest(&long[HEAD..]);
        long[8..HEAD].copy_from_slice(&sum);
        for (bytes, wanted) in [
            (vec![0; CLUSTER], "magic: 0x0"),
            (torn, "checksum"),
            (long, "data_size"),
            (one(vec![0; 8]), "Too small"),
            (one(bitmap(sectors + 1, 8, &[1])), "differs from disk size"),
            (one(bitmap(sectors, 3, &[1])), "no power of two"),
            (one(bitmap(sectors, 8, &[])), "Expected 1"),
            (one(bitmap(sectors, 8, &[1 << 60])), "outside the image"),
            (one(bitmap(sectors, 8, &[2])), "outside the image"),
        ] {
            let error = read(&bytes).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
