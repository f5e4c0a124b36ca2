//! A simulated disk for tests: memory with any traits, seeded faults, and a log of writes.
//!
//! Every state that a crash may leave can be made from the log.
//!
//! The rule it guards: it is as strict as the contract in [`crate::block::driver`] allows it to be. A
//! request that the contract forbids is a panic, and what a request may leave undefined is garbage.
//! On a simulated ring ([`crate::io::sim`]) it goes through the ring, so that its operations are
//! reordered; on a real one it answers at once.

mod driver;
mod fault;
mod log;
mod renew;

pub use fault::{Effect, Fault, Kinds};
pub use log::{Change, Crash, Tries, WriteLog};

use crate::block::{
    Abilities, Access, Driver, DriverEntry, Error, Extent, Fence, Growth, Image, Kind, Leaf,
    LocalFuture, Mapping, OptionHelp, Perms, Place, Preallocation, Precision, SECTOR, Status,
    Target, Traits, WriteFlags, ZeroFlags,
};
use crate::io::sim::{Executed, SimFd, SimFile, SimOp, register};
use crate::io::sync::Mutex;
use crate::io::{self, Durable, Errno, InFlight, IoResult, IoVec, Op, Started};
use driver::{DISCARD, Sim, ZERO_UNMAP};
use fault::Faults;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// What a discarded range holds that does not read as zeroes.
const GARBAGE: u8 = 0xdb;

/// The driver `sim`, for the registries of tests: opens a disk that was [`SimDisk::publish`]ed.
pub static ENTRY: DriverEntry = DriverEntry {
    growth: Growth::Own(&[Preallocation::Off]),
    options: &[OptionHelp { name: "disk", value: "str", help: "a published disk" }],
    ..DriverEntry::new("sim", Kind::Protocol, |opening, options| {
        let disk = opening.parse(options).and_then(|NameOnly { disk }| {
            let found = PUBLISHED.lock().get(&disk).cloned();
            found.ok_or_else(|| Error::new(format!("no simulated disk is called '{disk}'")))
        });
        Box::pin(std::future::ready(disk.map(|disk| disk.driver())))
    })
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NameOnly {
    disk: String,
}

static PUBLISHED: Mutex<BTreeMap<String, SimDisk>> = Mutex::new(BTreeMap::new());

/// What a disk is like.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Bytes.
    pub len: u64,
    /// The most that it can be resized to, in bytes, at least `len`: unless there is less room
    /// ([`SimDisk::set_room`]).
    pub max_len: u64,
    /// It has the length it has, as a device.
    pub fixed: bool,
    pub traits: Traits,
    /// Whether it has a fast path.
    pub fast: bool,
    /// Whether it answers at once on a simulated ring, too: nothing is reordered.
    pub at_once: bool,
    /// Whether it keeps a write log.
    pub log: bool,
    /// Of the faults that strike by chance.
    pub seed: u64,
}

impl SimOptions {
    /// A disk that can do everything, without a log.
    pub fn new(len: u64) -> SimOptions {
        let abilities = Abilities::ZERO
            | Abilities::ZERO_UNMAP
            | Abilities::DISCARD
            | Abilities::DISCARD_ZEROES
            | Abilities::FUA
            | Abilities::GROW;
        let traits = Traits { abilities, ..Traits::default() };
        SimOptions {
            len,
            max_len: len,
            fixed: false,
            traits,
            fast: true,
            at_once: false,
            log: false,
            seed: 0,
        }
    }

    /// What the room for bytes is a multiple of.
    fn unit(&self) -> u64 {
        SECTOR.max(self.traits.request_align as u64)
    }
}

/// A test's handle on a disk; the disk is as long-lived as its handles and drivers.
#[derive(Clone)]
pub struct SimDisk(Arc<Disk>);

struct Disk {
    options: SimOptions,
    len: AtomicU64,
    room: AtomicU64,
    /// What each sector is, for the fast path.
    sectors: Box<[AtomicU8]>,
    state: Mutex<State>,
    /// Some fault makes operations wait.
    waits: AtomicBool,
    /// How often the hanging operations were released.
    releases: AtomicU64,
}

struct State {
    bytes: Vec<u8>,
    faults: Faults,
    rng: fastrand::Rng,
    log: WriteLog,
    origin: renew::Origin,
}

/// What a sector is.
mod sector {
    pub const HOLE: u8 = 0;
    pub const DATA: u8 = 1;
    pub const ZERO: u8 = 2;

    /// What one is that holds these bytes.
    pub fn holding(bytes: &[u8]) -> u8 {
        // Whole sectors are compared at once: byte by byte would be most of a fuzzer's time.
        const ZEROES: [u8; super::SECTOR as usize] = [0; super::SECTOR as usize];
        if *bytes == ZEROES[..bytes.len()] { HOLE } else { DATA }
    }
}

impl SimDisk {
    /// A disk of zeroes.
    pub fn new(options: SimOptions) -> SimDisk {
        Self::holding(options, &[])
    }

    /// A disk that begins with `bytes`.
    pub fn holding(options: SimOptions, bytes: &[u8]) -> SimDisk {
        let unit = options.unit();
        let capacity = options.len.max(options.max_len).next_multiple_of(unit) as usize;
        let mut image = vec![0; capacity];
        image[..bytes.len()].copy_from_slice(bytes);
        let sectors =
            image.chunks(SECTOR as usize).map(|bytes| AtomicU8::new(sector::holding(bytes)));
        let base = if options.log { image.clone() } else { Vec::new() };
        SimDisk(Arc::new(Disk {
            len: AtomicU64::new(options.len),
            room: AtomicU64::new(options.max_len),
            sectors: sectors.collect(),
            state: Mutex::new(State {
                bytes: image,
                faults: Faults::default(),
                rng: fastrand::Rng::with_seed(options.seed),
                log: WriteLog::new(base),
                origin: Default::default(),
            }),
            waits: AtomicBool::new(false),
            releases: AtomicU64::new(0),
            options,
        }))
    }

    /// A driver on this disk. Two on one disk are two openings of it.
    pub fn driver(&self) -> Box<dyn Driver> {
        let file: Arc<dyn SimFile> = self.0.clone();
        Box::new(Sim {
            disk: self.0.clone(),
            fd: register(Arc::downgrade(&file)),
            flush_failed: AtomicBool::new(false),
        })
    }

    /// Gives the disk a name by which [`ENTRY`] opens it.
    pub fn publish(&self, name: &str) {
        PUBLISHED.lock().insert(name.to_owned(), self.clone());
    }

    /// Forgets the disk of a name; nodes that have it open keep it.
    pub fn withdraw(name: &str) {
        PUBLISHED.lock().remove(name);
    }

    /// Adds a rule, behind those that there are.
    pub fn inject(&self, fault: Fault) {
        self.0.waits.fetch_or(fault.waits(), Ordering::SeqCst);
        self.0.state.lock().faults.add(fault);
    }

    /// How long it can become from now on, in bytes: at most [`SimOptions::max_len`].
    pub fn set_room(&self, len: u64) {
        self.0.room.store(len.min(self.0.options.max_len), Ordering::SeqCst);
    }

    /// Forgets all faults, and releases what hangs.
    pub fn heal(&self) {
        self.0.state.lock().faults.clear();
        self.0.waits.store(false, Ordering::SeqCst);
        self.release();
    }

    /// Resumes what hangs now.
    pub fn release(&self) {
        self.0.releases.fetch_add(1, Ordering::SeqCst);
    }

    /// All bytes as they are now.
    pub fn bytes(&self) -> Vec<u8> {
        let len = self.0.len.load(Ordering::SeqCst) as usize;
        self.0.state.lock().bytes[..len].to_vec()
    }

    /// What was written, so far.
    pub fn log(&self) -> WriteLog {
        self.0.state.lock().log.clone()
    }
}

/// What becomes of an operation, faults considered.
enum Verdict {
    Go,
    Wait(Executed),
    /// Only the first bytes, this many; then perhaps an error.
    Partly(u64, Option<Errno>),
}

/// A ticket of an operation that no fault strikes any more; greater ones are of hanging operations.
const PASSED: u64 = 1;

impl Disk {
    fn verdict(
        &self,
        state: &mut State,
        kind: Kinds,
        range: Range<u64>,
        ticket: &mut u64,
    ) -> Verdict {
        if *ticket > PASSED {
            if self.releases.load(Ordering::SeqCst) < *ticket - PASSED {
                return Verdict::Wait(Executed::Hung);
            }
            *ticket = PASSED;
        }
        if *ticket == PASSED {
            return Verdict::Go;
        }
        *ticket = PASSED;
        let len = range.end - range.start;
        let State { faults, rng, .. } = state;
        let is_hole = || self.has_hole(&range);
        let strikes = faults.strike(rng, kind, range.clone(), is_hole);
        let Some(effect) = strikes else { return Verdict::Go };
        let part = rng.u64(0..=len / self.block()) * self.block();
        match effect {
            Effect::Fail(errno) => Verdict::Partly(0, Some(errno)),
            Effect::Tear(errno) => Verdict::Partly(part, Some(errno)),
            Effect::Shorten => Verdict::Partly(part.clamp(self.block().min(len), len), None),
            Effect::Delay(time) => Verdict::Wait(Executed::After(time)),
            Effect::Hang => {
                *ticket = PASSED + 1 + self.releases.load(Ordering::SeqCst);
                Verdict::Wait(Executed::Hung)
            }
        }
    }

    fn room(&self) -> u64 {
        self.room.load(Ordering::SeqCst)
    }

    fn has_hole(&self, range: &Range<u64>) -> bool {
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        let mut sectors = sectors.map(|n| self.sectors[n as usize].load(Ordering::SeqCst));
        sectors.any(|what| what == sector::HOLE)
    }

    /// Marks the sectors that lie wholly in the range (`partly`: or that it touches).
    fn mark(&self, range: &Range<u64>, what: u8, partly: bool) {
        let (first, last) = if partly {
            (range.start / SECTOR, range.end.div_ceil(SECTOR))
        } else {
            (range.start.div_ceil(SECTOR), range.end / SECTOR)
        };
        for n in first..last {
            self.sectors[n as usize].store(what, Ordering::SeqCst);
        }
    }

    fn zero(&self, state: &mut State, range: Range<u64>, unmap: bool) {
        state.origin.note(&range);
        state.bytes[range.start as usize..range.end as usize].fill(0);
        self.mark(&range, if unmap { sector::HOLE } else { sector::ZERO }, false);
        self.log(state, || Change::Zero {
            offset: range.start,
            len: range.end - range.start,
            unmap,
        });
    }

    fn discard(&self, state: &mut State, range: Range<u64>) {
        let zeroes = self.options.traits.abilities.contains(Abilities::DISCARD_ZEROES);
        state.origin.note(&range);
        let bytes = &mut state.bytes[range.start as usize..range.end as usize];
        bytes.fill(if zeroes { 0 } else { GARBAGE });
        match zeroes {
            true => self.mark(&range, sector::HOLE, false),
            false => self.mark(&range, sector::DATA, true),
        }
        self.log(state, || Change::Discard { offset: range.start, len: range.end - range.start });
    }

    fn log(&self, state: &mut State, change: impl FnOnce() -> Change) {
        if self.options.log {
            state.log.push(change());
        }
    }

    /// A write, in part beyond the end, brings the end up to the sector that users saw already.
    fn extend(&self, end: u64) {
        let len = self.len.load(Ordering::SeqCst);
        let end = end.min(len.next_multiple_of(SECTOR));
        self.len.fetch_max(end, Ordering::SeqCst);
    }

    /// What the sectors from `at` on are, and how far that goes, at most `want`.
    fn run(&self, at: u64, want: u64) -> (u8, u64) {
        let what = |n: u64| self.sectors[n as usize].load(Ordering::SeqCst);
        let first = what(at / SECTOR);
        let mut end = (at / SECTOR + 1) * SECTOR;
        while end < at + want && what(end / SECTOR) == first {
            end += SECTOR;
        }
        (first, want.min(end - at))
    }
}

impl SimFile for Disk {
    fn execute(&self, op: &SimOp<'_>, ticket: &mut u64) -> Executed {
        let (kind, start, len) = match op {
            SimOp::Read { offset, into } => (Kinds::READ, *offset, into.len()),
            SimOp::Write { offset, from, .. } => (Kinds::WRITE, *offset, from.len()),
            SimOp::Sync => (Kinds::FLUSH, 0, 0),
            SimOp::Allocate { mode, offset, len } => match *mode {
                DISCARD => (Kinds::DISCARD, *offset, *len),
                _ => (Kinds::ZERO, *offset, *len),
            },
        };
        let state = &mut *self.state.lock();
        let (len, error) = match self.verdict(state, kind, start..start + len, ticket) {
            Verdict::Go => (len, None),
            Verdict::Partly(part, error) => (part, error),
            Verdict::Wait(executed) => return executed,
        };
        let range = start..start + len;
        let place = range.start as usize..range.end as usize;
        match op {
            SimOp::Read { into, .. } => into.slice(0, len).copy_from(&state.bytes[place]),
            SimOp::Write { from, durable, .. } if len > 0 => {
                state.origin.note(&range);
                from.slice(0, len).copy_to(&mut state.bytes[place.clone()]);
                self.mark(&range, sector::DATA, true);
                self.extend(range.end);
                let durable = *durable == Durable::Yes && error.is_none();
                if self.options.log {
                    let data = state.bytes[place].to_vec();
                    self.log(state, || Change::Write { offset: start, data, durable });
                }
            }
            SimOp::Allocate { mode: DISCARD, .. } if len > 0 => self.discard(state, range),
            SimOp::Allocate { mode, .. } if len > 0 => {
                self.extend(range.end);
                self.zero(state, range, *mode == ZERO_UNMAP);
            }
            _ => {}
        }
        Executed::Now(error.map_or(Ok(len), Err))
    }

    fn block(&self) -> u64 {
        self.options.traits.request_align.max(self.options.traits.buffer_align) as u64
    }
}
