//! Cutting a front end off from where its requests are served: on a worker, which must not wait.
//!
//! The connection's own thread finds it closed, and ends the session as if the front end had gone.

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
