//! The rings of one queue pair, with the positions of the host and the controller (section 3.3.1.2).

#![forbid(unsafe_code)]

use crate::dma::HostRange;
use crate::function::Registers;
use crate::spec::command::{CQE, SQE};
use crate::spec::{Command, Completion};

/// A submission queue. Commands are written as they come; the controller is notified of them when the doorbell is
/// rung.
pub struct SubmissionQueue {
    ring: HostRange,
    entries: u32,
    tail: u32,
    /// The tail that the doorbell was last rung with.
    written: u32,
    doorbell: usize,
}

impl SubmissionQueue {
    /// `ring` holds `entries` entries; `doorbell` is the register.
    pub fn new(ring: HostRange, entries: u32, doorbell: usize) -> SubmissionQueue {
        SubmissionQueue { ring, entries, tail: 0, written: 0, doorbell }
    }

    /// Writes a command. The caller ensures that fewer than `entries - 1` are in flight.
    #[inline]
    pub fn push(&mut self, command: &Command) {
        self.ring.put(self.tail as usize * SQE, &command.0);
        self.tail += 1;
        if self.tail == self.entries {
            self.tail = 0;
        }
    }

    #[inline]
    pub fn must_ring(&self) -> bool {
        self.tail != self.written
    }

    /// Tells the controller of what was pushed, if anything was.
    #[inline]
    pub fn ring(&mut self, registers: &dyn Registers) {
        if self.must_ring() {
            registers.write(self.doorbell, self.tail);
            self.written = self.tail;
        }
    }

    /// The queue was created again.
    pub fn reset(&mut self) {
        (self.tail, self.written) = (0, 0);
    }
}

/// A completion queue. A new entry shows by its phase, which changes with every pass of the ring
/// (section 4.2.4).
pub struct CompletionQueue {
    ring: HostRange,
    entries: u32,
    head: u32,
    written: u32,
    phase: bool,
    doorbell: usize,
}

impl CompletionQueue {
    /// `ring` holds `entries` entries, all zero; `doorbell` is the register.
    pub fn new(ring: HostRange, entries: u32, doorbell: usize) -> CompletionQueue {
        CompletionQueue { ring, entries, head: 0, written: 0, phase: true, doorbell }
    }

    /// Whether there is an entry.
    #[inline]
    pub fn has_entry(&self) -> bool {
        let last = self.ring.load(self.head as usize * CQE + 12);
        (last >> 16 & 1 != 0) == self.phase
    }

    /// The next entry, if there is one.
    #[inline]
    pub fn pop(&mut self) -> Option<Completion> {
        let at = self.head as usize * CQE;
        // The dword with the phase first: the controller writes it last.
        let last = self.ring.load(at + 12);
        if (last >> 16 & 1 != 0) != self.phase {
            return None;
        }
        let dwords = [self.ring.load(at), 0, self.ring.load(at + 8), last];
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase = !self.phase;
        }
        Some(Completion::parse(dwords))
    }

    /// Gives the entries that were taken back to the controller, if any were.
    #[inline]
    pub fn ring(&mut self, registers: &dyn Registers) {
        if self.head != self.written {
            registers.write(self.doorbell, self.head);
            self.written = self.head;
        }
    }

    /// The queue was created again, and its memory zeroed.
    pub fn reset(&mut self) {
        (self.head, self.written, self.phase) = (0, 0, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::Pages;
    use crate::spec::Status;
    use std::sync::Mutex;

    struct Written(Mutex<Vec<(usize, u32)>>);

    impl Registers for Written {
        fn len(&self) -> usize {
            0x2000
        }
        fn read(&self, _: usize) -> u32 {
            0
        }
        fn write(&self, offset: usize, value: u32) {
            self.0.lock().unwrap().push((offset, value));
        }
    }

    #[test]
    fn one_doorbell_reports_all_commands_and_the_tail_wraps() {
        let pages = Pages::new(4096, 4096).unwrap();
        let mut queue = SubmissionQueue::new(pages.range(), 4, 0x1008);
        let written = Written(Mutex::default());
        for round in 0..3u16 {
            for n in 0..3 {
                queue.push(&Command::new(2, 1).with_id(round * 3 + n));
            }
            queue.ring(&written);
            queue.ring(&written);
        }
        let tails: Vec<_> = written.0.into_inner().unwrap();
        assert_eq!(tails, [(0x1008, 3), (0x1008, 2), (0x1008, 1)]);
        assert_eq!(pages.range().load(0), 2 | 8 << 16);
        assert_eq!(pages.range().load(64), 2 | 5 << 16);
    }

    #[test]
    fn the_phase_tells_new_entries_from_those_of_the_pass_before() {
        let pages = Pages::new(4096, 4096).unwrap();
        let mut queue = CompletionQueue::new(pages.range(), 4, 0x100c);
        let written = Written(Mutex::default());
        for n in 0..1000u16 {
            assert!(!queue.has_entry() && queue.pop().is_none());
            let phase = n / 4 % 2 == 0;
            let entry =
                Completion { result: 5, head: 0, queue: 1, id: n, phase, status: Status(3) };
            let at = usize::from(n % 4) * CQE;
            for (dword, at) in entry.dwords().into_iter().zip((at..).step_by(4)) {
                pages.range().store(at, dword);
            }
            assert!(queue.has_entry());
            assert_eq!(queue.pop(), Some(entry));
        }
        queue.ring(&written);
        queue.ring(&written);
        assert_eq!(written.0.into_inner().unwrap(), []);
    }
}
