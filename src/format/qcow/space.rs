//! Allocation of clusters at the end of the file, and clusters that are being filled with packed ones.
//!
//! Nothing counts clusters: those that no table names are lost, and nothing is given back but what no entry could name.
//! Closing the image cuts off what was not used.

use super::Qcow;
use super::entries::L2Entry;
use super::header::{Geometry, Header};
use crate::cow::{
    Allocator, Appending, Compressed, FileEnd, FileExtent, Lock, Packing, Run, Taken, cut, file,
    lengthen, take_at_end,
};
use crate::io::IoResult;
use std::collections::BTreeSet;

/// Clusters that packed ones fill are taken so many at a time.
const AHEAD: u64 = 4;

/// The space of an open image. Locks are taken in the order of the fields.
pub struct Space {
    /// Held while packed clusters are given their places.
    packing: Lock<Filling>,
    end: FileEnd,
}

/// What is left of the clusters that are being filled: offsets in the file, in bytes.
#[derive(Default)]
struct Filling {
    at: u64,
    end: u64,
}

impl Filling {
    /// Gives up the rest; the clusters in which nothing is.
    fn give_up(&mut self, geometry: &Geometry) -> Run {
        let (first, end) = (geometry.clusters(self.at), self.end >> geometry.cluster_bits);
        *self = Filling::default();
        Run { first, count: end.saturating_sub(first), is_fresh: false }
    }
}

impl Space {
    /// The space of a file of so many bytes.
    pub fn new(file_len: u64, geometry: &Geometry) -> Space {
        let end = FileEnd::new(extent(file_len, geometry), geometry.cluster_size());
        Space { packing: Lock::new(Filling::default()), end }
    }
}

/// What a file of so many bytes has. Its last cluster may be there in part, and full of packed ones.
fn extent(file_len: u64, geometry: &Geometry) -> FileExtent {
    let used = geometry.clusters(file_len);
    FileExtent { used, fresh_from: used, limit: i64::MAX as u64 >> geometry.cluster_bits }
}

impl Qcow {
    /// Where the file ends, as far as its clusters may be written in place, in bytes. No lock.
    pub(super) fn file_len(&self) -> u64 {
        self.space.end.end() << self.geometry.cluster_bits
    }

    /// Whether one of these clusters may be given to something new.
    pub(super) fn has_free(&self, hosts: &BTreeSet<u64>) -> bool {
        self.space.end.has_free(hosts.iter().copied())
    }

    /// Cuts off what was not used at the file's end.
    pub(super) async fn cut_file(&self) {
        let rest = self.space.packing.lock().await.give_up(&self.geometry);
        if rest.count > 0 {
            self.space.end.put_back(rest);
        }
        let len = self.space.end.cut() << self.geometry.cluster_bits;
        cut(&file(self), len).await;
    }

    /// Forgets all clusters: the tables name none any more, durably. Cuts the file to what is left.
    pub(super) async fn forget_clusters(&self, header: &Header) {
        self.space.packing.lock().await.give_up(&self.geometry);
        let mut least = header.l1_end();
        if header.backing_len > 0 {
            // A name that was changed lies anywhere.
            least = least.max(header.backing_offset + u64::from(header.backing_len));
        }
        let extent = extent(least, &self.geometry);
        let is_cut = cut(&file(self), extent.used << self.geometry.cluster_bits).await;
        let fresh_from = if is_cut { extent.used } else { u64::MAX };
        self.space.end.replace(FileExtent { fresh_from, ..extent });
    }
}

impl Allocator for Qcow {
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Qcow>> {
        take_at_end(self, 1, most).await
    }

    fn put_back(&self, run: Run) {
        self.space.end.put_back(run);
    }
}

impl Appending for Qcow {
    fn file_end(&self) -> &FileEnd {
        &self.space.end
    }

    fn place_of(&self, cluster: u64) -> u64 {
        cluster << self.geometry.cluster_bits
    }

    /// The new length is durable before an entry can name what is behind the old one: after a crash new clusters come
    /// from behind all that any entry names.
    async fn extend(&self, end: u64) -> IoResult {
        let file = file(self);
        lengthen(&file, self.place_of(end)).await?;
        file.flush().await
    }
}

impl Packing for Qcow {
    async fn place(&self, units: &[&[u8]]) -> IoResult<(u64, usize)> {
        let mut filling = self.space.packing.lock().await;
        let first = units.first().map_or(0, |unit| unit.len() as u64);
        while filling.end - filling.at < first {
            let taken = take_at_end(self, 1, AHEAD).await?;
            let (start, len) = (taken.host(), taken.run.count << self.geometry.cluster_bits);
            taken.keep();
            if start != filling.end {
                let rest = filling.give_up(&self.geometry);
                if rest.count > 0 {
                    self.space.end.put_back(rest);
                }
                filling.at = start;
            }
            filling.end = start + len;
        }
        let host = filling.at;
        let fits = |unit: &&&[u8]| {
            let end = filling.at + unit.len() as u64;
            let fits = end <= filling.end;
            if fits {
                filling.at = end;
            }
            fits
        };
        let count = units.iter().take_while(fits).count();
        Ok((host, count))
    }

    fn packed_entry(&self, place: Compressed) -> Option<L2Entry> {
        self.geometry.encode_compressed(place)
    }
}
