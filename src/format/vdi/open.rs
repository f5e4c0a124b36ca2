//! Opening an image: the header, the file, and which blocks of it are in use.

use super::blocks::{self, Blocks, Emptied, Head};
use super::header::{self, Header};
use super::{Vdi, mapping, space};
use crate::block::*;
use crate::cow::{Lock, read_padded};
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
    let mut held = Perm::CONSISTENT_READ;
    if opening.is_active() && !opening.options().read_only && !opening.auto_read_only() {
        // An image that was not closed is brought to rest.
        held |= Perm::WRITE | Perm::RESIZE;
    }
    let during = Perms::format(Perms { held, shared: Perm::all() });
    let file = opening.child(Role::File, options.file, during).await?;
    let node = file.node();
    let is_writable = opening.is_writable_over(&node);
    let mut head = read_header(&node).await?;
    let may_settle = opening.is_active() && !opening.policy().for_check;
    let blocks = match is_writable && may_settle {
        true => settled(opening.name(), &node, &mut head, held.contains(Perm::WRITE)).await?,
        false => Blocks::default(),
    };
    let mapping = mapping::tables(&head.0);
    let mapping = mapping.map_err(|errno| Error::os("Could not allocate the block map", errno))?;
    Ok(Box::new(Vdi {
        name: opening.name().to_owned(),
        header: head.0.clone(),
        children: [file],
        mapping,
        space: space::space(&head.0, &blocks, node.driver().len()),
        is_writable,
        is_prepared: Default::default(),
        is_frozen: Default::default(),
        head: Lock::new(head),
    }))
}

/// The blocks of an image that is about to be written; one that was not closed is brought to rest first, if it may be
/// changed already.
pub(super) async fn settled(
    name: &str,
    file: &Node,
    head: &mut Head,
    may_change: bool,
) -> Result<Blocks, Error> {
    let found = blocks::scan(file, &head.0).await?;
    if blocks::agree(&head.0, &found) || !may_change {
        return Ok(found);
    }
    log::info!("{name}: vdi: the image was not closed cleanly: its blocks are counted again");
    blocks::settle(file, head, Emptied::Go).await?;
    blocks::scan(file, &head.0).await
}

/// Reads the header, and checks that the file has the map.
pub(super) async fn read_header(file: &Node) -> Result<Head, Error> {
    let mut head = [0; header::LEN];
    let read = read_padded(file, 0, &IoVec::from_mut(&mut head)).await;
    read.map_err(|errno| Error::os("Could not read VDI header", errno))?;
    let header = Header::parse(&head)?;
    if header.map_end() > file.len() {
        return Err(Error::new(format!(
            "The VDI block map ends at {:#x}, past the end of the file ({:#x})",
            header.map_end(),
            file.len()
        )));
    }
    Ok((header, head))
}
