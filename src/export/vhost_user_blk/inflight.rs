//! The record of requests in flight, in memory that outlives the daemon.
//!
//! The vhost-user text calls it "Inflight I/O tracking" (split virtqueues). The daemon that is started after a kill
//! repeats exactly the requests that had begun and not ended.
//!
//! The front end keeps the memory between connections. For each queue it holds a header and an entry
//! for each descriptor, and this is the order of the stores:
//!
//! * A chain is taken: its counter, then its flag. Only then its I/O may begin.
//! * A batch of chains is handed back: each is linked to the one before it and becomes the head of
//!   the list; the ring's used index; the flags are cleared; the header's used index.
//! * A ring starts: if the two used indices differ, the daemon died inside a batch, whose length is
//!   the difference: its flags are cleared, all of them again. What has its flag then is in flight.
//!
//! Stores are seen by the next daemon in the order of the program, as by a signal handler: the one
//! thread that makes them is the one that dies. So only the compiler must be kept from moving them.
//!
//! Behind the queues is a trailer of our own, which the specification leaves room for: the size of the memory is ours
//! to say. Memory of another back end has none, and is taken as it is. Behind the trailer is the journal of the
//! disk's image ([`crate::block::Journaled`]).
//!
//! Whatever is read from the memory may be anything: every index is checked where it is used.

use crate::block::Survivor;
use crate::export::core::kept::Kept;
use crate::io::{SharedMapping, descriptors};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU8, AtomicU16, AtomicU64, Ordering::Relaxed, Ordering::SeqCst, compiler_fence,
};
use vhost::vhost_user::message::VhostUserInflight;

use super::ring::{MAX_SIZE, Tracking};

/// The one way in which anything is stored.
macro_rules! store {
    ($place:expr, $value:expr) => {
        #[cfg(test)]
        let alive = tests::is_alive();
        #[cfg(not(test))]
        let alive = true;
        if alive {
            $place.store($value, Relaxed);
        }
        // In the order of the program.
        compiler_fence(SeqCst);
    };
}

/// The only version there is. Zero: the memory was never used.
const VERSION: u16 = 1;

/// Of a queue's part, so that no two queues write to one cache line.
const ALIGNMENT: usize = 64;

/// `QueueRegionSplit`, up to its entries.
#[repr(C)]
struct Header {
    /// None are defined.
    features: AtomicU64,
    version: AtomicU16,
    /// Entries.
    desc_num: AtomicU16,
    /// The chain that was handed back last.
    last_batch_head: AtomicU16,
    /// The ring's used index when a batch was last handed back in full.
    used_idx: AtomicU16,
}

/// `DescStateSplit`: of the chain that begins with the descriptor of this number.
#[repr(C)]
struct Entry {
    /// 1 while the chain is in flight.
    inflight: AtomicU8,
    _padding: [AtomicU8; 5],
    /// The chain that was handed back before this one.
    next: AtomicU16,
    /// Chains were taken in the order of these.
    counter: AtomicU64,
}

/// What is behind the queues' parts.
#[repr(C)]
struct Trailer {
    magic: AtomicU64,
    /// Anything but 0: the guest has switched its write cache off.
    write_cache_off: AtomicU8,
    /// Anything but 0: an fsync has failed, and no operator has accepted what was lost.
    loss: AtomicU8,
    _padding: [AtomicU8; 54],
}

const MAGIC: u64 = u64::from_ne_bytes(*b"vublk\0\x02\0");

/// Words of the journal.
const JOURNAL: usize = 20 << 10;

/// Bytes behind the queues' parts.
const OWN_LEN: usize = size_of::<Trailer>() + JOURNAL * size_of::<AtomicU64>();

/// Bytes of a queue's part.
fn part_len(queue_size: u16) -> usize {
    let len = size_of::<Header>() + queue_size as usize * size_of::<Entry>();
    len.next_multiple_of(ALIGNMENT)
}

/// The shared memory, mapped: a part for each queue.
pub struct Region {
    mapping: SharedMapping,
    num_queues: u16,
    queue_size: u16,
    /// Where the trailer begins, if there is one.
    trailer: Option<usize>,
}

impl Region {
    /// New memory for the queues of a front end that asks for this size, and its description. It is made for the largest
    /// rings: QEMU 10 asks for the size in its option `queue-size` (128 by default) and offers the guest 1,024 entries.
    ///
    /// # Errors
    /// As those of [`Region::new`]; and a size that no ring has.
    pub fn for_any_ring(
        num_queues: u16,
        queue_size: u16,
    ) -> Result<(Region, VhostUserInflight, File), String> {
        check(num_queues, queue_size)?;
        Region::new(num_queues, MAX_SIZE)
    }

    /// New memory for queues of the given size, and its description for the front end. Its file can be neither shrunk
    /// nor grown.
    pub fn new(
        num_queues: u16,
        queue_size: u16,
    ) -> Result<(Region, VhostUserInflight, File), String> {
        check(num_queues, queue_size)?;
        let parts = part_len(queue_size) * num_queues as usize;
        let len = parts + OWN_LEN;
        let failed = |what: &str| {
            let error = std::io::Error::last_os_error();
            format!("inflight region: {what}: {}", descriptors::explain(&error))
        };
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string; the call has no other precondition.
        let fd = unsafe { libc::memfd_create(c"vublk-inflight".as_ptr(), flags) };
        if fd < 0 {
            return Err(failed("memfd_create"));
        }
        // SAFETY: the descriptor was just opened and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len as u64).map_err(|e| format!("inflight region: {len} bytes: {e}"))?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: an integer is all that the call takes.
        if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } != 0 {
            return Err(failed("F_ADD_SEALS"));
        }
        for queue in 0..num_queues {
            let mut header = [0; 4];
            header[..2].copy_from_slice(&VERSION.to_ne_bytes());
            header[2..].copy_from_slice(&queue_size.to_ne_bytes());
            let at = part_len(queue_size) * queue as usize + std::mem::offset_of!(Header, version);
            file.write_all_at(&header, at as u64).map_err(|e| format!("inflight region: {e}"))?;
        }
        file.write_all_at(&MAGIC.to_ne_bytes(), parts as u64)
            .map_err(|e| format!("inflight region: {e}"))?;
        let announced = VhostUserInflight::new(len as u64, 0, num_queues, queue_size);
        let theirs = file.try_clone();
        let theirs =
            theirs.map_err(|e| format!("inflight region: {}", descriptors::explain(&e)))?;
        Ok((Region::map(&announced, file)?, announced, theirs))
    }

    /// Memory that the front end has kept. Refuses what cannot have come from [`Region::new`], and a
    /// file that could be shrunk: touching what is no longer there would end the process (SIGBUS).
    pub fn map(announced: &VhostUserInflight, file: File) -> Result<Region, String> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *announced;
        check(num_queues, queue_size)?;
        let queue_size = own_queue_size(announced, &file).unwrap_or(queue_size);
        let wanted = part_len(queue_size) as u64 * num_queues as u64;
        if mmap_size < wanted {
            return Err(format!(
                "inflight region of {mmap_size} bytes: {num_queues} queues of {queue_size} take {wanted}"
            ));
        }
        // SAFETY: the call takes nothing.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err("inflight region: its file is not sealed against shrinking".into());
        }
        let holds = file.metadata().map_err(|e| format!("inflight region: {e}"))?.len();
        if mmap_offset.checked_add(wanted).is_none_or(|end| end > holds) {
            return Err(format!(
                "inflight region of {wanted} bytes at {mmap_offset}: its file ends at {holds}"
            ));
        }
        let more = wanted + OWN_LEN as u64;
        let has_more = mmap_size >= more && mmap_offset.saturating_add(more) <= holds;
        let len = if has_more { more } else { wanted };
        let mapping = SharedMapping::map(&file, mmap_offset, len as usize)
            .map_err(|e| format!("inflight region at {mmap_offset}: {e}"))?;
        let trailer = has_more.then_some(wanted as usize);
        let mut region = Region { mapping, num_queues, queue_size, trailer };
        if region.trailer().is_some_and(|trailer| trailer.magic.load(Relaxed) != MAGIC) {
            region.trailer = None;
        }
        for queue in 0..num_queues {
            let (version, entries) = (
                region.header(queue).version.load(Relaxed),
                region.header(queue).desc_num.load(Relaxed),
            );
            if version != 0 && (version, entries) != (VERSION, queue_size) {
                return Err(format!(
                    "inflight region: queue {queue} has version {version} and {entries} entries \
                     (version {VERSION} and {queue_size} entries are wanted)"
                ));
            }
        }
        Ok(region)
    }

    pub fn num_queues(&self) -> u16 {
        self.num_queues
    }

    fn trailer(&self) -> Option<&Trailer> {
        let at = self.mapping.as_ptr().wrapping_add(self.trailer?);
        // SAFETY: the mapping holds it, at a multiple of 64, and cannot lose pages; all fields are
        // atomic and have no invalid values.
        Some(unsafe { &*at.cast::<Trailer>() })
    }

    /// A queue's part; `queue` is below the number of queues.
    fn part(&self, queue: u16) -> *mut u8 {
        assert!(queue < self.num_queues, "queue {queue} of {}", self.num_queues);
        self.mapping.as_ptr().wrapping_add(part_len(self.queue_size) * queue as usize)
    }

    fn header(&self, queue: u16) -> &Header {
        // SAFETY: the part is in the mapping, which cannot lose pages, at a multiple of 64; all fields are atomic and
        // have no invalid values.
        unsafe { &*self.part(queue).cast::<Header>() }
    }

    fn entries(&self, queue: u16) -> &[Entry] {
        let first = self.part(queue).wrapping_add(size_of::<Header>()).cast::<Entry>();
        // SAFETY: as above; a part has room for that many entries after its header.
        unsafe { std::slice::from_raw_parts(first, self.queue_size as usize) }
    }
}

impl Kept for Region {
    fn write_cache(&self) -> Option<bool> {
        self.trailer().map(|trailer| trailer.write_cache_off.load(Relaxed) == 0)
    }

    fn set_write_cache(&self, on: bool) {
        if let Some(trailer) = self.trailer() {
            store!(trailer.write_cache_off, u8::from(!on));
        }
    }

    fn has_loss(&self) -> bool {
        self.trailer().is_some_and(|trailer| trailer.loss.load(Relaxed) != 0)
    }

    fn set_loss(&self, is_lost: bool) {
        if let Some(trailer) = self.trailer() {
            store!(trailer.loss, u8::from(is_lost));
        }
    }

    fn has_journal(&self) -> bool {
        self.trailer.is_some()
    }
}

impl Survivor for Region {
    fn words(&self) -> &[AtomicU64] {
        let Some(at) = self.trailer else { return &[] };
        let first = self.mapping.as_ptr().wrapping_add(at + size_of::<Trailer>());
        // SAFETY: the mapping holds that many behind the trailer, at a multiple of 64, and cannot lose
        // pages; they are atomic and have no invalid values.
        unsafe { std::slice::from_raw_parts(first.cast::<AtomicU64>(), JOURNAL) }
    }
}

/// The size of the queues that memory made by [`Region::new`] is laid out for, which it says itself; `None` if it is another
/// back end's. A front end may announce the size that it has asked for ([`Region::for_any_ring`]).
fn own_queue_size(announced: &VhostUserInflight, file: &File) -> Option<u16> {
    let VhostUserInflight { mmap_size, mmap_offset, num_queues, .. } = *announced;
    let parts = mmap_size.checked_sub(OWN_LEN as u64)?;
    let mut magic = [0; size_of::<u64>()];
    file.read_exact_at(&mut magic, mmap_offset.checked_add(parts)?).ok()?;
    let mut desc_num = [0; size_of::<u16>()];
    let at = mmap_offset.checked_add(std::mem::offset_of!(Header, desc_num) as u64)?;
    file.read_exact_at(&mut desc_num, at).ok()?;
    let queue_size = u16::from_ne_bytes(desc_num);
    let is_whole = part_len(queue_size) as u64 * u64::from(num_queues) == parts;
    let is_ours = u64::from_ne_bytes(magic) == MAGIC && is_whole;
    (is_ours && check(num_queues, queue_size).is_ok()).then_some(queue_size)
}

fn check(num_queues: u16, queue_size: u16) -> Result<(), String> {
    if num_queues == 0 || queue_size == 0 || queue_size > MAX_SIZE {
        return Err(format!(
            "inflight region for {num_queues} queues of {queue_size} (1 to {MAX_SIZE} entries are wanted)"
        ));
    }
    Ok(())
}

/// One queue's part of the memory, and the requests to repeat. Owned by the queue.
pub struct Tracker {
    header: *const Header,
    entries: *const [Entry],
    /// Of the next chain that is taken.
    counter: u64,
    /// Linked, and not yet shown to the guest.
    batch: Vec<u16>,
    /// Chains of a daemon that has died, last first.
    replay: Vec<u16>,
    /// Keeps the mapping alive.
    _region: Arc<Region>,
}

// SAFETY: the pointers lead into the mapping, which lives as long as self, to atomics.
unsafe impl Send for Tracker {}

impl Tracker {
    fn header(&self) -> &Header {
        // SAFETY: the mapping lives as long as self.
        unsafe { &*self.header }
    }

    /// `head` is below the ring's size.
    fn entry(&self, head: u16) -> &Entry {
        // SAFETY: as above.
        let entries = unsafe { &*self.entries };
        &entries[head as usize]
    }
}

impl Tracking for Tracker {
    type Index = u16;

    fn recover(
        region: &Arc<Region>,
        queue: usize,
        ring_size: u16,
        used_index: u16,
    ) -> Result<Tracker, String> {
        let num_queues = region.num_queues;
        let queue = u16::try_from(queue).ok().filter(|&queue| queue < num_queues);
        let queue = queue.ok_or_else(|| format!("the inflight region has {num_queues} queues"))?;
        let (header, entries) = (region.header(queue), region.entries(queue));
        if ring_size as usize > entries.len() {
            let entries = entries.len();
            return Err(format!("the inflight region has {entries} entries, the ring {ring_size}"));
        }
        if header.version.load(Relaxed) == 0 {
            store!(header.desc_num, region.queue_size);
            store!(header.version, VERSION);
        }
        let left = || entries.iter().any(|entry| entry.inflight.load(Relaxed) != 0);
        let recorded = header.used_idx.load(Relaxed);
        let batch = used_index.wrapping_sub(recorded);
        // A ring that was laid out again begins at zero; then nothing can have been left.
        if batch > ring_size && left() {
            return Err(format!(
                "the inflight region holds requests and ends at used index {recorded}, the ring at \
                 {used_index}"
            ));
        }
        if batch != 0 {
            let mut head = header.last_batch_head.load(Relaxed);
            for _ in 0..batch.min(ring_size) {
                let Some(entry) = entries.get(head as usize) else {
                    return Err(format!("the inflight region's last batch leads to entry {head}"));
                };
                store!(entry.inflight, 0);
                head = entry.next.load(Relaxed);
            }
            store!(header.used_idx, used_index);
        }
        let in_flight = entries.iter().enumerate();
        let in_flight = in_flight.filter(|(_, entry)| entry.inflight.load(Relaxed) != 0);
        let mut replay: Vec<(u64, u16)> =
            in_flight.map(|(head, entry)| (entry.counter.load(Relaxed), head as u16)).collect();
        replay.sort_unstable_by(|a, b| b.cmp(a));
        if let Some((_, head)) = replay.iter().find(|(_, head)| *head >= ring_size) {
            return Err(format!(
                "the inflight region has chain {head}, the ring {ring_size} entries"
            ));
        }
        Ok(Tracker {
            header,
            entries,
            counter: replay.first().map_or(0, |(counter, _)| counter.wrapping_add(1)),
            batch: Vec::with_capacity(ring_size as usize),
            replay: replay.into_iter().map(|(_, head)| head).collect(),
            _region: region.clone(),
        })
    }

    fn to_replay(&self) -> u16 {
        self.replay.len() as u16
    }

    fn replay(&mut self) -> Option<u16> {
        self.replay.pop()
    }

    fn mark(&mut self, head: u16) {
        let entry = self.entry(head);
        store!(entry.counter, self.counter);
        store!(entry.inflight, 1);
        self.counter = self.counter.wrapping_add(1);
    }

    fn link(&mut self, head: u16) {
        store!(self.entry(head).next, self.header().last_batch_head.load(Relaxed));
        store!(self.header().last_batch_head, head);
        self.batch.push(head);
    }

    fn settle(&mut self, used_index: u16) {
        if self.batch.is_empty() {
            return;
        }
        // After the ring's index.
        compiler_fence(SeqCst);
        for &head in &self.batch {
            store!(self.entry(head).inflight, 0);
        }
        store!(self.header().used_idx, used_index);
        self.batch.clear();
    }
}

#[cfg(test)]
mod tests;
