//! A load that requests every block of a disk exactly once, in random order, and flushes.

use std::path::Path;
use std::time::Instant;

use vublk_testkit::process::pin_thread;
use vublk_testkit::spec::{feature, protocol};
use vublk_testkit::{Disk, MemoryLayout, Options, Result};

use super::ring::{Chains, HotRing};
use super::{Idle, Measured};

/// One request at the beginning of each of `count` steps. It polls, so that no wake-up is measured.
#[derive(Debug, Clone, Copy)]
pub struct Once {
    pub chains: Chains,
    /// Bytes from one request to the next.
    pub step: u64,
    pub count: u64,
    pub cpu: usize,
}

impl Once {
    /// Connects to the server at `socket` and runs; `cpu_ns` reads the server's CPU time. The times are
    /// those of all requests and the flush.
    pub fn run(&self, socket: &Path, cpu_ns: impl Fn() -> Result<u64>) -> Result<Measured> {
        // The second queue is for the flush: the load's rings keep their chains for good.
        let options = Options {
            features: feature::QEMU,
            num_queues: 2,
            queue_size: self.chains.ring_size(),
            layout: MemoryLayout::single(self.chains.memory() * 2),
            // As QEMU does.
            protocol: protocol::DEFAULT | protocol::INFLIGHT_SHMFD,
            ..Options::default()
        };
        let mut disk = Disk::open(socket, &options)?;
        pin_thread(0, self.cpu)?;
        let order = shuffled(self.count);
        let (began, cpu) = (Instant::now(), cpu_ns()?);
        self.drive(HotRing::new(disk.queues[0].ring(), &self.chains)?, &order)?;
        if self.chains.write {
            disk.queues[1].flush()?;
        }
        let used = cpu_ns()? - cpu;
        Ok(Measured {
            requests: self.count,
            seconds: began.elapsed().as_secs_f64(),
            cpu_ns: used as f64 / self.count as f64,
            p50_ns: 0,
            p99_ns: 0,
        })
    }

    fn drive(&self, mut ring: HotRing<'_>, order: &[u32]) -> Result<()> {
        let mut left = order.iter().map(|&block| u64::from(block) * self.step / 512);
        for slot in 0..self.chains.depth {
            if let Some(sector) = left.next() {
                ring.post(slot, sector);
            }
        }
        ring.refuse_calls();
        ring.publish()?;
        let mut idle = Idle::default();
        while ring.in_flight() > 0 {
            let done = ring.reap(|ring, slot| {
                if let Some(sector) = left.next() {
                    ring.post(slot, sector);
                }
            })?;
            if done > 0 {
                ring.refuse_calls();
                ring.publish()?;
                idle = Idle::default();
            } else {
                std::hint::spin_loop();
                idle.check()?;
            }
        }
        Ok(())
    }
}

/// The numbers below `count`, in an order that is the same every time.
fn shuffled(count: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for last in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, (state % (last as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_comes_once() {
        let mut order = shuffled(1000);
        assert_ne!(order[..10], (0..10).collect::<Vec<u32>>()[..]);
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }
}
