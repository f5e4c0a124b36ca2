//! The descriptor: the text that says what a disk consists of, and which contents it has.
//!
//! It is bytes in some encoding, one statement a line. What is not understood stays as it is when the text is changed.

use super::encoding::{Encoding, from_utf16};
use crate::block::{Error, SECTOR};
use crate::options::bytes;
use std::ops::Range;

/// Longest text, in bytes.
pub const LIMIT: u64 = 1 << 20;
/// Most extents of a disk.
pub const MOST_EXTENTS: usize = 4096;
/// The content ID of a parent that there is not.
pub const NO_PARENT: u32 = u32::MAX;

const TITLE: &[u8] = b"# Disk DescriptorFile";
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What an extent may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    ReadWrite,
    ReadOnly,
    None,
}

/// What an extent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The disk's bytes as they are.
    Flat,
    Vmfs,
    /// Grains behind tables.
    Sparse,
    VmfsSparse,
    SeSparse,
    /// Zeroes, in no file.
    Zero,
}

impl Kind {
    const ALL: [(&'static str, Kind); 6] = [
        ("FLAT", Kind::Flat),
        ("VMFS", Kind::Vmfs),
        ("SPARSE", Kind::Sparse),
        ("VMFSSPARSE", Kind::VmfsSparse),
        ("SESPARSE", Kind::SeSparse),
        ("ZERO", Kind::Zero),
    ];

    /// As in the text.
    pub fn name(self) -> &'static str {
        Kind::ALL.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

/// A line that describes an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    pub access: Access,
    pub kind: Kind,
    /// Bytes of the disk.
    pub len: u64,
    /// The name of its file, as it is to be opened; none of zeroes.
    pub name: String,
    /// Where its bytes begin in the file.
    pub offset: u64,
}

/// What the text says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub cid: u32,
    pub parent_cid: u32,
    pub create_type: String,
    /// The name of the parent, as it is to be opened.
    pub parent: Option<String>,
}

/// Whether a file that begins so is meant to be a descriptor: it begins with its title, or the first line that is no
/// comment is a version.
pub fn probe(head: &[u8]) -> bool {
    let decoded = from_utf16(head);
    let head = decoded.as_deref().unwrap_or(head);
    let head = head.strip_prefix(BYTE_ORDER_MARK).unwrap_or(head);
    let titled = head.get(..TITLE.len()).is_some_and(|line| line.eq_ignore_ascii_case(TITLE));
    let mut lines = head.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    let versions: [&[u8]; 3] = [b"version=1", b"version=2", b"version=3"];
    titled || first.is_some_and(|line| versions.contains(&line))
}

/// A key and its value, which is not quoted any more; and where the value stands in the text.
pub fn statement(text: &[u8], line: Range<usize>) -> Option<(&[u8], Range<usize>)> {
    let equals = line.start + text[line.clone()].iter().position(|&byte| byte == b'=')?;
    let key = text[line.start..equals].trim_ascii();
    let rest = &text[equals + 1..line.end];
    let start = equals + 1 + (rest.len() - rest.trim_ascii_start().len());
    let end = start + text[start..line.end].trim_ascii_end().len();
    let value = start..end;
    match text[value.clone()].strip_prefix(b"\"") {
        // What follows the second quotation mark is no part of it.
        Some(rest) => {
            let len = rest.iter().position(|&byte| byte == b'"').unwrap_or(rest.len());
            Some((key, start + 1..start + 1 + len))
        }
        None => Some((key, value)),
    }
}

/// Where the lines of the text are that are no comments. It ends before the first NUL byte.
pub fn lines(text: &[u8]) -> impl Iterator<Item = Range<usize>> + '_ {
    let text = bytes::until_nul(text);
    let mut at = if text.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
    std::iter::from_fn(move || {
        if at >= text.len() {
            return None;
        }
        let len = text[at..].iter().position(|&byte| matches!(byte, b'\n' | b'\r'));
        let line = at..len.map_or(text.len(), |len| at + len);
        at = line.end + 1;
        Some(line)
    })
    .filter(move |line| {
        let line = text[line.clone()].trim_ascii();
        !line.is_empty() && !line.starts_with(b"#")
    })
}

/// Where the value of a key stands in the text: the first one counts.
fn value_of(text: &[u8], wanted: &str) -> Option<Range<usize>> {
    lines(text).find_map(|line| {
        let (key, value) = statement(text, line)?;
        key.eq_ignore_ascii_case(wanted.as_bytes()).then_some(value)
    })
}

/// A content ID: hexadecimal digits.
fn id_in(text: &[u8], key: &str, default: Option<u32>) -> Result<u32, Error> {
    let value = value_of(text, key).map(|place| String::from_utf8_lossy(&text[place]));
    let invalid = |value: &str| {
        Error::new(format!("VMDK descriptor: {key} '{}' is no content ID", value.escape_debug()))
    };
    match (value, default) {
        (Some(value), _) => u32::from_str_radix(&value, 16).map_err(|_| invalid(&value)),
        (None, Some(default)) => Ok(default),
        (None, None) => Err(Error::new(format!("VMDK descriptor: there is no {key}"))),
    }
}

impl Descriptor {
    /// Reads the text.
    ///
    /// # Errors
    /// In QEMU's words, where it has them.
    pub fn parse(text: &[u8]) -> Result<Descriptor, Error> {
        let raw = |key: &str| value_of(text, key).map(|place| &text[place]);
        let create_type = raw("createType").map(bytes::text_of);
        let create_type = create_type.ok_or_else(|| Error::new("invalid VMDK image descriptor"))?;
        let encoding = encoding_of(text);
        let parent = raw("parentFileNameHint").filter(|name| !name.is_empty());
        Ok(Descriptor {
            cid: id_in(text, "CID", None)?,
            parent_cid: id_in(text, "parentCID", Some(NO_PARENT))?,
            create_type,
            parent: parent.map(|name| encoding.decode(name)),
        })
    }

    pub fn has_parent(&self) -> bool {
        self.parent_cid != NO_PARENT && self.parent.is_some()
    }
}

impl ExtentLine {
    /// Reads a line; none if it describes no extent.
    ///
    /// # Errors
    /// In QEMU's words.
    fn parse(line: &[u8], encoding: Encoding) -> Result<Option<ExtentLine>, Error> {
        let mut rest = line;
        let access = match word(&mut rest).to_ascii_uppercase().as_slice() {
            b"RW" => Access::ReadWrite,
            b"RDONLY" => Access::ReadOnly,
            b"NOACCESS" => Access::None,
            _ => return Ok(None),
        };
        let invalid = || {
            let line = bytes::text_of(line.trim_ascii());
            Error::new(format!(
                "Invalid extent line: {}",
                line.escape_debug().to_string().replace("\\\"", "\"")
            ))
        };
        let sectors = number(word(&mut rest)).filter(|&sectors| sectors > 0);
        let len = sectors.and_then(|sectors| sectors.checked_mul(SECTOR));
        let len = len.filter(|&len| i64::try_from(len).is_ok()).ok_or_else(invalid)?;
        let kind = word(&mut rest);
        let kind = Kind::ALL.iter().find(|(name, _)| kind.eq_ignore_ascii_case(name.as_bytes()));
        let &(_, kind) = kind.ok_or_else(invalid)?;
        let zeroes = ExtentLine { access, kind, len, name: String::new(), offset: 0 };
        if kind == Kind::Zero {
            return Ok(Some(zeroes));
        }
        let quoted = rest.trim_ascii_start().strip_prefix(b"\"").ok_or_else(invalid)?;
        let end = quoted.iter().position(|&byte| byte == b'"').ok_or_else(invalid)?;
        let name = encoding.decode(&quoted[..end]);
        rest = &quoted[end + 1..];
        let offset = match (word(&mut rest), kind) {
            // What follows it names a device.
            (offset, Kind::Flat) => number(offset).ok_or_else(invalid)?,
            (b"", _) => 0,
            _ => return Err(invalid()),
        };
        let offset = offset.checked_mul(SECTOR).filter(|offset| offset.checked_add(len).is_some());
        let offset = offset.ok_or_else(invalid)?;
        if name.is_empty() {
            return Err(invalid());
        }
        Ok(Some(ExtentLine { name, offset, ..zeroes }))
    }
}

fn encoding_of(text: &[u8]) -> Encoding {
    value_of(text, "encoding").map_or(Encoding::Plain, |place| Encoding::named(&text[place]))
}

/// The extents that the text describes.
///
/// # Errors
/// In QEMU's words, where it has them.
pub fn extents(text: &[u8]) -> Result<Vec<ExtentLine>, Error> {
    let encoding = encoding_of(text);
    let mut extents = Vec::new();
    for line in lines(text) {
        extents.extend(ExtentLine::parse(&text[line], encoding)?);
        if extents.len() > MOST_EXTENTS {
            let text = format!("VMDK descriptor: there are more than {MOST_EXTENTS} extents");
            return Err(Error::new(text));
        }
    }
    match extents.is_empty() {
        true => Err(Error::new("VMDK descriptor: there is no extent")),
        false => Ok(extents),
    }
}

/// Takes the next word off a line.
fn word<'a>(line: &mut &'a [u8]) -> &'a [u8] {
    let rest = line.trim_ascii_start();
    let len = rest.iter().position(u8::is_ascii_whitespace).unwrap_or(rest.len());
    let (word, rest) = rest.split_at(len);
    *line = rest;
    word
}

fn number(word: &[u8]) -> Option<u64> {
    std::str::from_utf8(word).ok().filter(|word| !word.starts_with('+'))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(extents: &str) -> Vec<u8> {
        let head = "# Disk DescriptorFile\nversion=1\nCID=0123abcd\nparentCID=ffffffff\n";
        format!("{head}createType=\"custom\"\n\n{extents}\n").into_bytes()
    }

    #[test]
    fn extents_of_all_kinds_are_read_whatever_the_spacing() {
        let text = text(
            "RW 10 FLAT \"a b.vmdk\" 3\r\n\t rdonly  4\tSPARSE   \"s\"  \nNOACCESS 1 ZERO\n\
             RW 2 FLAT \"/dev/x\" 63 \"uuid\"\n#RW 1 ZERO\nRW 8 VMFSSPARSE \"c\"",
        );
        let line = |access, kind, len, name: &str, offset| ExtentLine {
            access,
            kind,
            len: len * SECTOR,
            name: name.to_owned(),
            offset: offset * SECTOR,
        };
        assert_eq!(
            extents(&text).unwrap(),
            [
                line(Access::ReadWrite, Kind::Flat, 10, "a b.vmdk", 3),
                line(Access::ReadOnly, Kind::Sparse, 4, "s", 0),
                line(Access::None, Kind::Zero, 1, "", 0),
                line(Access::ReadWrite, Kind::Flat, 2, "/dev/x", 63),
                line(Access::ReadWrite, Kind::VmfsSparse, 8, "c", 0),
            ]
        );
        let read = Descriptor::parse(&text).unwrap();
        assert_eq!((read.cid, read.parent_cid), (0x0123_abcd, NO_PARENT));
    }

    #[test]
    fn lines_that_make_no_sense_are_reported() {
        for line in [
            "RW -1 FLAT \"a\" 0",
            "RW 0 FLAT \"a\" 0",
            "RW 1 FLAT \"a\"",
            "RW 1 FLAT \"a\" -1",
            "RW 1 FLAT \"a 0",
            "RW 1 FLAT \"\" 0",
            "RW 1 SPARSE \"a\" 0",
            "RW 1 VMFS \"a\" 1",
            "RW 1 FOO \"a\"",
            "RW 1",
            "RW",
            "RW 99999999999999999999 ZERO",
            "RW 36028797018963968 ZERO",
        ] {
            let error = extents(&text(line)).unwrap_err().to_string();
            assert_eq!(error, format!("Invalid extent line: {line}"));
        }
        let many = "RW 1 ZERO\n".repeat(MOST_EXTENTS + 1);
        assert!(extents(&text(&many)).is_err() && extents(&text("")).is_err());
        for bad in ["", "version=1\nCID=1\n", "createType=\"x\"\n", "createType=x\nCID=xyz\n"] {
            assert!(Descriptor::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_descriptor_is_known_by_its_beginning() {
        for head in [
            "# Disk DescriptorFile\n",
            "# disk descriptorfile",
            "#x\n\nversion=2\n",
            "\u{feff}version=1\r\n",
        ] {
            assert!(probe(head.as_bytes()), "{head}");
        }
        for head in ["", "version=4\n", "x\nversion=1\n"] {
            assert!(!probe(head.as_bytes()), "{head}");
        }
    }
}
