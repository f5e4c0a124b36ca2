//! Disconnecting a front end from a worker, which must not block.
//!
//! The connection's own thread finds it closed, and ends the session as if the front end had gone.

use std::sync::atomic::{AtomicBool, Ordering};

/// The way to end one connection.
pub struct CutOff {
    /// For the log.
    name: String,
    close: Box<dyn Fn() + Send + Sync>,
    done: AtomicBool,
}

impl CutOff {
    /// `close` ends the connection, and does not wait.
    pub fn new(name: String, close: impl Fn() + Send + Sync + 'static) -> CutOff {
        CutOff { name, close: Box::new(close), done: AtomicBool::new(false) }
    }

    /// Closes the connection, and logs why if it is the first to do so.
    pub fn cut(&self, why: &str) {
        if !self.done.swap(true, Ordering::Relaxed) {
            log::warn!(export = &*self.name; "connection closed: {why}");
            (self.close)();
        }
    }
}
