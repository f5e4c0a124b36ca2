//! Checking an image: the places of grain tables and grains.
//!
//! Each is in its file, behind what comes before all grains, and no grain is used twice.

use super::Vmdk;
use super::sparse::{Grain, Sparse, Stored, TableAt, stored_number};
use crate::block::{CheckReport, Error, SECTOR};
use crate::cow::{References, file, read_padded};
use crate::io::{AlignedBuf, Errno, IoResult};

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
    let first_of = |places: &mut References, place: u64| -> Result<bool, Errno> {
        let is_first = places.get(place) == 0;
        places.add(place, 1).map_err(|_| Errno::ENOMEM)?;
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
        if !first_of(&mut tables, table / SECTOR)? {
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
                    // Each begins at a sector of its own.
                    if !first_of(&mut used, host / SECTOR)? {
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
