//! The parent of a differencing image ([MS-VHDX] 2.6.2.6): the locator that names it, and proves which one it is.
//!
//! A locator is a list of keys and values in UTF-16. Of the paths in it the relative one is followed, below the folder of
//! the image; the others are those of Windows.

use super::bytes::{guid_at, put, u16_at, u32_at};
use super::header::{self, Header};
use crate::block::{Error, Node};
use crate::cow::read_padded;
use crate::format::parent_name::{HINT, below, recorded, text_of, utf16};
use crate::io::{Errno, IoResult, IoVec};
use std::ops::Range;
use std::sync::Arc;
use uuid::{Uuid, uuid};

const KIND: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");
const HEAD_LEN: usize = 20;
const ENTRY_LEN: usize = 12;

const LINKAGE: &str = "parent_linkage";
/// The GUID that the parent had before, while something changes it.
const LINKAGE_TOO: &str = "parent_linkage2";
const RELATIVE: &str = "relative_path";

/// What a locator says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locator {
    /// What the parent's header has as its `data_write`.
    pub linkage: Uuid,
    linkage_too: Option<Uuid>,
    /// Where the value of the first is in the locator, in bytes.
    pub linkage_place: Range<usize>,
    /// As it is stored.
    relative_path: Option<String>,
}

fn invalid(what: impl std::fmt::Display) -> Error {
    Error::new(format!("VHDX parent locator: {what}"))
}

impl Locator {
    /// Reads a locator.
    ///
    /// # Errors
    /// It is of an unknown kind, or makes no sense.
    pub fn parse(bytes: &[u8]) -> Result<Locator, Error> {
        if guid_at(bytes, 0) != KIND || bytes.len() < HEAD_LEN {
            return Err(invalid("it is of an unknown kind"));
        }
        let count = usize::from(u16_at(bytes, 18));
        let entries = bytes[HEAD_LEN..].chunks_exact(ENTRY_LEN);
        if entries.len() < count {
            return Err(invalid(format_args!(
                "{count} entries have no room in {} bytes",
                bytes.len()
            )));
        }
        let (mut linkage, mut linkage_too, mut relative_path) = (None, None, None);
        for entry in entries.take(count) {
            let place = |offset: usize, len: usize| {
                let start = u32_at(entry, offset) as usize;
                start..start + usize::from(u16_at(entry, len))
            };
            let text = |place: Range<usize>| -> Result<String, Error> {
                let bytes = bytes.get(place.clone());
                let bytes =
                    bytes.filter(|_| place.start >= HEAD_LEN && place.len().is_multiple_of(2));
                let bytes = bytes.ok_or_else(|| {
                    invalid(format_args!("text at {:#x} of {} bytes", place.start, place.len()))
                })?;
                text_of(bytes, u16::from_le_bytes).ok_or_else(|| {
                    invalid(format_args!("the text at {:#x} is not UTF-16", place.start))
                })
            };
            let guid = |text: String| {
                let shown = text.escape_debug();
                Uuid::try_parse(&text).map_err(|_| invalid(format_args!("'{shown}' is no GUID")))
            };
            let value = place(4, 10);
            match &*text(place(0, 8))? {
                LINKAGE => linkage = Some((guid(text(value.clone())?)?, value)),
                LINKAGE_TOO => linkage_too = Some(guid(text(value)?)?),
                RELATIVE => relative_path = Some(text(value)?),
                _ => {}
            }
        }
        let (linkage, linkage_place) =
            linkage.ok_or_else(|| invalid(format_args!("there is no {LINKAGE}")))?;
        Ok(Locator { linkage, linkage_too, linkage_place, relative_path })
    }

    /// The name of the parent, as one of a file below the folder of the image.
    ///
    /// # Errors
    /// There is none, or it leads elsewhere.
    pub fn name(&self) -> Result<String, Error> {
        let Some(path) = &self.relative_path else {
            return Err(invalid(format_args!("there is no {RELATIVE}: {HINT}")));
        };
        below(path).ok_or_else(|| {
            invalid(format_args!(
                "'{}' does not lie below the folder of the image: {HINT}",
                path.escape_debug()
            ))
        })
    }

    /// Whether this is the parent that was meant, by the GUID in its header.
    pub fn means(&self, data_write: Uuid) -> bool {
        self.linkage == data_write || self.linkage_too == Some(data_write)
    }
}

/// A GUID as the text that locators have.
pub fn guid_text(guid: Uuid) -> Vec<u8> {
    utf16(&guid.braced().to_string())
}

/// The locator of the parent called `name`, whose header has this GUID.
///
/// # Errors
/// The name is not one that would be followed.
pub fn encode(name: &str, data_write: Uuid) -> Result<Vec<u8>, Error> {
    let path = recorded(name).ok_or_else(|| {
        Error::new(format!(
            "A VHDX image names its parent by a path below its own folder, and '{}' is none",
            name.escape_debug()
        ))
    })?;
    let entries = [(LINKAGE, guid_text(data_write)), (RELATIVE, utf16(&path))];
    let mut bytes = vec![0; HEAD_LEN + entries.len() * ENTRY_LEN];
    put(&mut bytes, 0, &KIND.to_bytes_le());
    put(&mut bytes, 18, &(entries.len() as u16).to_le_bytes());
    for (n, (key, value)) in entries.into_iter().enumerate() {
        for (field, text) in [(0, utf16(key)), (1, value)] {
            let len = u16::try_from(text.len())
                .map_err(|_| Error::new("The name of the parent is too long"))?;
            let (at, place) = (HEAD_LEN + n * ENTRY_LEN, bytes.len() as u32);
            put(&mut bytes, at + 4 * field, &place.to_le_bytes());
            put(&mut bytes, at + 8 + 2 * field, &len.to_le_bytes());
            bytes.extend(text);
        }
    }
    Ok(bytes)
}

/// What is said of a parent of another format.
pub fn is_no_vhdx() -> Error {
    Error::new("The parent of a VHDX image has to be a VHDX image")
}

/// The GUID that says what the guest sees of a disk, if its node is an image of this format.
pub async fn data_write(disk: &Arc<Node>) -> Result<Option<Uuid>, Error> {
    let image = disk.below_filters();
    if !std::ptr::eq(image.driver().entry(), &super::ENTRY) {
        return Ok(None);
    }
    let Some(file) = image.driver().children().first().map(|child| child.node()) else {
        return Ok(None);
    };
    let read = async || -> IoResult<[Vec<u8>; 2]> {
        let mut headers = header::PLACES.map(|_| vec![0; header::LEN]);
        for (bytes, place) in headers.iter_mut().zip(header::PLACES) {
            read_padded(&file, place, &IoVec::from_mut(bytes)).await?;
        }
        Ok(headers)
    };
    let failed = |errno: Errno| Error::os("Could not read the parent's VHDX header", errno);
    let [first, second] = read().await.map_err(failed)?;
    Ok(Some(Header::current(&first, &second)?.1.data_write))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locator_says_what_was_put_into_it() {
        let guid = Uuid::new_v4();
        let bytes = encode("./sub/parent.vhdx", guid).unwrap();
        let locator = Locator::parse(&bytes).unwrap();
        assert_eq!(locator.relative_path.as_deref(), Some(".\\sub\\parent.vhdx"));
        assert_eq!(locator.name().unwrap(), "./sub/parent.vhdx");
        assert!(locator.means(guid) && !locator.means(Uuid::nil()));
        assert_eq!(bytes[locator.linkage_place.clone()], guid_text(guid)[..]);
        for (at, byte) in [(0, 1), (19, 1), (20, 0xff), (20 + 4, 0xff), (20 + 10, 1), (60, b'x')] {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            let error = Locator::parse(&bytes).unwrap_err().to_string();
            assert!(error.starts_with("VHDX parent locator: "), "{at}: {error}");
        }
    }
}
