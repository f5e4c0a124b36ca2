//! Opening an image: the header, the tables that are kept in memory, the children.

use super::bitmaps::ImageBitmaps;
use super::clean::clean_every;
use super::corrupt::Corruption;
use super::extensions::{self, Extension, FeatureKind};
use super::header::{self, Autoclear, CRYPT_NONE, Header, Incompatible};
use super::image_header::ImageHeader;
use super::layout::L1Entry;
use super::life::Life;
use super::mapping::ImageMapping;
use super::nodes::Nodes;
use super::options::Options;
use super::overlap::{Kinds, Overlaps};
use super::settings::{Discards, Settings};
use super::snapshots::{self, ImageSnapshots};
use super::space::{Refcounts, Space};
use super::unclosed::{mark_of, promised, set_mark};
use super::{Qcow2, check, header_cluster};
use crate::block::*;
use crate::cow::{Unclosed, Unpacking, read_padded, traits_over};
use crate::io::{AlignedBuf, Errno, IoVec};
use crate::options::{Map, NodeRef, Value, bytes};

pub async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(map)?;
    // Nobody else may write while the tables are read; we may have to, to repair them.
    let mut held = Perm::CONSISTENT_READ;
    if !opening.options().read_only && !opening.auto_read_only() {
        held |= Perm::WRITE;
    }
    let during = Perms::format(Perms { held, shared: Perm::all() });
    let file = opening.child(Role::File, options.file.clone(), during).await?;
    let node = file.node();
    let mut header = read_header(&node).await?;
    check_known(&header)?;
    let for_check = opening.policy().for_check;
    if !for_check {
        check_counted(&header)?;
    }
    let may_repair = !for_check
        && opening.is_active()
        && held.contains(Perm::WRITE)
        && header.incompatible & (Incompatible::DIRTY | Incompatible::CORRUPT)
            == Incompatible::DIRTY;
    if may_repair {
        header = repair(opening.name(), &node).await?;
    }
    let overlap_check = options.overlap_check().map_err(|error| opening.error(error))?;
    let clean_interval = options.clean_interval()?;
    let geometry = header.geometry();
    let caches = options.caches(&geometry, header.size, !opening.options().read_only)?;

    let recorded = header.backing_file.as_deref().map(bytes::text_of);
    let format = header.backing_format().map(String::from_utf8_lossy);
    let recorded =
        recorded.as_ref().map(|filename| RecordedBacking { filename, format: format.as_deref() });
    let backing = opening.backing(options.backing, recorded, &file).await?;
    let data_file = data_file(opening, options.data_file, &header).await?;

    let l1 = load_l1(&node, &header).await?;

    let is_writable = is_writable(opening, &node, &header)?;
    if is_writable && opening.is_active() && held.contains(Perm::WRITE) {
        if for_check {
            forget_mark(&node, &mut header).await?;
        }
        clear_unknown(opening.name(), &node, &mut header).await?;
    }
    let lazy = lazy_refcounts(&options.lazy_refcounts, &header)?;
    // A check reads them itself, and may find that there are none.
    let counts = match is_writable && !for_check {
        true => {
            let place = (header.refcount_table_offset, header.refcount_table_clusters);
            node.event(Event::ReftableLoad).await;
            let counts = Refcounts::load(&node, geometry, place, caches.refcounts, lazy).await;
            let counts = counts.map_err(no_refcounts)?;
            Some(counts)
        }
        false => None,
    };

    let snapshots = snapshots::Table::read(&node, &header).await;

    let bitmaps = ImageBitmaps::load(opening.name(), &node, &header, is_writable).await?;
    let mapping = ImageMapping::new(geometry, &l1, caches.l2, caches.l2_slice)
        .map_err(|_| Error::new("Could not allocate metadata caches"))?;
    let passes_discards = options.pass_discard_request.unwrap_or(opening.options().discard);
    let settings = Settings {
        name: opening.name().to_owned(),
        compression: header.compression,
        is_writable,
        readers_share: opening.policy().readers_share,
        lazy_refcounts: lazy,
        raw_data: header.autoclear.contains(Autoclear::RAW_DATA_FILE) && geometry.external_data,
        discards: Discards {
            guest: passes_discards,
            snapshot: options.pass_discard_snapshot.unwrap_or(true),
            other: options.pass_discard_other.unwrap_or(false),
            keeps: keeps_discarded(options.discard_no_unref, &header)?,
        },
    };
    let unclosed = Unclosed::default();
    unclosed.note(mark_of(&header));
    let image = Qcow2 {
        settings,
        geometry,
        size: header.size.into(),
        life: Life::default(),
        nodes: Nodes::new(file, backing, data_file),
        mapping,
        unclosed,
        space: Space::new(opening.name(), geometry, counts, caches.refcounts, passes_discards),
        snapshots: ImageSnapshots::new(snapshots, geometry.external_data),
        bitmaps,
        overlaps: Overlaps::new(if is_writable { overlap_check } else { Kinds::empty() }),
        corruption: Corruption::new(opening.name(), is_writable, opening.notices()),
        unpacking: Unpacking::new(opening.blocking()),
        header: ImageHeader::new(header),
    };
    image.note_metadata().await;
    if let Some(interval) = clean_interval {
        clean_every(interval, &image.mapping, &image.space);
    }
    Ok(Box::new(image))
}

pub(super) async fn read_header(file: &Node) -> Result<Header, Error> {
    let failed = |e| Error::os("Could not read qcow2 header", e);
    let mut head = [0; header::FIXED_LEN];
    read_padded(file, 0, &IoVec::from_mut(&mut head)).await.map_err(failed)?;
    let bits = Header::cluster_bits(&head)?;
    let mut cluster = AlignedBuf::new(1 << bits, 4096).ok_or_else(|| failed(Errno::ENOMEM))?;
    read_padded(file, 0, &cluster.io_vec()).await.map_err(failed)?;
    Header::parse(&cluster)
}

pub(super) fn no_refcounts(errno: Errno) -> Error {
    Error::os("Could not initialize refcount handling", errno)
}

/// The entries of the active L1 table.
pub(super) async fn load_l1(file: &Node, header: &Header) -> Result<Vec<L1Entry>, Error> {
    let len = header.l1_size as usize * 8;
    if len > 0 && header.l1_table_offset >= file.len() {
        return Err(Error::os("Could not read L1 table", Errno::EIO));
    }
    let mut table = AlignedBuf::new(len, 4096)
        .ok_or_else(|| Error::os("Could not allocate L1 table", Errno::ENOMEM))?;
    if len > 0 {
        read_padded(file, header.l1_table_offset, &table.io_vec())
            .await
            .map_err(|e| Error::os("Could not read L1 table", e))?;
    }
    Ok(L1Entry::parse_all(&table[..len]))
}

/// Counts the references of an image again that was not closed cleanly; the header afterwards.
pub(super) async fn repair(name: &str, file: &Node) -> Result<Header, Error> {
    log::info!("{name}: qcow2: repairing the refcounts");
    forget_mark(file, &mut read_header(file).await?).await?;
    let mut say = |line: &str| log::debug!("{name}: {line}");
    let repaired = check::check(file, Fix::All, &mut say).await;
    repaired.map_err(|error| error.at("Could not repair dirty image"))?;
    read_header(file).await
}

/// Takes back what the header promises of features that we do not know, durably, because whatever is
/// written from now on may break it.
pub(super) async fn clear_unknown(
    name: &str,
    file: &Node,
    header: &mut Header,
) -> Result<(), Error> {
    let unknown = header.autoclear - promised(header);
    if unknown.is_empty() {
        return Ok(());
    }
    let names = extensions::names_of(&header.extensions, FeatureKind::Autoclear, unknown.bits());
    log::info!("{name}: qcow2: these features no longer hold: {names}");
    header.autoclear -= unknown;
    header_cluster::write_fields(file, header).await.map_err(header_cluster::failed)
}

/// Clears the mark of an image that was not closed: a repair is going to take back what nothing names.
async fn forget_mark(file: &Node, header: &mut Header) -> Result<(), Error> {
    if mark_of(header).is_none() {
        return Ok(());
    }
    set_mark(header, None);
    header_cluster::write_fields(file, header).await.map_err(header_cluster::failed)
}

/// Refuses what nobody here can make sense of.
fn check_known(header: &Header) -> Result<(), Error> {
    if header.crypt_method != CRYPT_NONE {
        return Err(Error::new("Encrypted qcow2 images are not supported"));
    }
    Ok(())
}

/// Refuses an image without a refcount table, which only a repair can use.
pub(super) fn check_counted(header: &Header) -> Result<(), Error> {
    match header.refcount_table_clusters {
        0 => Err(Error::new("Image does not contain a reference count table")),
        _ => Ok(()),
    }
}

/// Whether the image is opened for writing. With `auto-read-only` it is as its file is.
fn is_writable(opening: &Opening, file: &Node, header: &Header) -> Result<bool, Error> {
    let file_is_read_only = file.traits().abilities.contains(Abilities::READ_ONLY);
    if opening.options().read_only || opening.auto_read_only() && file_is_read_only {
        return Ok(false);
    }
    // What another process does to the image meanwhile will be looked at when it is ours.
    if !opening.policy().for_check && opening.is_active() {
        check_writable(header)?;
    }
    Ok(true)
}

/// Whether an image may be written as it is.
pub(super) fn check_writable(header: &Header) -> Result<(), Error> {
    if header.incompatible.contains(Incompatible::CORRUPT) {
        return Err(Error::new("qcow2: Image is corrupt; cannot be opened read/write"));
    }
    if header.incompatible.contains(Incompatible::DIRTY) {
        return Err(Error::new(
            "Image was not closed cleanly and its refcounts may be wrong: repair it first, with \
             'check -r all'",
        ));
    }
    Ok(())
}

fn keeps_discarded(given: Option<bool>, header: &Header) -> Result<bool, Error> {
    let keeps = given.unwrap_or(false);
    if keeps && header.version < 3 {
        return Err(Error::new("discard-no-unref is only supported since qcow2 version 3"));
    }
    Ok(keeps)
}

fn lazy_refcounts(given: &Option<bool>, header: &Header) -> Result<bool, Error> {
    let lazy = given.unwrap_or(false);
    if lazy && header.version < 3 {
        return Err(Error::new(
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
        ));
    }
    Ok(lazy)
}

/// The external data file, if the image keeps its data apart: what the options say, or else what the
/// image records.
async fn data_file(
    opening: &mut Opening,
    given: Option<NodeRef>,
    header: &Header,
) -> Result<Option<Child>, Error> {
    let needed = header.incompatible.contains(Incompatible::DATA_FILE);
    let options = match (needed, given) {
        (false, None) => return Ok(None),
        (false, Some(_)) if opening.policy().for_info => return Ok(None),
        (false, Some(_)) => {
            return Err(Error::new(
                "'data-file' can only be set for images with an external data file",
            ));
        }
        // Reads from it find nothing.
        (true, _) if opening.policy().for_info => NodeRef::Inline(Map::from_iter([
            ("driver", Value::from("null-co")),
            ("size", Value::from(0u64)),
        ])),
        (true, None) => opening.recorded_file(&recorded_data_file(header)?, Map::new())?,
        (true, Some(NodeRef::Inline(given))) => match recorded_data_file(header) {
            Ok(name) => opening.recorded_file(&name, given)?,
            Err(_) => NodeRef::Inline(given),
        },
        (true, Some(reference)) => reference,
    };
    let during = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
    opening.child(Role::DataFile, options, during).await.map(Some)
}

/// The name of the data file that an image with one records.
fn recorded_data_file(header: &Header) -> Result<String, Error> {
    let recorded = header.extensions.iter().find_map(|extension| match extension {
        Extension::DataFile(name) if !name.is_empty() => Some(bytes::text_of(name)),
        _ => None,
    });
    recorded.ok_or_else(|| Error::new("'data-file' is required for this image"))
}

/// Requests that are aligned for the data's file stay so in every cluster, as long as its blocks are
/// no larger than clusters.
pub(super) fn traits(
    data: Traits,
    geometry: &super::layout::Geometry,
    is_writable: bool,
) -> Traits {
    let abilities = match is_writable {
        true => Abilities::ZERO | Abilities::ZERO_UNMAP | Abilities::DISCARD,
        false => Abilities::READ_ONLY,
    };
    traits_over(data, geometry.cluster_size(), geometry.subcluster_size(), abilities)
}
