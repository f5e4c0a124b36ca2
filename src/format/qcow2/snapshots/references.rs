//! The references of everything that an L1 table names: raised, lowered, checked.

use crate::block::WriteFlags;
use crate::cow::{Run, read_padded};
use crate::format::qcow2::corrupt;
use crate::format::qcow2::layout::L1Entry;
use crate::format::qcow2::metadata::Metadata;
use crate::format::qcow2::space::{Change, Space};
use crate::io::{AlignedBuf, Errno, IoResult};

/// One reference more, or one less, to each thing that the L1 table names and that its L2 tables name, in an order
/// that is always the same; no more than the first `most`. `discard`: the storage is notified of what becomes free.
/// Raised refcounts are in memory then ([`Space::write`](crate::format::qcow2::space::Space::write)).
///
/// Nothing else may change the tables meanwhile, and lowered references must be gone, durably.
///
/// # Errors
/// How many were changed, and why no more.
pub async fn change(
    (image, space): (Metadata<'_>, &Space),
    l1: &[L1Entry],
    change: Change,
    most: u64,
    discard: bool,
) -> Result<(), (u64, Errno)> {
    let mut done = 0;
    for (index, &entry) in l1.iter().enumerate() {
        if entry.l2_table() == 0 || done == most {
            continue;
        }
        let clusters = named_by(image, index as u64, entry).await.map_err(|e| (done, e))?;
        let some = &clusters[..clusters.len().min((most - done) as usize)];
        let changed = space.change(image, some, change, discard).await;
        changed.map_err(|(n, errno)| (done + n, errno))?;
        done += some.len() as u64;
    }
    Ok(())
}

/// Whether all that entries of L1 tables name, and that their L2 tables name, makes sense and is counted.
/// What is not counted would be given out while references are raised.
pub async fn check(
    image: Metadata<'_>,
    space: &Space,
    entries: impl Iterator<Item = (u64, L1Entry)>,
) -> IoResult {
    for (index, entry) in entries.filter(|(_, entry)| entry.l2_table() != 0) {
        let clusters = named_by(image, index, entry).await?;
        space.check_counted(image, &clusters).await?;
    }
    Ok(())
}

/// The L2 table that an entry names and the clusters that this names: each as often as it does.
async fn named_by(image: Metadata<'_>, index: u64, entry: L1Entry) -> IoResult<Vec<u64>> {
    let guest = index * image.geometry.l2_coverage();
    let entries = image.stored_l2(index, entry).await?;
    let mut clusters = vec![image.geometry.run_of(entry.l2_table()).first];
    for (n, entry) in entries.into_iter().enumerate() {
        if let Err(error) = image.geometry.decode(entry) {
            let guest = guest + ((n as u64) << image.geometry.cluster_bits);
            return Err(corrupt::bad_entry(image, guest, entry, error));
        }
        if let Some(Run { first, count, .. }) = image.geometry.clusters_of(entry) {
            clusters.extend(first..first + count);
        }
    }
    // One block of refcounts after the other.
    clusters[1..].sort_unstable();
    Ok(clusters)
}

/// Clears flags that somebody has left in a snapshot's tables, before the disk uses these.
pub async fn clear_stale_flags(image: Metadata<'_>, l1: &[L1Entry]) -> IoResult {
    let file = image.file();
    for entry in l1.iter().filter(|entry| entry.l2_table() != 0) {
        let (mut bytes, is_changed) = without_flags(image, entry.l2_table()).await?;
        if is_changed {
            file.write(entry.l2_table(), &bytes.io_vec(), WriteFlags::empty()).await?;
        }
    }
    Ok(())
}

/// An L2 table without COPIED flags, and whether it had any.
async fn without_flags(image: Metadata<'_>, table: u64) -> IoResult<(AlignedBuf, bool)> {
    let size = image.geometry.cluster_size() as usize;
    let mut bytes = AlignedBuf::new(size, 4096).ok_or(Errno::ENOMEM)?;
    read_padded(&image.file(), table, &bytes.io_vec()).await?;
    let mut is_changed = false;
    for entry in bytes.chunks_exact_mut(image.geometry.l2_entry_size() as usize) {
        // The first bit of an entry.
        is_changed |= entry[0] & 0x80 != 0;
        entry[0] &= 0x7f;
    }
    Ok((bytes, is_changed))
}
