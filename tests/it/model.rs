//! Random requests, many at once, against a model of what each sector may hold.
//!
//! Requests that overlap in time may take effect in any order, so the model keeps, for each sector,
//! every value that a read may still find: of a write that has begun, until another that began after
//! its end has ended itself. Each write's bytes say which write they are and where they belong.

use crate::disks::{Opened, open, seed, sim_disk, simulated};
use crate::fast_path::FastPath;
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, AlignedBuf, IoResult, Worker, WorkerOptions};
use vublk::protocol::sim::{Effect, Fault, Kinds, SimOptions};

pub const LEN: u64 = 96 << 10;
pub const CLIENTS: u64 = 8;

/// What a sector was made to hold.
#[derive(Clone, Copy, PartialEq)]
pub enum Value {
    /// Zeroes, if the number is zero.
    Write(u64),
    Anything,
}

impl Value {
    fn word(number: u64, sector: u64) -> u64 {
        if number == 0 { 0 } else { number << 16 | sector }
    }

    fn allows(self, word: u64, sector: u64) -> bool {
        match self {
            Value::Write(number) => word == Self::word(number, sector),
            Value::Anything => true,
        }
    }
}

struct Written {
    value: Value,
    began: u64,
    /// Never, while it is in flight.
    ended: u64,
    /// When a later write that has replaced it for certain ended.
    replaced: u64,
}

const NEVER: u64 = u64::MAX;

struct Model {
    /// Counts events.
    now: u64,
    sectors: Vec<Vec<Written>>,
    /// When the reads in flight began.
    reads: Vec<u64>,
}

impl Model {
    fn new() -> Model {
        let zero = || Written { value: Value::Write(0), began: 0, ended: 0, replaced: NEVER };
        let sectors = (0..LEN / SECTOR).map(|_| vec![zero()]).collect();
        Model { now: 1, sectors, reads: Vec::new() }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn sectors(&mut self, range: &Range<u64>) -> &mut [Vec<Written>] {
        &mut self.sectors[(range.start / SECTOR) as usize..(range.end / SECTOR) as usize]
    }

    fn begin_write(&mut self, range: &Range<u64>, value: Value) -> u64 {
        let began = self.tick();
        for sector in self.sectors(range) {
            sector.push(Written { value, began, ended: NEVER, replaced: NEVER });
        }
        began
    }

    /// `certain`: it has surely happened; else it may have happened in any part.
    fn end_write(&mut self, range: &Range<u64>, began: u64, certain: bool) {
        let now = self.tick();
        let oldest_read = self.reads.iter().copied().min().unwrap_or(now);
        for sector in self.sectors(range) {
            for written in sector.iter_mut() {
                if written.began == began {
                    written.ended = now;
                } else if certain && written.ended < began && written.replaced == NEVER {
                    written.replaced = now;
                }
            }
            sector.retain(|written| written.replaced > oldest_read);
        }
    }

    fn begin_read(&mut self) -> u64 {
        let began = self.tick();
        self.reads.push(began);
        began
    }

    /// `word` gives the bytes found, eight at a time.
    fn end_read(
        &mut self,
        range: &Range<u64>,
        began: u64,
        word: impl Fn(u64) -> u64,
    ) -> Result<(), String> {
        let at = self.reads.iter().position(|&read| read == began).expect("it has begun");
        self.reads.swap_remove(at);
        for offset in range.clone().step_by(8) {
            let (sector, found) = (offset / SECTOR, word(offset - range.start));
            let allowed = &self.sectors[sector as usize];
            let fits = |w: &Written| w.replaced > began && w.value.allows(found, sector);
            if !allowed.iter().any(fits) {
                let writes: Vec<_> = allowed
                    .iter()
                    .filter(|w| w.replaced > began)
                    .map(|w| match w.value {
                        Value::Write(number) => format!("{number}"),
                        Value::Anything => "anything".into(),
                    })
                    .collect();
                return Err(format!(
                    "at {offset}: found write {} of sector {}, wanted one of {} of sector {sector}",
                    found >> 16,
                    found & 0xffff,
                    writes.join(", ")
                ));
            }
        }
        Ok(())
    }
}

/// What is kept of a disk for later: what could be read at some moment between two.
impl Run {
    /// From now on, what is kept may show the disk.
    pub fn begin_kept(&self) -> u64 {
        self.model().begin_read()
    }

    pub fn now(&self) -> u64 {
        self.model().tick()
    }

    /// It is not looked at.
    pub fn forget_kept(&self, began: u64) {
        self.model().reads.retain(|&read| read != began);
    }

    /// Whether the whole disk was kept between these moments: no sector holds what was replaced
    /// before, nor what came after.
    pub fn check_kept(&self, began: u64, ended: u64, bytes: &[u8]) -> Result<(), String> {
        let model = self.model();
        for (n, bytes) in bytes.chunks_exact(8).enumerate() {
            let sector = n as u64 * 8 / SECTOR;
            let found = u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
            let fits = |written: &Written| {
                let there = written.replaced > began && written.began <= ended;
                there && written.value.allows(found, sector)
            };
            if !model.sectors[sector as usize].iter().any(fits) {
                return Err(format!(
                    "found write {} of sector {} in sector {sector}",
                    found >> 16,
                    found & 0xffff
                ));
            }
        }
        Ok(())
    }
}

/// What clients share, on whatever worker they are.
#[derive(Clone)]
pub struct Run {
    node: Arc<Node>,
    model: Arc<Mutex<Model>>,
    /// What a discard leaves.
    discarded: Value,
    /// Whether requests may fail.
    faulty: bool,
}

impl Run {
    pub fn new(node: &Arc<Node>, discarded: Value, faulty: bool) -> Run {
        assert_eq!(node.len(), LEN);
        Run { node: node.clone(), model: Arc::new(Mutex::new(Model::new())), discarded, faulty }
    }

    /// One client: one request after the other.
    async fn client(self, fast_path: FastPath, seed: u64, requests: u64) -> Result<(), String> {
        let mut rng = fastrand::Rng::with_seed(seed);
        for n in 0..requests {
            // Numbers that no other request has.
            let number = (seed & 0xff_ffff) << 20 | (n + 1);
            let unit = if rng.bool() { SECTOR } else { 4096 };
            let start = rng.u64(0..LEN / unit);
            let count = rng.u64(1..=(LEN / unit - start).min(if unit == SECTOR { 12 } else { 4 }));
            let range = start * unit..(start + count) * unit;
            match rng.u8(0..20) {
                0..8 => self.read(&fast_path, range).await?,
                8..16 => self.write(&fast_path, range, number, rng.u8(0..8) == 0).await?,
                16 => self.zero(range, rng.bool()).await?,
                17 => self.discard(range).await?,
                18 => self.status(range).await?,
                _ => self.check(self.node.flush().await).map(drop)?,
            }
        }
        Ok(())
    }

    /// Whether it happened for certain.
    fn check(&self, result: IoResult) -> Result<bool, String> {
        match result {
            Err(errno) if !self.faulty => Err(format!("a request failed: {errno}")),
            result => Ok(result.is_ok()),
        }
    }

    fn model(&self) -> std::sync::MutexGuard<'_, Model> {
        self.model.lock().unwrap()
    }

    async fn read(&self, fast_path: &FastPath, range: Range<u64>) -> Result<(), String> {
        let began = self.model().begin_read();
        let buf = buffer(&range);
        let (mut buf, fast) = fast_path.transfer(Access::Read, range.start, buf).await;
        let result = match fast {
            Some(result) => result,
            None => self.node.read(range.start, &buf.io_vec()).await,
        };
        let word = |at: u64| {
            u64::from_ne_bytes(buf[at as usize..][..8].try_into().expect("whole words are read"))
        };
        if self.check(result)? {
            return self.model().end_read(&range, began, word);
        }
        self.model().reads.retain(|&read| read != began);
        Ok(())
    }

    async fn write(
        &self,
        fast_path: &FastPath,
        range: Range<u64>,
        number: u64,
        durable: bool,
    ) -> Result<(), String> {
        let mut buf = buffer(&range);
        for (n, word) in buf.chunks_exact_mut(8).enumerate() {
            let sector = (range.start + n as u64 * 8) / SECTOR;
            word.copy_from_slice(&Value::word(number, sector).to_ne_bytes());
        }
        let began = self.model().begin_write(&range, Value::Write(number));
        let (access, flags) = match durable {
            true => (Access::DurableWrite, WriteFlags::FUA),
            false => (Access::Write, WriteFlags::empty()),
        };
        let (mut buf, fast) = fast_path.transfer(access, range.start, buf).await;
        let result = match fast {
            Some(result) => result,
            None => self.node.write(range.start, &buf.io_vec(), flags).await,
        };
        let certain = self.check(result)?;
        self.model().end_write(&range, began, certain);
        Ok(())
    }

    async fn zero(&self, range: Range<u64>, unmap: bool) -> Result<(), String> {
        let began = self.model().begin_write(&range, Value::Write(0));
        let flags = if unmap { ZeroFlags::UNMAP } else { ZeroFlags::empty() };
        let result = self.node.zero(range.start, range.end - range.start, flags).await;
        let certain = self.check(result)?;
        self.model().end_write(&range, began, certain);
        Ok(())
    }

    async fn discard(&self, range: Range<u64>) -> Result<(), String> {
        let began = self.model().begin_write(&range, self.discarded);
        let result = self.node.discard(range.start, range.end - range.start).await;
        self.check(result)?;
        // Advice: perhaps nothing has happened.
        self.model().end_write(&range, began, false);
        Ok(())
    }

    async fn status(&self, range: Range<u64>) -> Result<(), String> {
        let began = self.model().begin_read();
        let len = range.end - range.start;
        let extent = self.node.status(range.start, len, Precision::Zeroes).await;
        let extent = match extent {
            Err(_) if self.faulty => {
                self.model().reads.retain(|&read| read != began);
                return Ok(());
            }
            extent => extent.map_err(|errno| format!("status: {errno}"))?,
        };
        assert!((1..=len).contains(&extent.len), "an extent of {} bytes of {len}", extent.len);
        // Whole sectors; what is said to be zero is as good as read.
        let known = match extent.status.contains(Status::ZERO) {
            true => range.start..range.start + extent.len / SECTOR * SECTOR,
            false => range.start..range.start,
        };
        self.model().end_read(&known, began, |_| 0)
    }

    /// All clients of one worker at once.
    pub async fn clients(
        self,
        fast_path: FastPath,
        seed: u64,
        requests: u64,
    ) -> Result<(), String> {
        fast_path.serve(&self.node);
        let results: Rc<RefCell<Vec<Result<(), String>>>> = Rc::default();
        for client in 0..CLIENTS {
            let (run, fast_path, results) = (self.clone(), fast_path.clone(), results.clone());
            io::current().spawn(async move {
                let result = run.client(fast_path, seed.wrapping_add(client), requests).await;
                results.borrow_mut().push(result);
            });
        }
        while results.borrow().len() < CLIENTS as usize {
            io::sleep(Duration::from_micros(300)).await;
        }
        fast_path.close();
        results.take().into_iter().collect()
    }
}

fn buffer(range: &Range<u64>) -> AlignedBuf {
    AlignedBuf::new((range.end - range.start) as usize, 4096).expect("memory")
}

fn sim_options() -> SimOptions {
    let mut options = SimOptions::new(LEN);
    options.max_len = 4 * LEN;
    options.traits.request_align = 4096;
    options.traits.buffer_align = 512;
    options.traits.zero_align = 4096;
    options.traits.discard_align = 4096;
    options.traits.max_transfer = 16384;
    options
}

/// The options of `disk` below the drivers of `stack`, outermost first.
fn within(stack: &[&str], disk: &str) -> String {
    let role = |driver: &&str| if *driver == "blkdebug" { "image." } else { "file." };
    let below = |depth: usize, option: &str| {
        let path: String = stack[..depth].iter().map(role).collect();
        format!("{path}{option}")
    };
    let upper = stack.iter().enumerate().map(|(n, name)| below(n, &format!("driver={name}")));
    let disk = disk.split(',').map(|option| below(stack.len(), option));
    upper.chain(disk).chain(["discard=unmap".to_owned()]).collect::<Vec<_>>().join(",")
}

#[test]
fn any_order_of_completions_agrees_with_the_model() {
    let seed = seed();
    for (n, stack) in STACKS.iter().enumerate() {
        for round in 0..3 {
            let seed = seed.wrapping_add((n as u64 * 3 + round) << 32);
            let result = simulated(Disorder::wild(seed), |local| {
                let fast_path = FastPath::attach(local);
                async move {
                    let (_disk, options) = sim_disk(sim_options());
                    let opened = open(&within(stack, &options)).await;
                    let run = Run::new(&opened.node, Value::Write(0), false);
                    run.clients(fast_path, seed, 150).await
                }
            });
            result.unwrap_or_else(|error| panic!("{stack:?} (seed {seed}): {error}"));
        }
    }
}

/// Drivers over the disk, outermost first.
const STACKS: &[&[&str]] = &[
    &[],
    &["raw"],
    &["suspend"],
    &["suspend", "raw"],
    &["raw", "suspend"],
    &["raw", "blkdebug"],
    &["raw", "preallocate"],
    &["copy-on-read", "layer"],
    &["raw", "copy-on-read", "suspend", "layer", "suspend"],
    &["flat"],
    &["suspend", "flat", "suspend"],
];

#[test]
fn failing_and_torn_requests_agree_with_the_model() {
    let seed = seed();
    let result = simulated(Disorder::wild(seed), |local| {
        let fast_path = FastPath::attach(local);
        async move {
            let mut options = SimOptions { seed, ..sim_options() };
            // And a discard leaves garbage.
            options.traits.abilities -= Abilities::DISCARD_ZEROES;
            let (disk, options) = sim_disk(options);
            let writes = Kinds::WRITE | Kinds::ZERO;
            disk.inject(Fault::new(writes, Effect::Tear(io::Errno::EIO)).with_probability(0.05));
            disk.inject(
                Fault::new(Kinds::all(), Effect::Fail(io::Errno::EIO)).with_probability(0.05),
            );
            let delay = Effect::Delay(Duration::from_millis(5));
            disk.inject(Fault::new(Kinds::all(), delay).with_probability(0.1));
            let opened = open(&within(&["raw"], &options)).await;
            let run = Run::new(&opened.node, Value::Anything, true);
            run.clients(fast_path, seed, 300).await
        }
    });
    result.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
}

/// Clients on two real workers, over what `options` open.
pub fn on_real_workers(options: String, seed: u64, requests: u64) {
    let quiet = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
    let workers: Vec<_> =
        (0..2).map(|n| Worker::start(&format!("model{n}"), quiet).unwrap()).collect();
    let opened: Opened = workers[0].block_on({
        let options = options.clone();
        move || async move { open(&options).await }
    });
    let run = Run::new(&opened.node, Value::Write(0), false);
    let (sender, results) = mpsc::channel();
    for (n, worker) in workers.iter().enumerate() {
        let (run, sender) = (run.clone(), sender.clone());
        let seed = seed.wrapping_add(n as u64 * CLIENTS);
        worker.send(move |local| {
            let fast_path = FastPath::attach(local);
            local.io().spawn(async move {
                let _ = sender.send(run.clients(fast_path, seed, requests).await);
            });
        });
    }
    for _ in &workers {
        let result = results.recv_timeout(Duration::from_secs(100)).expect("the clients end");
        result.unwrap_or_else(|error| panic!("{options} (seed {seed}): {error}"));
    }
    drop(opened);
}

#[test]
fn two_workers_on_one_simulated_disk_agree_with_the_model() {
    let seed = seed();
    for stack in STACKS {
        let (_disk, options) = sim_disk(sim_options());
        on_real_workers(within(stack, &options), seed, 400);
    }
}

#[test]
fn two_workers_on_one_file_agree_with_the_model() {
    let seed = seed();
    for direct in ["off", "on"] {
        for stack in [&[] as &[&str], &["raw"], &["suspend"]] {
            let file = crate::disks::file_on_disk(LEN);
            let path = file.path().display();
            let disk = format!("driver=file,filename={path}");
            let mut options = within(stack, &disk);
            options += &format!(",cache.direct={direct}");
            on_real_workers(options, seed, 200);
        }
    }
}

#[test]
fn a_file_on_a_simulated_ring_agrees_with_the_model() {
    let seed = seed();
    for direct in ["off", "on"] {
        let file = crate::disks::file_on_disk(LEN);
        let path = file.path().to_owned();
        let result = simulated(Disorder::wild(seed), |local| {
            let fast_path = FastPath::attach(local);
            async move {
                let disk = format!("driver=file,filename={}", path.display());
                let opened =
                    open(&format!("{},cache.direct={direct}", within(&["raw"], &disk))).await;
                Run::new(&opened.node, Value::Write(0), false).clients(fast_path, seed, 150).await
            }
        });
        result.unwrap_or_else(|error| panic!("direct={direct} (seed {seed}): {error}"));
    }
}
