//! Incomplete images of interrupted tools, which are named when a signal ends the process.

use super::process::EndSignals;
use super::signals;
use crate::io::sync::Mutex;
use crate::tools::output::errln;
use std::io::IsTerminal;
use std::sync::Arc;

/// The image that is incomplete while a tool is at work. Safe to share.
#[derive(Clone, Default)]
pub struct Unfinished(Arc<Mutex<Option<String>>>);

impl Unfinished {
    /// The image is incomplete from now on.
    pub fn begin(&self, name: &str) {
        *self.0.lock() = Some(name.to_owned());
    }

    /// It is whole.
    pub fn end(&self) {
        *self.0.lock() = None;
    }

    /// Makes a signal that ends the program name the image first, in a line of `program`. To be called before there
    /// is another thread. Without a descriptor or a thread, signals end the program as ever.
    pub fn watch(&self, program: &str) {
        let (program, unfinished) = (program.to_owned(), self.clone());
        let ends = EndSignals::block();
        let Ok(descriptor) = ends.descriptor() else { return ends.unblock() };
        let watch = move || {
            let signal = super::process::next_signal(&descriptor);
            if let Some(name) = &*unfinished.0.lock() {
                if std::io::stderr().is_terminal() {
                    // In place of the bar.
                    crate::tools::output::err!("\r\x1b[2K");
                }
                errln!("{program}: interrupted: '{name}' is incomplete");
            }
            ends.unblock();
            signals::raise(signal);
        };
        // The thread has a mask of its own: this one's stays as it is.
        if std::thread::Builder::new().name("signals".into()).spawn(watch).is_err() {
            EndSignals::block().unblock();
        }
    }
}
