//! The snapshot table as a whole: reading it, and writing a replacement.

use super::entry::MAX_ENTRY;
use super::{ImageSnapshots, Snapshot};
use crate::block::{Error, Event, Node, SnapshotKey};
use crate::cow::{Run, read_padded};
use crate::format::qcow2::Qcow2;
use crate::format::qcow2::header::Header;
use crate::format::qcow2::layout::MAX_SNAPSHOTS;
use crate::format::qcow2::metadata::Metadata;
use crate::format::qcow2::space::Space;
use crate::io::{AlignedBuf, Errno, IoResult};

/// The longest table, in bytes; QEMU opens no image with a longer one.
const MAX_BYTES: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// What is read at once, in bytes.
const CHUNK: usize = 64 << 10;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    pub list: Vec<Snapshot>,
    /// That it takes on disk.
    pub bytes: u64,
}

impl Table {
    /// Reads the table that the header names.
    ///
    /// # Errors
    /// I/O, or an entry that nobody can read, in QEMU's words.
    pub async fn read(file: &Node, header: &Header) -> Result<Table, Error> {
        let mut table = Table::default();
        let mut next = header.snapshots_offset;
        // What has been read and not yet understood.
        let mut window: Vec<u8> = Vec::new();
        let mut used = 0;
        while table.list.len() < header.nb_snapshots as usize {
            let index = table.list.len();
            if let Some((snapshot, len)) = Snapshot::parse(&window[used..]) {
                used += len;
                table.bytes += len as u64;
                table.list.push(snapshot);
            } else if window.len() - used >= MAX_ENTRY {
                return Err(Error::new(format!(
                    "Too much extra metadata in snapshot table entry {index}"
                ))
                .with_hint("You can force-remove this extra metadata with qemu-img check -r all")
                .with_errno(Errno(libc::EFBIG)));
            } else {
                window.drain(..used);
                used = 0;
                let mut more = AlignedBuf::new(CHUNK, 4096)
                    .ok_or_else(|| Error::os("Could not read snapshots", Errno::ENOMEM))?;
                read_padded(file, next, &more.io_vec())
                    .await
                    .map_err(|errno| Error::os("Could not read snapshots", errno))?;
                window.extend_from_slice(&more);
                next = next.saturating_add(CHUNK as u64);
            }
            if table.bytes > MAX_BYTES {
                return Err(Error::new("Snapshot table too large").with_errno(Errno(libc::EFBIG)));
            }
        }
        Ok(table)
    }

    /// The place of a snapshot.
    pub fn find(&self, which: SnapshotKey<'_>) -> Option<usize> {
        which.find(self.list.iter().map(|snapshot| (&*snapshot.id, &*snapshot.name)))
    }

    /// An identifier that none has: the largest number, and one more.
    pub fn next_id(&self) -> Vec<u8> {
        let number = |snapshot: &Snapshot| {
            let digits = snapshot.id.iter().take_while(|byte| byte.is_ascii_digit());
            digits.fold(0u64, |n, &b| n.saturating_mul(10).saturating_add(u64::from(b - b'0')))
        };
        let most = self.list.iter().map(number).max().unwrap_or(0);
        most.saturating_add(1).to_string().into_bytes()
    }
}

impl ImageSnapshots {
    /// Puts a table of these snapshots of a disk of `size` bytes instead of the one that there is, with what else is
    /// to change in the header: all of it by one write. What had been written before is durable then. Gives the
    /// clusters of the old table.
    ///
    /// # Errors
    /// Whether there was an attempt to write the header: then the disk may have either table, and
    /// the new one counts.
    pub(super) async fn replace_table(
        &self,
        (image, space): (Metadata<'_>, &Space),
        size: u64,
        old: &Table,
        mut list: Vec<Snapshot>,
        change: impl FnOnce(&mut Header),
    ) -> Result<Run, (bool, Errno)> {
        let bits = image.geometry.cluster_bits;
        list.iter_mut().for_each(|snapshot| snapshot.complete(size));
        let bytes: Vec<u8> = list.iter().flat_map(Snapshot::encode).collect();
        let new = Table { list, bytes: bytes.len() as u64 };
        if new.list.len() > MAX_SNAPSHOTS as usize || new.bytes > MAX_BYTES {
            return Err((false, Errno(libc::EFBIG)));
        }
        let clusters = image.geometry.clusters(new.bytes);
        image.event(Event::ClusterAlloc).await;
        let (run, _claim) =
            space.take_run(image, clusters).await.map_err(|errno| (false, errno))?;
        if let Err(errno) = image.write_durably(run.first << bits, &bytes).await {
            space.give_back(image, &[run]).await;
            return Err((false, errno));
        }
        let mut header = image.lock_header().await;
        let mut changed = header.clone();
        changed.nb_snapshots = new.list.len() as u32;
        changed.snapshots_offset = run.first << bits;
        change(&mut changed);
        let gone = Run {
            first: header.snapshots_offset >> bits,
            count: image.geometry.clusters(old.bytes),
            is_fresh: false,
        };
        // How long the table is goes with where it is, which counts as soon as it is being written.
        *self.table.lock() = Ok(new);
        let written = header.write(changed).await;
        drop(header);
        image.note_header(&image.header.now());
        image.note_snapshots().await;
        written.map_err(|errno| (true, errno))?;
        Ok(gone)
    }
}

impl Qcow2 {
    /// As [`ImageSnapshots::replace_table`].
    pub(super) async fn name_snapshots(
        &self,
        old: &Table,
        list: Vec<Snapshot>,
        change: impl FnOnce(&mut Header),
    ) -> Result<Run, (bool, Errno)> {
        let own = (self.metadata(), &self.space);
        self.snapshots.replace_table(own, self.size(), old, list, change).await
    }

    /// Fills in what version 3 wants of the snapshots' entries.
    pub(in crate::format::qcow2) async fn complete_snapshots(&self) -> IoResult {
        let table = match self.header.now().nb_snapshots {
            0 => return Ok(()),
            _ => self.snapshots.table().map_err(|error| error.errno().unwrap_or(Errno::EIO))?,
        };
        if table.list.iter().all(Snapshot::is_complete) {
            return Ok(());
        }
        self.prepare_snapshots().await?;
        let replaced = self.name_snapshots(&table, table.list.clone(), |_| {}).await;
        let old = replaced.map_err(|(_, errno)| errno)?;
        self.space.give_back(self.metadata(), &[old]).await;
        Ok(())
    }
}
