//! Records of entries in memory that outlives the process, each complete or absent at any moment.
//!
//! A record is five words: the guest's cluster plus one (0: there is no record), then the old entry and the new one.
//! Its first word is written last and cleared first, so that a process that is killed between any two stores leaves
//! a whole record or none.

use super::table_cache::TableEntry;
use crate::io::atomics::{AtomicU64, Ordering};

/// Words of a record.
pub const RECORD: usize = 5;
/// In a record's first word: something newer may be on the disk.
const MARK: u64 = 1 << 63;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left<E> {
    /// The guest's cluster.
    pub cluster: u64,
    /// Something newer may be on the disk.
    pub is_marked: bool,
    pub old: E,
    pub new: E,
    pub record: usize,
}

/// Writes a record where there is none.
pub fn write_record<E: TableEntry>(
    words: &[AtomicU64],
    record: usize,
    cluster: u64,
    old: E,
    new: E,
) {
    let words = &words[record * RECORD..][..RECORD];
    let content = [old.words(), new.words()];
    for (word, &value) in words[1..].iter().zip(content.as_flattened()) {
        word.store(value, Ordering::Release);
    }
    words[0].store(cluster + 1, Ordering::Release);
}

/// Changes the second word of a record's new entry, in one store.
pub fn extend_record<E: TableEntry>(words: &[AtomicU64], record: usize, new: E) {
    let [_, second] = new.words();
    words[record * RECORD + RECORD - 1].store(second, Ordering::Release);
}

/// Whether something newer than a record may be on the disk.
pub fn is_marked(words: &[AtomicU64], record: usize) -> bool {
    words[record * RECORD].load(Ordering::Relaxed) & MARK != 0
}

/// Says of a record that the disk is about to have something newer.
pub fn mark_record(words: &[AtomicU64], record: usize) {
    words[record * RECORD].fetch_or(MARK, Ordering::Release);
}

pub fn clear_record(words: &[AtomicU64], record: usize) {
    words[record * RECORD].store(0, Ordering::Release);
}

/// The entries that an earlier process has left.
pub fn read_records<E: TableEntry>(words: &[AtomicU64]) -> Vec<Left<E>> {
    let read = |(record, words): (usize, &[AtomicU64])| {
        let mut content = [0; RECORD];
        content.iter_mut().zip(words).for_each(|(to, word)| *to = word.load(Ordering::Acquire));
        let [cluster, old, old_second, new, new_second] = content;
        Some(Left {
            cluster: (cluster & !MARK).checked_sub(1)?,
            is_marked: cluster & MARK != 0,
            old: E::from_words(old, old_second),
            new: E::from_words(new, new_second),
            record,
        })
    };
    words.chunks_exact(RECORD).enumerate().filter_map(read).collect()
}
