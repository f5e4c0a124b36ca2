//! The mark that the image is being written ([`crate::cow::Unclosed`]), in the header. Version 2 has no bits for it.

use super::Qcow2;
use super::header::{Autoclear, Header};
use crate::cow::Mark;
use crate::io::IoResult;

/// The mark that a header has.
pub fn mark_of(header: &Header) -> Option<Mark> {
    Mark::in_bits(header.autoclear.bits())
}

fn bits(mark: Option<Mark>) -> Autoclear {
    Autoclear::from_bits_retain(mark.map_or(0, Mark::bits))
}

/// The bits whose promises we keep.
pub fn promised(header: &Header) -> Autoclear {
    header.autoclear & Autoclear::KNOWN | bits(mark_of(header))
}

/// Puts a mark into the header, or takes it away, and clears bits that are not known.
pub fn set_mark(header: &mut Header, mark: Option<Mark>) {
    let mark = mark.filter(|_| header.version >= 3);
    header.autoclear = header.autoclear & Autoclear::KNOWN | bits(mark);
}

/// Whether two headers differ in no more than the mark.
pub fn differ_in_mark(one: &Header, other: &Header) -> bool {
    let without = |header: &Header| {
        let mut header = header.clone();
        header.autoclear -= bits(mark_of(&header));
        header
    };
    without(one) == without(other)
}

impl Qcow2 {
    /// The mark that the image has while it is written.
    pub(super) fn mark(&self) -> Mark {
        self.unclosed.mark(self.mapping.tables().journal.number())
    }

    /// Memory that outlives the process is about to keep entries ([`crate::cow::Recovering`]).
    pub(super) async fn begin_to_keep(&self, was_in_use: bool) {
        self.unclosed.begin_keeping(was_in_use);
        if was_in_use {
            let _ = self.prepare_writing().await;
        }
        // An image that nobody prepares is not written: it may be another process's.
        let with_number = |header: &mut Header| {
            if self.life.is_begun() && mark_of(header).is_some() {
                set_mark(header, Some(self.mark()));
            }
        };
        // If this fails, the header is written again before an entry is kept.
        let _ = self.metadata().change_header(with_number).await;
        if self.life.is_prepared() {
            self.take_back_if_due().await;
        }
    }

    /// Begins to take back what another process has left, if that is due. The image is prepared for writes.
    pub(super) async fn take_back_if_due(&self) {
        if self.unclosed.take_due() {
            self.space.begin_taking_back(self.metadata()).await;
        }
    }

    /// A repair is going to take back what nothing names.
    pub(super) async fn forget_mark(&self) -> IoResult {
        self.unclosed.note(None);
        self.metadata().change_header(|header| set_mark(header, None)).await
    }
}
