//! Cutting a front end off from where its requests are served: on a worker, which must not wait.
//!
//! The connection's own thread finds it closed, and ends the session as if the front end had gone.

use super::memory::Memory;
use crate::io::shared_mapping::losses;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The way to end one connection.
pub struct CutOff {
    /// For the log.
    name: String,
    stream: Arc<UnixStream>,
    done: AtomicBool,
}

impl CutOff {
    pub fn new(name: String, stream: Arc<UnixStream>) -> CutOff {
        CutOff { name, stream, done: AtomicBool::new(false) }
    }

    /// Closes the connection, and logs why if it is the first to do so.
    pub fn cut(&self, why: &str) {
        if !self.done.swap(true, Ordering::Relaxed) {
            log::warn!(export = &*self.name; "connection closed: {why}");
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }
}

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
        self.lost || losses() != self.seen && self.look(memory)
    }

    #[cold]
    fn look(&mut self, memory: &Memory) -> bool {
        self.seen = losses();
        self.lost = memory.is_lost();
        if let (true, Some(cut_off)) = (self.lost, &self.cut_off) {
            cut_off.cut("the front end has taken away memory that it shares");
        }
        self.lost
    }
}
