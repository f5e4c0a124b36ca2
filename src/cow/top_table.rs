//! The upper one of two levels of tables, in memory, read without a lock.
//!
//! All of it is read when the image is opened: the format bounds its length, and every lookup begins here. It
//! lies in pieces that are allocated once, so that it can grow while readers use it.

use std::marker::PhantomData;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries of a piece.
const PIECE: usize = 4096;

/// An entry of an upper table, as a number in host byte order. Zero is an entry that names no table.
pub trait TopEntry: Copy {
    fn from_word(word: u64) -> Self;
    fn word(self) -> u64;
}

/// See the module's text.
pub struct TopTable<E> {
    pieces: Box<[OnceLock<Box<[AtomicU64]>>]>,
    /// Entries.
    len: AtomicU64,
    entry: PhantomData<fn() -> E>,
}

impl<E: TopEntry> TopTable<E> {
    /// A table with these entries that can grow up to `most`.
    pub fn new(most: u64, entries: &[E]) -> TopTable<E> {
        let pieces = (0..(most as usize).div_ceil(PIECE)).map(|_| OnceLock::new()).collect();
        let table = TopTable { pieces, len: AtomicU64::new(0), entry: PhantomData };
        table.replace(entries);
        table
    }

    /// Replaces all entries. No other task uses the table meanwhile.
    pub fn replace(&self, entries: &[E]) {
        let (old, len) = (self.entries(), entries.len() as u64);
        self.grow(len);
        for (index, &entry) in entries.iter().enumerate() {
            self.set(index as u64, entry);
        }
        (len..old).for_each(|index| self.set(index, E::from_word(0)));
        self.len.store(len, Ordering::Release);
    }

    pub fn entries(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// The entry, or an empty one past the end.
    pub fn get(&self, index: u64) -> E {
        let piece = self.pieces.get(index as usize / PIECE).and_then(OnceLock::get);
        let word = piece.map_or(0, |piece| piece[index as usize % PIECE].load(Ordering::Acquire));
        E::from_word(word)
    }

    /// Shows an entry to all readers.
    pub fn set(&self, index: u64, entry: E) {
        if let Some(piece) = self.pieces.get(index as usize / PIECE).and_then(OnceLock::get) {
            piece[index as usize % PIECE].store(entry.word(), Ordering::Release);
        }
    }

    /// Makes it at least so long; new entries are empty.
    pub fn grow(&self, len: u64) {
        let most = self.pieces.len();
        for piece in &self.pieces[..(len as usize).div_ceil(PIECE).min(most)] {
            piece.get_or_init(|| std::iter::repeat_with(AtomicU64::default).take(PIECE).collect());
        }
        self.len.fetch_max(len, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Word(u64);

    impl TopEntry for Word {
        fn from_word(word: u64) -> Word {
            Word(word)
        }
        fn word(self) -> u64 {
            self.0
        }
    }

    #[test]
    fn a_table_grows_to_its_limit_and_entries_past_its_end_are_empty() {
        let table = TopTable::new(2 * PIECE as u64, &[Word(7), Word(8)]);
        assert_eq!((table.entries(), table.get(1), table.get(2)), (2, Word(8), Word(0)));
        table.grow(PIECE as u64 + 1);
        table.set(PIECE as u64, Word(9));
        assert_eq!((table.get(0), table.get(PIECE as u64)), (Word(7), Word(9)));
        table.replace(&[Word(1)]);
        assert_eq!((table.entries(), table.get(1), table.get(PIECE as u64)), (1, Word(0), Word(0)));
        assert_eq!(table.get(1 << 40), Word(0));
    }
}
