//! A second processor of a hostile guest, which writes to memory at any time.

use super::guest::GuestMemory;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Another processor of the guest, which changes descriptors and headers while they are read.
pub struct Scribbler {
    end: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Scribbler {
    /// Changes `len` bytes from `from` on, in an order that `seed` says.
    pub fn start(memory: &GuestMemory, from: u64, len: u64, seed: u64) -> Scribbler {
        let end = Arc::new(AtomicBool::new(false));
        let (clone, memory) = (end.clone(), memory.memory.clone());
        let thread = std::thread::spawn(move || {
            let mut state = seed | 1;
            while !clone.load(Ordering::Relaxed) {
                // xorshift
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let Some(host) = memory.host(from + (state >> 8) % len, 1) else { continue };
                // SAFETY: a byte of the guest's memory, which `memory` keeps mapped.
                unsafe { host.write_volatile(state as u8 & 0x13) };
            }
        });
        Scribbler { end, thread: Some(thread) }
    }
}

impl Drop for Scribbler {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
