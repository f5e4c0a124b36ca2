//! The encodings of descriptors, for the names of files in them.
//!
//! A name that is UTF-8 is taken as it is, whatever the text says of itself: so are those of descriptors that were made or
//! edited where they are now. Of other encodings those are known that VMware's Windows programs write most; a name in
//! any other is the bytes that it is. A whole text in UTF-16, as some editors store it, is read.

use crate::options::bytes;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// The bytes of the name.
    Plain,
    /// windows-1252, of which ISO 8859-1 is a part.
    Windows1252,
}

/// What windows-1252 has from 0x80 to 0x9f; a byte that is no character is that control character.
const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}',
    '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

impl Encoding {
    /// The encoding of this name.
    pub fn named(name: &[u8]) -> Encoding {
        let is_one = |known: &&str| name.eq_ignore_ascii_case(known.as_bytes());
        match ["windows-1252", "cp1252", "iso-8859-1", "latin1"].iter().any(is_one) {
            true => Encoding::Windows1252,
            false => Encoding::Plain,
        }
    }

    /// A name as one of files here.
    pub fn decode(self, name: &[u8]) -> String {
        let is_utf8 = std::str::from_utf8(name).is_ok();
        match self {
            Encoding::Windows1252 if !is_utf8 => {
                name.iter().map(|&byte| windows_1252(byte)).collect()
            }
            _ => bytes::text_of(name),
        }
    }
}

fn windows_1252(byte: u8) -> char {
    match byte {
        0x80..0xa0 => WINDOWS_1252[usize::from(byte - 0x80)],
        byte => char::from(byte),
    }
}

/// A text in UTF-16, which begins with a mark of its byte order, as UTF-8.
pub fn from_utf16(bytes: &[u8]) -> Option<Vec<u8>> {
    let unit: fn([u8; 2]) -> u16 = match bytes.first_chunk()? {
        [0xff, 0xfe] => u16::from_le_bytes,
        [0xfe, 0xff] => u16::from_be_bytes,
        _ => return None,
    };
    let units = bytes[2..].as_chunks().0.iter().map(|&pair| unit(pair));
    let text: String = char::decode_utf16(units).map(|c| c.unwrap_or('\u{fffd}')).collect();
    Some(text.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_decoded_where_the_text_says_how() {
        let latin = Encoding::named(b"Windows-1252");
        assert_eq!(latin.decode(b"gr\xfc\xdfe \x80.vmdk"), "grüße €.vmdk");
        assert_eq!(latin.decode("grüße".as_bytes()), "grüße");
        let other = Encoding::named(b"GBK");
        assert_eq!(*bytes::bytes_of(&other.decode(b"\xc4\xe3.vmdk")), *b"\xc4\xe3.vmdk");
    }
}
