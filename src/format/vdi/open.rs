//! Opening an image: the header, the file.

use super::header::{self, Header};
use super::{Vdi, mapping};
use crate::block::*;
use crate::cow::read_padded;
use crate::io::IoVec;
use crate::options::{Map, NodeRef};
use serde::Deserialize;

pub(super) static HELP: &[OptionHelp] =
    &[OptionHelp { name: "file", value: "node", help: "The node that holds the image" }];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
}

pub(super) async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(map)?;
    if !opening.options().read_only && !opening.auto_read_only() {
        return Err(Error::new("vdi images cannot be written yet: open it with read-only=on"));
    }
    let during = Perms::format(Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() });
    let file = opening.child(Role::File, options.file, during).await?;
    let node = file.node();
    let header = read_header(&node).await?;
    let map_end = u64::from(header.map_offset) + u64::from(header.blocks) * 4;
    if map_end > node.len() {
        return Err(Error::new(format!(
            "The VDI block map ends at {map_end:#x}, past the end of the file ({:#x})",
            node.len()
        )));
    }
    let mapping = mapping::tables(&header);
    let mapping = mapping.map_err(|errno| Error::os("Could not allocate the block map", errno))?;
    Ok(Box::new(Vdi { header, children: [file], mapping }))
}

/// Reads the header.
pub(super) async fn read_header(file: &Node) -> Result<Header, Error> {
    let mut head = [0; header::LEN];
    let read = read_padded(file, 0, &IoVec::from_mut(&mut head)).await;
    read.map_err(|errno| Error::os("Could not read VDI header", errno))?;
    Header::parse(&head)
}
