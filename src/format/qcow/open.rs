//! Opening an image: the header, the L1 table, the children.

use super::entries::L1Entry;
use super::header::{self, Header};
use super::space::Space;
use super::{Qcow, mapping};
use crate::block::*;
use crate::cow::{Lock, TopTable, Unpacking, read_padded};
use crate::format::children::FileAndBacking;
use crate::io::sync::Mutex;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use crate::options::{Map, bytes};
use std::sync::atomic::AtomicBool;

pub(super) async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: FileAndBacking = opening.parse(map)?;
    let during = Perms::format(Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() });
    let file = opening.child(Role::File, options.file, during).await?;
    let node = file.node();
    let is_writable = opening.is_writable_over(&node);
    let header = read_header(&node).await?;
    let backing_name = backing_name(&node, &header).await?;
    let recorded = backing_name.as_ref().map(|filename| RecordedBacking { filename, format: None });
    let backing = opening.backing(options.backing, recorded, &file).await?;
    let entries = read_l1(&node, &header).await;
    let entries = entries.map_err(|errno| Error::os("Could not read L1 table", errno))?;
    let geometry = header.geometry;
    let mapping = mapping::tables(&geometry, header.size);
    let mapping = mapping.map_err(|errno| Error::os("Could not allocate L2 tables", errno))?;
    let mut children = vec![file];
    children.extend(backing);
    Ok(Box::new(Qcow {
        name: opening.name().to_owned(),
        geometry,
        size: header.size,
        l1_offset: header.l1_offset,
        l1_end: header.l1_end(),
        backing_name: Mutex::new(backing_name),
        children,
        l1: TopTable::new(entries.len() as u64, &entries),
        l1_lock: Lock::new(()),
        mapping,
        unpacking: Unpacking::new(opening.blocking()),
        space: Space::new(node.driver().len(), &geometry),
        is_writable,
        is_prepared: AtomicBool::new(false),
        is_frozen: AtomicBool::new(false),
        header: Lock::new(header),
        has_reported: AtomicBool::new(false),
    }))
}

/// Reads the header.
async fn read_header(file: &Node) -> Result<Header, Error> {
    let mut head = [0; header::LEN];
    let read = read_padded(file, 0, &IoVec::from_mut(&mut head)).await;
    read.map_err(|errno| Error::os("Could not read qcow header", errno))?;
    Header::parse(&head, file.len())
}

async fn read_l1(file: &Node, header: &Header) -> IoResult<Vec<L1Entry>> {
    let len = header.l1_bytes() as usize;
    let mut bytes = AlignedBuf::new(len, 4096).ok_or(Errno::ENOMEM)?;
    read_padded(file, header.l1_offset, &bytes.io_vec()).await?;
    let entries = bytes[..len].chunks_exact(8).filter_map(|entry| entry.first_chunk());
    Ok(entries.map(|entry| L1Entry(u64::from_be_bytes(*entry))).collect())
}

/// The name of the backing file as it is stored, if the image has one.
async fn backing_name(file: &Node, header: &Header) -> Result<Option<String>, Error> {
    let mut name = vec![0; header.backing_len as usize];
    let read = read_padded(file, header.backing_offset, &IoVec::from_mut(&mut name)).await;
    read.map_err(|errno| Error::os("Could not read backing filename", errno))?;
    let name = bytes::until_nul(&name);
    Ok((!name.is_empty()).then(|| bytes::text_of(name)))
}
