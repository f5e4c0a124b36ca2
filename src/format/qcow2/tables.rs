//! Writing new tables: L2 tables, copies of those that a snapshot shares, a longer L1 table.
//!
//! It also prepares an image for its first write.

use super::header::Incompatible;
use super::layout::{self, L1Entry};
use super::mapping::L1Lock;
use super::overlap::Kinds;
use super::space::Claim;
use super::unclosed::set_mark;
use super::{Qcow2, corrupt};
use crate::block::{Event, WriteFlags};
use crate::cow::{
    NewTable, Release, Run, Stop, TwoLevels, check_sound, read_padded, write_suspects,
};
use crate::io::{AlignedBuf, Errno, IoResult};

impl TwoLevels for Qcow2 {
    type UpperLock<'a> = L1Lock<'a>;
    type Claim = Claim;

    fn has_own_table(&self, guest: u64) -> bool {
        self.mapping.l1_of(guest).has_own_table()
    }

    async fn lock_upper(&self) -> L1Lock<'_> {
        self.mapping.lock_l1().await
    }

    async fn make_table(&self, guest: u64) -> IoResult<NewTable<'_, Qcow2>> {
        let index = self.geometry.l1_index(guest);
        let old = self.mapping.l1_at(index);
        if index >= self.mapping.l1_entries() {
            return Err(Errno::EIO);
        }
        let (unnamed, claim) = self.space.take_for_table(self.metadata()).await?;
        let taken = self.hold(unnamed.keep());
        self.fill_table(guest, old, taken.host(), taken.run.is_fresh).await?;
        let entry = L1Entry::new(taken.host(), true).0.to_be_bytes();
        let place = self.header.now().l1_table_offset + index * 8;
        self.metadata().check_write(place, entry.len() as u64, Kinds::ACTIVE_L1)?;
        let replaced = (old.l2_table() != 0).then(|| {
            let run = self.geometry.run_of(old.l2_table());
            Release { run, discard: self.settings.discards.other }
        });
        Ok(NewTable { taken, claim, entry, place, replaced })
    }

    fn show_table(&self, lock: &L1Lock<'_>, guest: u64, host: u64) {
        lock.set(self.geometry.l1_index(guest), L1Entry::new(host, true));
        let cluster = host >> self.geometry.cluster_bits;
        self.overlaps.note(Kinds::ACTIVE_L2, cluster..cluster + 1);
    }
}

impl Qcow2 {
    /// Writes the new table, durably: empty, or as the old one is.
    async fn fill_table(&self, guest: u64, old: L1Entry, host: u64, is_fresh: bool) -> IoResult {
        if old.l2_table() == 0 && is_fresh {
            self.event(Event::L2AllocWrite).await;
            return Ok(());
        }
        let size = self.geometry.cluster_size() as usize;
        let mut table = AlignedBuf::new(size, 4096).ok_or(Errno::ENOMEM)?;
        let file = self.file();
        if old.l2_table() != 0 {
            if old.has_reserved_bits()
                || !self.geometry.is_cluster_start(old.l2_table())
                || old.l2_table() >= file.len()
            {
                return Err(corrupt::bad_l1(self.metadata(), guest, old));
            }
            self.event(Event::L2AllocCowRead).await;
            read_padded(&file, old.l2_table(), &table.io_vec()).await?;
        }
        self.event(Event::L2AllocWrite).await;
        file.write(host, &table.io_vec(), WriteFlags::empty()).await?;
        file.flush().await
    }

    /// Makes the L1 table so long that it has `entries`: where it is, if its clusters have the room, or
    /// in a larger place. New entries are empty.
    pub(super) async fn grow_l1(&self, entries: u64) -> IoResult {
        let lock = self.mapping.lock_l1().await;
        let now = self.header.now();
        let (old, len) = (u64::from(now.l1_size) * 8, entries * 8);
        if len <= old {
            return Ok(());
        }
        if len > layout::MAX_L1_BYTES {
            return Err(Errno(libc::EFBIG));
        }
        let bits = self.geometry.cluster_bits;
        let held = self.geometry.clusters(old);
        let (place, _claim) = match len <= held << bits {
            true => {
                // The file may end where the table does.
                self.nodes.grow_file(now.l1_table_offset + (held << bits)).await?;
                let empty = vec![0; (len - old) as usize];
                self.event(Event::L1GrowWriteTable).await;
                self.metadata().write_durably(now.l1_table_offset + old, &empty).await?;
                (now.l1_table_offset, None)
            }
            false => {
                let clusters = self.geometry.clusters(len);
                self.event(Event::L1GrowAllocTable).await;
                self.event(Event::ClusterAlloc).await;
                let (run, claim) = self.space.reserve_run(self.metadata(), clusters).await?;
                self.event(Event::L1GrowWriteTable).await;
                let place = run.first << bits;
                let entries = (0..(clusters << bits) / 8)
                    .map(|index| self.mapping.l1_at(index).0.to_be_bytes());
                let table = entries.collect::<Vec<_>>().concat();
                if let Err(errno) = self.metadata().write_durably(place, &table).await {
                    // It is leaked at worst.
                    let _ = self.space.release(self.metadata(), &[run]).await;
                    return Err(errno);
                }
                (place, Some(claim))
            }
        };
        let mut header = self.metadata().lock_header().await;
        let mut new = header.clone();
        (new.l1_table_offset, new.l1_size) = (place, entries as u32);
        // The disk may have either from here on, and new entries go to the new place.
        lock.grow(entries);
        self.event(Event::L1GrowActivateTable).await;
        header.write(new).await?;
        drop(header);
        if place != now.l1_table_offset && held > 0 {
            let first = now.l1_table_offset >> bits;
            let run = Run { first, count: held, is_fresh: false };
            self.space.release(self.metadata(), &[run]).await?;
        }
        Ok(())
    }

    /// What has to be on disk before the first write: that promises of others are not kept, that
    /// stored bitmaps are out of date, that the image is being written, and, with lazy refcounts, that the refcounts may
    /// be wrong.
    pub(super) async fn prepare_writing(&self) -> IoResult {
        if self.mapping.tables().stopped.get() == Stop::NeedsFlush {
            write_suspects(self).await?;
        }
        check_sound(self).await?;
        if self.life.is_prepared() {
            self.mapping.tables().end_rest();
            return Ok(());
        }
        self.life.begin();
        let prepared = self.metadata().change_header(|header| {
            set_mark(header, Some(self.mark()));
            if self.settings.lazy_refcounts {
                header.incompatible |= Incompatible::DIRTY;
            }
        });
        prepared.await?;
        self.bitmaps.set_in_use(self.metadata()).await?;
        self.bitmaps.set_in_use(self.metadata()).await?;
        self.mapping.tables().journal.mark_in_use(true);
        self.life.prepare();
        self.mapping.tables().end_rest();
        self.take_back_if_due().await;
        Ok(())
    }
}
