//! The address space of a device: our own memory, and memory of guests, which comes and goes.
//!
//! Memory of others (a guest's) is pinned in the background, piece by piece. What is not mapped yet is not found by
//! [`Table::find`], and goes through bounce buffers. It is found from the moment it is mapped until just before it is
//! unmapped; the owner first ensures that no request in flight names it.

#![forbid(unsafe_code)]

use crate::dma::{HostRange, Pages};
use crate::iova::Iova;
use crate::{Error, PciFunction};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Memory of others is mapped in pieces of this many bytes: few enough for the kernel's limit on the
/// number of mappings (`dma_entry_limit`, 65535), small enough for one to be given up in a moment.
pub const PIECE: usize = 64 << 20;
/// The alignment of what is mapped: huge pages of the host stay huge in the IOMMU.
const HUGE: u64 = 2 << 20;
const PAGE: u64 = 4096;

/// The addresses of one device.
pub struct Space {
    function: Arc<dyn PciFunction>,
    iova: Mutex<Iova>,
    foreign: Mutex<Foreign>,
    /// Something is to be pinned, or a registration has ended.
    changed: Condvar,
    /// Counts the tables, so that the holder of one can tell whether it is still the latest.
    generation: AtomicU64,
    /// Everything was unmapped because the device is gone.
    cut: AtomicBool,
}

#[derive(Default)]
struct Foreign {
    table: Arc<Table>,
    pieces: Vec<Piece>,
    wanted: VecDeque<Piece>,
    /// The registration that the pinning thread has a piece of in hand.
    in_hand: Option<u64>,
    pinning: bool,
    next: u64,
    /// Everything that is mapped, our own memory too: address and length.
    mapped: Vec<(u64, usize)>,
}

#[derive(Clone, Copy)]
struct Piece {
    registration: u64,
    memory: HostRange,
    iova: u64,
}

/// Where the device sees the memory of others.
#[derive(Debug, Default)]
pub struct Table {
    /// Ordered by address; no two overlap.
    spans: Vec<Span>,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: usize,
    end: usize,
    iova: u64,
}

impl Table {
    /// The device's address of `len` bytes at `address`, if it reaches all of them, one after the
    /// other.
    #[inline]
    pub fn find(&self, address: usize, len: usize) -> Option<u64> {
        let after = match self.spans.len() {
            0..=8 => self.spans.iter().take_while(|span| span.start <= address).count(),
            _ => self.spans.partition_point(|span| span.start <= address),
        };
        let span = self.spans[..after].last()?;
        let inside = address.checked_add(len)? <= span.end;
        inside.then(|| span.iova + (address - span.start) as u64)
    }

    fn of(pieces: &[Piece]) -> Table {
        let mut pieces = pieces.to_vec();
        pieces.sort_by_key(|piece| piece.memory.address());
        let mut spans: Vec<Span> = Vec::new();
        for Piece { memory, iova, .. } in pieces {
            let (start, end) = (memory.address(), memory.address() + memory.len());
            match spans.last_mut() {
                Some(last)
                    if last.end == start && last.iova + (last.end - last.start) as u64 == iova =>
                {
                    last.end = end;
                }
                _ => spans.push(Span { start, end, iova }),
            }
        }
        Table { spans }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Space {
    pub fn new(function: Arc<dyn PciFunction>) -> Result<Arc<Space>, Error> {
        let ranges = function.iova_ranges()?;
        Ok(Arc::new(Space {
            function,
            iova: Mutex::new(Iova::new(&ranges)),
            foreign: Mutex::default(),
            changed: Condvar::new(),
            generation: AtomicU64::new(0),
            cut: AtomicBool::new(false),
        }))
    }

    /// The number of the latest [`Space::table`].
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The latest table and its number.
    pub fn table(&self) -> (u64, Arc<Table>) {
        let foreign = lock(&self.foreign);
        (self.generation(), foreign.table.clone())
    }

    /// Whether the device reaches nothing any more.
    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    fn take(&self, len: usize) -> Result<u64, Error> {
        let align = if len as u64 >= HUGE { HUGE } else { PAGE };
        lock(&self.iova).take(len as u64, align).ok_or_else(|| {
            Error::new(format!("the IOMMU has no {len} bytes of addresses left"))
                .with_errno(libc::ENOSPC)
        })
    }

    fn give_back(&self, iova: u64, len: usize) {
        lock(&self.iova).give_back(iova..iova + len as u64);
    }

    /// Maps, unless the device is gone.
    fn map(&self, iova: u64, memory: HostRange) -> Result<(), Error> {
        self.function.map(iova, memory)?;
        lock(&self.foreign).mapped.push((iova, memory.len()));
        if self.is_cut() {
            self.unmap(iova, memory.len())?;
            return Err(Error::new("the device is gone").with_errno(libc::ENODEV));
        }
        Ok(())
    }

    fn unmap(&self, iova: u64, len: usize) -> Result<(), Error> {
        let mut foreign = lock(&self.foreign);
        let Some(at) = foreign.mapped.iter().position(|&mapped| mapped == (iova, len)) else {
            return Ok(());
        };
        foreign.mapped.swap_remove(at);
        drop(foreign);
        self.function.unmap(iova, len)
    }

    /// Memory of our own that the device reaches. `len` is in bytes, `page` the device's page size.
    pub fn memory(self: &Arc<Space>, len: usize, page: usize) -> Result<Memory, Error> {
        let pages = Pages::new(len, page.max(PAGE as usize))?;
        let len = pages.range().len();
        let iova = lock(&self.iova).take(len as u64, page.max(PAGE as usize) as u64);
        let iova = iova.ok_or_else(|| Error::new("the IOMMU has no addresses left"))?;
        if let Err(error) = self.map(iova, pages.range()) {
            self.give_back(iova, len);
            return Err(error);
        }
        Ok(Memory { space: self.clone(), iova, host: pages.range(), pages: Some(pages) })
    }

    /// Lets the device reach memory of others, as it gets pinned in the background. What cannot be is
    /// told in the log, and left to bounce buffers.
    ///
    /// Address and length are rounded inwards to whole pages.
    pub fn register(self: &Arc<Space>, memory: HostRange) -> Result<Registration, Error> {
        let skip = memory.address().wrapping_neg() % PAGE as usize;
        let len = memory.len().saturating_sub(skip) & !(PAGE as usize - 1);
        let mut registration =
            Registration { space: self.clone(), number: 0, iova: 0, len, is_safe: true };
        let Some(whole) = memory.part(skip, len).filter(|_| len > 0) else {
            registration.len = 0;
            return Ok(registration);
        };
        registration.iova = self.take(len)?;
        let mut foreign = lock(&self.foreign);
        foreign.next += 1;
        registration.number = foreign.next;
        let mut at = 0;
        while let Some(memory) = whole.part(at, PIECE.min(len - at)).filter(|p| !p.is_empty()) {
            let piece =
                Piece { registration: foreign.next, memory, iova: registration.iova + at as u64 };
            foreign.wanted.push_back(piece);
            at += memory.len();
        }
        if !std::mem::replace(&mut foreign.pinning, true) {
            let space = self.clone();
            let thread = std::thread::Builder::new().name("nvme-pin".into());
            if let Err(error) = thread.spawn(move || space.pin()) {
                foreign.pinning = false;
                foreign.wanted.retain(|piece| piece.registration != registration.number);
                return Err(Error::os("starting a thread that pins memory", &error));
            }
        }
        drop(foreign);
        self.changed.notify_all();
        Ok(registration)
    }

    /// The pinning thread: until nothing is wanted any more.
    fn pin(&self) {
        let mut foreign = lock(&self.foreign);
        while let Some(piece) = foreign.wanted.pop_front() {
            foreign.in_hand = Some(piece.registration);
            drop(foreign);
            let result = self.map(piece.iova, piece.memory);
            foreign = lock(&self.foreign);
            foreign.in_hand = None;
            match result {
                Ok(()) => {
                    foreign.pieces.push(piece);
                    self.publish(&mut foreign);
                }
                Err(error) => {
                    let before = foreign.wanted.len();
                    foreign.wanted.retain(|other| other.registration != piece.registration);
                    let left = before - foreign.wanted.len();
                    log::warn!(
                        "{}: {error}: what guests keep in {} MiB or more is copied, as guest-dma=off \
                         copies all",
                        self.function.name(),
                        (piece.memory.len() + left * PIECE) >> 20
                    );
                }
            }
            self.changed.notify_all();
        }
        foreign.pinning = false;
        self.changed.notify_all();
    }

    fn publish(&self, foreign: &mut Foreign) {
        foreign.table = Arc::new(Table::of(&foreign.pieces));
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Takes everything away from the device, whatever it is doing: it is gone, or said to be.
    pub fn cut(&self) -> Result<(), Error> {
        self.cut.store(true, Ordering::SeqCst);
        let mut foreign = lock(&self.foreign);
        foreign.wanted.clear();
        foreign.pieces.clear();
        self.publish(&mut foreign);
        let mapped = std::mem::take(&mut foreign.mapped);
        drop(foreign);
        let mut result = Ok(());
        for (iova, len) in mapped {
            let unmapped = self.function.unmap(iova, len);
            result = result.and(unmapped);
        }
        result
    }

    /// Waits until nothing is left to pin: for tests and tools.
    pub fn settle(&self) {
        let mut foreign = lock(&self.foreign);
        while foreign.pinning {
            foreign = self.changed.wait(foreign).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Memory of our own that the device reaches, until it is dropped: its owner knows that the device has
/// done with it.
pub struct Memory {
    space: Arc<Space>,
    iova: u64,
    host: HostRange,
    /// None once it was decided that the memory is never given back.
    pages: Option<Pages>,
}

impl Memory {
    /// For this process.
    #[inline]
    pub fn host(&self) -> HostRange {
        self.host
    }

    /// For the device.
    #[inline]
    pub fn iova(&self) -> u64 {
        self.iova
    }
}

impl Memory {
    /// Never gives the memory back: the device may write to it forever.
    pub fn leak(&mut self) {
        if let Some(pages) = self.pages.take() {
            std::mem::forget(pages);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Some(pages) = self.pages.take() else { return };
        let len = pages.range().len();
        match self.space.unmap(self.iova, len) {
            Ok(()) => self.space.give_back(self.iova, len),
            Err(error) => {
                // Rather lost than written to by a device when it is something else.
                log::error!("{}: unmapping its memory: {error}", self.space.function.name());
                std::mem::forget(pages);
            }
        }
    }
}

/// Memory of others that the device reaches, until this is dropped, which blocks until it does not. The caller that
/// drops it has ensured that no request in flight names the memory.
pub struct Registration {
    space: Arc<Space>,
    number: u64,
    iova: u64,
    /// Bytes; zero for nothing.
    len: usize,
    is_safe: bool,
}

impl Registration {
    /// Takes the memory from the device.
    ///
    /// # Errors
    /// When the device may still reach it: it must stay mapped.
    pub fn end(mut self) -> Result<(), Error> {
        self.withdraw()
    }

    fn withdraw(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.len) == 0 {
            return Ok(());
        }
        let mut foreign = lock(&self.space.foreign);
        foreign.wanted.retain(|piece| piece.registration != self.number);
        while foreign.in_hand == Some(self.number) {
            foreign = self.space.changed.wait(foreign).unwrap_or_else(PoisonError::into_inner);
        }
        let (mine, others) =
            foreign.pieces.iter().partition(|piece| piece.registration == self.number);
        foreign.pieces = others;
        let mine: Vec<Piece> = mine;
        self.space.publish(&mut foreign);
        drop(foreign);
        for piece in &mine {
            if let Err(error) = self.space.unmap(piece.iova, piece.memory.len()) {
                self.is_safe = false;
                return Err(error);
            }
        }
        Ok(())
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let len = self.len;
        match self.withdraw() {
            Ok(()) if len > 0 && self.is_safe => self.space.give_back(self.iova, len),
            Ok(()) => {}
            Err(error) => {
                // The memory goes back to its owner whatever we say; a device that may still write to it must not
                // continue.
                log::error!("{}: {error}: a guest's memory", self.space.function.name());
                log::logger().flush();
                std::process::abort();
            }
        }
    }
}
