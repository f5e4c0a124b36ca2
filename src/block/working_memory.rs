//! Upper bounds of the memory that a request takes on its way through the graph.
//!
//! The sender takes this much from a budget ([`crate::io::Budget`]) before it begins.
//!
//! It counts what grows with requests: the futures of each layer, lists of segments, bounce buffers, and what drivers
//! report about themselves ([`Scratch`](super::driver::Scratch)). What a driver keeps in any case (caches, tables) is
//! bounded there.

use super::driver::{Driver, Traits};
use crate::io::is_aligned;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most memory that one request may take for a bounce buffer, in bytes, unless one block is more;
/// longer requests go in pieces.
pub const BOUNCE_LIMIT: u64 = 1 << 20;

/// The most that a write copies at once on either side of its data, in bytes; longer copies go in pieces.
pub const COPY_LIMIT: u64 = 2 << 20;

/// A request's futures in one layer, a node and its driver, in bytes; more than they take.
const LAYER: u64 = 4 << 10;

/// What requests may need in a node and all nodes below it.
#[derive(Clone, Copy, Debug)]
pub struct WorkingMemory {
    request_align: u32,
    buffer_align: u32,
    /// How many layers a request may be in at a time.
    layers: u32,
    /// Nodes below whose alignment is stricter than that of what stands on them: each may have a bounce
    /// buffer, however well the request is aligned here.
    bounces: u32,
    /// The largest of all drivers, in bytes.
    copy_unit: u32,
    /// Drivers that copy writes, on a path below.
    write_copies: u32,
    /// Of all drivers on the most expensive path, in bytes.
    scratch: u64,
}

impl WorkingMemory {
    /// Of a node with this driver.
    pub(super) fn of(driver: &dyn Driver, traits: &Traits) -> WorkingMemory {
        let own = driver.scratch();
        let Traits { request_align, buffer_align, .. } = *traits;
        let mut all = WorkingMemory {
            request_align,
            buffer_align,
            layers: 0,
            bounces: 0,
            copy_unit: own.copy_unit,
            write_copies: 0,
            scratch: 0,
        };
        for child in driver.children() {
            let below = child.node().working_memory();
            let is_stricter =
                below.request_align > request_align || below.buffer_align > buffer_align;
            all.layers = all.layers.max(below.layers);
            all.bounces = all.bounces.max(below.bounces + u32::from(is_stricter));
            all.copy_unit = all.copy_unit.max(below.copy_unit);
            all.write_copies = all.write_copies.max(below.write_copies);
            all.scratch = all.scratch.max(below.scratch);
        }
        all.layers += 1;
        all.write_copies += u32::from(own.copies_writes);
        all.scratch += u64::from(own.other);
        all
    }

    /// For a read or write, in bytes.
    pub fn to_transfer(&self, at: u64, segments: &[libc::iovec], writes: bool) -> u64 {
        let len: u64 = segments.iter().map(|segment| segment.iov_len as u64).sum();
        let fits = (at | len) & (u64::from(self.request_align) - 1) == 0
            && is_aligned(segments, self.buffer_align);
        let bounces = u64::from(self.bounces) + u64::from(!fits);
        let lists = size_of_val(segments) as u64 * u64::from(self.layers + 1);
        let copied = match writes {
            true => {
                self.copied_around(at, len) + u64::from(self.write_copies) * self.bounce_of(len)
            }
            false => 0,
        };
        self.to_ask() + self.scratch + lists + bounces * self.bounce_of(len) + copied
    }

    /// For a request that zeroes at most `len` bytes, perhaps by writing them, in bytes.
    pub fn to_zero(&self, len: u64) -> u64 {
        // The zeroes, and where these are to be aligned what goes around them.
        let buffers = u64::from(self.bounces + self.write_copies) + 2;
        let copied = 2 * u64::from(self.copy_unit).min(COPY_LIMIT);
        self.to_ask() + self.scratch + buffers * self.bounce_of(len) + copied
    }

    /// For a request that moves no data, in bytes.
    pub fn to_ask(&self) -> u64 {
        u64::from(self.layers) * LAYER
    }

    /// The bounce buffer of a request of `len` bytes: whole blocks, and a power of two, as they are kept.
    fn bounce_of(&self, len: u64) -> u64 {
        let align = u64::from(self.request_align);
        let whole = len.saturating_add(2 * align);
        whole.min(BOUNCE_LIMIT.max(align)).next_power_of_two()
    }

    /// What a write copies of the units that it covers in part.
    fn copied_around(&self, at: u64, len: u64) -> u64 {
        let unit = u64::from(self.copy_unit);
        if unit == 0 || at.is_multiple_of(unit) && len.is_multiple_of(unit) {
            return 0;
        }
        let is_one = at / unit == at.saturating_add(len) / unit;
        let both = 2 * unit.min(COPY_LIMIT);
        if is_one { unit.min(both) } else { both }
    }
}

/// What threads share of it. It changes only while nothing is in flight.
pub(super) struct CurrentWorkingMemory([AtomicU64; 4]);

impl CurrentWorkingMemory {
    pub fn set(&self, new: WorkingMemory) {
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let words = [
            pair(new.request_align, new.buffer_align),
            pair(new.layers, new.bounces),
            pair(new.write_copies, new.copy_unit),
            new.scratch,
        ];
        for (word, new) in self.0.iter().zip(words) {
            word.store(new, Ordering::Relaxed);
        }
    }

    pub fn get(&self) -> WorkingMemory {
        let [aligns, counts, copy_unit, scratch] =
            self.0.each_ref().map(|word| word.load(Ordering::Relaxed));
        WorkingMemory {
            request_align: (aligns >> 32) as u32,
            buffer_align: aligns as u32,
            layers: (counts >> 32) as u32,
            bounces: counts as u32,
            copy_unit: copy_unit as u32,
            write_copies: (copy_unit >> 32) as u32,
            scratch,
        }
    }
}

impl From<WorkingMemory> for CurrentWorkingMemory {
    fn from(memory: WorkingMemory) -> CurrentWorkingMemory {
        let current = CurrentWorkingMemory(Default::default());
        current.set(memory);
        current
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::iovec::iovec;

    const ONE: WorkingMemory = WorkingMemory {
        request_align: 512,
        buffer_align: 512,
        layers: 3,
        bounces: 0,
        copy_unit: 0,
        write_copies: 0,
        scratch: 0,
    };

    fn segment(address: usize, len: usize) -> [libc::iovec; 1] {
        [iovec(std::ptr::without_provenance_mut(address), len)]
    }

    #[test]
    fn a_bounce_buffer_is_counted_where_there_is_one() {
        let cost =
            |at, address, len| ONE.to_transfer(at, &segment(address, len), false) - ONE.to_ask();
        assert!(cost(0, 4096, 1 << 20) < 4096);
        assert!(cost(0, 4097, 1 << 20) >= 1 << 20);
        assert!(cost(1, 4096, 1 << 20) >= 1 << 20);
        assert!(cost(0, 4097, 4096) < 32 << 10);
        // Longer requests go in pieces.
        assert!(cost(0, 4097, 1 << 30) < 2 << 20);
        let below = WorkingMemory { request_align: 1, buffer_align: 1, bounces: 1, ..ONE };
        assert!(below.to_transfer(1, &segment(4097, 1 << 20), false) >= 1 << 20);
    }

    #[test]
    fn a_write_counts_what_it_copies_around_it() {
        let needs = WorkingMemory { copy_unit: 65536, ..ONE };
        let cost =
            |at, len, writes| needs.to_transfer(at, &segment(0, len), writes) - needs.to_ask();
        assert!(cost(0, 65536, true) < 4096);
        assert!(cost(4096, 4096, false) < 4096);
        assert!((65536..2 * 65536).contains(&cost(4096, 4096, true)));
        assert!(cost(4096, 65536, true) >= 2 * 65536);
    }
}
