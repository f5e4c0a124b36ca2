//! Notices: events of a node that concern observers of the graph rather than one request.
//!
//! Rule: listening is optional. Notices that are not taken do not pile up.

use super::ThresholdExceeded;
use crate::io::sync::Mutex;
use std::sync::OnceLock;

/// So many wait to be taken; where nobody takes them there are no more.
const WAITING: usize = 256;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// An image was found to make no sense.
    Corrupted(Corrupted),
    /// A write went beyond the threshold.
    Exceeded(ThresholdExceeded),
}

/// QEMU's event BLOCK_IMAGE_CORRUPTED.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corrupted {
    /// The node's name.
    pub node: String,
    pub message: String,
    /// Where in the image file, in bytes, and how much: of what would have been written over.
    pub place: Option<(u64, u64)>,
    /// The image is marked as corrupt, and is not written any more.
    pub is_fatal: bool,
}

/// The notices of a graph, until somebody takes them.
#[derive(Default)]
pub struct Notices {
    waiting: Mutex<Vec<Notice>>,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Notices {
    /// `wake` is called, on any thread, when there is something to take. Once, before there is.
    pub fn on_notice(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.wake.set(Box::new(wake));
    }

    pub fn notify(&self, notice: Notice) {
        let mut waiting = self.waiting.lock();
        if waiting.len() >= WAITING {
            return;
        }
        waiting.push(notice);
        drop(waiting);
        if let Some(wake) = self.wake.get() {
            wake();
        }
    }

    /// Oldest first.
    pub fn take(&self) -> Vec<Notice> {
        std::mem::take(&mut self.waiting.lock())
    }
}
