//! Storage that becomes full at any write.
//!
//! Requests fail with "no space" and nothing else, nothing is corrupt, and when there is room again everything works.

use super::consistency;
use super::sim::{Image, below, check, image, passing};
use crate::disks::{open_holding, seed, simulated};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, Errno, IoVec};
use vublk::protocol::sim::{Effect, Fault, Kinds, SimDisk, SimOptions};

const LEN: u64 = 64 << 10;
/// The most that the disk is resized to.
const MOST_LEN: u64 = 96 << 10;
const MOST: u64 = 1 << 20;

/// In which way the storage is full.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Full {
    /// Nothing can be written.
    Writes,
    /// What has room can be written over, as on a thin volume.
    Holes,
    /// The file cannot become longer.
    Length,
}

const KINDS: &[(&str, u32, &str)] = &[
    ("cluster_size=4k", 512, ""),
    ("cluster_size=512,refcount_bits=64", 512, ""),
    ("cluster_size=512", 1, ",l2-cache-size=1"),
    ("cluster_size=16k,extended_l2=on", 512, ""),
    ("cluster_size=4k,compat=0.10", 1, ""),
    ("cluster_size=4k,lazy_refcounts=on", 512, ",lazy-refcounts=on"),
];

/// What each sector may hold.
type Model = Vec<Vec<u8>>;

/// A run of requests on an image.
struct Work {
    image: Image,
    model: Rc<RefCell<Model>>,
    rng: fastrand::Rng,
    number: u8,
    /// What could not be done.
    failures: Rc<RefCell<usize>>,
    /// Whether something may fail.
    may_fail: bool,
    /// Version 2 keeps no bitmaps, and its length if it has snapshots.
    is_new: bool,
}

fn sectors(at: u64, len: u64) -> std::ops::Range<usize> {
    (at / SECTOR) as usize..((at + len) / SECTOR) as usize
}

impl Work {
    /// Whether it worked; what fails does so for want of room.
    fn judge(&self, what: &str, errno: Option<Errno>) -> bool {
        let Some(errno) = errno else { return true };
        assert!(self.may_fail, "{what}: {errno}");
        assert_eq!(errno, Errno::ENOSPC, "{what}");
        *self.failures.borrow_mut() += 1;
        false
    }

    fn of<T>(&self, what: &str, result: Result<T, Error>) -> bool {
        let text = result.as_ref().err().map(|error| error.to_string()).unwrap_or_default();
        let errno = result.err().map(|error| error.errno().unwrap_or(Errno::EIO));
        self.judge(&format!("{what}: {text}"), errno)
    }

    async fn one(&mut self) {
        let len = self.image.node.len();
        match self.rng.u8(0..14) {
            0..6 => self.write(len).await,
            6 | 7 => self.zero(len).await,
            8 => self.discard(len).await,
            9 => drop(self.judge("flush", self.image.node.flush().await.err())),
            10 | 11 => self.snapshot().await,
            12 => self.resize(len).await,
            _ if self.is_new => self.bitmap().await,
            _ => self.write(len).await,
        }
    }

    /// A few at once, on different sectors.
    async fn write(&mut self, len: u64) {
        let writers = self.rng.u64(1..4);
        let done: Rc<RefCell<u64>> = Rc::default();
        let per_writer = len / SECTOR / writers;
        for writer in 0..writers {
            self.number = self.number % 250 + 1;
            let value = self.number;
            let first = writer * per_writer + self.rng.u64(0..per_writer);
            let count = self.rng.u64(1..=((writer + 1) * per_writer - first).min(20));
            let (at, len) = (first * SECTOR, count * SECTOR);
            for sector in &mut self.model.borrow_mut()[sectors(at, len)] {
                sector.push(value);
            }
            let (node, model, done) = (self.image.node.clone(), self.model.clone(), done.clone());
            let (failures, may_fail) = (self.failures.clone(), self.may_fail);
            io::current().spawn(async move {
                let bytes = vec![value; len as usize];
                match node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await {
                    Ok(()) => {
                        for sector in &mut model.borrow_mut()[sectors(at, len)] {
                            *sector = vec![value];
                        }
                    }
                    Err(errno) => {
                        assert!(may_fail && errno == Errno::ENOSPC, "write: {errno}");
                        *failures.borrow_mut() += 1;
                    }
                }
                *done.borrow_mut() += 1;
            });
        }
        while *done.borrow() < writers {
            io::sleep(Duration::from_micros(50)).await;
        }
    }

    async fn zero(&mut self, len: u64) {
        let first = self.rng.u64(0..len / SECTOR);
        let count = self.rng.u64(1..=(len / SECTOR - first).min(40));
        let (at, len) = (first * SECTOR, count * SECTOR);
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::UNMAP, self.rng.bool());
        let result = self.image.node.zero(at, len, flags).await;
        let worked = self.judge("zero", result.err());
        for sector in &mut self.model.borrow_mut()[sectors(at, len)] {
            match worked {
                true => *sector = vec![0],
                false => sector.push(0),
            }
        }
    }

    /// May or may not do something.
    async fn discard(&mut self, len: u64) {
        let first = self.rng.u64(0..len / SECTOR);
        let count = self.rng.u64(1..=(len / SECTOR - first).min(60));
        let (at, len) = (first * SECTOR, count * SECTOR);
        let result = self.image.node.discard(at, len).await;
        self.judge("discard", result.err());
        for sector in &mut self.model.borrow_mut()[sectors(at, len)] {
            sector.push(0);
        }
        self.compare("after a discard").await;
    }

    async fn snapshot(&mut self) {
        let snapshots = self.image.node.driver().image().unwrap().snapshots().unwrap();
        let list = snapshots.list().unwrap();
        match list.first() {
            Some(oldest) if list.len() > 2 || self.rng.bool() => {
                let deleted = snapshots.delete(SnapshotKey::Id(&oldest.id)).await;
                self.of("deleting a snapshot", deleted);
            }
            _ => {
                self.number = self.number % 250 + 1;
                let name = format!("s{}", self.number);
                let new = NewSnapshot { name: &name, date: Duration::ZERO, icount: None };
                let made = snapshots.create(new).await;
                self.of("making a snapshot", made);
            }
        }
    }

    async fn resize(&mut self, old: u64) {
        let new = self.rng.u64(LEN / 2 / SECTOR..MOST_LEN / SECTOR) * SECTOR;
        let snapshots = self.image.node.driver().image().unwrap().info().snapshots;
        if new < old || !self.is_new && !snapshots.is_empty() {
            return;
        }
        let result = self.image.resize(new).await;
        self.of("resize", result);
        let found = self.image.node.len();
        assert!(found == old || found == new);
        self.model.borrow_mut().resize((found / SECTOR) as usize, vec![0]);
    }

    async fn bitmap(&mut self) {
        let all = self.image.node.bitmaps().all();
        if all.len() > 2 {
            let removed = self.image.node.remove_bitmap(all[0].name()).await;
            self.of("removing a bitmap", removed);
            return;
        }
        self.number = self.number % 250 + 1;
        let name = format!("b{}", self.number);
        let new = NewBitmap { name, granularity: Some(4096), persistent: true, disabled: false };
        let added = self.image.node.add_bitmap(new).await;
        self.of("adding a bitmap", added);
    }

    /// Reads it all: what it is, is what it stays.
    async fn compare(&mut self, when: &str) {
        let len = self.image.node.len();
        let mut found = vec![0xee; len as usize];
        self.image.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        let mut model = self.model.borrow_mut();
        assert_eq!(model.len() as u64 * SECTOR, len);
        for (n, sector) in found.chunks(SECTOR as usize).enumerate() {
            let is_whole = sector.iter().all(|&byte| byte == sector[0]);
            let may = &model[n];
            assert!(
                is_whole && may.contains(&sector[0]),
                "{when}: sector {n}: {} {may:?}",
                sector[0]
            );
            model[n] = vec![sector[0]];
        }
    }
}

/// Runs a workload that is full from the `n`-th write on; how many there were.
fn run(
    kind: (&'static str, u32, &'static str),
    full: Full,
    seed: u64,
    n: u64,
    sample: bool,
) -> u64 {
    let (create, align, more) = kind;
    let bytes = image(LEN, create);
    let shape = |options: &mut SimOptions| {
        options.log = true;
        options.traits.request_align = align;
        options.traits.buffer_align = align;
    };
    let (lower, options) = passing(&bytes, MOST, shape);
    let options = format!("driver=qcow2,discard=unmap{}{more}", below("file", &options));
    let model = Rc::new(RefCell::new(vec![vec![0]; (LEN / SECTOR) as usize]));
    let what = format!("{create}, {full:?}, seed {seed}, n {n}");
    let disorder = Disorder { short: 0.0, ..Disorder::wild(seed) };
    let (faulty, kept, label) = (lower.clone(), model.clone(), what.clone());
    let state = simulated(disorder, |_| async move {
        let image = Image::open(&options).await;
        let failures = Rc::default();
        let rng = fastrand::Rng::with_seed(seed);
        let is_new = !create.contains("compat");
        let mut work =
            Work { image, model: kept, rng, number: 0, failures, may_fail: true, is_new };
        fill_up(&faulty, full, n);
        for _ in 0..24 {
            work.one().await;
            if *work.failures.borrow() > 6 {
                break;
            }
        }
        work.compare(&label).await;
        let state = faulty.bytes();
        faulty.heal();
        faulty.set_room(MOST);
        work.may_fail = false;
        // Whatever was left in doubt is settled.
        work.image.node.flush().await.unwrap();
        for _ in 0..10 {
            work.one().await;
        }
        work.compare(&label).await;
        work.image.close().await;
        state
    });
    // As a kill would have left it. In the middle of a snapshot version 2 cannot say that the references
    // are being counted.
    if !create.contains("compat") {
        judge(&what, &state, sample);
    }
    judge(&what, &lower.bytes(), sample);
    let (_again, options) = passing(&lower.bytes(), MOST, |_| ());
    let options = format!("driver=qcow2,read-only=on{}", below("file", &options));
    let wanted: Vec<u8> = model.borrow().iter().map(|sector| sector[0]).collect();
    let found = simulated(Disorder::wild(1), |_| async move {
        let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
        let mut found = vec![0xee; opened.node.len() as usize];
        opened.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        found
    });
    let found: Vec<u8> = found.chunks(SECTOR as usize).map(|sector| sector[0]).collect();
    let differs = found.iter().zip(&wanted).position(|(found, wanted)| found != wanted);
    assert!(found == wanted, "{what}: {differs:?} {} {}", found.len(), wanted.len());
    lower.log().changes().len() as u64
}

fn fill_up(disk: &SimDisk, full: Full, n: u64) {
    let fault = || Fault::new(Kinds::WRITE | Kinds::ZERO, Effect::Fail(Errno::ENOSPC)).after(n);
    match full {
        Full::Writes => disk.inject(fault()),
        Full::Holes => disk.inject(fault().on_holes()),
        Full::Length => disk.set_room(disk.bytes().len() as u64 + n * 512),
    }
}

/// Whether an image is whole, or is when it was opened for writing: one that says that it was not
/// closed cleanly is repaired then.
fn judge(what: &str, bytes: &[u8], sample: bool) {
    if bytes[79] & 1 == 1 {
        let (lower, options) = passing(bytes, MOST, |_| ());
        let options = format!("driver=qcow2{}", below("file", &options));
        simulated(Disorder::wild(1), |_| async move { Image::open(&options).await.close().await });
        let repaired = lower.bytes();
        assert_eq!(repaired[79] & 1, 0, "{what}");
        return judge(what, &repaired, sample);
    }
    consistency::check(bytes, true).unwrap_or_else(|error| panic!("{what}: {error}"));
    if sample {
        check(bytes, false).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

fn countdown(full: Full) {
    let seed = seed();
    for (number, kind) in KINDS.iter().enumerate() {
        let seed = seed.wrapping_add(number as u64);
        println!("{}, seed {seed}", kind.0);
        let most = run(*kind, full, seed, u64::MAX >> 20, true);
        // Of one kind in turn every other, of the others some: with other seeds, others.
        let step = if seed.is_multiple_of(KINDS.len() as u64) { 2 } else { 13 };
        for n in (seed % step..most).step_by(step as usize) {
            run(*kind, full, seed, n, n % 40 == 0);
        }
    }
}

#[test]
fn storage_that_nothing_can_be_written_to_any_more_costs_requests_and_nothing_else() {
    countdown(Full::Writes);
}

#[test]
fn a_thin_volume_without_room_costs_requests_and_nothing_else() {
    countdown(Full::Holes);
}

#[test]
fn a_file_that_cannot_grow_costs_requests_and_nothing_else() {
    countdown(Full::Length);
}
