//! The mark of an image that is being written.
//!
//! It is in bits of the header that programs clear when they open an image for writing, if they do not know them. A format
//! has it if its header has such bits.
//!
//! A closed image has no mark. So an opening that finds one knows that the last process did not close the image, and that
//! no other program has repaired it since. The clusters that this process had taken and not used are still counted, or,
//! where nothing is counted, inside the file, and none but a repair gives such clusters to others. What is in the entries
//! the mark does not tell: QEMU keeps it when it commits to a backing image, which it opens to read and then writes. The
//! mark has a number:
//!
//! * **None** (0): the process kept nothing in memory that outlives it. The next opening that writes takes its unused
//!   clusters back.
//! * **A number**: that of the opening, which is also in the memory where it kept entries. Such entries can be taken over
//!   without a look at all tables. Until that memory comes, or other memory in its place, nothing is taken back, because
//!   entries in it name some of the clusters. An opening without such memory keeps the number, so that it stays true.
//!
//! What takes clusters back that nothing names, such as a repair, clears the mark first.
//!
//! A mark needs no flush of its own: it is for kills. A crash of the host that loses it leaks as much as one kill did.

use crate::io::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// The upper 16 bits. The number is below, and the lower 16 bits are for the features that a format defines.
const TAG: u64 = 0x7662;
const TAG_AT: u32 = 48;
const NUMBER_AT: u32 = 16;

/// A mark with its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub u32);

impl Mark {
    /// The mark in the bits of a header.
    pub fn in_bits(bits: u64) -> Option<Mark> {
        (bits >> TAG_AT == TAG).then_some(Mark((bits >> NUMBER_AT) as u32))
    }

    pub fn bits(self) -> u64 {
        TAG << TAG_AT | u64::from(self.0) << NUMBER_AT
    }
}

/// What an opening knows of the one before it that did not close the image.
#[derive(Default)]
pub struct Unclosed {
    /// Its mark, while entries in memory that outlives it may name clusters that no table names.
    found: Mutex<Option<Mark>>,
    /// It has left clusters that can be taken back.
    is_due: AtomicBool,
    /// This opening keeps entries in memory that outlives it, or did so.
    keeps_entries: AtomicBool,
}

impl Unclosed {
    /// Notes the mark that the image has when it is opened.
    pub fn note(&self, mark: Option<Mark>) {
        let nobody_comes = mark == Some(Mark(0));
        *self.found.lock() = mark.filter(|_| !nobody_comes);
        self.is_due.store(nobody_comes, Ordering::SeqCst);
    }

    /// Whether nothing has touched what the opening with this number has left.
    pub fn is_of(&self, number: u32) -> bool {
        *self.found.lock() == Some(Mark(number))
    }

    /// The mark that the image has while it is written by the opening with this number.
    pub fn mark(&self, number: u32) -> Mark {
        let own = if self.keeps_entries.load(Ordering::SeqCst) { number } else { 0 };
        self.found.lock().unwrap_or(Mark(own))
    }

    /// Memory with entries has come. What this opening writes until they are in the tables must not say that there are none.
    pub fn expect_entries(&self) {
        self.keeps_entries.store(true, Ordering::SeqCst);
    }

    /// Entries are going to be kept in memory that outlives the process, and what an earlier one has left there is in the
    /// tables. `was_in_use`: that one did not close the image.
    pub fn begin_keeping(&self, was_in_use: bool) {
        self.keeps_entries.store(true, Ordering::SeqCst);
        let found = self.found.lock().take();
        if found.is_some() || was_in_use {
            self.is_due.store(true, Ordering::SeqCst);
        }
    }

    /// Whether there are clusters to be taken back. It is told once.
    pub fn take_due(&self) -> bool {
        self.is_due.load(Ordering::Relaxed) && self.is_due.swap(false, Ordering::SeqCst)
    }

    /// Whether there may be clusters that nobody has taken back.
    pub fn has_left(&self) -> bool {
        self.is_due.load(Ordering::SeqCst) || self.found.lock().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_told_from_other_bits() {
        for number in [0, 1, u32::MAX] {
            assert_eq!(Mark::in_bits(Mark(number).bits() | 3), Some(Mark(number)));
        }
        for bits in [0, 3, 1 << 63 | 5, u64::MAX] {
            assert_eq!(Mark::in_bits(bits), None);
        }
    }

    #[test]
    fn what_memory_may_name_is_not_taken_back_before_memory_has_come() {
        let unclosed = Unclosed::default();
        unclosed.note(Some(Mark(7)));
        assert!(!unclosed.take_due() && unclosed.has_left());
        assert!(unclosed.is_of(7) && !unclosed.is_of(8));
        assert_eq!(unclosed.mark(9), Mark(7), "the image still says whose clusters these are");
        unclosed.begin_keeping(false);
        assert_eq!(unclosed.mark(9), Mark(9));
        assert!(unclosed.take_due() && !unclosed.take_due() && !unclosed.has_left());
    }

    #[test]
    fn an_image_without_a_mark_does_not_deny_entries_that_have_come() {
        let unclosed = Unclosed::default();
        unclosed.note(None);
        unclosed.expect_entries();
        assert_eq!(unclosed.mark(9), Mark(9));
        assert!(!unclosed.take_due());
    }

    #[test]
    fn what_no_memory_names_is_taken_back_at_once() {
        let unclosed = Unclosed::default();
        unclosed.note(Some(Mark(0)));
        assert!(!unclosed.is_of(0));
        assert_eq!(unclosed.mark(9), Mark(0));
        assert!(unclosed.take_due() && !unclosed.has_left());
        unclosed.note(None);
        assert!(!unclosed.take_due());
    }
}
