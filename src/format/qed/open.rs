//! Opening an image: the header, the L1 table, the children.

use super::header::{self, Features, Header};
use super::mapping::L1Entry;
use super::unnamed::Unnamed;
use super::{Qed, RecordedName, check, idle, mapping, space};
use crate::block::*;
use crate::cow::{Lock, Run, TopTable, Unclosed, read_padded};
use crate::format::children::FileAndBacking;
use crate::io::sync::Mutex;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use crate::options::{Map, bytes};
use std::ops::Range;
use std::sync::atomic::AtomicBool;

pub(super) async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: FileAndBacking = opening.parse(map)?;
    let mut held = Perm::CONSISTENT_READ;
    if opening.is_active() && !opening.options().read_only && !opening.auto_read_only() {
        // An image that was not closed is repaired.
        held |= Perm::WRITE | Perm::RESIZE;
    }
    let during = Perms::format(Perms { held, shared: Perm::all() });
    let file = opening.child(Role::File, options.file, during).await?;
    let node = file.node();
    let is_writable = opening.is_writable_over(&node);
    let mut header = read_header(&node).await?;
    let needs_check = header.features.contains(Features::NEED_CHECK);
    let is_repaired = is_writable
        && (needs_check || header.mark().is_some())
        && opening.is_active()
        && !opening.policy().for_check;
    let unclosed = Unclosed::default();
    unclosed.note(header.mark());
    let mut unnamed = None;
    if is_repaired {
        let (repaired, runs) = repair(opening.name(), &node).await?;
        (header, unnamed) = (repaired, Some(runs));
    }
    let backing_name = backing_name(&node, &header).await?;
    let recorded = backing_name
        .as_ref()
        .map(|filename| RecordedBacking { filename, format: header.backing_format() });
    let backing = opening.backing(options.backing, recorded, &file).await?;

    let geometry = header.geometry;
    let failed = |errno| Error::os("Could not read L1 table", errno);
    let entries = 0..geometry.l1_entries(header.size);
    let entries = read_l1(&node, header.l1_offset, entries).await.map_err(failed)?;
    let mapping = mapping::tables(&geometry, header.size);
    let mapping = mapping.map_err(|errno| Error::os("Could not allocate L2 tables", errno))?;

    let space = space::space(node.driver().len(), &geometry);
    let mut children = vec![file];
    children.extend(backing);
    Ok(Box::new(Qed {
        name: opening.name().to_owned(),
        layout: header.layout(),
        l1_offset: header.l1_offset,
        size: header.size.into(),
        backing: Mutex::new(RecordedName { name: backing_name, format: header.backing_format() }),
        children,
        l1: TopTable::new(mapping::most_l1_entries(&geometry), &entries),
        l1_lock: Lock::new(()),
        mapping,
        space,
        is_writable,
        is_prepared: AtomicBool::new(false),
        is_marked: AtomicBool::new(false),
        clock: is_writable.then(|| IdleClock::new(idle::AFTER)).transpose()?,
        unclosed,
        unnamed: Unnamed::new(unnamed),
        is_frozen: AtomicBool::new(false),
        header: Lock::new(header),
        has_reported: AtomicBool::new(false),
    }))
}

/// Repairs an image that was not closed; the header afterwards, and the clusters that nothing names. They stay: the front
/// end of a killed daemon may know of them.
pub(super) async fn repair(name: &str, file: &Node) -> Result<(Header, Vec<Run>), Error> {
    log::info!("{name}: qed: the image was not closed cleanly: it is checked");
    let report = check::check_killed(file).await;
    let (report, unnamed) = report.map_err(|error| error.at("Could not repair dirty image"))?;
    if report.corruptions > 0 {
        return Err(Error::new(format!(
            "The image was not closed cleanly, and {} clusters have two owners: open it with \
             read-only=on",
            report.corruptions
        )));
    }
    Ok((read_header(file).await?, unnamed))
}

/// Entries of the L1 table, which begins at `table`.
pub(super) async fn read_l1(
    file: &Node,
    table: u64,
    entries: Range<u64>,
) -> IoResult<Vec<L1Entry>> {
    let len = (entries.end - entries.start) as usize * 8;
    let mut bytes = AlignedBuf::new(len, 4096).ok_or(Errno::ENOMEM)?;
    read_padded(file, table + entries.start * 8, &bytes.io_vec()).await?;
    Ok(mapping::entries(&bytes[..len]).map(L1Entry).collect())
}

/// Reads the header.
pub(super) async fn read_header(file: &Node) -> Result<Header, Error> {
    let mut head = [0; header::LEN];
    let read = read_padded(file, 0, &IoVec::from_mut(&mut head)).await;
    read.map_err(|errno| Error::os("Could not read QED header", errno))?;
    Header::parse(&head, file.len())
}

/// The name of the backing file as it is stored, if the image has one.
pub(super) async fn backing_name(file: &Node, header: &Header) -> Result<Option<String>, Error> {
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
