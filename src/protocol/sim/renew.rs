//! Resetting a simulated disk: only sectors that have changed are written again.
//!
//! Fuzz targets need a new disk thousands of times a second.

use super::{SECTOR, SimDisk, State, WriteLog, sector};
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};

/// The contents that a disk had when it was last renewed, and the sectors that have changed since.
#[derive(Default)]
pub(super) struct Origin {
    bytes: Option<&'static [u8]>,
    is_changed: Vec<bool>,
    changed: Vec<usize>,
}

impl Origin {
    /// The bytes of the range are about to change.
    pub(super) fn note(&mut self, range: &Range<u64>) {
        if self.bytes.is_none() {
            return;
        }
        let (first, last) = (range.start / SECTOR, range.end.div_ceil(SECTOR));
        for n in first as usize..last as usize {
            if self.is_changed.len() <= n {
                self.is_changed.resize(n + 1, false);
            }
            if !std::mem::replace(&mut self.is_changed[n], true) {
                self.changed.push(n);
            }
        }
    }
}

impl SimDisk {
    /// Makes it like a new disk that holds `bytes` and can grow by `room`, without faults, in the same memory.
    /// Nobody has it open. The same bytes once more cost as much as has changed since.
    ///
    /// # Panics
    /// The disk has no room for `bytes`.
    pub fn renew(&self, bytes: &'static [u8], room: u64) {
        let disk = &*self.0;
        self.heal();
        self.set_room(bytes.len() as u64 + room);
        disk.len.store(bytes.len() as u64, Ordering::SeqCst);
        let state = &mut *disk.state.lock();
        state.rng = fastrand::Rng::with_seed(disk.options.seed);
        let again = state.origin.bytes.is_some_and(|origin| std::ptr::eq(origin, bytes));
        if !again {
            state.origin.bytes = Some(bytes);
            state.origin.note(&(0..state.bytes.len() as u64));
        }
        state.restore(bytes, &disk.sectors);
        if disk.options.log {
            state.log = WriteLog::new(state.bytes.clone());
        }
    }

    /// Writes over the disk's bytes, past its drivers. Nobody has it open.
    ///
    /// # Panics
    /// It goes beyond the disk's end.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        let range = at..at + bytes.len() as u64;
        let state = &mut *self.0.state.lock();
        state.origin.note(&range);
        state.bytes[range.start as usize..range.end as usize].copy_from_slice(bytes);
        for n in range.start / SECTOR..range.end.div_ceil(SECTOR) {
            state.update_sector(n as usize, &self.0.sectors);
        }
    }

    /// Reads the disk's bytes, past its drivers.
    ///
    /// # Panics
    /// They are beyond the disk's end.
    pub fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut into = [0; N];
        into.copy_from_slice(&self.0.state.lock().bytes[at as usize..][..N]);
        into
    }

    /// Cuts the disk off, or lengthens it with zeroes, past its drivers. Nobody has it open.
    pub fn set_len(&self, len: u64) {
        let old = self.0.len.swap(len, Ordering::SeqCst);
        if len < old {
            self.put(len, &vec![0; (old - len) as usize]);
        }
    }

    pub fn len(&self) -> u64 {
        self.0.len.load(Ordering::SeqCst)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl State {
    /// Gives the sectors that have changed their first contents.
    fn restore(&mut self, bytes: &[u8], sectors: &[AtomicU8]) {
        for n in std::mem::take(&mut self.origin.changed) {
            self.origin.is_changed[n] = false;
            let from = n * SECTOR as usize;
            let to = (from + SECTOR as usize).min(self.bytes.len());
            let old = bytes.get(from..to.min(bytes.len()).max(from)).unwrap_or(&[]);
            self.bytes[from..][..old.len()].copy_from_slice(old);
            self.bytes[from + old.len()..to].fill(0);
            self.update_sector(n, sectors);
        }
    }

    /// Tells the fast path what a sector holds.
    fn update_sector(&self, n: usize, sectors: &[AtomicU8]) {
        let from = n * SECTOR as usize;
        let to = (from + SECTOR as usize).min(self.bytes.len());
        sectors[n].store(sector::holding(&self.bytes[from..to]), Ordering::SeqCst);
    }
}
