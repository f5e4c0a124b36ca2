//! Misbehaviour: what no controller should do and a driver must survive.

use super::device::{Device, Held};
use crate::spec::{Completion, Status};
use std::collections::VecDeque;

pub struct Rogue {
    /// What it does is decided by these bytes, from the front. After the last it behaves.
    script: VecDeque<u8>,
}

impl Rogue {
    pub fn new(script: &[u8]) -> Rogue {
        Rogue { script: script.iter().copied().collect() }
    }

    pub fn is_over(&self) -> bool {
        self.script.is_empty()
    }

    /// A number below `most`.
    fn below(&mut self, most: u64) -> u64 {
        let mut number = 0;
        let mut reach = 1;
        while reach < most {
            number = number << 8 | u64::from(self.script.pop_front().unwrap_or(0));
            reach <<= 8;
        }
        number % most.max(1)
    }

    /// After each command that was fetched: something, or nothing.
    pub fn act(&mut self, device: &mut Device) {
        for _ in 0..self.below(3) {
            match self.below(8) {
                0 => self.post_anything(device),
                1 => device.raise_event(self.below(1 << 24) as u32),
                2 => drop(self.take(device)),
                3 => {
                    if let Some(Held { queue, command }) = self.take(device) {
                        device.run(queue, command);
                        // Later it might be taken for that of another command.
                        if device.has_room(usize::from(queue)) {
                            device.complete(queue, &command, Status::SUCCESS, 0);
                        }
                    }
                }
                4 => {
                    if let Some(Held { queue, command }) = self.take(device) {
                        let status = Status(self.below(1 << 15) as u16);
                        device.complete(queue, &command, status, self.below(1 << 32) as u32);
                    }
                }
                _ => {
                    if let Some(Held { queue, command }) = self.take(device) {
                        device.run(queue, command);
                    }
                }
            }
        }
    }

    fn take(&mut self, device: &mut Device) -> Option<Held> {
        let at = self.below(device.held.len() as u64) as usize;
        device.held.remove(at)
    }

    /// A completion of nothing, or one that comes before anything was done. What it completes it then
    /// leaves alone: no driver can tell that from the real thing.
    fn post_anything(&mut self, device: &mut Device) {
        let at = self.below(device.completions.len() as u64) as usize;
        let mut completion = Completion {
            result: self.below(1 << 32) as u32,
            head: self.below(1 << 16) as u16,
            queue: at as u16,
            id: self.below(1 << 16) as u16,
            phase: false,
            status: Status(self.below(1 << 15) as u16),
        };
        match self.below(3) {
            0 if at > 0 => {
                let Some(Held { queue, command }) = self.take(device) else { return };
                (completion.queue, completion.id) = (queue, command.id());
            }
            1 if at > 0 => completion.queue = completion.queue.wrapping_add(1 + completion.id % 9),
            _ if at > 0 => completion.id |= 1 << 15,
            _ => completion.id %= 40,
        }
        if device.has_room(at) {
            device.post(at, completion);
        }
    }
}
