//! Opening an image: the header, the tables that are kept in memory, the children.

use super::extensions::Extension;
use super::header::{self, CRYPT_NONE, Header, Incompatible};
use super::l1::L1Table;
use super::l2_cache::L2Cache;
use super::options::Options;
use super::read::read_padded;
use super::{ENTRY, Qcow2};
use crate::block::*;
use crate::io::{AlignedBuf, Errno, IoVec};
use crate::options::Map;

pub async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(map)?;
    let during = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
    let file = opening.child("file", options.file.clone(), Inherit::Storage, during).await?;
    let node = file.node();
    let header = read_header(&node).await?;
    check(&header)?;
    let geometry = header.geometry();
    let caches = options.caches(&geometry, header.size)?;

    let recorded = header.backing_file.as_deref().map(String::from_utf8_lossy);
    let format = header.extensions.iter().find_map(|extension| match extension {
        Extension::BackingFormat(name) => Some(String::from_utf8_lossy(name)),
        _ => None,
    });
    let recorded =
        recorded.as_ref().map(|filename| RecordedBacking { filename, format: format.as_deref() });
    let backing = opening.backing(options.backing, recorded, &file).await?;
    let data_file = data_file(opening, options.data_file, &header).await?;

    let l1_bytes = header.l1_size as u64 * 8;
    if l1_bytes > 0 && header.l1_table_offset >= node.len() {
        return Err(Error::os("Could not read L1 table", Errno::EIO));
    }
    let mut table = AlignedBuf::new(l1_bytes as usize, 4096)
        .ok_or_else(|| Error::os("Could not allocate L1 table", Errno::ENOMEM))?;
    if l1_bytes > 0 {
        read_padded(&node, header.l1_table_offset, &table.io_vec())
            .await
            .map_err(|e| Error::os("Could not read L1 table", e))?;
    }
    let l1 = L1Table::new(&table[..l1_bytes as usize]);

    let read_only = opening.options().read_only;
    if !read_only && !opening.auto_read_only() {
        return Err(Error::new(format!(
            "Writing to '{}' images is not supported yet: open it with read-only=on",
            ENTRY.name
        )));
    }

    let mut children = vec![file];
    let backing = backing.map(|child| {
        children.push(child);
        children.len() - 1
    });
    let data = data_file.map_or(0, |child| {
        children.push(child);
        children.len() - 1
    });
    let words = geometry.l2_entry_size() as usize / 8;
    let traits = traits(children[data].node().traits(), &geometry);
    Ok(Box::new(Qcow2 {
        name: opening.name().to_owned(),
        geometry,
        compression: header.compression,
        size: header.size.into(),
        backing,
        data,
        traits,
        l1,
        l2: L2Cache::new(caches.l2, caches.l2_slice, words),
        slice_bytes: caches.l2_slice,
        visits: Default::default(),
        is_corrupt: Default::default(),
        info: super::info::info(&header),
        children,
    }))
}

async fn read_header(file: &Node) -> Result<Header, Error> {
    let failed = |e| Error::os("Could not read qcow2 header", e);
    let mut head = [0; header::FIXED_LEN];
    read_padded(file, 0, &IoVec::from_mut(&mut head)).await.map_err(failed)?;
    let bits = Header::cluster_bits(&head)?;
    let mut cluster = AlignedBuf::new(1 << bits, 4096).ok_or_else(|| failed(Errno::ENOMEM))?;
    read_padded(file, 0, &cluster.io_vec()).await.map_err(failed)?;
    Header::parse(&cluster)
}

/// Refuses what nobody here can make sense of.
fn check(header: &Header) -> Result<(), Error> {
    if header.crypt_method != CRYPT_NONE {
        return Err(Error::new("Encrypted qcow2 images are not supported"));
    }
    Ok(())
}

/// The external data file, which has to be there if the image keeps its data apart, and only then.
/// The image may name one, but whoever made the image is not who opens it.
async fn data_file(
    opening: &mut Opening,
    given: Option<crate::options::NodeRef>,
    header: &Header,
) -> Result<Option<Child>, Error> {
    let needed = header.incompatible.contains(Incompatible::DATA_FILE);
    let options = match (needed, given) {
        (false, None) => return Ok(None),
        (false, Some(_)) => {
            return Err(Error::new(
                "'data-file' can only be set for images with an external data file",
            ));
        }
        (true, None) => return Err(Error::new("'data-file' is required for this image")),
        (true, Some(options)) => options,
    };
    let during = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
    opening.child("data-file", options, Inherit::Storage, during).await.map(Some)
}

/// Requests that are aligned for the data's file stay so in every cluster, as long as its blocks are
/// no larger than clusters.
fn traits(data: Traits, geometry: &super::layout::Geometry) -> Traits {
    let fits = u64::from(data.request_align) <= geometry.cluster_size();
    let (request_align, buffer_align) =
        if fits { (data.request_align, data.buffer_align) } else { (1, 1) };
    Traits {
        request_align,
        buffer_align,
        max_transfer: data.max_transfer,
        max_segments: data.max_segments,
        zero_align: request_align,
        max_zero: Traits::MAX_TRANSFER as u64,
        discard_align: request_align,
        max_discard: Traits::MAX_TRANSFER as u64,
        optimal_io: geometry.subcluster_size() as u32,
        abilities: Abilities::READ_ONLY,
    }
}
