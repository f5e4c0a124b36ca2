//! The layout of a new image: contiguous clusters, all with refcount one.
//!
//! Header, refcount table, first refcount block, L1 table; then, when mapped from the start, each
//! L2 table and its data. A further refcount block comes right behind what it is first needed for,
//! as in the images that QEMU makes.

use super::layout::{self, Geometry, L1Entry, L2Entry};

/// Where the tables of a new image are. Offsets in bytes, indices in clusters.
pub(super) struct NewImage {
    geometry: Geometry,
    pub refcount_table: u64,
    pub refcount_table_clusters: u64,
    /// The clusters of the refcount blocks, in the order of what they count.
    pub blocks: Vec<u64>,
    pub l1_table: u64,
    pub l1_size: u64,
    /// The clusters of the L2 tables, in the order of what they map. Empty if nothing is mapped.
    pub l2_tables: Vec<u64>,
    /// The first cluster of the data that each L2 table maps, unless that is in another file.
    data: Vec<u64>,
    /// Clusters of the disk.
    guest_clusters: u64,
    /// Clusters of the file that are in use: all up to here.
    end: u64,
}

impl NewImage {
    /// The layout of an image for a disk of `size` bytes; `mapped` if every cluster of it gets its
    /// place at once.
    ///
    /// None when a table would be longer than is allowed.
    pub fn new(geometry: Geometry, size: u64, mapped: bool) -> Option<NewImage> {
        let l1_size = geometry.l1_entries_for(size);
        if l1_size * 8 > layout::MAX_L1_BYTES {
            return None;
        }
        let most = layout::MAX_REFCOUNT_TABLE_BYTES >> geometry.cluster_bits;
        // The table is rarely more than one cluster; then the next larger ones will do.
        let mut table_clusters = 1;
        while table_clusters <= most {
            let image = NewImage::with_table(geometry, size, l1_size, mapped, table_clusters);
            if image.is_some() {
                return image;
            }
            table_clusters *= 2;
        }
        None
    }

    /// None when a refcount table of this many clusters does not reach.
    fn with_table(
        geometry: Geometry,
        size: u64,
        l1_size: u64,
        mapped: bool,
        table_clusters: u64,
    ) -> Option<NewImage> {
        let guest_clusters = geometry.clusters(size);
        let mut image = NewImage {
            geometry,
            refcount_table: geometry.cluster_size(),
            refcount_table_clusters: table_clusters,
            blocks: Vec::new(),
            l1_table: 0,
            l1_size,
            l2_tables: Vec::new(),
            data: Vec::new(),
            guest_clusters,
            end: 1 + table_clusters,
        };
        // The first block is there before what comes after it, and counts what was before it.
        image.count(image.end)?;
        if l1_size > 0 {
            image.l1_table = image.take(geometry.clusters(l1_size * 8))? << geometry.cluster_bits;
        }
        if mapped {
            for index in 0..l1_size {
                let table = image.take(1)?;
                image.l2_tables.push(table);
                if !geometry.external_data {
                    let data = image.take(image.mapped_by(index))?;
                    image.data.push(data);
                }
            }
        }
        Some(image)
    }

    /// So many clusters in a row; the first one.
    fn take(&mut self, n: u64) -> Option<u64> {
        let first = self.end;
        self.end += n;
        self.count(self.end)?;
        Some(first)
    }

    /// Makes sure that there are refcount blocks up to the cluster `end`, and for themselves.
    fn count(&mut self, end: u64) -> Option<()> {
        let most = self.refcount_table_clusters << (self.geometry.cluster_bits - 3);
        let per_block = self.geometry.refcount_block_bits();
        let mut wanted = end;
        while (self.blocks.len() as u64) << per_block < wanted {
            if self.blocks.len() as u64 == most {
                return None;
            }
            self.blocks.push(self.end);
            self.end += 1;
            wanted = self.end;
        }
        Some(())
    }

    /// Clusters of the disk that the L2 table with this index maps.
    fn mapped_by(&self, index: u64) -> u64 {
        let entries = self.geometry.l2_entries();
        entries.min(self.guest_clusters - index * entries)
    }

    /// Bytes of the file. The last cluster is cut where the L1 table ends, if that is the last.
    pub fn file_len(&self) -> u64 {
        let bits = self.geometry.cluster_bits;
        let l1_end = self.l1_table + self.l1_size * 8;
        if l1_end.div_ceil(1 << bits) == self.end { l1_end } else { self.end << bits }
    }

    /// The refcount table's entries that are not zero.
    pub fn refcount_table_bytes(&self) -> Vec<u8> {
        let offsets = self.blocks.iter().map(|block| block << self.geometry.cluster_bits);
        offsets.flat_map(u64::to_be_bytes).collect()
    }

    /// The refcount block with this index.
    pub fn refcount_block(&self, index: usize) -> Vec<u8> {
        let per_block = self.geometry.refcount_block_entries();
        let used = (self.end - index as u64 * per_block).min(per_block);
        let mut block = vec![0; 1 << self.geometry.cluster_bits];
        for i in 0..used as usize {
            layout::set_refcount(&mut block, self.geometry.refcount_order, i, 1);
        }
        block
    }

    /// The L1 table, in full; empty if nothing is mapped.
    pub fn l1_bytes(&self) -> Vec<u8> {
        let bits = self.geometry.cluster_bits;
        let entries = self.l2_tables.iter().map(|table| L1Entry::new(table << bits, true).0);
        entries.flat_map(u64::to_be_bytes).collect()
    }

    /// The entries in use of the L2 table with this index. Subclusters have a place, and are not
    /// allocated: a backing file still shows.
    pub fn l2_bytes(&self, index: usize) -> Vec<u8> {
        let Geometry { cluster_bits, extended_l2, external_data, .. } = self.geometry;
        let first = match external_data {
            true => index as u64 * self.geometry.l2_entries(),
            false => self.data[index],
        };
        let mut out = Vec::new();
        for i in 0..self.mapped_by(index as u64) {
            let entry = L2Entry::normal((first + i) << cluster_bits, true, 0);
            out.extend(entry.word.to_be_bytes());
            if extended_l2 {
                out.extend(entry.bitmap.to_be_bytes());
            }
        }
        out
    }
}
