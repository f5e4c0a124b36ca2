//! Where things are in the file: what is no place for a block.

use super::bytes::MIB;
use super::regions::{Region, Regions};

/// The parts of a file that no block may be over.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    taken: [Region; 3],
    /// No part lies behind this.
    clear_from: u64,
}

impl Layout {
    pub fn new(log: Region, regions: &Regions) -> Layout {
        let taken = [log, regions.bat, regions.metadata];
        let clear_from = taken.iter().map(Region::end).max().unwrap_or(MIB);
        Layout { taken, clear_from }
    }

    /// Whether a block of `len` bytes may begin at `host` in a file of so many. A file may end inside its last block.
    pub fn has_room(&self, host: u64, len: u64, file_len: u64) -> bool {
        host < file_len
            && (host >= self.clear_from
                || host >= MIB && !self.taken.iter().any(|part| part.meets(host, len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_lies_inside_the_file_and_beside_metadata() {
        let region = |mib: u64, len: u64| Region { offset: mib * MIB, len: len * MIB };
        let regions = Regions { bat: region(9, 1), metadata: region(20, 1) };
        let layout = Layout::new(region(1, 1), &regions);
        let has_room = |mib: u64| layout.has_room(mib * MIB, 4 * MIB, 40 * MIB);
        assert_eq!([0, 1, 2, 5, 6, 9].map(has_room), [false, false, true, true, false, false]);
        assert_eq!(
            [10, 16, 17, 20, 21, 39, 40].map(has_room),
            [true, true, false, false, true, true, false]
        );
    }
}
