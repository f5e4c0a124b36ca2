//! Compressed clusters: unpacking them off the workers, and storing what was packed.
//!
//! The bytes of a packed cluster are *durable* before the entry that names them: what was there before is no stream.
//! Packed clusters are written once: an entry that has something is not replaced.

use super::batch::change_entries;
use super::format::{Format, announce, file};
use super::lookup::{Compressed, Found, pin};
use super::read_padded;
use super::writer::Writer;
use crate::block::{Access, Event, WriteFlags};
use crate::io::budget::Budget;
use crate::io::{AlignedBuf, Blocking, Errno, IoResult, IoVec};
use std::future::Future;
use std::sync::Arc;

/// Where an image's clusters are unpacked, and the memory for it. A task that has some of it waits for nothing but the
/// file below and the processor.
pub struct Unpacking {
    blocking: Blocking,
    room: Arc<Budget>,
}

impl Unpacking {
    /// `blocking`: the work of the image's node.
    pub fn new(blocking: Blocking) -> Unpacking {
        Unpacking { blocking, room: Budget::of_disk() }
    }
}

/// Reads guest bytes from `at` on out of a compressed cluster, which `unpack` unpacks: its stored bytes and its length
/// are given. What the file does not have reads as zeroes.
///
/// # Errors
/// EIO where the place is not in the file at all, those of `unpack`, or I/O failed.
pub async fn read_packed<F: Format>(
    image: &F,
    unpacking: &Unpacking,
    at: u64,
    place: Compressed,
    into: &IoVec<'_>,
    unpack: impl FnOnce(&[u8], usize) -> IoResult<Vec<u8>> + Send + 'static,
) -> IoResult {
    let shape = image.tables().shape;
    let size = shape.cluster_size();
    let file = file(image);
    if place.host >= file.len() {
        return Err(Errno::EIO);
    }
    let _room = unpacking.room.take(place.len + size).await;
    let mut stored = AlignedBuf::new(place.len as usize, 4096).ok_or(Errno::ENOMEM)?;
    announce(image, Event::ReadCompressed).await;
    read_padded(&file, place.host, &stored.io_vec()).await?;
    // Unpacking takes longer than a worker may be kept from its other queues.
    let len = place.len as usize;
    let work = move || unpack(&stored[..len], size as usize);
    let cluster = unpacking.blocking.compute(work).await?;
    into.copy_from(&cluster[shape.offset_in_cluster(at) as usize..]);
    Ok(())
}

/// What the layer asks of a format that stores packed clusters.
pub trait Packing: Writer {
    /// A place in the file for as many of these as there is one for side by side, at least one; and how many. A crash
    /// gives the place to nobody else ([`Allocator::take`](super::Allocator::take)).
    fn place(&self, units: &[&[u8]]) -> impl Future<Output = IoResult<(u64, usize)>>;

    /// The entry of a packed cluster, if it can name the place.
    fn packed_entry(&self, place: Compressed) -> Option<Self::Entry>;
}

/// Stores packed clusters of the guest's clusters from `at` on.
///
/// # Errors
/// EIO where something is stored already, which is QEMU's answer, too.
pub async fn store_packed<F: Packing>(image: &F, at: u64, units: &[&[u8]]) -> IoResult {
    image.prepare().await?;
    let tables = image.tables();
    // What one slice of entries maps.
    let entries = tables.cache.entries() as u64;
    let mut done = 0;
    while done < units.len() {
        let first = (at >> tables.shape.cluster_bits) + done as u64;
        let most = entries - (first & (entries - 1));
        let count = (units.len() - done).min(most as usize);
        store_in_slice(image, first, &units[done..done + count]).await?;
        done += count;
    }
    Ok(())
}

async fn store_in_slice<F: Packing>(image: &F, first: u64, units: &[&[u8]]) -> IoResult {
    let tables = image.tables();
    let bits = tables.shape.cluster_bits;
    let guest = first << bits;
    let _range = tables.ranges.lock(first..first + units.len() as u64).await;
    let _visit = tables.visits.enter();
    image.ensure_table(guest).await?;
    let free = free_entries(image, guest, units.len()).await?;
    let (units, refused) = units.split_at(free);
    let mut done = 0;
    while done < units.len() {
        announce(image, Event::ClusterAllocBytes).await;
        let (host, count) = image.place(&units[done..]).await?;
        // If it fails the place is leaked: an entry may name it.
        let guest = guest + ((done as u64) << bits);
        store_at(image, guest, host, &units[done..done + count]).await?;
        done += count;
    }
    if refused.is_empty() { Ok(()) } else { Err(Errno::EIO) }
}

/// How many guest clusters from `guest` on have nothing that would be overwritten.
async fn free_entries<F: Packing>(image: &F, guest: u64, most: usize) -> IoResult<usize> {
    let tables = image.tables();
    let pinned = pin(image, guest).await?;
    let (_, index) = tables.slice_of(guest);
    for n in 0..most {
        let entry = pinned.get(index + n);
        let at = guest + ((n as u64) << tables.shape.cluster_bits);
        let piece = image.decode(entry, at, 1);
        let piece = piece.map_err(|bad| image.bad_entry(at, entry, bad, Access::Write))?;
        if !matches!(piece.found, Found::Unallocated { host: None } | Found::Zero { host: None }) {
            return Ok(n);
        }
    }
    Ok(most)
}

/// Writes what lies side by side at `host`, durably, and the entries that name it.
async fn store_at<F: Packing>(image: &F, guest: u64, host: u64, units: &[&[u8]]) -> IoResult {
    let mut entries = Vec::with_capacity(units.len());
    let mut at = host;
    for unit in units {
        let place = Compressed { host: at, len: unit.len() as u64 };
        entries.push(image.packed_entry(place).ok_or(Errno(libc::EFBIG))?);
        at += place.len;
    }
    let parts: Vec<IoVec<'_>> = units.iter().map(|unit| IoVec::from_ref(unit)).collect();
    let parts: Vec<&IoVec<'_>> = parts.iter().collect();
    let file = file(image);
    announce(image, Event::WriteCompressed).await;
    file.write(host, &IoVec::concat(&parts), WriteFlags::empty()).await?;
    file.flush().await?;
    announce(image, Event::L2UpdateCompressed).await;
    change_entries(image, guest, &entries).await
}
