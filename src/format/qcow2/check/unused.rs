//! Finding clusters that are counted and not referred to, in an image that is being changed.
//!
//! The references are counted a part at a time.
//!
//! Everything but the L2 tables is read at once, and the tables one by one. The caller ensures that a table is not
//! reused before it was read ([`Walk::is_to_read`]), and leaves alone what was counted in another way meanwhile.

use super::{Check, read_header, read_words};
use crate::block::{Error, Fix, Node};
use crate::cow::References;
use crate::format::qcow2::extensions::Extension;
use crate::format::qcow2::header::{Autoclear, Header};
use crate::format::qcow2::layout::L1Entry;

/// See the module's text.
pub struct Walk {
    header: Header,
    references: References,
    /// Of entries whose flag tells that they are the only ones: with the count the flag would have to change.
    flagged: References,
    /// L2 tables that are to be read, the last one first, and whether the disk has them now.
    tables: Vec<(u64, bool)>,
}

impl Walk {
    /// Reads all but the L2 tables. `l1`: the active L1 table as it is in memory.
    ///
    /// # Errors
    /// I/O failed, or the image makes no sense.
    pub async fn begin(file: &Node, l1: &[L1Entry]) -> Result<Walk, Error> {
        let mut say = |line: &str| log::debug!("looking for references: {line}");
        let mut check = Check::new(file, read_header(file).await?, Fix::Nothing, &mut say);
        let header = check.header.clone();
        let is_bitmaps = |extension: &Extension| matches!(extension, Extension::Bitmaps(_));
        if header.extensions.iter().any(is_bitmaps)
            && !header.autoclear.contains(Autoclear::BITMAPS)
        {
            return Err(Error::new("the image has bitmaps that are out of date"));
        }
        let stored = read_words(file, header.l1_table_offset, header.l1_size as usize).await?;
        if !stored.iter().copied().eq(l1.iter().map(|entry| entry.0)) {
            return Err(Error::new("the L1 table is in doubt"));
        }
        check.flagged = Some(References::default());
        check.put_off = Some(Vec::new());
        let references = check.count_references().await?;
        let flagged = check.flagged.take().unwrap_or_default();
        let mut tables = check.put_off.take().unwrap_or_default();
        check.assert_sound()?;
        tables.sort_unstable();
        Ok(Walk { header, references, flagged, tables })
    }

    /// Reads the next table. False if there is none.
    ///
    /// # Errors
    /// I/O failed, or the table makes no sense.
    pub async fn step(&mut self, file: &Node) -> Result<bool, Error> {
        let Some(&(table, is_active)) = self.tables.last() else { return Ok(false) };
        let mut say = |line: &str| log::debug!("looking for references: {line}");
        let mut check = Check::new(file, self.header.clone(), Fix::Nothing, &mut say);
        check.flagged = Some(std::mem::take(&mut self.flagged));
        check.count_l2(&mut self.references, table, is_active).await?;
        self.flagged = check.flagged.take().unwrap_or_default();
        check.assert_sound()?;
        self.tables.pop();
        Ok(true)
    }

    /// Whether a cluster has a table that is to be read.
    pub fn is_to_read(&self, cluster: u64) -> bool {
        let offset = cluster << self.header.cluster_bits;
        let index = self.tables.partition_point(|&(table, _)| table < offset);
        self.tables.get(index).is_some_and(|&(table, _)| table == offset)
    }

    /// How often a cluster should be counted that is counted `stored` times, if that is less often. All tables were read.
    pub fn lower_count(&self, cluster: u64, stored: u64) -> Option<u64> {
        let found = self.references.get(cluster);
        (found < stored && self.flagged.get(cluster) == 0).then_some(found)
    }
}

impl Check<'_> {
    fn assert_sound(&self) -> Result<(), Error> {
        match self.report.corruptions + self.report.check_errors {
            0 => Ok(()),
            _ => Err(Error::new("the image is corrupt")),
        }
    }
}
