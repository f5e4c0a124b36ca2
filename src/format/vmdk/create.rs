//! New images: qemu-img's options, their rules in QEMU's words, and the writing.
//!
//! The order: extents in files of their own first, then the tables of the image itself, made durable, and what makes it an
//! image last: a header, or the descriptor.

use super::descriptor::NO_PARENT;
use super::header::{DESCRIPTOR_AT, DESCRIPTOR_SECTORS, New};
use super::shared::{content_id, new_id};
use crate::block::create::{CreateEntry, CreateOption, Creation, Made, ValueType};
use crate::block::new_file::{NewFile, make_in_file, make_in_other};
use crate::block::{Error, Node, SECTOR, WriteFlags, ZeroFlags};
use crate::io::{IoResult, IoVec};
use crate::options::{Map, Value, bytes};
use std::sync::Arc;

pub(super) static CREATE: CreateEntry = CreateEntry {
    options: OPTIONS,
    create: |creation, map| Box::pin(create(creation, map)),
    measure: None,
    amend: &[],
    on_nodes: Some(super::create_on_nodes::prepare),
};

const OPTIONS: &[CreateOption] = &[
    CreateOption::new("size", ValueType::Size, "Virtual disk size"),
    CreateOption::new(
        "adapter_type",
        ValueType::Str,
        "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    ),
    CreateOption::new("backing_file", ValueType::Str, "File name of a base image"),
    CreateOption::new("backing_fmt", ValueType::Str, "Must be 'vmdk' if present"),
    CreateOption {
        default: Some("off"),
        ..CreateOption::new("compat6", ValueType::Bool, "VMDK version 6 image")
    },
    CreateOption {
        default: Some(UNDEFINED),
        ..CreateOption::new("hwversion", ValueType::Str, "VMDK hardware version")
    },
    CreateOption::new("toolsversion", ValueType::Str, "VMware guest tools version"),
    CreateOption::new(
        "subformat",
        ValueType::Str,
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | \
         twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    ),
    CreateOption::new(
        "zeroed_grain",
        ValueType::Bool,
        "Enable efficient zero writes using the zeroed-grain GTE feature",
    ),
];

/// The hardware version when none is given.
const UNDEFINED: &str = "undefined";
/// Bytes of an extent of a disk that is cut into several.
const SPLIT: u64 = 2 << 30;
/// Most extents: [`super::descriptor::MOST_EXTENTS`] are read again.
const MOST_EXTENTS: u64 = super::descriptor::MOST_EXTENTS as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subformat {
    MonolithicSparse,
    MonolithicFlat,
    TwoGbMaxExtentSparse,
    TwoGbMaxExtentFlat,
    StreamOptimized,
}

impl Subformat {
    const ALL: [(&'static str, Subformat); 5] = [
        ("monolithicSparse", Subformat::MonolithicSparse),
        ("monolithicFlat", Subformat::MonolithicFlat),
        ("twoGbMaxExtentSparse", Subformat::TwoGbMaxExtentSparse),
        ("twoGbMaxExtentFlat", Subformat::TwoGbMaxExtentFlat),
        ("streamOptimized", Subformat::StreamOptimized),
    ];

    fn name(self) -> &'static str {
        Subformat::ALL.iter().find(|(_, one)| *one == self).map_or("", |(name, _)| name)
    }

    fn is_flat(self) -> bool {
        matches!(self, Subformat::MonolithicFlat | Subformat::TwoGbMaxExtentFlat)
    }

    fn is_split(self) -> bool {
        matches!(self, Subformat::TwoGbMaxExtentSparse | Subformat::TwoGbMaxExtentFlat)
    }

    fn is_apart(self) -> bool {
        self.is_flat() || self.is_split()
    }
}

/// The adapters that a disk can be for.
const ADAPTERS: [&str; 4] = ["ide", "buslogic", "lsilogic", "legacyESX"];

/// What is asked for, in types.
pub(super) struct Wanted {
    /// Of the disk, in bytes.
    pub size: u64,
    adapter: String,
    hardware: String,
    tools: String,
    subformat: Subformat,
    says_zero: bool,
    /// The name of the parent, and its content ID.
    parent: Option<(String, u32)>,
}

/// An extent of a new image, by the name in the descriptor.
pub(super) struct NewExtent {
    pub name: String,
    pub len: u64,
}

fn refused<T>(text: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(text))
}

fn not_one_of<T>(value: &str) -> Result<T, Error> {
    refused(format!("invalid parameter value: {}", value.escape_debug()))
}

impl Wanted {
    /// Reads the options. The parent is looked for later.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn of_options(options: &Map) -> Result<Wanted, Error> {
        let text = |name: &str| options.get(name).and_then(Value::as_str);
        let is_on = |name: &str| options.get(name) == Some(&Value::Bool(true));
        let size = match options.get("size") {
            Some(Value::Int(n)) => u64::try_from(*n).unwrap_or(0),
            _ => 0,
        };
        let adapter = text("adapter_type").unwrap_or("ide");
        if !ADAPTERS.contains(&adapter) {
            return not_one_of(adapter);
        }
        let subformat = text("subformat").unwrap_or("monolithicSparse");
        let found = Subformat::ALL.iter().find(|(name, _)| *name == subformat);
        let Some(&(_, subformat)) = found else { return not_one_of(subformat) };
        let hardware = text("hwversion").filter(|version| *version != UNDEFINED);
        let hardware = match (is_on("compat6"), hardware) {
            (true, Some(_)) => return refused("compat6 cannot be enabled with hwversion set"),
            (true, None) => "6",
            (false, given) => given.unwrap_or("4"),
        };
        let tools = text("toolsversion").unwrap_or("2147483647");
        for (what, text) in [("hwversion", hardware), ("toolsversion", tools)] {
            if text.contains(['"', '\n', '\r', '\0']) {
                return refused(format!("A VMDK descriptor cannot hold this {what}"));
            }
        }
        Ok(Wanted {
            size,
            adapter: adapter.to_owned(),
            hardware: hardware.to_owned(),
            tools: tools.to_owned(),
            subformat,
            says_zero: is_on("zeroed_grain"),
            parent: None,
        })
    }

    pub(super) fn is_flat(&self) -> bool {
        self.subformat.is_flat()
    }

    /// Whether the image's file has the descriptor alone.
    pub(super) fn is_apart(&self) -> bool {
        self.subformat.is_apart()
    }

    /// # Errors
    /// In QEMU's words: what cannot go together.
    pub(super) fn check(&self) -> Result<(), Error> {
        let is_flat = self.subformat.is_flat();
        if is_flat && self.parent.is_some() {
            return refused("Flat image can't have backing file");
        }
        if is_flat && self.says_zero {
            return refused("Flat image can't enable zeroed grain");
        }
        let is_large = i64::try_from(self.size).is_err()
            || self.subformat.is_split() && self.size.div_ceil(SPLIT) > MOST_EXTENTS;
        if is_large { refused("Image too large") } else { Ok(()) }
    }

    /// The extents, of an image in a file of this name.
    pub(super) fn extents(&self, filename: &str) -> Vec<NewExtent> {
        let base = &filename[folder_len(filename)..];
        let (prefix, postfix) = base.split_at(base.rfind('.').unwrap_or(base.len()));
        if !self.subformat.is_split() {
            let name = match self.subformat.is_apart() {
                true => format!("{prefix}-flat{postfix}"),
                false => base.to_owned(),
            };
            return vec![NewExtent { name, len: self.size }];
        }
        let letter = if self.subformat.is_flat() { 'f' } else { 's' };
        let count = self.size.div_ceil(SPLIT);
        let extent = |n: u64| NewExtent {
            name: format!("{prefix}-{letter}{:03}{postfix}", n + 1),
            len: SPLIT.min(self.size - n * SPLIT),
        };
        (0..count).map(extent).collect()
    }

    /// The header of a sparse extent.
    pub(super) fn sparse(&self, len: u64) -> Result<New, Error> {
        let is_stream = self.subformat == Subformat::StreamOptimized;
        New::of(len, is_stream, self.says_zero)
    }

    /// The text of the descriptor, as QEMU writes it.
    pub(super) fn descriptor(&self, extents: &[NewExtent]) -> Result<Vec<u8>, Error> {
        let heads = if self.adapter == "ide" { 16 } else { 255 };
        let (parent_id, parent) = match &self.parent {
            Some((name, id)) => (*id, format!("parentFileNameHint=\"{name}\"")),
            None => (NO_PARENT, String::new()),
        };
        let lines: String = extents
            .iter()
            .map(|extent| {
                let sectors = extent.len.div_ceil(SECTOR);
                match self.subformat.is_flat() {
                    true => format!("RW {sectors} FLAT \"{}\" 0\n", extent.name),
                    false => format!("RW {sectors} SPARSE \"{}\"\n", extent.name),
                }
            })
            .collect();
        let names = extents.iter().map(|extent| &extent.name);
        let mut names = names.chain(self.parent.iter().map(|(name, _)| name));
        if let Some(name) = names.find(|name| name.contains(['"', '\n', '\r', '\0'])) {
            return refused(format!(
                "A VMDK descriptor cannot hold the file name '{}'",
                name.escape_debug()
            ));
        }
        let cylinders = self.size / (63 * heads * SECTOR);
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID={:08x}\nparentCID={parent_id:08x}\n\
             createType=\"{}\"\n{parent}\n# Extent description\n{lines}\n# The Disk Data Base\n#DDB\n\n\
             ddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
             ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\n\
             ddb.adapterType = \"{}\"\nddb.toolsVersion = \"{}\"\n",
            new_id(0, 8),
            self.subformat.name(),
            self.hardware,
            self.adapter,
            self.tools,
        );
        let text = bytes::bytes_of(&text).into_owned();
        if !self.subformat.is_apart() && text.len() as u64 > DESCRIPTOR_SECTORS * SECTOR {
            return refused("The VMDK descriptor is too long");
        }
        Ok(text)
    }
}

/// How long what stands before the last part of a name is.
fn folder_len(filename: &str) -> usize {
    filename.rfind('/').or_else(|| filename.rfind(':')).map_or(0, |at| at + 1)
}

/// Writes a sparse extent without data to a file that is long enough. `is_empty`: the file reads as zeroes; one that was
/// there before, or a disk, may have anything.
pub(super) async fn write_sparse(
    file: &Node,
    new: &New,
    descriptor: Option<&[u8]>,
    is_empty: bool,
) -> Result<(), Error> {
    let write = async || -> IoResult {
        if !is_empty {
            file.zero(0, new.file_len(), ZeroFlags::empty()).await?;
            file.flush().await?;
        }
        let put_at = async |at: u64, bytes: &[u8]| {
            file.write(at, &IoVec::from_ref(bytes), WriteFlags::empty()).await
        };
        for (at, entries) in new.directories() {
            if !entries.is_empty() {
                put_at(at, &entries).await?;
            }
        }
        if let Some(text) = descriptor {
            put_at(DESCRIPTOR_AT * SECTOR, text).await?;
        }
        file.flush().await?;
        put_at(0, &new.encode()).await?;
        file.flush().await
    };
    write().await.map_err(|errno| Error::os("Could not write the new image's metadata", errno))
}

/// Writes the descriptor that is a file of its own.
pub(super) async fn write_descriptor(file: &Node, text: &[u8]) -> Result<(), Error> {
    let write = async || -> IoResult {
        file.write(0, &IoVec::from_ref(text), WriteFlags::empty()).await?;
        file.flush().await
    };
    write().await.map_err(|errno| Error::os("Could not write the descriptor", errno))
}

async fn create(creation: &Creation, options: Map) -> Result<Made, Error> {
    let mut wanted = Wanted::of_options(&options)?;
    let text = |name: &str| options.get(name).and_then(Value::as_str);
    if let Some(name) = text("backing_file") {
        if wanted.subformat.is_flat() {
            return refused("Flat image can't have backing file");
        }
        let look = async |node: &Arc<Node>| content_id(node).await;
        let id = creation.with_backing(name, text("backing_fmt"), look).await?;
        let id = id.ok_or_else(|| Error::new("backing_file must be a vmdk image"))?;
        wanted.parent = Some((name.to_owned(), id));
    }
    wanted.check()?;
    let extents = wanted.extents(creation.filename());
    let descriptor = wanted.descriptor(&extents)?;
    if !wanted.subformat.is_apart() {
        let new = wanted.sparse(wanted.size)?;
        let write = async |node: &Node, is_empty: bool| {
            write_sparse(node, &new, Some(&descriptor), is_empty).await
        };
        make_in_file(creation, options, new.file_len(), write).await?;
        return Ok(Made { reads_zeroes: true });
    }
    let mut made = Vec::with_capacity(extents.len());
    let done = create_apart(creation, options, (&wanted, &extents), &descriptor, &mut made).await;
    for new in made.iter().rev() {
        // The error is told all the same.
        let _ = new.remove_unmade(done.clone());
    }
    done
}

/// Makes an image whose extents have files of their own, which are added to `made` before they are made.
async fn create_apart(
    creation: &Creation,
    mut options: Map,
    (wanted, extents): (&Wanted, &[NewExtent]),
    descriptor: &[u8],
    made: &mut Vec<NewFile>,
) -> Result<Made, Error> {
    let filename = creation.filename();
    let folder = &filename[..folder_len(filename)];
    let mut reads_zeroes = true;
    for extent in extents {
        let name = format!("{folder}{}", extent.name);
        made.push(NewFile::before(creation, &name));
        if wanted.subformat.is_flat() {
            options.insert("size", Value::from(extent.len.next_multiple_of(SECTOR)));
            reads_zeroes &= creation.create_other(&name, &options).await?.reads_zeroes;
            continue;
        }
        let new = wanted.sparse(extent.len)?;
        let write =
            async |node: &Node, is_empty: bool| write_sparse(node, &new, None, is_empty).await;
        make_in_other(creation, &name, options.clone(), new.file_len(), write).await?;
    }
    // The descriptor itself is not allocated ahead.
    options.take("preallocation");
    let write = async |node: &Node, _: bool| write_descriptor(node, descriptor).await;
    make_in_file(creation, options, descriptor.len() as u64, write).await?;
    Ok(Made { reads_zeroes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_called_after_the_image() {
        let mut wanted = Wanted::of_options(&Map::new()).unwrap();
        wanted.size = 5 << 30;
        let names = |wanted: &Wanted, filename: &str| {
            let extents = wanted.extents(filename);
            extents.into_iter().map(|extent| (extent.name, extent.len >> 20)).collect::<Vec<_>>()
        };
        wanted.subformat = Subformat::MonolithicFlat;
        for (filename, name) in [
            ("a", "a-flat"),
            ("a.img", "a-flat.img"),
            ("/x.y/a.b.vmdk", "a.b-flat.vmdk"),
            ("x.y/a", "a-flat"),
            ("file:a.vmdk", "a-flat.vmdk"),
            (".vmdk", "-flat.vmdk"),
        ] {
            assert_eq!(names(&wanted, filename), [(name.to_owned(), 5 << 10)], "{filename}");
        }
        wanted.subformat = Subformat::TwoGbMaxExtentSparse;
        let split = [("a-s001.vmdk", 2048), ("a-s002.vmdk", 2048), ("a-s003.vmdk", 1024)];
        assert_eq!(names(&wanted, "d/a.vmdk"), split.map(|(name, len)| (name.to_owned(), len)));
    }

    #[test]
    fn a_name_that_would_be_read_as_something_else_is_refused() {
        let wanted = Wanted::of_options(&Map::new()).unwrap();
        for name in ["a\"b", "a\nRW 1 ZERO"] {
            let extent = NewExtent { name: name.to_owned(), len: 512 };
            assert!(wanted.descriptor(&[extent]).is_err());
        }
        let options = Map::from_iter([("toolsversion", "1\"\nRW 1 ZERO\n#")]);
        assert!(Wanted::of_options(&options).is_err());
    }
}
