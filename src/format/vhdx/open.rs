//! Opening an image: the headers, the log, the regions, the metadata, the children.

use super::header::{self, Header};
use super::layout::Layout;
use super::linkage::{Parent, Said};
use super::log::append::LogEnd;
use super::log::replay::{self, Active};
use super::metadata::Metadata;
use super::parent::{self, Locator};
use super::regions::{self, Regions};
use super::{State, Vhdx, mapping, space};
use crate::block::*;
use crate::cow::{FileEnd, Lock, read_padded};
use crate::format::children::FileAndBacking;
use crate::io::IoVec;
use crate::io::sync::Mutex;
use crate::options::Map;
use crate::options::node_ref::NodeRefOrNull;
use std::sync::atomic::AtomicBool;
use uuid::Uuid;

pub(super) static HELP: &[OptionHelp] = &[
    OptionHelp { name: "file", value: "node", help: "The node that holds the image" },
    OptionHelp {
        name: "backing",
        value: "node",
        help: "The parent of a differencing image, to read where it has no data; null for none",
    },
];

/// What a file says of itself.
pub(super) struct Read {
    pub header: Header,
    /// Which of the two headers that is.
    pub place: usize,
    /// Entries of the log that are not in their places yet.
    pub active: Option<Active>,
}

/// What lies behind the headers. Read after the log was replayed.
pub(super) struct Contents {
    pub regions: Regions,
    pub metadata: Metadata,
    pub layout: Layout,
}

pub(super) async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: FileAndBacking = opening.parse(map)?;
    let mut held = Perm::CONSISTENT_READ;
    if opening.is_active() && !opening.options().read_only && !opening.auto_read_only() {
        // The log is replayed.
        held |= Perm::WRITE | Perm::RESIZE;
    }
    let during = Perms::format(Perms { held, shared: Perm::all() });
    let file = opening.child(Role::File, options.file, during).await?;
    let node = file.node();
    let is_writable = opening.is_writable_over(&node);
    let mut read = read(&node).await?;
    // That of an image that is another process's is looked at when it becomes ours.
    let active = read.active.take().filter(|_| opening.is_active());
    let is_replayed = active.is_some();
    if let Some(active) = active {
        if !held.contains(Perm::WRITE) {
            return Err(needs_replay(&node));
        }
        log::info!(
            "{}: vhdx: the image was not closed cleanly: its log is replayed",
            opening.name()
        );
        replay_log(&node, &mut read, &active).await?;
    }
    let Contents { regions, metadata, layout } = contents(&node, &read.header).await?;
    let (parent, backing) = open_parent(opening, options.backing, &metadata, &file).await?;
    if is_writable && read.header.log.len == 0 {
        return Err(Error::new("VHDX header: log length 0: open the image with read-only=on"));
    }
    let mapping = mapping::tables(&metadata.geometry);
    let mapping = mapping.map_err(|errno| Error::os("Could not allocate the block map", errno))?;
    let file_len = node.driver().len();
    let Read { header, place, .. } = read;
    Ok(Box::new(Vhdx {
        name: opening.name().to_owned(),
        log: Lock::new(LogEnd::new(header.log)),
        header: Lock::new(State { header, place }),
        regions,
        layout,
        space: FileEnd::new(space::extent(&metadata.geometry), metadata.geometry.block_size()),
        space_start: space::start(file_len).into(),
        file_len: file_len.into(),
        metadata,
        children: [file].into_iter().chain(backing).collect(),
        parent,
        mapping,
        is_writable,
        is_replayed,
        is_prepared: AtomicBool::new(false),
        is_frozen: AtomicBool::new(false),
        has_reported: AtomicBool::new(false),
    }))
}

/// Opens the parent that the options give, or the image names, and looks whether it is the one that is meant.
async fn open_parent(
    opening: &mut Opening,
    given: Option<NodeRefOrNull>,
    metadata: &Metadata,
    file: &Child,
) -> Result<(Option<Parent>, Option<Child>), Error> {
    if !metadata.geometry.has_parent {
        return match given {
            None | Some(NodeRefOrNull::Null) => Ok((None, None)),
            Some(_) => Err(Error::new("The VHDX image has no parent, and takes no backing file")),
        };
    }
    let Some((bytes, place)) = metadata.locator.as_ref().zip(metadata.locator_place) else {
        return Err(Error::new("VHDX metadata: there is no parent locator"));
    };
    let locator = Locator::parse(bytes)?;
    let is_given = given.is_some();
    let name = match locator.name() {
        Err(error) if !is_given => return Err(error),
        name => name.ok(),
    };
    let recorded =
        name.as_ref().map(|filename| RecordedBacking { filename, format: Some(super::ENTRY.name) });
    let backing = opening.backing(given, recorded, file).await?;
    let found = match &backing {
        Some(backing) => parent::data_write(&backing.node()).await?,
        None => None,
    };
    let is_meant = found.is_some_and(|found| locator.means(found));
    if let Some(found) = found
        && !is_meant
        && !is_given
        && !opening.policy().for_info
    {
        return Err(Error::new(format!(
            "The parent '{}' has changed since the image was made: it is {found}, and the image wants {}; \
             the option 'backing' takes it all the same",
            name.as_deref().unwrap_or_default().escape_debug(),
            locator.linkage
        )));
    }
    let has_room = locator.linkage_place.len() == parent::guid_text(Uuid::nil()).len();
    let linkage_place = place.offset + locator.linkage_place.start as u64;
    let said = Said {
        name,
        linkage: found.unwrap_or(locator.linkage),
        linkage_place: (is_meant && has_room).then_some(linkage_place),
    };
    Ok((Some(Parent(Mutex::new(said))), backing))
}

/// In QEMU's words.
pub(super) fn needs_replay(file: &Node) -> Error {
    let name = file.driver().filename().unwrap_or_default();
    let name = name.escape_debug();
    Error::new(format!(
        "VHDX image file '{name}' opened read-only, but contains a log that needs to be replayed"
    ))
    .with_hint(format!("To replay the log, run:\nqemu-img check -r all '{name}'"))
}

/// Reads bytes of the header section.
async fn read_at(file: &Node, at: u64, len: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; len];
    let read = read_padded(file, at, &IoVec::from_mut(&mut bytes)).await;
    read.map_err(|errno| Error::os("Could not read VHDX header", errno))?;
    Ok(bytes)
}

/// Reads the headers, and looks for entries of the log that count.
pub(super) async fn read(file: &Node) -> Result<Read, Error> {
    let magic = read_at(file, 0, header::MAGIC.len()).await?;
    if !Header::probe(&magic) {
        return Err(Error::new("Image not in VHDX format"));
    }
    let [first, second] = header::PLACES;
    let first = read_at(file, first, header::LEN).await?;
    let second = read_at(file, second, header::LEN).await?;
    let (place, header) = Header::current(&first, &second)?;
    let active = replay::active(file, &header).await?;
    Ok(Read { header, place, active })
}

/// Brings what the log says to its places. The file says first that it has changed, and last that the log is empty.
pub(super) async fn replay_log(file: &Node, read: &mut Read, active: &Active) -> Result<(), Error> {
    let failed = |errno| Error::os("Could not write VHDX header", errno);
    let mut state = State { header: read.header.clone(), place: read.place };
    let file_write = Uuid::new_v4();
    state.write(file, |header| header.file_write = file_write).await.map_err(failed)?;
    replay::replay(file, &state.header, active).await?;
    state.write(file, |header| header.log_guid = Uuid::nil()).await.map_err(failed)?;
    (read.header, read.place) = (state.header, state.place);
    Ok(())
}

/// Reads what lies behind the headers.
pub(super) async fn contents(file: &Node, header: &Header) -> Result<Contents, Error> {
    let [first, second] = regions::PLACES;
    let first = read_at(file, first, regions::LEN).await?;
    let second = read_at(file, second, regions::LEN).await?;
    let regions = Regions::parse([&first, &second], header.log, file.driver().len())?;
    let metadata = Metadata::read(file, regions.metadata).await?;
    let needed = metadata.geometry.entries() * mapping::ENTRY_BYTES;
    if needed > regions.bat.len {
        return Err(Error::new(format!(
            "VHDX block allocation table: it has {:#x} bytes, and the disk needs {needed:#x}",
            regions.bat.len
        )));
    }
    let layout = Layout::new(header.log, &regions);
    Ok(Contents { regions, metadata, layout })
}
