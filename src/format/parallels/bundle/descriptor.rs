//! The text of `DiskDescriptor.xml` (QEMU's docs/interop/prl-xml).
//!
//! It says which parts a disk has, and the images of each, from the top one down to the one that has no parent.
//!
//! Everything that leaves [`Descriptor::parse`] is inside the limits below, and no chain of parents has a loop.

use super::elements::{Met, for_each_leaf};
use crate::block::{Error, SECTOR};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a descriptor.
pub const LIMIT: u64 = 1 << 20;
/// The element that is all of it.
const ROOT: &str = "Parallels_disk_image";
/// Images on top of each other.
const MOST_IMAGES: usize = 256;
/// Parts of a disk.
const MOST_PARTS: usize = 256;
/// The top image, where nothing else is named, and the parent of an image that has none.
const TOP: &str = "5fbaabe3-6958-40ff-92a7-860e329aab41";
const NONE: &str = "00000000-0000-0000-0000-000000000000";

/// What a descriptor says.
#[derive(Debug, PartialEq)]
pub struct Descriptor {
    /// Of the disk, in bytes.
    pub len: u64,
    /// One behind the other, from the disk's beginning to its end.
    pub parts: Vec<Part>,
}

/// A part of the disk, and the images that it is in: the top one first. At least one.
#[derive(Debug, PartialEq)]
pub struct Part {
    /// Bytes of the disk.
    pub start: u64,
    pub end: u64,
    pub images: Vec<Image>,
}

/// How an image is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Bytes as they are.
    Plain,
    /// An image with a catalogue, which the text calls compressed.
    Expanding,
}

/// An image of a part.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// In lower case, without its brackets.
    pub guid: String,
    pub kind: Type,
    /// As it is written in the text.
    pub file: String,
}

/// Whether a file that begins so may be a descriptor: the element comes first, behind what XML allows there.
pub fn probe(head: &[u8]) -> bool {
    let mut rest = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    loop {
        let end: &[u8] = match rest {
            [b'<', b'?', ..] => b"?>",
            [b'<', b'!', b'-', b'-', ..] => b"-->",
            [b'<', name @ ..] => {
                let rest = name.strip_prefix(ROOT.as_bytes());
                return rest.is_some_and(|rest| {
                    rest.first().is_some_and(|byte| b" \t\r\n>".contains(byte))
                });
            }
            _ => return false,
        };
        let Some(at) = rest.windows(end.len()).position(|window| window == end) else {
            return false;
        };
        rest = rest[at + end.len()..].trim_ascii_start();
    }
}

/// What the text says, as it is read: elements may come in any order.
#[derive(Default)]
struct Said {
    sectors: Option<u64>,
    padding: Option<u64>,
    /// What an encrypted disk is encrypted by.
    engine: Option<String>,
    parts: Vec<SaidPart>,
    top: Option<String>,
    shots: Vec<Shot>,
}

#[derive(Default)]
struct SaidPart {
    start: Option<u64>,
    end: Option<u64>,
    images: Vec<SaidImage>,
}

#[derive(Default)]
struct SaidImage {
    guid: Option<String>,
    kind: Option<String>,
    file: Option<String>,
}

#[derive(Default)]
struct Shot {
    guid: Option<String>,
    parent: Option<String>,
}

fn missing(what: &str) -> Error {
    Error::new(format!("The Parallels disk descriptor says no {what}"))
}

/// Text in a message: short, and on one line.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(80).collect();
    short.escape_debug().to_string()
}

impl Descriptor {
    /// Reads the text.
    ///
    /// # Errors
    /// It is no such text, or says what makes no sense.
    pub fn parse(text: &[u8]) -> Result<Descriptor, Error> {
        let mut said = Said::default();
        let version = for_each_leaf(text, ROOT, |event| said.hear(event))?;
        match version.as_deref() {
            Some("1.0") => said.settle(),
            Some(other) => Err(Error::new(format!(
                "The Parallels disk descriptor has version '{}', and 1.0 is supported",
                shown(other)
            ))),
            None => Err(missing("version")),
        }
    }
}

impl Said {
    fn hear(&mut self, met: Met<'_>) -> Result<(), Error> {
        match met {
            Met::Begin(["StorageData", "Storage"]) => {
                if self.parts.len() == MOST_PARTS {
                    return Err(Error::new(format!(
                        "A Parallels disk has more than {MOST_PARTS} parts"
                    )));
                }
                self.parts.push(SaidPart::default());
            }
            Met::Begin(["StorageData", "Storage", "Image"]) => {
                if let Some(part) = self.parts.last_mut() {
                    part.images.push(SaidImage::default());
                }
            }
            Met::Begin(["Snapshots", "Shot"]) => self.shots.push(Shot::default()),
            Met::Begin(_) => {}
            Met::Leaf(path, text) => self.hear_leaf(path, text)?,
        }
        Ok(())
    }

    fn hear_leaf(&mut self, path: &[&str], text: &str) -> Result<(), Error> {
        let number = || -> Result<Option<u64>, Error> {
            text.parse().map(Some).map_err(|_| {
                Error::new(format!(
                    "'{}' of the Parallels disk descriptor is no number: '{}'",
                    path.last().map_or("", |name| name),
                    shown(text)
                ))
            })
        };
        let word = || Some(text.to_owned());
        match path {
            ["Disk_Parameters", "Disk_size"] => self.sectors = number()?,
            ["Disk_Parameters", "Padding"] => self.padding = number()?,
            ["Disk_Parameters", "Encryption", "Engine"] => self.engine = Some(guid(text)?),
            ["StorageData", "Storage", rest @ ..] => {
                let Some(part) = self.parts.last_mut() else { return Ok(()) };
                match rest {
                    ["Start"] => part.start = number()?,
                    ["End"] => part.end = number()?,
                    ["Image", field] => {
                        let Some(image) = part.images.last_mut() else { return Ok(()) };
                        match *field {
                            "GUID" => image.guid = Some(guid(text)?),
                            "Type" => image.kind = word(),
                            "File" => image.file = word(),
                            _ => {}
                        }
                    }
                    _ => {}
                }
            }
            ["Snapshots", "TopGUID"] => self.top = Some(guid(text)?),
            ["Snapshots", "Shot", field] => {
                let Some(shot) = self.shots.last_mut() else { return Ok(()) };
                match *field {
                    "GUID" => shot.guid = Some(guid(text)?),
                    "ParentGUID" => shot.parent = Some(guid(text)?),
                    _ => {}
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn settle(self) -> Result<Descriptor, Error> {
        if self.padding.is_some_and(|padding| padding != 0) {
            return Err(Error::new("Parallels disks with padding are not supported"));
        }
        if self.engine.as_ref().is_some_and(|engine| engine != NONE) {
            return Err(Error::new("Encrypted Parallels disks are not supported"));
        }
        let bytes = |sectors: u64| {
            let len = sectors.checked_mul(SECTOR).filter(|&len| i64::try_from(len).is_ok());
            len.ok_or_else(|| {
                Error::new(format!("A Parallels disk is too large: {sectors} sectors"))
            })
        };
        let len = bytes(self.sectors.ok_or_else(|| missing("Disk_size"))?)?;
        let order = self.order()?;
        let mut parts = Vec::new();
        let mut files = BTreeSet::new();
        for said in self.parts {
            let start = bytes(said.start.ok_or_else(|| missing("Start of a Storage"))?)?;
            let end = bytes(said.end.ok_or_else(|| missing("End of a Storage"))?)?;
            if start >= end {
                return Err(Error::new(format!(
                    "A Storage of a Parallels disk begins at sector {} and ends at {}",
                    start / SECTOR,
                    end / SECTOR
                )));
            }
            let images = chain(said.images, &order)?;
            if let Some(twice) = images.iter().find(|image| !files.insert(image.file.clone())) {
                return Err(Error::new(format!(
                    "The Parallels disk descriptor names '{}' twice",
                    shown(&twice.file)
                )));
            }
            parts.push(Part { start, end, images });
        }
        parts.sort_by_key(|part| part.start);
        let end = parts.iter().try_fold(0, |end, part| (part.start == end).then_some(part.end));
        if end != Some(len) {
            return Err(Error::new(format!(
                "The Storages of a Parallels disk do not lie one behind the other up to its end, sector {}",
                len / SECTOR
            )));
        }
        Ok(Descriptor { len, parts })
    }

    /// The GUIDs of the snapshots that the disk is made of, the top one first.
    fn order(&self) -> Result<Vec<String>, Error> {
        let mut parents = BTreeMap::new();
        for shot in &self.shots {
            let guid = shot.guid.as_ref().ok_or_else(|| missing("GUID of a Shot"))?;
            let parent = shot.parent.as_ref().ok_or_else(|| missing("ParentGUID of a Shot"))?;
            if parents.insert(guid, parent).is_some() {
                return Err(Error::new(format!("The snapshot {{{guid}}} has two parents")));
            }
        }
        let mut order = Vec::new();
        let mut next = self.top.as_deref().unwrap_or(TOP);
        // Of a disk without snapshots, nothing needs to be said.
        if parents.is_empty() && self.top.is_none() {
            return Ok(vec![next.to_owned()]);
        }
        while next != NONE {
            if order.len() == MOST_IMAGES {
                return Err(Error::new(format!(
                    "The snapshots of a Parallels disk have more than {MOST_IMAGES} ancestors, or a loop"
                )));
            }
            let Some((guid, parent)) = parents.get_key_value(&next.to_owned()) else {
                return Err(Error::new(format!(
                    "The Parallels disk descriptor has no snapshot {{{next}}}"
                )));
            };
            order.push((*guid).clone());
            next = parent;
        }
        if order.is_empty() {
            return Err(missing("top snapshot"));
        }
        Ok(order)
    }
}

/// The images of a part in the order of the snapshots.
fn chain(said: Vec<SaidImage>, order: &[String]) -> Result<Vec<Image>, Error> {
    let mut images = BTreeMap::new();
    for said in said {
        let guid = said.guid.ok_or_else(|| missing("GUID of an Image"))?;
        let kind = match said.kind.as_deref() {
            Some("Plain") => Type::Plain,
            Some("Compressed") => Type::Expanding,
            Some(other) => {
                let other = shown(other);
                return Err(Error::new(format!("Images of type '{other}' are not supported")));
            }
            None => return Err(missing("Type of an Image")),
        };
        let file = said.file.ok_or_else(|| missing("File of an Image"))?;
        let image = Image { guid: guid.clone(), kind, file };
        if images.insert(guid, image).is_some_and(|before| !before.file.is_empty()) {
            return Err(Error::new("Two Images of a Storage have the same GUID"));
        }
    }
    let mut chain = Vec::new();
    for (number, guid) in order.iter().enumerate() {
        let image = images.remove(guid).ok_or_else(|| {
            Error::new(format!(
                "A Storage of a Parallels disk has no image of the snapshot {{{guid}}}"
            ))
        })?;
        if image.kind == Type::Plain && number + 1 < order.len() {
            return Err(Error::new(format!(
                "The image '{}' is plain and has a parent",
                shown(&image.file)
            )));
        }
        chain.push(image);
    }
    Ok(chain)
}

/// A GUID in one spelling: the text has it in brackets, in upper or lower case.
fn guid(text: &str) -> Result<String, Error> {
    let inner = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
    let parsed = uuid::Uuid::try_parse(inner).map_err(|_| {
        Error::new(format!("The Parallels disk descriptor has a GUID '{}'", shown(text)))
    })?;
    Ok(parsed.hyphenated().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "11111111-1111-1111-1111-111111111111";

    fn image(guid: &str, kind: &str, file: &str) -> String {
        format!("<Image><GUID>{{{guid}}}</GUID><Type>{kind}</Type><File>{file}</File></Image>")
    }

    fn storage(start: u64, end: u64, images: &[String]) -> String {
        let images = images.concat();
        format!(
            "<Storage><Start>{start}</Start><End>{end}</End><Blocksize>2048</Blocksize>{images}</Storage>"
        )
    }

    fn shot(guid: &str, parent: &str) -> String {
        format!("<Shot><GUID>{{{guid}}}</GUID><ParentGUID>{{{parent}}}</ParentGUID></Shot>")
    }

    fn disk(sectors: u64, storages: &[String], shots: &[String]) -> String {
        let (storages, shots) = (storages.concat(), shots.concat());
        format!(
            "<?xml version='1.0' encoding='UTF-8'?>\n<!-- a disk -->\n<{ROOT} Version=\"1.0\">\
             <Disk_Parameters><Disk_size>{sectors}</Disk_size><Padding>0</Padding></Disk_Parameters>\
             <StorageData>{storages}</StorageData><Snapshots>{shots}</Snapshots></{ROOT}>"
        )
    }

    fn error(text: &str) -> String {
        Descriptor::parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn parts_come_with_their_images_from_the_top_down() {
        let images = |part: &str| {
            [
                image(BASE, "Plain", &format!("{part}&amp;base")),
                image(&TOP.to_uppercase(), "Compressed", part),
            ]
        };
        let shots = [shot(BASE, NONE), shot(TOP, BASE)];
        let text = disk(30, &[storage(10, 30, &images("b")), storage(0, 10, &images("a"))], &shots);
        assert!(probe(text.as_bytes()));
        let found = Descriptor::parse(text.as_bytes()).unwrap();
        assert_eq!(found.len, 30 * SECTOR);
        let [first, second] = &found.parts[..] else { panic!("{found:?}") };
        assert_eq!((first.start, first.end, second.end), (0, 10 * SECTOR, 30 * SECTOR));
        let files =
            |part: &Part| part.images.iter().map(|image| image.file.clone()).collect::<Vec<_>>();
        assert_eq!(files(first), ["a", "a&base"]);
        assert_eq!(first.images[1].kind, Type::Plain);
        assert_eq!(files(second), ["b", "b&base"]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_one_line() {
        let one = |kind, file| [storage(0, 10, &[image(TOP, kind, file)])];
        assert!(Descriptor::parse(disk(10, &one("Plain", "a"), &[]).as_bytes()).is_ok());
        let looped = [shot(TOP, BASE), shot(BASE, TOP)];
        let over_plain = [image(TOP, "Plain", "a"), image(BASE, "Plain", "b")];
        for (text, wanted) in [
            (disk(10, &one("Odd", "a"), &[]), "type 'Odd'"),
            (disk(11, &one("Plain", "a"), &[]), "up to its end, sector 11"),
            (disk(u64::MAX, &one("Plain", "a"), &[]), "too large"),
            (disk(10, &one("Plain", "a"), &looped), "or a loop"),
            (disk(10, &one("Plain", "a"), &[shot(TOP, BASE)]), "has no snapshot"),
            (
                disk(10, &one("Compressed", "a"), &[shot(TOP, BASE), shot(BASE, NONE)]),
                "has no image",
            ),
            (
                disk(10, &[storage(0, 10, &over_plain)], &[shot(TOP, BASE), shot(BASE, NONE)]),
                "is plain and has a parent",
            ),
            (disk(10, &one("Plain", "a"), &[shot("x\n", NONE)]), "GUID"),
            (disk(10, &[], &[]), "up to its end"),
            (disk(10, &one("Plain", "a"), &[]).replace("<Padding>0", "<Padding>1"), "padding"),
            (disk(10, &one("Plain", "a"), &[]).replace("\"1.0\"", "\"2.0\""), "version '2.0'"),
            (
                disk(10, &one("Plain", "a"), &[]).replace("<Disk_size>10", "<Disk_size>x"),
                "no number: 'x'",
            ),
            (
                disk(
                    20,
                    &[
                        storage(0, 10, &[image(TOP, "Plain", "a")]),
                        storage(10, 20, &[image(TOP, "Plain", "a")]),
                    ],
                    &[],
                ),
                "'a' twice",
            ),
        ] {
            let error = error(&text);
            assert!(error.contains(wanted) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn only_a_descriptor_is_taken_for_one() {
        for text in
            ["<?xml version='1.0'?><plist>", "<Parallels_disk_images>", "", "<", "<?xml", "x"]
        {
            assert!(!probe(text.as_bytes()), "{text}");
        }
        assert!(probe(
            b"\xef\xbb\xbf<?xml version='1.0'?>\r\n<Parallels_disk_image Version='1.0'>"
        ));
    }
}
