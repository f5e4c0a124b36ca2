//! The trailer of a UDIF image ("koly"): 512 bytes of big-endian fields, at the end of the file or a little before it.

use crate::block::{Error, Node, SECTOR};
use crate::cow::read_padded;
use crate::io::IoVec;
use std::ops::Range;

const MAGIC: &[u8] = b"koly";
const LEN: usize = 512;
/// So much may follow the trailer, in bytes.
const MOST_BEHIND: usize = 511;
/// How the file of an encrypted image begins.
const ENCRYPTED: &[u8] = b"encrcdsa";
/// Bytes of the resources at most: tables of over a million chunks.
const MAX_RESOURCES: u64 = 64 << 20;

/// What the trailer says.
#[derive(Debug, PartialEq, Eq)]
pub struct Trailer {
    /// What offsets of data count from, in bytes of the file.
    pub data_fork: u64,
    pub resources: Resources,
    /// The length of the disk, in bytes.
    pub size: u64,
}

/// Where the tables of chunks are, in bytes of the file.
#[derive(Debug, PartialEq, Eq)]
pub enum Resources {
    /// A resource fork as Mac OS has them.
    Fork(Range<u64>),
    /// A property list in XML.
    List(Range<u64>),
}

/// Finds and reads the trailer.
///
/// # Errors
/// In QEMU's words, where it has them.
pub async fn read_trailer(file: &Node) -> Result<Trailer, Error> {
    // Not rounded up to whole sectors.
    let len = file.driver().len();
    if len < LEN as u64 {
        return Err(Error::new("dmg file must be at least 512 bytes long"));
    }
    let failed = |errno| Error::os("Could not read UDIF trailer", errno);
    let mut end = vec![0; (len as usize).min(LEN + MOST_BEHIND)];
    let start = len - end.len() as u64;
    read_padded(file, start, &IoVec::from_mut(&mut end)).await.map_err(failed)?;
    if let Some(at) = find(&end) {
        let bytes = end[at..].first_chunk().unwrap_or(&[0; LEN]);
        return parse(bytes, start + at as u64);
    }
    let mut head = [0; ENCRYPTED.len()];
    read_padded(file, 0, &IoVec::from_mut(&mut head)).await.map_err(failed)?;
    Err(Error::new(match head == ENCRYPTED {
        true => "Encrypted dmg images are not supported",
        false => "Could not locate UDIF trailer in dmg file",
    }))
}

/// Where the trailer begins: as near to the end as it can be.
fn find(end: &[u8]) -> Option<usize> {
    (0..=end.len().checked_sub(LEN)?).rev().find(|&at| end[at..].starts_with(MAGIC))
}

/// `at`: where the trailer begins in the file, in bytes.
fn parse(bytes: &[u8; LEN], at: u64) -> Result<Trailer, Error> {
    let u64_at = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 8]));
    let place = |what: &str, offset: u64, len: u64| {
        if len > MAX_RESOURCES {
            return Err(Error::new(format!(
                "The {what} has {len} bytes, more than {MAX_RESOURCES}"
            )));
        }
        match offset.checked_add(len) {
            Some(end) if end <= at => Ok(offset..end),
            _ => Err(Error::new(format!(
                "The {what} is said to be {len} bytes at {offset:#x}, past the trailer at {at:#x}"
            ))),
        }
    };
    let (fork_len, list_len) = (u64_at(48), u64_at(224));
    let resources = match (fork_len, list_len) {
        (0, 0) => {
            return Err(Error::new("dmg file has neither a resource fork nor a property list"));
        }
        (0, _) => Resources::List(place("property list", u64_at(216), list_len)?),
        _ => Resources::Fork(place("resource fork", u64_at(40), fork_len)?),
    };
    let sectors = u64_at(492);
    let size = sectors.checked_mul(SECTOR).filter(|&size| i64::try_from(size).is_ok());
    let Some(size) = size else {
        return Err(Error::new(format!("The sector count {sectors} is too large")));
    };
    Ok(Trailer { data_fork: u64_at(24), resources, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trailer_is_found_where_something_follows_it() {
        for behind in [0, 1, 100, MOST_BEHIND] {
            let mut end = [vec![9; MOST_BEHIND - behind], MAGIC.to_vec()].concat();
            end.resize(LEN + MOST_BEHIND, 7);
            assert_eq!(find(&end), Some(MOST_BEHIND - behind));
        }
        assert_eq!(find(&[0; 100]), None);
        assert_eq!(find(&[[0; LEN].as_slice(), MAGIC].concat()), None, "it has no room");
    }
}
