//! Requests that the kernel does not finish: their deadline, and the reaction to it.
//!
//! After the deadline one line tells what hangs, and the connection is closed. The queue stays on its worker, and the
//! memory mapped, until the I/O has ended: then only do the rings of the front end that came back begin, for nothing
//! may be done again while the first time may still land. Other disks continue meanwhile, those of the same worker
//! too.
//!
//! It costs the warm path nothing: a slot's age, set to zero when a request is taken, is counted up a
//! few times per deadline while anything is in flight.

use super::cut_off::CutOff;
use super::disk::Disk;
use crate::io::Io;
use crate::io::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

/// Looks at a queue's slots per deadline.
const LOOKS: u8 = 8;

/// The default deadline. What Linux gives a SCSI disk by itself before it fails a request: 30
/// seconds, and five times again. What takes longer has no end.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(180);

/// A queue's watch over its slots.
#[derive(Default)]
pub struct Watch {
    /// Nanoseconds between two looks; 0: nobody looks.
    period: u64,
    /// When to look next, in nanoseconds on the ring's clock; 0: nothing is in flight.
    next: u64,
    cut_off: Option<Arc<CutOff>>,
    hung: Arc<AtomicBool>,
    is_hung: bool,
}

impl Watch {
    /// `timeout`: zero for none. `hung` is set when something hangs, and `cut_off` cuts the front end
    /// off then.
    pub fn new(timeout: Duration, cut_off: Option<Arc<CutOff>>, hung: Arc<AtomicBool>) -> Watch {
        let period = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX) / u64::from(LOOKS);
        Watch { period, cut_off, hung, ..Watch::default() }
    }

    /// Requests have been taken.
    #[inline]
    pub fn begin(&mut self, io: &Io) {
        if self.next == 0 && self.period > 0 {
            self.recheck(io, io.now());
        }
    }

    fn recheck(&mut self, io: &Io, now: u64) {
        self.next = now.saturating_add(self.period).max(1);
        io.tick_by(self.next);
    }

    /// Whether it is time to count the slots' ages up. `busy`: whether anything is in flight.
    pub fn is_due(&mut self, io: &Io, now: u64, busy: bool) -> bool {
        if self.next == 0 {
            return false;
        }
        if now < self.next {
            io.tick_by(self.next);
            return false;
        }
        if busy {
            self.recheck(io, now);
        } else {
            self.next = 0;
        }
        busy
    }

    /// Whether a request of this age has been in flight for longer than it may. The first look may
    /// come at once.
    pub fn is_over(&self, age: u8) -> bool {
        age > LOOKS
    }

    /// How long a request of this age has been in flight at least.
    pub fn elapsed(&self, age: u8) -> Duration {
        Duration::from_nanos(self.period.saturating_mul(u64::from(age.saturating_sub(1))))
    }

    /// Something of an export hangs. Says so and closes the connection, once.
    pub fn hangs(&mut self, export: &str, what: &str) {
        if !std::mem::replace(&mut self.is_hung, true) {
            log::error!(export; "{what}");
            self.hung.store(true, Ordering::SeqCst);
            if let Some(cut_off) = &self.cut_off {
                cut_off.cut("a request of it does not end");
            }
        }
    }

    pub fn is_hung(&self) -> bool {
        self.is_hung
    }
}

/// Queues of a disk that nobody waits for any more, with I/O in flight.
#[derive(Default)]
pub struct Lingering {
    count: Mutex<usize>,
    when_none: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Lingering {
    /// `act` runs on a thread of its own whenever the last of them has ended.
    pub fn when_none(&self, act: impl Fn() + Send + Sync + 'static) {
        // Once, when the export is made.
        let _ = self.when_none.set(Box::new(act));
    }

    pub fn any(&self) -> bool {
        *self.count.lock() > 0
    }

    /// Returns when there are none.
    pub fn wait(&self, name: &str) {
        if self.any() {
            log::warn!(export = name; "waits for I/O that has not ended");
        }
        while self.any() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn end(&self) {
        let mut count = self.count.lock();
        *count -= 1;
        let last = *count == 0;
        drop(count);
        if let (true, Some(act)) = (last, self.when_none.get()) {
            act();
        }
    }
}

/// Leaves a queue of `disk` to itself until it has ended, which `queue` tells by its own end. `ended` is called then.
pub fn linger<T: Send + 'static>(
    disk: &Arc<Disk>,
    queue: mpsc::Receiver<T>,
    ended: impl FnOnce() + Send + 'static,
) {
    *disk.lingering.count.lock() += 1;
    let clone = disk.clone();
    let wait = move || {
        while queue.recv().is_ok() {}
        ended();
        clone.lingering.end();
    };
    let thread = std::thread::Builder::new().name("lingering".into()).stack_size(256 << 10);
    if let Err(error) = thread.spawn(wait) {
        // It is never known to have ended then: the disk serves nobody else.
        log::error!("cannot start a thread that waits for I/O: {error}");
    }
}
