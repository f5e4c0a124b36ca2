//! Writing bitmaps: marking them in use before they go stale, and storing them.

use super::load::read_table;
use super::{BitmapFlags, ImageBitmaps, Stored, StoredBitmap, TableEntry, decode_table_entry};
use crate::block::{Bitmap, BitmapStore, Bitmaps, Error, Event, LocalFuture, WriteFlags};
use crate::cow::{Run, begin_rest};
use crate::format::qcow2::Qcow2;
use crate::format::qcow2::extensions::BitmapsPointer;
use crate::format::qcow2::hand_over::has_bitmaps;
use crate::format::qcow2::header::Header;
use crate::format::qcow2::header_cluster::with_bitmaps;
use crate::format::qcow2::header_steps;
use crate::format::qcow2::layout;
use crate::format::qcow2::metadata::Metadata;
use crate::format::qcow2::space::{Claim, Space, Unnamed};
use crate::io::{Errno, IoResult, IoVec};
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Stored {
    /// Whether these are the bitmaps on disk, as they are.
    fn is_current(&self, persistent: &[&Arc<Bitmap>]) -> bool {
        let is_stored = |bitmap: &&Arc<Bitmap>| {
            let entry = self.entries.iter().find(|entry| entry.name() == bitmap.name());
            let in_use = entry.is_none_or(|entry| entry.flags.contains(BitmapFlags::IN_USE));
            !in_use || bitmap.flags().inconsistent && entry.is_some()
        };
        self.entries.len() == persistent.len() && persistent.iter().all(is_stored)
    }
}

/// The most that is written at once, in bytes, unless a cluster is more.
const CHUNK: u64 = 1 << 20;

impl ImageBitmaps {
    /// Makes it durable that the bitmaps of the image are out of date from now on.
    pub async fn set_in_use(&self, image: Metadata<'_>) -> IoResult {
        let mut stored = self.stored.lock().await;
        self.is_touched.store(true, Ordering::SeqCst);
        let is_set = |entry: &StoredBitmap| entry.flags.contains(BitmapFlags::IN_USE);
        if stored.entries.iter().all(is_set) {
            return Ok(());
        }
        let mut entries = stored.entries.clone();
        entries.iter_mut().for_each(|entry| entry.flags |= BitmapFlags::IN_USE);
        // In place: whatever a crash leaves of it, a flag that is still clear is right, because
        // nothing has been written yet.
        let (offset, len) = stored.directory;
        let bytes = super::encode_directory(&entries);
        if bytes.len() as u64 != len {
            return Err(Errno::EIO);
        }
        image.write_durably(offset, &bytes).await?;
        self.shown.lock().clone_from(&entries);
        stored.entries = entries;
        Ok(())
    }

    /// Whether something was written since the image was opened.
    pub fn is_touched(&self) -> bool {
        self.is_touched.load(Ordering::SeqCst)
    }

    /// Whether closing the image now would lose persistent bitmaps.
    pub async fn has_unstored(&self) -> bool {
        let stored = self.stored.lock().await;
        let all = self.node.all();
        let persistent: Vec<_> = all.iter().filter(|bitmap| bitmap.flags().persistent).collect();
        self.is_touched() && !stored.is_current(&persistent)
    }

    /// Stores all persistent bitmaps, unless they are stored. No request is in flight. Returns whether what is written
    /// from now on makes them out of date again.
    pub async fn store(&self, image: Metadata<'_>, space: &Space) -> Result<bool, Error> {
        let mut stored = self.stored.lock().await;
        let all = self.node.all();
        let persistent: Vec<_> = all.iter().filter(|bitmap| bitmap.flags().persistent).collect();
        if !self.is_touched() || stored.is_current(&persistent) {
            return Ok(false);
        }
        let mut taken = Vec::new();
        let mut entries = Vec::new();
        let old_ones = stored.entries.iter();
        let order =
            old_ones.filter_map(|old| persistent.iter().find(|new| new.name() == old.name()));
        let known: Vec<_> = order.collect();
        // The newest first: QEMU's order.
        let new = persistent.iter().rev();
        let new = new.filter(|new| !known.iter().any(|old| Arc::ptr_eq(old, new)));
        for bitmap in known.iter().copied().chain(new) {
            let old = stored.entries.iter().find(|old| old.name() == bitmap.name());
            let kept = old.filter(|_| bitmap.flags().inconsistent);
            entries.push(match kept {
                Some(old) => old.clone(),
                None => {
                    let written = write_bitmap((image, space), bitmap, old, &mut taken).await;
                    written.map_err(|errno| {
                        let name = bitmap.name();
                        Error::os(format!("Failed to write bitmap '{name}' to file"), errno)
                    })?
                }
            });
        }
        self.change_directory((image, space), &mut stored, entries, taken).await?;
        Ok(true)
    }

    /// Makes `entries` those of the image: their tables and data, in clusters that were `taken`, and a
    /// new directory, all durable before the header names them; then frees what is named no more.
    async fn change_directory<'a>(
        &self,
        (image, space): (Metadata<'_>, &'a Space),
        stored: &mut Stored,
        entries: Vec<StoredBitmap>,
        mut taken: Vec<Unnamed<'a>>,
    ) -> Result<(), Error> {
        let failed = |errno| Error::os("Failed to update bitmap directory", errno);
        let bytes = super::encode_directory(&entries);
        let len = bytes.len() as u64;
        if len > layout::MAX_BITMAP_DIRECTORY_BYTES {
            return Err(failed(Errno(libc::EFBIG)));
        }
        let (mut directory, mut pointer, mut _claim) = ((0, 0), None, None);
        if !entries.is_empty() {
            let (at, claim) =
                write_clusters((image, space), bytes, &mut taken).await.map_err(failed)?;
            (directory, _claim) = ((at, len), Some(claim));
            pointer = Some(BitmapsPointer::new(entries.len() as u32, len, directory.0));
        }
        let mut old = unnamed_clusters(image, stored, &entries).await;
        image.file().flush().await.map_err(failed)?;
        // Whether that fails or not, the header may name them.
        for unnamed in taken {
            unnamed.keep();
        }
        let named = name_bitmaps(image, pointer).await;
        if named.is_err() {
            // It may name the old ones as well.
            old.clear();
        }
        self.shown.lock().clone_from(&entries);
        *stored = Stored { entries, directory };
        named?;
        // What fails is leaked at worst.
        space.give_back(image, &old).await;
        Ok(())
    }

    async fn remove(&self, image: Metadata<'_>, space: &Space, name: &str) -> Result<(), Error> {
        let mut stored = self.stored.lock().await;
        let mut entries = stored.entries.clone();
        entries.retain(|entry| entry.name() != name);
        if entries.len() == stored.entries.len() {
            // It was never stored.
            return Ok(());
        }
        let at = format!("Failed to remove bitmap '{name}'");
        self.change_directory((image, space), &mut stored, entries, Vec::new())
            .await
            .map_err(|e| e.at(at))
    }

    /// What stands between a bitmap and its place in the image, if something does.
    fn refusal(
        &self,
        image: Metadata<'_>,
        len: u64,
        name: &str,
        granularity: u64,
    ) -> Option<String> {
        let header = image.header.now();
        let bits = len.div_ceil(granularity);
        let table = image.geometry.clusters(bits.div_ceil(8));
        let persistent = self.node.all();
        let persistent = persistent.iter().filter(|bitmap| bitmap.flags().persistent).count();
        let text = if header.version < 3 {
            "Cannot store dirty bitmaps in qcow2 v2 files".to_owned()
        } else if !self.is_writable {
            "No write access".to_owned()
        } else if name.len() > super::NAME_LIMIT {
            format!("Name length exceeds maximum ({} characters)", super::NAME_LIMIT)
        } else if granularity > 1 << super::GRANULARITY_BITS.end() {
            let most = 1u64 << super::GRANULARITY_BITS.end();
            format!("Granularity exceeds maximum ({most} bytes)")
        } else if bits == 0 {
            "The disk has no bytes".to_owned()
        } else if bits > crate::block::bitmap::MOST_BITS || table > super::MAX_TABLE.into() {
            "Too much space will be occupied by the bitmap. Use larger granularity".to_owned()
        } else if persistent >= layout::MAX_BITMAPS as usize {
            "Maximum number of persistent bitmaps is already reached".to_owned()
        } else if let Err(error) = check_pointer(&header) {
            error.to_string()
        } else {
            return None;
        };
        Some(text)
    }
}

/// Writes data and table of one bitmap to clusters of their own; its entry.
async fn write_bitmap<'a>(
    (image, space): (Metadata<'_>, &'a Space),
    bitmap: &Bitmap,
    old: Option<&StoredBitmap>,
    taken: &mut Vec<Unnamed<'a>>,
) -> IoResult<StoredBitmap> {
    let (bits, size) = (image.geometry.cluster_bits, image.geometry.cluster_size());
    let words = size as usize / 8;
    let dirt = bitmap.bits();
    let count = dirt.words().len().div_ceil(words);
    if count == 0 {
        // A table has at least one entry.
        return Err(Errno(libc::EINVAL));
    }
    let is_dirty = |index: &usize| dirt.words_from(index * words).take(words).any(|word| word != 0);
    let dirty: Vec<usize> = (0..count).filter(is_dirty).collect();
    let mut table = vec![0u64; count];
    let mut left = &dirty[..];
    while !left.is_empty() {
        let most = (CHUNK / size).clamp(1, left.len() as u64);
        let place = space.take(image, most).await?;
        let (now, rest) = left.split_at(place.run().count as usize);
        left = rest;
        let mut bytes = Vec::with_capacity(now.len() * size as usize);
        for (n, &index) in now.iter().enumerate() {
            table[index] = place.run().offset(bits) + n as u64 * size;
            let data = dirt.words_from(index * words).take(words);
            bytes.extend(data.flat_map(u64::to_le_bytes));
            bytes.resize((n + 1) * size as usize, 0);
        }
        let at = place.run().offset(bits);
        taken.push(place);
        image.file().write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
    }
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    let (table_offset, _) = write_clusters((image, space), bytes, taken).await?;
    let mut flags = old.map_or(BitmapFlags::empty(), |old| old.flags);
    flags.remove(BitmapFlags::IN_USE);
    flags.set(BitmapFlags::AUTO, bitmap.flags().recording);
    Ok(StoredBitmap {
        table_offset,
        table_size: count as u32,
        flags,
        granularity_bits: dirt.granularity_bits() as u8,
        name: old.map_or_else(|| bitmap.name().into(), |old| old.name.clone()),
        extra: old.map_or_else(Vec::new, |old| old.extra.clone()),
    })
}

/// Writes something to new clusters side by side; where.
async fn write_clusters<'a>(
    (image, space): (Metadata<'_>, &'a Space),
    mut bytes: Vec<u8>,
    taken: &mut Vec<Unnamed<'a>>,
) -> IoResult<(u64, Claim)> {
    let bits = image.geometry.cluster_bits;
    let clusters = image.geometry.clusters(bytes.len() as u64).max(1);
    bytes.resize((clusters << bits) as usize, 0);
    image.event(Event::ClusterAlloc).await;
    let (run, claim) = space.take_run(image, clusters).await?;
    let place = space.hold(run);
    let at = place.run().offset(bits);
    taken.push(place);
    image.file().write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
    Ok((at, claim))
}

/// Names another bitmap directory in the header, durably, or none. What the new one needs is
/// durable.
async fn name_bitmaps(image: Metadata<'_>, pointer: Option<BitmapsPointer>) -> Result<(), Error> {
    let mut header = image.lock_header().await;
    let new = with_bitmaps(&header, pointer);
    header.write_cluster(new).await
}

/// The clusters of the directory, and of the bitmaps that are not among `kept` as they are.
async fn unnamed_clusters(image: Metadata<'_>, stored: &Stored, kept: &[StoredBitmap]) -> Vec<Run> {
    let bits = image.geometry.cluster_bits;
    let run = |offset: u64, len: u64| {
        let count = image.geometry.clusters(len);
        Run { first: offset >> bits, count, is_fresh: false }
    };
    let mut runs = Vec::new();
    if stored.directory.1 > 0 {
        runs.push(run(stored.directory.0, stored.directory.1));
    }
    for entry in &stored.entries {
        if kept.iter().any(|kept| kept.table_offset == entry.table_offset) {
            continue;
        }
        let Ok(table) = read_table(&image.file(), entry).await else { continue };
        let places: Vec<_> =
            table.iter().map(|&entry| decode_table_entry(image.geometry, entry)).collect();
        if places.contains(&None) {
            // A check finds what is leaked.
            continue;
        }
        runs.push(run(entry.table_offset, u64::from(entry.table_size) * 8));
        runs.extend(places.iter().filter_map(|place| match place {
            Some(TableEntry::Data(host)) => Some(run(*host, 1)),
            _ => None,
        }));
    }
    runs
}

/// Whether the header can point to a bitmap directory.
fn check_pointer(header: &Header) -> Result<(), Error> {
    match has_bitmaps(header) {
        true => Ok(()),
        false => {
            let pointer = Some(BitmapsPointer::new(1, 0, 0));
            header_steps::check(header, with_bitmaps(header, pointer))
        }
    }
}

impl BitmapStore for Qcow2 {
    fn bitmaps(&self) -> &Arc<Bitmaps> {
        self.bitmaps.node()
    }

    fn is_available(&self) -> bool {
        self.header.now().version >= 3
    }

    fn can_store(&self, name: &str, granularity: u64) -> Result<(), Error> {
        self.bitmaps
            .refusal(self.metadata(), self.size(), name, granularity)
            .map_or(Ok(()), |text| Err(Error::new(text)))
    }

    fn begin_change(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            if !self.settings.is_writable {
                return Ok(());
            }
            let prepared = self.prepare_writing().await;
            prepared.map_err(|errno| Error::os("Failed to mark the image's bitmaps in use", errno))
        })
    }

    fn remove<'a>(&'a self, name: &'a str) -> LocalFuture<'a, Result<(), Error>> {
        Box::pin(async move {
            self.begin_change().await?;
            self.bitmaps.remove(self.metadata(), &self.space, name).await
        })
    }

    fn store(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            // What is written afterwards is not in the bitmaps.
            begin_rest(self).await;
            let flushed = self.flush_all().await;
            flushed.map_err(|errno| Error::os("Failed to flush the image", errno))?;
            self.store_bitmaps().await
        })
    }
}
