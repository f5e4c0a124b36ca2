//! The entries of both levels of tables, as the layer keeps them.

use crate::cow::{TableEntry, TopEntry};

/// The offset of an L2 table in the file; 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry(pub u64);

/// The place of a cluster in the file; 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Entry(pub u64);

/// An entry that leads to no place where data can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadEntry;

impl TopEntry for L1Entry {
    fn from_word(word: u64) -> L1Entry {
        L1Entry(word)
    }

    fn word(self) -> u64 {
        self.0
    }
}

impl TableEntry for L2Entry {
    fn from_words(first: u64, _: u64) -> L2Entry {
        L2Entry(first)
    }

    fn words(self) -> [u64; 2] {
        [self.0, 0]
    }
}
