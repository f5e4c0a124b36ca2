//! Names that are not UTF-8, converted to text and back.
//!
//! The rule held here: nothing is lost. A byte that is part of no character stands in text as a character of its
//! own, from a range for private use; should a name have such a character itself, its bytes stand so too.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The byte 0 stands in text as this; only bytes from 0x80 on ever do.
const FIRST: u32 = 0x10EE00;

/// A stored name as QEMU reads it: it ends before the first NUL byte.
pub fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Any bytes as text.
pub fn text_of(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let stand_in = |byte: u8| char::from_u32(FIRST + u32::from(byte));
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match byte_of(c) {
                None => text.push(c),
                Some(_) => text.extend(c.encode_utf8(&mut [0; 4]).bytes().filter_map(stand_in)),
            }
        }
        text.extend(chunk.invalid().iter().copied().filter_map(stand_in));
    }
    text
}

/// The same of a name that the system gave.
pub fn text_of_name(name: &OsStr) -> String {
    text_of(name.as_bytes())
}

/// The bytes that text stands for.
pub fn bytes_of(text: &str) -> Cow<'_, [u8]> {
    if is_plain(text) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        match byte_of(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend(c.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    Cow::Owned(bytes)
}

/// The path that text stands for.
pub fn path_of(text: &str) -> Cow<'_, Path> {
    match bytes_of(text) {
        Cow::Borrowed(bytes) => Cow::Borrowed(Path::new(OsStr::from_bytes(bytes))),
        Cow::Owned(bytes) => Cow::Owned(PathBuf::from(OsString::from_vec(bytes))),
    }
}

/// Whether each character of the text stands for itself.
pub fn is_plain(text: &str) -> bool {
    !text.chars().any(|c| byte_of(c).is_some())
}

/// The byte that a character stands for, if it does.
pub(super) fn byte_of(c: char) -> Option<u8> {
    let byte = u8::try_from(u32::from(c).checked_sub(FIRST)?).ok()?;
    (byte >= 0x80).then_some(byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_come_back_from_text() {
        let private = "\u{10EEFF}\u{10EE80}\u{10EE7F}".as_bytes();
        for bytes in
            [&b""[..], b"plain", "é€😀".as_bytes(), b"a\xff\x80b\xc3", private, b"\xf4\x8e\xbb"]
        {
            let text = text_of(bytes);
            assert_eq!(&*bytes_of(&text), bytes, "{text:?}");
            assert_eq!(path_of(&text).as_os_str().as_bytes(), bytes);
        }
        assert_eq!(text_of("é".as_bytes()), "é");
        assert!(is_plain("é") && !is_plain(&text_of(b"\xe9")));
    }
}
