//! Opening an image: the header, the L1 table, the children.

use super::header::{self, Features, Header};
use super::{Qed, mapping};
use crate::block::*;
use crate::cow::read_padded;
use crate::format::read_only;
use crate::io::{AlignedBuf, Errno, IoVec};
use crate::options::node_ref::NodeRefOrNull;
use crate::options::{Map, NodeRef, bytes};
use serde::Deserialize;
use std::sync::atomic::AtomicBool;

pub(super) static HELP: &[OptionHelp] = &[
    OptionHelp { name: "file", value: "node", help: "The node that holds the image" },
    OptionHelp {
        name: "backing",
        value: "node",
        help: "The node to read where the image has no data; null for none",
    },
];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
    backing: Option<NodeRefOrNull>,
}

pub(super) async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(map)?;
    read_only::check(opening, "qed")?;
    let during = Perms::format(Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() });
    let file = opening.child(Role::File, options.file, during).await?;
    let node = file.node();
    let header = read_header(&node).await?;
    let file_len = header.whole_clusters(node.len());
    let backing_name = backing_name(&node, &header).await?;
    let recorded = backing_name
        .as_ref()
        .map(|filename| RecordedBacking { filename, format: header.backing_format() });
    let backing = opening.backing(options.backing, recorded, &file).await?;

    // The disk may need fewer entries than the table has.
    let needed = header.size.div_ceil(header.geometry.l2_coverage()) as usize * 8;
    let failed = |errno| Error::os("Could not read L1 table", errno);
    let mut l1 = AlignedBuf::new(needed, 4096).ok_or_else(|| failed(Errno::ENOMEM))?;
    read_padded(&node, header.l1_offset, &l1.io_vec()).await.map_err(failed)?;
    let l1 = mapping::l1_table(&l1[..needed]);
    let mapping = mapping::tables(&header.geometry, header.size);
    let mapping = mapping.map_err(|errno| Error::os("Could not allocate L2 tables", errno))?;

    let mut children = vec![file];
    children.extend(backing);
    let name = opening.name().to_owned();
    Ok(Box::new(Qed {
        name,
        header,
        backing_name,
        file_len,
        children,
        l1,
        mapping,
        has_reported: AtomicBool::new(false),
    }))
}

/// Reads the header.
pub(super) async fn read_header(file: &Node) -> Result<Header, Error> {
    let mut head = [0; header::LEN];
    let read = read_padded(file, 0, &IoVec::from_mut(&mut head)).await;
    read.map_err(|errno| Error::os("Could not read QED header", errno))?;
    Header::parse(&head, file.len())
}

/// The name of the backing file as it is stored, if the image has one.
async fn backing_name(file: &Node, header: &Header) -> Result<Option<String>, Error> {
    if !header.features.contains(Features::BACKING_FILE) {
        return Ok(None);
    }
    let mut name = vec![0; (header.backing_len as usize).min(header::BACKING_NAME_LIMIT + 1)];
    let read = read_padded(file, header.backing_offset.into(), &IoVec::from_mut(&mut name)).await;
    read.map_err(|errno| Error::os("Could not read backing filename", errno))?;
    // As QEMU has it: the name ends before a zero byte, and none at all is no backing file.
    let name = bytes::until_nul(&name);
    if name.len() > header::BACKING_NAME_LIMIT {
        return Err(Error::new("QED backing filename is too long"));
    }
    Ok((!name.is_empty()).then(|| bytes::text_of(name)))
}
