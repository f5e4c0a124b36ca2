//! The active L1 table in memory, read without a lock.
//!
//! All of it is read when the image is opened: it is bounded ([`layout::MAX_L1_BYTES`]), and every
//! lookup begins here. It lies in pieces that are made once, so that it can grow below readers.

use super::layout::{self, L1Entry};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

const PIECE: usize = 4096;
const PIECES: usize = layout::MAX_L1_BYTES as usize / 8 / PIECE;

pub struct L1Table {
    pieces: Box<[OnceLock<Box<[AtomicU64]>>]>,
    /// Entries.
    len: AtomicU64,
}

impl L1Table {
    /// As it is stored: big-endian entries.
    pub fn new(bytes: &[u8]) -> L1Table {
        let pieces = (0..PIECES).map(|_| OnceLock::new()).collect();
        let table = L1Table { pieces, len: AtomicU64::new(0) };
        table.replace(bytes);
        table
    }

    /// Takes another table's place, stored as [`L1Table::new`] says. Nobody else uses it meanwhile.
    pub fn replace(&self, bytes: &[u8]) {
        let (old, len) = (self.entries(), bytes.len() as u64 / 8);
        self.grow(len);
        for (index, entry) in bytes.chunks_exact(8).enumerate() {
            let word = entry.iter().fold(0, |word, &byte| word << 8 | byte as u64);
            self.set(index as u64, L1Entry(word));
        }
        (len..old).for_each(|index| self.set(index, L1Entry(0)));
        self.len.store(len, Ordering::Release);
    }

    pub fn entries(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// The entry, or an empty one past the end.
    pub fn get(&self, index: u64) -> L1Entry {
        let piece = self.pieces.get(index as usize / PIECE).and_then(OnceLock::get);
        L1Entry(piece.map_or(0, |piece| piece[index as usize % PIECE].load(Ordering::Acquire)))
    }

    /// Shows an entry to all readers.
    pub fn set(&self, index: u64, entry: L1Entry) {
        if let Some(piece) = self.pieces.get(index as usize / PIECE).and_then(OnceLock::get) {
            piece[index as usize % PIECE].store(entry.0, Ordering::Release);
        }
    }

    /// Makes it at least so long; new entries are empty.
    pub fn grow(&self, len: u64) {
        for piece in &self.pieces[..(len as usize).div_ceil(PIECE).min(PIECES)] {
            piece.get_or_init(|| std::iter::repeat_with(AtomicU64::default).take(PIECE).collect());
        }
        self.len.fetch_max(len, Ordering::AcqRel);
    }

    /// The entries from `first` on, as they are stored; empty ones past the end.
    pub fn encode(&self, first: u64, count: u64) -> Vec<u8> {
        (first..first + count).flat_map(|index| self.get(index).0.to_be_bytes()).collect()
    }
}
