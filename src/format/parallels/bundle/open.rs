//! Opening a bundle: the descriptor, and the images that it names. Names obey the open policy as those of backing files do.

use super::descriptor::{self, Descriptor, Type};
use super::{Bundle, ENTRY, Part};
use crate::block::*;
use crate::cow::read_padded;
use crate::format::raw;
use crate::io::IoVec;
use crate::options::{Map, NodeRef, Value};

/// Opens the disk that the descriptor in `file` describes. `growing`: options of the images that are written.
pub async fn open(
    opening: &mut Opening,
    file: Child,
    growing: Map,
) -> Result<Box<dyn Driver>, Error> {
    let descriptor = Descriptor::parse(&read(&file.node()).await?)?;
    let mut children = vec![file];
    let mut parts = Vec::new();
    for descriptor::Part { start, end, images } in descriptor.parts {
        let options = options(opening, &images, &children[0], &growing)?;
        let during = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
        let child = opening.child(Role::Extent, NodeRef::Inline(options), during).await;
        let name = || images[0].file.escape_debug().to_string();
        let child =
            child.map_err(|error| error.at(format!("Could not open image '{}'", name())))?;
        let (len, wanted) = (child.node().len(), end - start);
        if len < wanted {
            return Err(Error::new(format!(
                "The image '{}' has {len} bytes, and its part of the disk {wanted}",
                name()
            )));
        }
        children.push(child);
        parts.push(Part { start, end, images });
    }
    Ok(Box::new(Bundle { children, parts }))
}

async fn read(file: &Node) -> Result<Vec<u8>, Error> {
    let len = file.driver().len();
    if len > descriptor::LIMIT {
        return Err(Error::new(format!(
            "The Parallels disk descriptor has {len} bytes: {} is the most",
            descriptor::LIMIT
        )));
    }
    let mut text = vec![0; len as usize];
    let read = read_padded(file, 0, &IoVec::from_mut(&mut text)).await;
    read.map_err(|errno| Error::os("Could not read the Parallels disk descriptor", errno))?;
    Ok(text)
}

/// The options of a node that is the top one of these images, with the others below it.
fn options(
    opening: &Opening,
    images: &[descriptor::Image],
    file: &Child,
    growing: &Map,
) -> Result<Map, Error> {
    let mut below = None;
    for (number, image) in images.iter().enumerate().rev() {
        let storage = opening.recorded_extent(&image.file, file, "Parallels disk descriptor")?;
        let storage = match storage {
            NodeRef::Inline(options) => Value::Map(options),
            NodeRef::Name(name) => Value::Str(name),
        };
        let mut options = match number {
            0 if image.kind == Type::Expanding => growing.clone(),
            _ => Map::new(),
        };
        let driver = match image.kind {
            Type::Plain => raw::ENTRY.name,
            Type::Expanding => ENTRY.name,
        };
        options.insert("driver", driver);
        options.insert("file", storage);
        if image.kind == Type::Expanding {
            options.insert("backing", below.take().map_or(Value::Null, Value::Map));
        }
        below = Some(options);
    }
    below.ok_or_else(|| Error::new("A part of a Parallels disk has no image"))
}
