//! The header of an open image: in memory, and whether the disk has it.
//!
//! Every request that changes the mapping reads whether the disk has it. That changes only when a write of the header
//! fails.

use super::header::Header;
use super::header_steps::Sector;
use crate::cow::Lock;
use crate::io::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

/// The header of an open image.
pub struct ImageHeader {
    /// Held while the header changes.
    pub current: Lock<Header>,
    /// A copy of what `current` guards, for readers.
    pub shown: Mutex<Header>,
    pub state: HeaderState,
    /// While the header is in doubt: the whole sector to be written, if not only its fields change.
    pub switch: Mutex<Option<Sector>>,
}

impl ImageHeader {
    pub fn new(header: Header) -> ImageHeader {
        ImageHeader {
            shown: Mutex::new(header.clone()),
            current: Lock::new(header),
            state: HeaderState::default(),
            switch: Mutex::default(),
        }
    }
}

/// What the disk has of the header that is in memory.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisk {
    /// The same header.
    Same,
    /// This header or the previous one: it is written again before anything relies on it.
    InDoubt,
}

/// An [`OnDisk`] that threads share.
pub struct HeaderState(AtomicU8);

impl Default for HeaderState {
    fn default() -> HeaderState {
        HeaderState(AtomicU8::new(OnDisk::Same as u8))
    }
}

impl HeaderState {
    pub fn get(&self) -> OnDisk {
        match self.0.load(Ordering::SeqCst) {
            n if n == OnDisk::Same as u8 => OnDisk::Same,
            _ => OnDisk::InDoubt,
        }
    }

    pub fn set(&self, state: OnDisk) {
        self.0.store(state as u8, Ordering::SeqCst);
    }
}
