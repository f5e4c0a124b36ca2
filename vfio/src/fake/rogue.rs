//! Misbehaviour: what no controller should do and a driver must survive.

use super::device::{Device, Held};
use crate::spec::{Completion, Status};

pub struct Rogue {
    seed: u64,
}

impl Rogue {
    pub fn new(seed: u64) -> Rogue {
        Rogue { seed }
    }

    /// A number below `most`.
    fn below(&mut self, most: u64) -> u64 {
        // A linear congruential generator: any sequence will do, as long as it is the seed's.
        self.seed =
            self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888);
        (self.seed >> 33) % most.max(1)
    }

    /// After each command that was fetched: something, or nothing.
    pub fn act(&mut self, device: &mut Device) {
        for _ in 0..self.below(3) {
            match self.below(8) {
                0 => self.post_anything(device),
                1 => device.tell(self.below(1 << 24) as u32),
                2 => drop(self.take(device)),
                3 => {
                    if let Some(Held { queue, command }) = self.take(device) {
                        device.run(queue, command);
                        device.complete(queue, &command, Status::SUCCESS, 0);
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

    fn post_anything(&mut self, device: &mut Device) {
        let queue = self.below(device.completions.len() as u64) as usize;
        let completion = Completion {
            result: self.below(1 << 32) as u32,
            head: self.below(1 << 16) as u16,
            queue: if self.below(2) == 0 { queue as u16 } else { self.below(1 << 16) as u16 },
            id: if self.below(2) == 0 { self.below(64) } else { self.below(1 << 16) } as u16,
            phase: false,
            status: Status(self.below(1 << 15) as u16),
        };
        device.post(queue, completion);
    }
}
