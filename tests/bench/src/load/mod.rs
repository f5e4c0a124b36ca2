//! The load: closed-loop requests on one disk, one thread per queue, for a stretch of time.

mod histogram;
mod once;
mod ring;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vublk_testkit::process::pin_thread;
use vublk_testkit::ring::DriverRing;
use vublk_testkit::{Disk, Error, Memory, MemoryLayout, Options, Queue, Result};

pub use histogram::Histogram;
pub use once::Once;
pub use ring::Chains;
use ring::{HotRing, echo};

/// How the load learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Sleeps until it is called, as a guest does.
    Wait,
    /// Looks at the used index without end, and wants no calls.
    Poll,
}

/// One load.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub queues: usize,
    pub chains: Chains,
    pub random: bool,
    pub mode: Mode,
    pub event_idx: bool,
    /// Requests in flight are tracked (INFLIGHT_SHMFD).
    pub tracked: bool,
    /// Queue `i` is driven from CPU `cpus[i]`.
    pub cpus: [usize; 2],
    pub warm_up: Duration,
    pub time: Duration,
}

/// What was measured, over the time after the warm-up.
#[derive(Debug, Clone, Copy, Default)]
pub struct Measured {
    pub requests: u64,
    pub seconds: f64,
    /// The server's CPU time per request.
    pub cpu_ns: f64,
    pub p50_ns: u64,
    pub p99_ns: u64,
}

impl Measured {
    pub fn per_second(&self) -> f64 {
        self.requests as f64 / self.seconds
    }
}

/// A server that finishes nothing for this long has failed.
const STUCK: Duration = Duration::from_secs(10);

// A load warms up in phase 0.
const MEASURING: u8 = 1;
const STOPPING: u8 = 2;

#[derive(Default)]
struct Shared {
    phase: AtomicU8,
    failed: AtomicBool,
    done: [AtomicU64; 2],
}

impl Load {
    /// Connects to the server at `socket` with the rings and memory this load needs.
    pub fn open(&self, socket: &Path) -> Result<Disk> {
        use vublk_testkit::spec::{feature, protocol};
        let mut features = feature::QEMU;
        if !self.event_idx {
            features &= !feature::EVENT_IDX;
        }
        let tracked = if self.tracked { protocol::INFLIGHT_SHMFD } else { 0 };
        let options = Options {
            features,
            protocol: protocol::DEFAULT | tracked,
            num_queues: self.queues,
            queue_size: self.chains.ring_size(),
            layout: MemoryLayout::single(self.chains.memory() * self.queues),
            ..Options::default()
        };
        let disk = Disk::open(socket, &options)?;
        if self.tracked && disk.inflight().is_none() {
            return Err(Error::Peer("does not track requests in flight".into()));
        }
        Ok(disk)
    }

    /// Runs the load on an open disk; `cpu_ns` reads the server's CPU time.
    pub fn run(&self, disk: &mut Disk, cpu_ns: impl Fn() -> Result<u64>) -> Result<Measured> {
        let sectors = disk.config().capacity_sectors;
        let count = self.queues;
        self.run_on(&mut disk.queues[..count], sectors, cpu_ns)
    }

    /// Runs the load on some queues of a disk of `sectors` sectors.
    pub fn run_on(
        &self,
        queues: &mut [Queue],
        sectors: u64,
        cpu_ns: impl Fn() -> Result<u64>,
    ) -> Result<Measured> {
        let blocks = sectors * 512 / u64::from(self.chains.block);
        if blocks == 0 {
            return Err(Error::Peer("is smaller than one block".into()));
        }
        let shared = Shared::default();
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (i, queue) in queues.iter_mut().enumerate() {
                let shared = &shared;
                threads.push(scope.spawn(move || {
                    let result = self.drive(i, queue, blocks, shared);
                    if result.is_err() {
                        shared.failed.store(true, Ordering::Relaxed);
                    }
                    result
                }));
            }
            let total = || -> u64 { shared.done.iter().map(|n| n.load(Ordering::Relaxed)).sum() };
            pause(self.warm_up, &shared.failed);
            shared.phase.store(MEASURING, Ordering::Relaxed);
            let (start, cpu, done) = (Instant::now(), cpu_ns(), total());
            pause(self.time, &shared.failed);
            let (cpu_after, done_after, seconds) =
                (cpu_ns(), total(), start.elapsed().as_secs_f64());
            shared.phase.store(STOPPING, Ordering::Relaxed);
            let mut latency = Histogram::default();
            for thread in threads {
                let one =
                    thread.join().map_err(|_| Error::Peer("a load thread panicked".into()))??;
                latency.merge(&one);
            }
            let requests = done_after - done;
            Ok(Measured {
                requests,
                seconds,
                cpu_ns: (cpu_after? - cpu?) as f64 / requests.max(1) as f64,
                p50_ns: latency.percentile(0.50),
                p99_ns: latency.percentile(0.99),
            })
        })
    }

    /// One queue's thread.
    fn drive(
        &self,
        index: usize,
        queue: &mut Queue,
        blocks: u64,
        shared: &Shared,
    ) -> Result<Histogram> {
        pin_thread(0, self.cpus[index % self.cpus.len()])?;
        let mut ring = HotRing::new(queue.ring(), &self.chains)?;
        let mut sectors = Sectors::new(index as u64, blocks, self);
        let mut latency = Histogram::default();
        let mut stamps: Vec<Option<Instant>> = vec![None; usize::from(self.chains.depth)];
        // One request in so many is timed: reading the clock costs as much as a request.
        let sample_mask = if self.chains.depth == 1 { 7 } else { 63 };
        let mut count = 0u64;
        for slot in 0..self.chains.depth {
            ring.post(slot, sectors.next());
        }
        if self.mode == Mode::Poll {
            ring.refuse_calls();
        }
        ring.publish()?;
        let mut idle = Idle::default();
        loop {
            let phase = shared.phase.load(Ordering::Relaxed);
            let done = ring.reap(|ring, slot| {
                let stamp = &mut stamps[usize::from(slot)];
                if let Some(sent) = stamp.take()
                    && phase == MEASURING
                {
                    latency.add(sent.elapsed().as_nanos() as u64);
                }
                count += 1;
                if phase != STOPPING {
                    ring.post(slot, sectors.next());
                    if count & sample_mask == 0 {
                        *stamp = Some(Instant::now());
                    }
                }
            })?;
            if done > 0 {
                if self.mode == Mode::Poll {
                    ring.refuse_calls();
                }
                shared.done[index % 2].store(count, Ordering::Relaxed);
                ring.publish()?;
                idle = Idle::default();
            } else if ring.in_flight() == 0 {
                return Ok(latency);
            } else {
                match self.mode {
                    Mode::Poll => std::hint::spin_loop(),
                    Mode::Wait if ring.wait(STUCK)? => {}
                    Mode::Wait => return Err(stuck()),
                }
                idle.check()?;
            }
        }
    }
}

/// Nanoseconds per request of the load alone, with a device in the same thread that only echoes: an
/// upper bound, since the echo is in it.
pub fn own_cost_ns() -> Result<f64> {
    const ROUNDS: u32 = 20_000;
    let chains = Chains { depth: 32, block: 4096, write: false, indirect: true };
    let memory = Memory::new(&MemoryLayout::single(chains.memory()))?;
    let driver = DriverRing::new(&memory, chains.ring_size(), true)?;
    let mut ring = HotRing::new(&driver, &chains)?;
    let mut sectors = Sectors { state: 1, blocks: 1 << 18, per_block: 8, random: true };
    let (mut next, mut heads) = (0, Vec::with_capacity(64));
    (0..chains.depth).for_each(|slot| ring.post(slot, sectors.next()));
    let start = Instant::now();
    for _ in 0..ROUNDS {
        ring.publish()?;
        echo(&driver, &mut next, &mut heads);
        ring.reap(|ring, slot| ring.post(slot, sectors.next()))?;
    }
    let requests = ROUNDS * u32::from(chains.depth);
    Ok(start.elapsed().as_nanos() as f64 / f64::from(requests))
}

fn stuck() -> Error {
    Error::Timeout("completion under load".into(), STUCK)
}

/// How long nothing has come. The clock is read only now and then: it costs as much as a request.
#[derive(Default)]
struct Idle {
    spins: u32,
    since: Option<Instant>,
}

impl Idle {
    fn check(&mut self) -> Result<()> {
        self.spins = self.spins.wrapping_add(1) & 0xfffff;
        if self.spins == 0 {
            self.since.get_or_insert_with(Instant::now);
        }
        if self.spins == 0 && self.since.is_some_and(|t| t.elapsed() > STUCK) {
            return Err(stuck());
        }
        Ok(())
    }
}

/// Sleeps, but not on when a thread has failed.
fn pause(time: Duration, failed: &AtomicBool) {
    let end = Instant::now() + time;
    loop {
        let rest = end.saturating_duration_since(Instant::now());
        if rest.is_zero() || failed.load(Ordering::Relaxed) {
            return;
        }
        std::thread::sleep(rest.min(Duration::from_millis(100)));
    }
}

/// The sectors asked for, one after another or all over the disk.
struct Sectors {
    state: u64,
    blocks: u64,
    per_block: u64,
    random: bool,
}

impl Sectors {
    fn new(queue: u64, blocks: u64, load: &Load) -> Sectors {
        Sectors {
            state: if load.random { 0x9e37_79b9_7f4a_7c15 ^ (queue << 32) } else { 0 },
            blocks,
            per_block: u64::from(load.chains.block) / 512,
            random: load.random,
        }
    }

    #[inline]
    fn next(&mut self) -> u64 {
        if self.random {
            // xorshift64, scaled to the number of blocks without a division.
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            let block = (u128::from(self.state) * u128::from(self.blocks)) >> 64;
            block as u64 * self.per_block
        } else {
            self.state = if self.state + 1 >= self.blocks { 0 } else { self.state + 1 };
            self.state * self.per_block
        }
    }
}
