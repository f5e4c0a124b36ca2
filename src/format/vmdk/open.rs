//! Opening an image: the descriptor, the extents and the parent.

use super::descriptor::{self, Access, Descriptor, ExtentLine, Kind};
use super::encoding::from_utf16;
use super::esx;
use super::header::{self, Header};
use super::layout::Layout;
use super::shared::{Shared, Text, content_id};
use super::sparse::{self, Sparse, TableAt};
use super::{Extent, Part, Vmdk, space};
use crate::block::*;
use crate::cow::{Lock, TopTable, read_padded};
use crate::format::children::FileAndBacking;
use crate::format::chunks::Chunks;
use crate::io::sync::Mutex;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use crate::options::Map;
use crate::options::node_ref::NodeRefOrNull;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Bytes of grain tables that are kept, of all extents together, and of each at least.
const CACHE: u64 = 32 << 20;
const LEAST_CACHE: u64 = 16 << 10;
/// Most bytes of grain directories, of all extents together.
const MOST_DIRECTORIES: u64 = 64 << 20;

/// What the file of an image is.
pub enum File {
    /// An extent, and its header.
    Hosted(Header),
    Cowd(Box<[u8; esx::COWD_LEN]>),
    /// A descriptor of extents that are elsewhere.
    Descriptor,
}

/// An extent that is about to be opened.
struct Found {
    kind: Kind,
    /// The child that it is in; none of zeroes.
    child: Option<usize>,
    /// Where a flat one begins in its file, in bytes.
    offset: u64,
    len: u64,
    access: Access,
    layout: Option<Layout>,
    name: String,
}

pub(super) async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: FileAndBacking = opening.parse(map)?;
    let during = Perms::format(Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() });
    let file = opening.child(Role::File, options.file, during).await?;
    let node = file.node();
    let (kind, text) = read(&node).await?;
    let says = said(&kind, &text)?;
    let mut children = vec![file];
    let found = match kind {
        File::Hosted(header) => vec![embedded(&node, Some(header), None).await?],
        File::Cowd(head) => vec![embedded(&node, None, Some(head)).await?],
        File::Descriptor => {
            check_type(&says.create_type)?;
            open_extents(opening, &descriptor::extents(&text.bytes)?, &mut children).await?
        }
    };
    let why = found.iter().find_map(Found::why_read_only).or_else(|| shared_file(&found));
    let by_text = || "The descriptor is in UTF-16, so the VMDK image must be read only".to_owned();
    let why = why.or_else(|| text.is_utf16.then(by_text));
    if let Some(why) = &why
        && !opening.options().read_only
        && !opening.auto_read_only()
    {
        return Err(Error::new(why.clone()).with_errno(Errno(libc::EACCES)));
    }
    let is_writable =
        children.iter().all(|child| opening.is_writable_over(&child.node())) && why.is_none();
    let (backing, knows_parent) =
        open_parent(opening, options.backing, &says, &children[0]).await?;
    let backing = backing.map(|backing| {
        children.push(backing);
        children.len() - 1
    });
    let shared = Arc::new(Shared {
        name: opening.name().to_owned(),
        children,
        backing,
        is_writable,
        is_marked: AtomicBool::new(false),
        is_frozen: AtomicBool::new(false),
        has_reported: AtomicBool::new(false),
        knows_parent: knows_parent.into(),
        text: Lock::new(text),
        says: Mutex::new(says),
        chunks: Chunks::new(opening.blocking()),
        blocking: opening.blocking(),
    });
    let parts = parts(&shared, found).await?;
    Ok(Box::new(Vmdk { shared, parts }))
}

/// What the descriptor of an image says. A COWD image may have none, which tells no contents.
///
/// # Errors
/// It makes no sense, or is elsewhere.
pub(super) fn said(file: &File, text: &Text) -> Result<Descriptor, Error> {
    match file {
        File::Hosted(_) if text.place.is_none() => Err(Error::new(
            "This VMDK extent has no descriptor: it is a part of a disk, whose descriptor is in another file",
        )),
        File::Cowd(_) => Ok(Descriptor {
            cid: descriptor::NO_PARENT,
            parent_cid: descriptor::NO_PARENT,
            create_type: "vmfsSparse".to_owned(),
            parent: None,
        }),
        File::Hosted(_) | File::Descriptor => Descriptor::parse(&text.bytes),
    }
}

/// Reads what a file is, and the descriptor in it.
pub(super) async fn read(file: &Node) -> Result<(File, Text), Error> {
    let failed = |errno| Error::os("Could not read VMDK header", errno);
    let mut head = Box::new([0; esx::COWD_LEN]);
    read_padded(file, 0, &IoVec::from_mut(&mut head[..])).await.map_err(failed)?;
    let none = Text { bytes: Vec::new(), place: None, room: None, is_utf16: false };
    if head.starts_with(esx::COWD_MAGIC) {
        return Ok((File::Cowd(head), none));
    }
    if head.starts_with(header::MAGIC) {
        let header = Header::parse(head.first_chunk().unwrap_or(&[0; header::LEN]))?;
        let place = header.descriptor_at.checked_mul(SECTOR);
        let room = header.descriptor_len.checked_mul(SECTOR).filter(|&len| len > 0);
        let (Some(place), Some(room)) = (place.filter(|&place| place > 0), room) else {
            return Ok((File::Hosted(header), none));
        };
        // A size that makes no sense does not matter as long as the text has an end.
        let room = room.min(descriptor::LIMIT);
        let bytes = read_text(file, place, room).await?;
        // The extents may be elsewhere, as long as the type of the disk is not one that has a single file.
        let has_others = header.capacity == 0 && !has_single_file(&bytes);
        let kind = if has_others { File::Descriptor } else { File::Hosted(header) };
        return Ok((kind, Text { bytes, place: Some(place), room: Some(room), is_utf16: false }));
    }
    if file.is_empty() {
        return Err(Error::new("File is too small, not a valid image"));
    }
    if file.len() > descriptor::LIMIT && !descriptor::probe(&head[..]) {
        return Err(Error::new("Image not in VMDK format"));
    }
    let stored = read_text(file, 0, file.len().min(descriptor::LIMIT)).await?;
    let decoded = from_utf16(&stored);
    let is_utf16 = decoded.is_some();
    let bytes = decoded.unwrap_or(stored);
    Ok((File::Descriptor, Text { bytes, place: Some(0), room: None, is_utf16 }))
}

/// Whether the descriptor in a sparse extent says that there are no other files.
fn has_single_file(text: &[u8]) -> bool {
    Descriptor::parse(text)
        .is_ok_and(|says| ["monolithicSparse", "streamOptimized"].contains(&&*says.create_type))
}

async fn read_text(file: &Node, place: u64, len: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; len as usize];
    let read = read_padded(file, place, &IoVec::from_mut(&mut bytes)).await;
    read.map_err(|errno| Error::os("Could not read VMDK descriptor", errno))?;
    Ok(bytes)
}

/// Whether disks of a type can lie in several files.
fn check_type(name: &str) -> Result<(), Error> {
    const KNOWN: [&str; 14] = [
        "monolithicSparse",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "2GbMaxExtentSparse",
        "2GbMaxExtentFlat",
        "vmfs",
        "vmfsThin",
        "vmfsPreallocated",
        "vmfsEagerZeroedThick",
        "vmfsSparse",
        "seSparse",
        "streamOptimized",
        "custom",
    ];
    match KNOWN.contains(&name) {
        true => Ok(()),
        false => Err(Error::new(format!("Unsupported image type '{}'", name.escape_debug()))),
    }
}

impl Found {
    fn why_read_only(&self) -> Option<String> {
        let of_layout = self.layout.as_ref().and_then(|layout| layout.read_only);
        let by_line = || {
            let is_shut = self.access == Access::ReadOnly;
            is_shut.then(|| format!("The extent '{}' is read-only", self.name.escape_debug()))
        };
        of_layout.map(str::to_owned).or_else(by_line)
    }
}

/// Why a disk cannot be written whose sparse extents share a file.
fn shared_file(found: &[Found]) -> Option<String> {
    let users = |child: Option<usize>| found.iter().filter(|found| found.child == child).count();
    let twice = found.iter().find(|found| found.layout.is_some() && users(found.child) > 1)?;
    let name = twice.name.escape_debug();
    Some(format!("Several extents are in '{name}', so it must be read only"))
}

/// The only extent of an image, in its file.
async fn embedded(
    file: &Node,
    header: Option<Header>,
    cowd: Option<Box<[u8; esx::COWD_LEN]>>,
) -> Result<Found, Error> {
    let layout = match (header, cowd) {
        (Some(header), _) => hosted(file, header).await?,
        (None, Some(head)) => esx::cowd(&head, file.len())?,
        (None, None) => return Err(Error::new("Image not in VMDK format")),
    };
    Ok(Found {
        kind: Kind::Sparse,
        child: Some(0),
        offset: 0,
        len: layout.capacity,
        access: Access::ReadWrite,
        layout: Some(layout),
        name: String::new(),
    })
}

/// The layout of a hosted sparse extent: what the header says, or a footer.
async fn hosted(file: &Node, header: Header) -> Result<Layout, Error> {
    if !header.has_footer() {
        return header.layout(file.len(), false);
    }
    let mut end = [0; 3 * header::LEN];
    let at = file.len().saturating_sub(end.len() as u64);
    let read = read_padded(file, at, &IoVec::from_mut(&mut end)).await;
    read.map_err(|errno| Error::os("Could not read VMDK footer", errno))?;
    Header::parse_footer(&end)?.layout(file.len(), true)
}

/// Opens the files of extents; one that several are in is opened once.
async fn open_extents(
    opening: &mut Opening,
    lines: &[ExtentLine],
    children: &mut Vec<Child>,
) -> Result<Vec<Found>, Error> {
    let mut open: BTreeMap<&str, usize> = BTreeMap::new();
    let mut found = Vec::with_capacity(lines.len());
    for line in lines {
        let child = match (line.kind, open.get(&*line.name).copied()) {
            (Kind::Zero, _) => None,
            _ if line.access == Access::None => None,
            (_, Some(child)) => Some(child),
            (_, None) => {
                let child = open_extent(opening, line, &children[0]).await?;
                children.push(child);
                open.insert(&line.name, children.len() - 1);
                Some(children.len() - 1)
            }
        };
        let layout = match child {
            Some(child) => layout_of(&children[child].node(), line.kind).await?,
            None => None,
        };
        found.push(Found {
            kind: line.kind,
            child,
            offset: line.offset,
            // As in QEMU, the header of a sparse extent counts.
            len: layout.as_ref().map_or(line.len, |layout| layout.capacity),
            access: line.access,
            layout,
            name: line.name.clone(),
        });
    }
    Ok(found)
}

async fn open_extent(
    opening: &mut Opening,
    line: &ExtentLine,
    file: &Child,
) -> Result<Child, Error> {
    let options = opening.recorded_extent(&line.name, file, "VMDK descriptor file")?;
    let during = Perms::format(Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() });
    opening.child(Role::Extent, options, during).await
}

/// The layout of a sparse extent; none of a flat one.
pub(super) async fn layout_of(file: &Node, kind: Kind) -> Result<Option<Layout>, Error> {
    let head = async |at: u64, len: usize| -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; len];
        let read = read_padded(file, at, &IoVec::from_mut(&mut bytes)).await;
        read.map_err(|errno| Error::os("Could not read VMDK header", errno))?;
        Ok(bytes)
    };
    let layout = match kind {
        Kind::Flat | Kind::Vmfs | Kind::Zero => return Ok(None),
        Kind::Sparse | Kind::VmfsSparse => {
            let bytes = head(0, esx::COWD_LEN).await?;
            match bytes.starts_with(esx::COWD_MAGIC) {
                true => esx::cowd(bytes.first_chunk().unwrap_or(&[0; esx::COWD_LEN]), file.len())?,
                false => {
                    let first = bytes.first_chunk().unwrap_or(&[0; header::LEN]);
                    hosted(file, Header::parse(first)?).await?
                }
            }
        }
        Kind::SeSparse => {
            let bytes = head(0, esx::SE_LEN).await?;
            let first = bytes.first_chunk().unwrap_or(&[0; esx::SE_LEN]);
            let (layout, volatile) = esx::se_sparse(first, file.len())?;
            let bytes = head(volatile, esx::SE_LEN).await?;
            esx::se_volatile(bytes.first_chunk().unwrap_or(&[0; esx::SE_LEN]))?;
            layout
        }
    };
    Ok(Some(layout))
}

/// Opens the parent that the options give, or the image names, and looks whether it is the one that is meant.
async fn open_parent(
    opening: &mut Opening,
    given: Option<NodeRefOrNull>,
    says: &Descriptor,
    file: &Child,
) -> Result<(Option<Child>, bool), Error> {
    let is_given = given.is_some();
    let recorded = says.parent.as_ref().filter(|_| says.has_parent());
    let recorded =
        recorded.map(|filename| RecordedBacking { filename, format: Some(super::ENTRY.name) });
    if let Some(recorded) = recorded.filter(|_| !is_given) {
        opening.check_near(recorded.filename)?;
    }
    let Some(backing) = opening.backing(given, recorded, file).await? else {
        return Ok((None, false));
    };
    let found = content_id(&backing.node()).await?;
    let is_meant = found == Some(says.parent_cid);
    if let Some(found) = found
        && !is_meant
        && !is_given
        && !opening.policy().for_info
    {
        return Err(Error::new(format!(
            "The parent '{}' has changed since the image was made: its content ID is {found:08x}, and the image wants \
             {:08x}; the option 'backing' takes it all the same",
            says.parent.as_deref().unwrap_or_default().escape_debug(),
            says.parent_cid
        )));
    }
    Ok((Some(backing), is_meant))
}

/// The extents with what they need in memory, one behind another.
async fn parts(shared: &Arc<Shared>, found: Vec<Found>) -> Result<Vec<Part>, Error> {
    let sparse = found.iter().filter(|found| found.layout.is_some()).count() as u64;
    let most = (CACHE / sparse.max(1)).max(LEAST_CACHE);
    let mut room = MOST_DIRECTORIES;
    let mut start = 0u64;
    let mut parts = Vec::with_capacity(found.len());
    for (number, found) in found.into_iter().enumerate() {
        let end = start.checked_add(found.len).filter(|&end| i64::try_from(end).is_ok());
        let end = end.ok_or_else(|| Error::new("The VMDK image is too large"))?;
        let extent = match (found.child, found.layout) {
            (Some(child), Some(layout)) => {
                let file = shared.children[child].node();
                let directories = |count: u64| layout.tables * layout.entry_bytes() * count;
                let copies = if layout.copy.is_some() && shared.is_writable { 2 } else { 1 };
                room = room
                    .checked_sub(directories(copies))
                    .ok_or_else(|| Error::new("L1 size too big"))?;
                let failed = |errno| Error::os("Could not read the grain directory", errno);
                let read = async |at: u64| read_directory(&file, at, &layout).await.map_err(failed);
                let table = |entries: Vec<TableAt>| TopTable::new(entries.len() as u64, &entries);
                let directory = table(read(layout.directory).await?);
                let copies = match layout.copy.filter(|_| copies > 1) {
                    Some(at) => Some(table(read(at).await?)),
                    None => None,
                };
                let mapping = sparse::tables(&layout, most);
                let space = space::space(&layout, file.len());
                let failed = |errno| Error::os("Could not allocate grain tables", errno);
                Extent::Sparse(Box::new(Sparse {
                    shared: shared.clone(),
                    number,
                    child,
                    start,
                    directory,
                    copies,
                    lock: Lock::new(()),
                    mapping: mapping.map_err(failed)?,
                    end_at_opening: space.end().into(),
                    space,
                    is_ready: AtomicBool::new(false),
                    layout,
                }))
            }
            (Some(child), None) => Extent::Flat { child, offset: found.offset },
            _ if found.access == Access::None => Extent::Shut,
            _ => Extent::Zero,
        };
        parts.push(Part { start, end, kind: found.kind, extent });
        start = end;
    }
    Ok(parts)
}

/// Reads the entries of a grain directory.
pub(super) async fn read_directory(
    file: &Node,
    at: u64,
    layout: &Layout,
) -> IoResult<Vec<TableAt>> {
    let len = (layout.tables * layout.entry_bytes()) as usize;
    let mut bytes = AlignedBuf::new(len.max(1), 4096).ok_or(Errno::ENOMEM)?;
    read_padded(file, at, &bytes.io_vec().slice(0, len as u64)).await?;
    let entries = bytes[..len].chunks_exact(layout.entry_bytes() as usize);
    Ok(entries.map(|entry| TableAt(sparse::stored_number(entry))).collect())
}
