//! The parent of a differencing image: the locators that name it, and the identifier that proves it.
//!
//! The locators have the forms of several platforms.
//!
//! Relative names are followed, below the folder of the image; absolute ones are those of another machine.

use super::footer;
use super::header::{Header, LOCATOR_COUNT, Locator};
use crate::block::{Error, Node};
use crate::cow::read_padded;
use crate::format::parent_name::{HINT, below, recorded, text_of, utf16};
use crate::io::IoVec;
use std::sync::Arc;
use uuid::Uuid;

/// A path in UTF-16, little-endian, from the folder of the image on.
const RELATIVE: &[u8; 4] = b"W2ru";
/// The same in single bytes, which early programs have written.
const RELATIVE_OLD: &[u8; 4] = b"Wi2r";
/// An URL of a file in UTF-8.
const URL: &[u8; 4] = b"MacX";
/// Bytes of a name that is read.
const MOST_NAME: u32 = 64 << 10;

fn invalid(what: impl std::fmt::Display) -> Error {
    Error::new(format!("VHD parent locator: {what}"))
}

/// The text of a locator.
fn text(code: [u8; 4], bytes: &[u8]) -> Option<String> {
    let text = match &code {
        RELATIVE => text_of(bytes, u16::from_le_bytes)?,
        _ => String::from_utf8(bytes.to_vec()).ok()?,
    };
    let text = text.trim_end_matches('\0');
    Some(
        match &code {
            URL => text.strip_prefix("file://").unwrap_or(text),
            _ => text,
        }
        .to_owned(),
    )
}

/// The name of the parent that an image records, as one of a file below the folder of the image.
///
/// # Errors
/// I/O failed, there is none, or each leads elsewhere.
pub async fn name(file: &Node, header: &Header) -> Result<String, Error> {
    let mut refused = None;
    for wanted in [RELATIVE, URL, RELATIVE_OLD] {
        for locator in header.locators.iter().filter(|locator| locator.code == *wanted) {
            let Locator { code, len, offset } = *locator;
            let code_name = code.escape_ascii();
            let is_inside =
                offset.checked_add(len.into()).is_some_and(|end| end <= file.driver().len());
            if len > MOST_NAME || !is_inside {
                return Err(invalid(format_args!("{code_name} at {offset:#x} of {len} bytes")));
            }
            let mut bytes = vec![0; len as usize];
            if !bytes.is_empty() {
                let read = read_padded(file, offset, &IoVec::from_mut(&mut bytes)).await;
                read.map_err(|errno| Error::os("Could not read a VHD parent locator", errno))?;
            }
            let text = text(code, &bytes)
                .ok_or_else(|| invalid(format_args!("the text of {code_name} is none")))?;
            match below(&text) {
                Some(name) => return Ok(name),
                None => refused = refused.or(Some(text)),
            }
        }
    }
    let plain = header.parent_name.as_deref().and_then(|name| name.rsplit(['\\', '/']).next());
    match (refused, plain.and_then(below)) {
        (Some(path), _) => Err(invalid(format_args!(
            "'{}' does not lie below the folder of the image: {HINT}",
            path.escape_debug()
        ))),
        // A parent beside the image.
        (None, Some(name)) => Ok(name),
        (None, None) => Err(invalid(format_args!("there is no relative path: {HINT}"))),
    }
}

/// What a new image has of its parent called `name`, with this identifier: what the header says, and the text of its
/// locator, which goes to `at`.
///
/// # Errors
/// The name is not one that would be followed.
pub fn encode(header: &mut Header, name: &str, id: Uuid, at: u64) -> Result<Vec<u8>, Error> {
    let path = recorded(name).ok_or_else(|| {
        Error::new(format!(
            "A VHD image names its parent by a path below its own folder, and '{}' is none",
            name.escape_debug()
        ))
    })?;
    let bytes = utf16(&path);
    let too_long = || Error::new("The name of the parent is too long");
    let len = u32::try_from(bytes.len()).ok().filter(|&len| len <= MOST_NAME);
    let locator = Locator { code: *RELATIVE, len: len.ok_or_else(too_long)?, offset: at };
    header.parent_id = id;
    header.parent_time = footer::now();
    header.parent_name = name.rsplit('/').next().map(str::to_owned);
    header.locators = [Locator::default(); LOCATOR_COUNT];
    header.locators[0] = locator;
    Ok(bytes)
}

/// The identifier of a disk, if its node is an image of this format.
///
/// # Errors
/// I/O failed.
pub async fn id_of(disk: &Arc<Node>) -> Result<Option<Uuid>, Error> {
    let image = disk.below_filters();
    if !std::ptr::eq(image.driver().entry(), &super::ENTRY) {
        return Ok(None);
    }
    let Some(file) = image.driver().children().first().map(|child| child.node()) else {
        return Ok(None);
    };
    Ok(Some(footer::read(&file).await?.footer.id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_in_the_form_of_each_platform() {
        assert_eq!(text(*RELATIVE, &utf16(".\\ä.vhd\0")).as_deref(), Some(".\\ä.vhd"));
        assert_eq!(text(*URL, b"file://./a.vhd\0").as_deref(), Some("./a.vhd"));
        assert_eq!(text(*RELATIVE_OLD, b"a.vhd").as_deref(), Some("a.vhd"));
        assert_eq!(text(*RELATIVE, b"odd"), None);
        assert_eq!(text(*RELATIVE_OLD, &[0xff]), None);
    }
}
