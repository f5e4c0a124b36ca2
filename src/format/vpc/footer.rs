//! The footer of an image, which describes the disk.
//!
//! It is the last sector of every image, and also the first one of images that grow.

use super::bytes::{id_at, is_sealed, put, seal, u16_at, u32_at, u64_at};
use super::geometry::Geometry;
use crate::block::{Error, Node, SECTOR};
use crate::cow::read_padded;
use crate::io::{Errno, IoVec};
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

pub const LEN: usize = 512;
/// The first bytes.
pub const MAGIC: &[u8; 8] = b"conectix";
/// Bytes of the largest disk: sectors are counted in 32 bits.
pub const MAX_SIZE: u64 = 2040 << 30;
/// Seconds from 1970 to 2000, when the time of the format begins.
const EPOCH: u64 = 946_684_800;

const CHECKSUM: usize = 64;
const VERSION: u32 = 0x0001_0000;
const RESERVED_FEATURE: u32 = 2;

/// Programs whose images have the size that the footer states. Those of any other have the size of their geometry.
const EXACT: [&[u8; 4]; 6] = [b"win ", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"qem2"];
/// How QEMU calls itself in images of either kind. Other programs know these names.
const BY_GEOMETRY: &[u8; 4] = b"qemu";
const BY_SIZE: &[u8; 4] = b"qem2";
const CREATOR_VERSION: u32 = 0x0005_0003;
const CREATOR_SYSTEM: &[u8; 4] = b"Wi2k";

/// How data lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    Fixed = 2,
    Dynamic = 3,
    Differencing = 4,
}

/// How the size of the disk is found, if the user says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeRule {
    Geometry,
    CurrentSize,
}

/// A footer that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    pub kind: Kind,
    /// Where the header of a dynamic image is, in bytes.
    pub header_at: u64,
    pub id: Uuid,
    geometry: Geometry,
    current_size: u64,
    creator: [u8; 4],
    /// As it is stored.
    pub bytes: [u8; LEN],
}

impl Footer {
    /// Whether a file that begins so is meant to be an image of this format that grows.
    pub fn probe(head: &[u8]) -> bool {
        head.starts_with(MAGIC)
    }

    /// Reads a footer.
    ///
    /// # Errors
    /// In QEMU's words, where it has some.
    pub fn parse(bytes: &[u8; LEN]) -> Result<Footer, Error> {
        if !Footer::probe(bytes) {
            return Err(Error::new("invalid VPC image"));
        }
        if !is_sealed(bytes, CHECKSUM) {
            return Err(Error::new("Incorrect header checksum"));
        }
        let version = u32_at(bytes, 12);
        if version >> 16 != VERSION >> 16 {
            let (major, minor) = (version >> 16, version & 0xffff);
            return Err(Error::new(format!(
                "VHD footer: version {major}.{minor} is not supported"
            )));
        }
        let kind = match u32_at(bytes, 60) {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => {
                return Err(Error::new(format!("VHD footer: disk type {other} is not supported")));
            }
        };
        Ok(Footer {
            kind,
            header_at: u64_at(bytes, 16),
            id: Uuid::from_bytes(id_at(bytes, 68)),
            geometry: Geometry { cylinders: u16_at(bytes, 56), heads: bytes[58], track: bytes[59] },
            current_size: u64_at(bytes, 48),
            creator: id_at(bytes, 28)[..4].try_into().unwrap_or_default(),
            bytes: *bytes,
        })
    }

    /// The footer of a new image, with an identifier that no other image has.
    pub fn of_new(kind: Kind, size: u64, geometry: Geometry, is_exact: bool) -> Footer {
        let header_at = if kind == Kind::Fixed { u64::MAX } else { LEN as u64 };
        let id = Uuid::new_v4();
        let creator = if is_exact { *BY_SIZE } else { *BY_GEOMETRY };
        let mut bytes = [0; LEN];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, &RESERVED_FEATURE.to_be_bytes());
        put(&mut bytes, 12, &VERSION.to_be_bytes());
        put(&mut bytes, 16, &header_at.to_be_bytes());
        put(&mut bytes, 24, &now().to_be_bytes());
        put(&mut bytes, 28, &creator);
        put(&mut bytes, 32, &CREATOR_VERSION.to_be_bytes());
        put(&mut bytes, 36, CREATOR_SYSTEM);
        put(&mut bytes, 40, &size.to_be_bytes());
        put(&mut bytes, 48, &size.to_be_bytes());
        put(&mut bytes, 56, &geometry.cylinders.to_be_bytes());
        put(&mut bytes, 58, &[geometry.heads, geometry.track]);
        put(&mut bytes, 60, &(kind as u32).to_be_bytes());
        put(&mut bytes, 68, id.as_bytes());
        seal(&mut bytes, CHECKSUM);
        Footer { kind, header_at, id, geometry, current_size: size, creator, bytes }
    }

    /// Bytes of the disk.
    ///
    /// # Errors
    /// It is too large for the format.
    pub fn disk_size(&self, rule: Option<SizeRule>) -> Result<u64, Error> {
        let is_exact = match rule {
            Some(rule) => rule == SizeRule::CurrentSize,
            None => EXACT.contains(&&self.creator),
        };
        let size = match is_exact || self.geometry == Geometry::MAX {
            true => self.current_size / SECTOR * SECTOR,
            false => self.geometry.sectors() * SECTOR,
        };
        match size > MAX_SIZE {
            true => Err(Error::new(format!(
                "VHD footer: the disk has {size} bytes, more than 2040 GiB"
            ))
            .with_errno(Errno(libc::EFBIG))),
            false => Ok(size),
        }
    }
}

/// Seconds since 2000.
pub fn now() -> u32 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since_1970.as_secs().saturating_sub(EPOCH) as u32
}

/// The footers of an image.
pub struct Found {
    /// The one that counts.
    pub footer: Footer,
    /// The copy at the head of an image that grows is whole.
    pub head_is_whole: bool,
    /// That at the end of the file is whole.
    pub tail_is_whole: bool,
}

/// Reads the footers of a file. The one at the end tells which kind of image it is: what lies at the head of a fixed image
/// is the guest's.
///
/// # Errors
/// Neither is whole, or I/O failed.
pub async fn read(file: &Node) -> Result<Found, Error> {
    let len = file.driver().len();
    if len < LEN as u64 {
        return Err(Error::new("File too small for a VHD header"));
    }
    let (mut head, mut tail) = ([0; LEN], [0; LEN]);
    let read = async |at: u64, bytes: &mut [u8; LEN]| {
        let read = read_padded(file, at, &IoVec::from_mut(bytes)).await;
        read.map_err(|errno| Error::os("Unable to read VHD header", errno))
    };
    read(0, &mut head).await?;
    let tail_at = len - LEN as u64;
    read(tail_at, &mut tail).await?;
    let (head, mut tail) = (Footer::parse(&head), Footer::parse(&tail));
    if tail.is_err() && !len.is_multiple_of(SECTOR) {
        // Early versions of Virtual PC leave out the last byte, which is reserved.
        let mut bytes = [0; LEN];
        read(len / SECTOR * SECTOR, &mut bytes).await?;
        tail = Footer::parse(&bytes);
    }
    let grows = |footer: &Footer| footer.kind != Kind::Fixed;
    match (head, tail) {
        (head, Ok(tail)) if !grows(&tail) => {
            let is_all = tail.current_size.checked_add(LEN as u64) == Some(len);
            match head {
                Ok(head) if grows(&head) && !is_all => {
                    Ok(Found { footer: head, head_is_whole: true, tail_is_whole: false })
                }
                _ => Ok(Found { footer: tail, head_is_whole: false, tail_is_whole: true }),
            }
        }
        (Ok(head), tail) if grows(&head) => {
            let tail_is_whole = tail.is_ok_and(|tail| tail.bytes == head.bytes);
            Ok(Found { footer: head, head_is_whole: true, tail_is_whole })
        }
        (_, Ok(tail)) => Ok(Found { footer: tail, head_is_whole: false, tail_is_whole: true }),
        (Ok(_), Err(error)) | (Err(error), Err(_)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(size: u64, geometry: Geometry, creator: &[u8; 4]) -> Footer {
        let mut bytes = Footer::of_new(Kind::Dynamic, size, geometry, false).bytes;
        put(&mut bytes, 28, creator);
        seal(&mut bytes, CHECKSUM);
        Footer::parse(&bytes).unwrap()
    }

    #[test]
    fn the_program_that_made_an_image_decides_how_large_the_disk_is() {
        let geometry = Geometry { cylinders: 10, heads: 4, track: 17 };
        let (by_geometry, size) = (10 * 4 * 17 * 512, 300_000);
        for creator in [b"win ", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"qem2"] {
            assert_eq!(footer(size, geometry, creator).disk_size(None).unwrap(), size / 512 * 512);
        }
        for creator in [b"vpc ", b"vs  ", b"qemu", b"vbox"] {
            let footer_of = |geometry| footer(size, geometry, creator);
            assert_eq!(footer_of(geometry).disk_size(None).unwrap(), by_geometry);
            assert_eq!(footer_of(Geometry::MAX).disk_size(None).unwrap(), size / 512 * 512);
            let asked = footer_of(geometry).disk_size(Some(SizeRule::CurrentSize));
            assert_eq!(asked.unwrap(), size / 512 * 512);
        }
        let exact = footer(size, geometry, b"win ");
        assert_eq!(exact.disk_size(Some(SizeRule::Geometry)).unwrap(), by_geometry);
        assert!(footer(MAX_SIZE + 512, geometry, b"win ").disk_size(None).is_err());
    }

    #[test]
    fn a_damaged_footer_is_refused() {
        let whole = Footer::of_new(Kind::Fixed, 1 << 20, Geometry::MAX, true);
        assert_eq!(Footer::parse(&whole.bytes).unwrap(), whole);
        for at in [0, 13, 60, 63, 64, 300] {
            let mut bytes = whole.bytes;
            bytes[at] ^= 0x10;
            assert!(Footer::parse(&bytes).is_err(), "{at}");
        }
        for (at, field) in [(60, 5u32), (12, 0x0002_0000)] {
            let mut bytes = whole.bytes;
            put(&mut bytes, at, &field.to_be_bytes());
            seal(&mut bytes, CHECKSUM);
            let error = Footer::parse(&bytes).unwrap_err().to_string();
            assert!(error.starts_with("VHD footer: "), "{error}");
        }
    }
}
