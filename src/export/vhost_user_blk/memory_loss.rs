//! Guest memory that the front end takes away while requests use it: detection and disconnection.

use super::memory::Memory;
use crate::export::core::cut_off::CutOff;
use crate::io::shared_mapping::losses;
use std::sync::Arc;

/// What a queue knows of memory that the front end has taken away. Its own; asking costs a look at a
/// number that hardly ever changes.
#[derive(Default)]
pub struct LossWatch {
    /// `None`: there is no connection to close.
    cut_off: Option<Arc<CutOff>>,
    seen: usize,
    lost: bool,
}

impl LossWatch {
    pub fn new(cut_off: Option<Arc<CutOff>>) -> LossWatch {
        LossWatch { cut_off, ..LossWatch::default() }
    }

    /// Whether some of `memory` is lost; its front end has been cut off then.
    #[inline]
    pub fn is_lost(&mut self, memory: &Memory) -> bool {
        self.lost || losses() != self.seen && self.check(memory)
    }

    #[cold]
    fn check(&mut self, memory: &Memory) -> bool {
        self.seen = losses();
        self.lost = memory.is_lost();
        if let (true, Some(cut_off)) = (self.lost, &self.cut_off) {
            cut_off.cut("the front end has taken away memory that it shares");
        }
        self.lost
    }
}
