//! Names of parents, as the formats of Microsoft record them: paths with backslashes, in UTF-16.

use crate::options::filename::is_below;

/// What an error about a recorded name advises.
pub const HINT: &str = "name the parent with the option 'backing'";

/// A recorded path as the name of a file below the folder of the image; none if it leads elsewhere.
pub fn below(path: &str) -> Option<String> {
    let name = path.replace('\\', "/");
    is_below(&name).then_some(name)
}

/// The path to record for the parent called `name`; none if [`below`] would not follow it.
pub fn recorded(name: &str) -> Option<String> {
    let is_followed = is_below(name) && !name.contains('\\');
    is_followed
        .then(|| format!(".\\{}", name.strip_prefix("./").unwrap_or(name).replace('/', "\\")))
}

/// A text in UTF-16, little-endian.
pub fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// The text of bytes in UTF-16, whose units `unit` reads; none if they are not that.
pub fn text_of(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Option<String> {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let units: Vec<u16> = pairs.iter().map(|&pair| unit(pair)).collect();
    String::from_utf16(&units).ok().filter(|_| rest.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_lies_below_the_folder_of_the_image() {
        for (path, name) in [
            (".\\a.vhdx", Some("./a.vhdx")),
            ("sub\\a b.vhdx", Some("sub/a b.vhdx")),
            ("..\\a.vhdx", None),
            ("sub\\..\\..\\a.vhdx", None),
            ("\\dev\\sda", None),
            ("/etc/passwd", None),
            ("nbd:localhost", None),
            ("json:{}", None),
            ("c:\\a.vhdx", None),
            ("", None),
        ] {
            assert_eq!(below(path).as_deref(), name, "{path}");
            assert!(name.is_some() || recorded(path).is_none(), "{path}");
        }
        assert_eq!(recorded("./sub/a.vhd").as_deref(), Some(".\\sub\\a.vhd"));
    }

    #[test]
    fn texts_are_whole_units_of_utf_16() {
        let text = "Straße \u{1f4be}";
        assert_eq!(text_of(&utf16(text), u16::from_le_bytes).as_deref(), Some(text));
        assert_eq!(text_of(b"abc", u16::from_le_bytes), None);
        assert_eq!(text_of(&[0xd8, 0], u16::from_be_bytes), None);
    }
}
