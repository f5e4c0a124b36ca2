//! Checking an image: the places of grain tables and grains.
//!
//! Each is in its file, behind what comes before all grains, and no grain is used twice.

use super::Vmdk;
use super::sparse::{Grain, Sparse, Stored, TableAt, stored_number};
use crate::block::{CheckReport, Error, SECTOR};
use crate::cow::{References, file, read_padded};
use crate::io::{AlignedBuf, Errno, IoResult};
use std::ops::Range;

impl Vmdk {
    /// Checks all extents, with no other request in flight, telling `say` what is found.
    pub(super) async fn check_extents(
        &self,
        say: &mut dyn FnMut(&str),
    ) -> Result<CheckReport, Error> {
        let mut report = CheckReport::default();
        for sparse in self.sparse() {
            let checked = check_extent(sparse, &mut report, say).await;
            checked.map_err(|errno| Error::os("Check failed", errno))?;
        }
        Ok(report)
    }
}

/// Gives `work` the places in the file, in bytes, of all that has grains or no grain: the header, what lies before all
/// grains, the descriptor, the directories and the tables.
pub(super) async fn for_each_fixed_place(sparse: &Sparse, mut work: impl FnMut(Range<u64>)) {
    let layout = &sparse.layout;
    work(0..layout.data_start.max(SECTOR));
    let directory = layout.tables * layout.entry_bytes();
    for place in [Some(layout.directory), layout.copy].into_iter().flatten() {
        work(place..place + directory.max(1));
    }
    if let Some(place) = sparse.shared.text_in(sparse.child).await {
        work(place);
    }
    sparse.places_of_tables().for_each(work);
}

/// The same, and the places of grains.
pub(super) async fn for_each_place(sparse: &Sparse, mut work: impl FnMut(Range<u64>)) -> IoResult {
    for_each_fixed_place(sparse, &mut work).await;
    let (layout, file) = (&sparse.layout, file(sparse));
    let len = layout.table_bytes();
    let mut bytes = AlignedBuf::new(len as usize, 4096).ok_or(Errno::ENOMEM)?;
    for index in 0..sparse.directory.entries() {
        let Some(table) = sparse.place_of_table(sparse.directory.get(index)) else { continue };
        read_padded(&file, table, &bytes.io_vec()).await?;
        for entry in bytes[..len as usize].chunks_exact(layout.entry_bytes() as usize) {
            if let Ok(Stored::At(host)) = sparse.place_of_grain(Grain(stored_number(entry))) {
                work(host..host + layout.grain_size());
            }
        }
    }
    Ok(())
}

impl Sparse {
    /// Where the tables and their copies lie.
    pub(super) fn places_of_tables(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let directories = [Some(&self.directory), self.copies.as_ref()].into_iter().flatten();
        let entries = directories
            .flat_map(|directory| (0..directory.entries()).map(move |index| directory.get(index)));
        let places = entries.filter_map(|entry| self.place_of_table(entry));
        places.map(|place| place..place + self.layout.table_bytes())
    }
}

async fn check_extent(
    sparse: &Sparse,
    report: &mut CheckReport,
    say: &mut dyn FnMut(&str),
) -> IoResult {
    let file = file(sparse);
    let (layout, file_len) = (&sparse.layout, file.driver().len());
    let mut found = |text: String| {
        report.corruptions += 1;
        say(&format!("ERROR: {text}"));
    };
    let (mut tables, mut used) = (References::default(), References::default());
    // Places are counted in what lies there: of two in one such unit, neither lies behind the other.
    let first_of = |places: &mut References, place: u64, unit: u64| -> Result<bool, Errno> {
        let is_first = places.get(place / unit) == 0;
        places.add(place / unit, 1).map_err(|_| Errno::ENOMEM)?;
        Ok(is_first)
    };
    for index in 0..sparse.directory.entries() {
        let entry = sparse.directory.get(index);
        let covered = sparse.mapping.shape.coverage();
        let sector = |inside: u64| (sparse.start + index * covered + inside) / SECTOR;
        if entry == TableAt(0) {
            continue;
        }
        let table =
            sparse.place_of_table(entry).filter(|table| table + layout.table_bytes() <= file_len);
        let Some(table) = table else {
            found(format!("grain table offset for sector {} points after EOF", sector(0)));
            continue;
        };
        if !first_of(&mut tables, table, layout.table_bytes())? {
            found(format!("the grain table of sector {} is another one's, too", sector(0)));
            continue;
        }
        let len = layout.table_bytes() as usize;
        let mut bytes = AlignedBuf::new(len, 4096).ok_or(Errno::ENOMEM)?;
        read_padded(&file, table, &bytes.io_vec()).await?;
        let entries = bytes[..len].chunks_exact(layout.entry_bytes() as usize);
        for (n, entry) in entries.enumerate() {
            let inside = (n as u64) << layout.grain_bits;
            if index * covered + inside >= layout.capacity {
                break;
            }
            match sparse.place_of_grain(Grain(stored_number(entry))) {
                Ok(Stored::Absent | Stored::Zero) => {}
                Ok(Stored::At(host)) if host < file_len => {
                    if !first_of(&mut used, host, sparse.space_unit())? {
                        found(format!(
                            "the grain of sector {} is another one's, too",
                            sector(inside)
                        ));
                    }
                }
                Ok(Stored::At(_)) => {
                    found(format!("cluster offset for sector {} points after EOF", sector(inside)));
                }
                Err(_) => {
                    found(format!(
                        "cluster offset for sector {} points to metadata",
                        sector(inside)
                    ));
                }
            }
        }
    }
    Ok(())
}
