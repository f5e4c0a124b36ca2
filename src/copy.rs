//! The copy engine: copies the contents of one or more disks to another disk.
//!
//! Many pieces are copied at a time, on several workers.
//!
//! The rules held here: what reads as zeroes is not read, and what is zero where the target has zeroes is not
//! written; memory, and what is in flight, is at most a chunk for each copier, or two where contents are compared; a
//! failure ends all, and if several pieces in flight fail, the failure at the lowest offset is reported; between two
//! pieces a copy can be paused, slowed down and ended ([`control`]).
//!
//! `plan` deals the pieces out, `write_order` keeps writes in order where that is asked for, `rebase` compares before
//! it writes. What is to be compressed goes in whole units of the target, packed by each copier before it may write.

pub mod control;
mod disk;
mod plan;
mod rebase;
mod write_order;
pub mod zeroes;

pub use control::Control;
pub use disk::{Disk, Guard};
pub use plan::STEP;

use crate::block::{Node, Packed, WriteFlags, ZeroFlags};
use crate::io::sync::{Mutex, Waiters};
use crate::io::{AlignedBuf, Errno, IoVec, Worker, current};
use control::{Cancelled, Member};
use plan::{Kind, Piece, Plan};
use std::fmt;
use std::sync::Arc;
use write_order::WriteOrder;
use zeroes::{is_zero, zero_prefix};

/// The most that one copier reads at once, in bytes, from the storage itself.
const CHUNK: u64 = 2 << 20;
/// The same through the host's page cache: the processor moves it there and back, and its own caches
/// should still hold it when it is written.
const CACHED_CHUNK: u64 = 512 << 10;
/// What runs of zeroes are at least rounded to, in bytes, so that a target's writes are whole pages.
const PAGE: u64 = 4096;

/// What is to be copied, and how.
pub struct Copy {
    /// Not empty.
    pub sources: Vec<Source>,
    pub target: Disk,
    /// Pieces in flight at the same time. Not 0.
    pub parallel: usize,
    /// Writes reach the target in the order of their offsets.
    pub in_order: bool,
    /// The target stores it compressed: it must be able to ([`crate::block::Compress`]).
    pub compress: bool,
    /// Runs of at least this many zero bytes are not written as data; none to write everything.
    pub sparse: Option<u64>,
    /// Data is passed on as it is, without a search for zeroes.
    pub keeps_data: bool,
    /// From this byte on the target is known to read as zeroes; `u64::MAX` if nothing is known.
    pub zero_from: u64,
    pub part: Part,
    /// What cannot be read becomes zeroes.
    pub salvage: bool,
}

/// What is copied of the sources.
pub enum Part {
    Whole,
    /// All but what comes from this image in the only source's chain, or from below it: the target supplies that.
    Above(Arc<Node>),
    /// The only source is the image that the target's writes go to, and that is about to get another backing file, or
    /// none. What it shows of its old backing file and would not show of the new one is copied.
    Rebased(Option<Disk>),
}

/// What is copied of a disk.
pub struct Source {
    pub disk: Disk,
    /// Bytes.
    pub from: u64,
    pub len: u64,
}

impl Source {
    /// All of a disk.
    pub fn whole(disk: Disk) -> Source {
        Source { len: disk.len(), from: 0, disk }
    }
}

/// The hooks by which a copy reports progress and is controlled.
pub struct Hooks {
    pub control: Arc<Control>,
    pub progress: Progress,
    pub salvaged: Salvaged,
}

impl Copy {
    /// The most that one copier reads at once, in bytes.
    fn chunk(&self) -> u64 {
        if self.is_rebase() {
            return plan::STEP;
        }
        let sources = self.sources.iter().map(|source| &source.disk);
        let mut disks = sources.chain([&self.target]);
        let direct = disks.any(|disk| disk.node().options().direct);
        let chunk = if direct { CHUNK } else { CACHED_CHUNK };
        chunk.max(self.unit().unwrap_or(0))
    }

    /// The memory that one copier needs, in bytes.
    fn memory(&self) -> u64 {
        if self.is_rebase() { 2 * self.chunk() } else { self.chunk() }
    }

    fn is_rebase(&self) -> bool {
        matches!(self.part, Part::Rebased(_))
    }

    /// The image whose contents are left out.
    fn base(&self) -> Option<&Arc<Node>> {
        match &self.part {
            Part::Above(base) => Some(base),
            _ => None,
        }
    }

    /// What is compressed as one, in bytes: a power of two, no longer than a chunk.
    fn unit(&self) -> Option<u64> {
        let node = self.target.node();
        let is_packed = self.compress || node.stores_only_compressed();
        node.compression_unit().filter(|_| is_packed)
    }

    /// The unit that all pieces are made of, if there is one: a rebase finds units inside its pieces.
    fn planned_unit(&self) -> Option<u64> {
        self.unit().filter(|_| !self.is_rebase())
    }

    /// Of all sources together, in bytes.
    fn len(&self) -> u64 {
        self.sources.iter().map(|source| source.len).sum()
    }

    /// The source that has the byte at `at` of the target, the byte's offset in it, and how many
    /// bytes there are from there on.
    fn source_at(&self, at: u64) -> Option<(&Disk, u64, u64)> {
        let mut from = at;
        for source in &self.sources {
            if from < source.len {
                return Some((&source.disk, source.from + from, source.len - from));
            }
            from -= source.len;
        }
        None
    }
}

/// Why a copy has ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Where in the target, in bytes.
    Read(u64, Errno),
    /// Reading the target's future backing file.
    ReadNew(u64, Errno),
    Write(u64, Errno),
    /// Of the source's mapping.
    Status(u64, Errno),
    Memory,
    /// It was cancelled.
    Cancelled,
}

impl From<Cancelled> for Trouble {
    fn from(_: Cancelled) -> Trouble {
        Trouble::Cancelled
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Read(at, errno) => write!(f, "error while reading at byte {at}: {errno}"),
            Trouble::ReadNew(at, errno) => {
                write!(f, "error while reading the new backing file at byte {at}: {errno}")
            }
            Trouble::Write(at, errno) => write!(f, "error while writing at byte {at}: {errno}"),
            Trouble::Status(at, errno) => {
                write!(f, "error while reading block status at offset {at}: {errno}")
            }
            Trouble::Memory => write!(f, "Out of memory"),
            Trouble::Cancelled => write!(f, "Operation canceled"),
        }
    }
}

impl Trouble {
    /// Where in the target, in bytes; behind everything if it is not about a place.
    fn at(&self) -> u64 {
        match self {
            Trouble::Read(at, _)
            | Trouble::ReadNew(at, _)
            | Trouble::Write(at, _)
            | Trouble::Status(at, _) => *at,
            Trouble::Memory | Trouble::Cancelled => u64::MAX,
        }
    }
}

/// Called with the number of bytes that have been done since the last call, and the total.
pub type Progress = Box<dyn Fn(u64, u64) + Send + Sync>;

/// Called for data that could not be read and became zeroes, with its offset in the target.
pub type Salvaged = Box<dyn Fn(u64, Errno) + Send + Sync>;

/// The state that all copiers share.
struct Shared {
    copy: Copy,
    plan: Plan,
    write_order: WriteOrder,
    hooks: Hooks,
    trouble: Mutex<Option<Trouble>>,
}

/// The copiers that have not ended.
struct Copiers {
    running: Mutex<usize>,
    ended: Mutex<Waiters>,
}

/// Copies. Runs on a worker; `helpers` are others that copiers are dealt to.
pub async fn copy(copy: Copy, helpers: &[Worker], hooks: Hooks) -> Result<(), Trouble> {
    let planner = hooks.control.join();
    let plan = Plan::new(&copy, &planner).await?;
    let count = copy.parallel;
    let (write_order, trouble) = (WriteOrder::default(), Mutex::default());
    let shared = Arc::new(Shared { plan, copy, write_order, hooks, trouble });
    let copiers = Arc::new(Copiers { running: Mutex::new(count), ended: Mutex::default() });
    for run_copier in 0..count {
        let (clone, copiers) = (shared.clone(), copiers.clone());
        let member = shared.hooks.control.join();
        // This worker is the first of them.
        match (run_copier % (helpers.len() + 1)).checked_sub(1) {
            None => current().spawn(clone.run_copier(member, copiers)),
            Some(helper) => {
                helpers[helper].send(|local| local.io().spawn(clone.run_copier(member, copiers)));
            }
        }
    }
    drop(planner);
    copiers.ended.wait_until(|| *copiers.running.lock() == 0).await;
    match shared.trouble.lock().take() {
        Some(trouble) => Err(trouble),
        None => Ok(()),
    }
}

impl Shared {
    /// Moves pieces until there are none left, or something fails. The disks are released before it counts as ended.
    async fn run_copier(self: Arc<Shared>, member: Member, copiers: Arc<Copiers>) {
        let mut buffer = None;
        while self.trouble.lock().is_none() {
            match self.next(&member).await {
                Ok(None) => break,
                Ok(Some(piece)) => {
                    let moved = self.move_piece(&piece, &mut buffer).await;
                    self.write_order.done(piece.ticket);
                    if let Err(trouble) = moved {
                        self.fail(trouble);
                    }
                }
                Err(trouble) => {
                    self.fail(trouble);
                    break;
                }
            }
        }
        drop((self, member));
        *copiers.running.lock() -= 1;
        copiers.ended.wake_all();
    }

    /// The next piece, when it may begin.
    async fn next(&self, member: &Member) -> Result<Option<Piece>, Trouble> {
        let most = self.copy.chunk();
        member.gate(most).await?;
        let piece = self.plan.next(&self.copy).await?;
        // Zeroes need no reading.
        let moved = piece.filter(|piece| piece.kind != Kind::Zeroes).map_or(0, |piece| piece.len);
        member.give_back(most.saturating_sub(moved));
        Ok(piece)
    }

    /// Ends the copy. All pieces below this one have been dealt out, and are tried to their end.
    fn fail(&self, trouble: Trouble) {
        let mut first = self.trouble.lock();
        if first.as_ref().is_none_or(|first| trouble.at() < first.at()) {
            *first = Some(trouble);
        }
    }

    async fn move_piece(
        &self,
        piece: &Piece,
        buffer: &mut Option<AlignedBuf>,
    ) -> Result<(), Trouble> {
        if piece.kind == Kind::Zeroes {
            self.await_order(piece).await;
            return self.zero(piece.at, piece.len).await;
        }
        let buffer = match buffer {
            Some(buffer) => buffer,
            None => buffer
                .insert(AlignedBuf::new(self.copy.memory() as usize, 4096).ok_or(Trouble::Memory)?),
        };
        match piece.kind {
            Kind::Compared => self.compare(piece, buffer).await?,
            _ => self.move_data(piece, buffer).await?,
        }
        self.report(piece);
        Ok(())
    }

    async fn move_data(&self, piece: &Piece, buffer: &mut AlignedBuf) -> Result<(), Trouble> {
        match piece.kind {
            Kind::WrittenZeroes => buffer[..piece.len as usize].fill(0),
            _ => self.read(piece.at, &buffer.io_vec().slice(0, piece.len)).await?,
        }
        match self.copy.unit() {
            Some(unit) => self.write_packed(piece, buffer, unit).await,
            None => {
                self.await_order(piece).await;
                self.write(piece, buffer).await
            }
        }
    }

    /// Tells how much is done with a piece.
    fn report(&self, piece: &Piece) {
        let step = self.copy.planned_unit().unwrap_or(plan::STEP);
        let mut left = piece.reported;
        while left > 0 {
            (self.hooks.progress)(left.min(step), self.plan.total());
            left -= left.min(step);
        }
    }

    async fn await_order(&self, piece: &Piece) {
        if self.copy.in_order {
            self.write_order.wait(piece.ticket).await;
        }
    }

    /// Reads what goes to `at` of the target.
    async fn read(&self, to: u64, into: &IoVec<'_>) -> Result<(), Trouble> {
        let mut done = 0;
        while done < into.len() {
            let at = to + done;
            let (source, from, there) =
                self.copy.source_at(at).ok_or(Trouble::Read(at, Errno::EIO))?;
            let part = into.slice(done, (into.len() - done).min(there));
            match source.read(from, &part).await {
                Ok(()) => {}
                Err(_) if self.copy.salvage => self.salvage(at, source, from, &part).await,
                Err(errno) => return Err(Trouble::Read(at, errno)),
            }
            done += part.len();
        }
        Ok(())
    }

    /// Reads sector by sector; those that cannot be read become zeroes.
    async fn salvage(&self, to: u64, source: &Disk, from: u64, into: &IoVec<'_>) {
        let mut at = 0;
        while at < into.len() {
            let sector = into.slice(at, (into.len() - at).min(512));
            if let Err(errno) = source.read(from + at, &sector).await {
                (self.hooks.salvaged)(to + at, errno);
                sector.zero();
            }
            at += sector.len();
        }
    }

    /// Packs all units that are not zero, waits for earlier writes, and stores them.
    async fn write_packed(
        &self,
        piece: &Piece,
        buffer: &AlignedBuf,
        unit: u64,
    ) -> Result<(), Trouble> {
        let target = self.copy.target.node();
        let units: Vec<&[u8]> = buffer[..piece.len as usize].chunks(unit as usize).collect();
        let is_left_out = |unit: &[u8]| self.copy.sparse.is_some() && is_zero(unit);
        let mut parts: Vec<(u64, u64, Option<Vec<Packed>>)> = Vec::new();
        let mut at = 0u64;
        // A unit that is cut short goes by itself: it may be refused.
        for alike in units.chunk_by(|a, b| a.len() == b.len() && is_left_out(a) == is_left_out(b)) {
            let len = alike.iter().map(|unit| unit.len() as u64).sum();
            let to = piece.at + at;
            let packed = match is_left_out(alike[0]) {
                true => None,
                false => {
                    let packed = target.pack(to, &buffer.source().slice(at, len)).await;
                    Some(packed.map_err(|errno| Trouble::Write(to, errno))?)
                }
            };
            parts.push((to, len, packed));
            at += len;
        }
        self.await_order(piece).await;
        for (to, len, packed) in parts {
            let Some(packed) = packed else {
                self.zero(to, len).await?;
                continue;
            };
            let plain = buffer.source().slice(to - piece.at, len);
            let stored = self.copy.target.store_packed(&packed, &plain).await;
            stored.map_err(|errno| Trouble::Write(to, errno))?;
        }
        Ok(())
    }

    /// Writes data, without its longer runs of zeroes where that is wanted.
    async fn write(&self, piece: &Piece, buffer: &AlignedBuf) -> Result<(), Trouble> {
        let from = buffer.source().slice(0, piece.len);
        let sparse = match self.copy.sparse {
            Some(sparse) if !self.copy.keeps_data => sparse,
            _ => return self.write_data(piece.at, &from).await,
        };
        let mut done = 0;
        while done < piece.len {
            let at = piece.at + done;
            let rest = &buffer[done as usize..piece.len as usize];
            let (zero, len) = next_run(rest, at, sparse);
            let len = len as u64;
            match zero {
                true => self.zero(at, len).await?,
                false => self.write_data(at, &from.slice(done, len)).await?,
            }
            done += len;
        }
        Ok(())
    }

    async fn write_data(&self, to: u64, from: &IoVec<'_>) -> Result<(), Trouble> {
        let written = self.copy.target.write(to, from, WriteFlags::empty()).await;
        written.map_err(|errno| Trouble::Write(to, errno))
    }

    async fn zero(&self, to: u64, len: u64) -> Result<(), Trouble> {
        let len = len.min(self.copy.zero_from.saturating_sub(to));
        if len == 0 {
            return Ok(());
        }
        let zeroed = self.copy.target.zero(to, len, ZeroFlags::UNMAP).await;
        zeroed.map_err(|errno| Trouble::Write(to, errno))
    }
}

/// The run at the beginning of `bytes`, which go to offset `at`: whether it is of zeroes, at least
/// `sparse` of them and in whole units of that length, and how long it is.
fn next_run(bytes: &[u8], at: u64, sparse: u64) -> (bool, usize) {
    let least = sparse.max(1) as usize;
    let unit = PAGE.max(sparse);
    let mut len = 0;
    while len < bytes.len() {
        let (zero, run) = zero_prefix(&bytes[len..]);
        let end = len + run;
        if !zero {
            len = end;
            continue;
        }
        // Whole units of it; what is left over goes with its neighbours.
        let up = |offset: u64| (offset.next_multiple_of(unit) - at) as usize;
        let from = if len == 0 { 0 } else { up(at + len as u64).min(end) };
        let to = match end == bytes.len() {
            true => end,
            false => (((at + end as u64) / unit * unit).saturating_sub(at) as usize).max(from),
        };
        if to > from && (run >= least || to == bytes.len() && from == 0) {
            return if from == 0 { (true, to) } else { (false, from) };
        }
        len = end;
    }
    (false, bytes.len())
}

#[cfg(test)]
mod tests;
