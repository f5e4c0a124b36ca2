//! The memory of requests in flight as the previous daemon left it.
//!
//! That daemon died between any two of its stores; with a hostile front end, anything may have been written over
//! them.
//!
//! Its layout and the order of the stores are the vhost-user specification's, "Inflight I/O
//! tracking", for split virtqueues, and not taken from what is tested.

use super::input::Input;
use super::mapped::Mapped;
use std::cell::RefCell;
use std::fs::File;
use std::sync::Arc;
use vhost::vhost_user::message::VhostUserInflight;
use vublk::export::vhost_user_blk::inflight::{Region, Tracker};
use vublk::export::vhost_user_blk::ring::Tracking;

/// Bytes of a queue's header, and of each entry behind it.
const HEADER: u64 = 16;
const ENTRY: u64 = 16;
/// Fields of the header.
const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX: u64 = 14;
/// Fields of an entry.
const INFLIGHT: u64 = 0;
const NEXT: u64 = 6;
const COUNTER: u64 = 8;

thread_local! {
    /// Memories that earlier runs of this thread have returned.
    static FREE: RefCell<Vec<Laid>> = const { RefCell::new(Vec::new()) };
}

/// Memory as the daemon hands it out.
struct Laid {
    num_queues: u16,
    entries: u16,
    new: Vec<u8>,
    file: File,
    bytes: Mapped,
    announced: VhostUserInflight,
}

impl Laid {
    fn new(num_queues: u16, entries: u16) -> Laid {
        let is_match = |free: &Laid| (free.num_queues, free.entries) == (num_queues, entries);
        let found = FREE.with_borrow_mut(|free| {
            let at = free.iter().position(is_match)?;
            Some(free.swap_remove(at))
        });
        if let Some(mut laid) = found {
            laid.bytes.alone().copy_from_slice(&laid.new);
            return laid;
        }
        let (region, announced, file) = Region::new(num_queues, entries).expect("a new region");
        drop(region);
        let mut bytes = Mapped::of(&file, announced.mmap_size as usize);
        let new = bytes.alone().to_vec();
        Laid { num_queues, entries, new, file, bytes, announced }
    }
}

/// The memory of one queue among others, and what a daemon that takes it up finds.
pub struct Kept {
    /// Taken when this is dropped.
    laid: Option<Laid>,
    announced: VhostUserInflight,
    queue: u16,
    ring_size: u16,
    /// What must be begun again, if the memory is good.
    expected: Option<Vec<u16>>,
    /// What is begun again, in this order.
    pub again: Vec<u16>,
    /// Of the ring when the earlier daemon died; then, when it was taken up.
    pub used_index: u16,
}

/// What a daemon did to the used ring before it died.
#[derive(Default)]
pub struct HandedBack {
    /// Heads in the used ring's elements; the guest sees the first `shown`.
    pub heads: Vec<u16>,
    pub shown: u16,
}

impl Kept {
    /// Memory as good as new.
    pub fn new(input: &mut Input<'_>, ring_size: u16, honest: bool) -> Kept {
        let num_queues = 1 + input.below(3) as u16;
        let entries =
            if honest { ring_size } else { input.pick(&[ring_size, ring_size, 1024, 1, 3]) };
        let laid = Laid::new(num_queues, entries);
        let queue = input.below(u64::from(num_queues)) as u16;
        let (announced, again) = (laid.announced, Vec::new());
        Kept { laid: Some(laid), announced, queue, ring_size, expected: None, again, used_index: 0 }
    }

    fn laid(&self) -> &Laid {
        self.laid.as_ref().expect("it is there until the end")
    }

    /// Where the queue's part begins.
    fn part(&self) -> u64 {
        let part_len = (HEADER + u64::from(self.announced.queue_size) * ENTRY).next_multiple_of(64);
        self.announced.mmap_offset.wrapping_add(part_len * u64::from(self.queue))
    }

    fn entry(&self, head: u16) -> u64 {
        self.part().wrapping_add(HEADER + u64::from(head) * ENTRY)
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.laid().bytes.put(at as usize, bytes);
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        self.laid().bytes.get(at as usize)
    }

    fn marked(&self) -> Vec<u16> {
        let is_marked = |head: &u16| self.read(self.entry(*head) + INFLIGHT) != [0];
        (0..self.announced.queue_size).filter(is_marked).collect()
    }

    /// A daemon takes some of the chains `offered`, hands some of them back in batches, and dies
    /// after any of its stores. The used ring's index was `used`.
    pub fn live_and_die(
        &mut self,
        input: &mut Input<'_>,
        offered: &[u16],
        used: u16,
    ) -> HandedBack {
        // What earlier requests have left behind means nothing.
        let entries = self.announced.queue_size.min(self.ring_size);
        for head in 0..entries.min(32) {
            let stale = input.below(u64::from(entries)) as u16;
            self.write(self.entry(head) + NEXT, &stale.to_le_bytes());
        }
        let stale = input.below(u64::from(entries)) as u16;
        self.write(self.part() + LAST_BATCH_HEAD, &stale.to_le_bytes());
        self.write(self.part() + USED_IDX, &used.to_le_bytes());

        let mut daemon = Daemon { kept: self, stores_left: input.u8() % 64, used };
        let mut flying = Vec::new();
        let mut back = HandedBack::default();
        daemon.live(input, offered, &mut flying, &mut back);
        let shown = &back.heads[..back.shown.into()];
        flying.retain(|head| !shown.contains(head));
        self.expected = (self.announced.queue_size >= self.ring_size).then_some(flying);
        self.used_index = used.wrapping_add(back.shown);
        back
    }

    /// Writes over it.
    pub fn scramble(&mut self, input: &mut Input<'_>) {
        for _ in 0..input.below(6) {
            let head = input.below(u64::from(self.announced.queue_size) + 2) as u16;
            let index = if input.one_in(4) { input.u16() } else { head };
            let (part, entry) = (self.part(), self.entry(head));
            match input.u8() % 8 {
                0 => self.write(part.wrapping_add(LAST_BATCH_HEAD), &index.to_le_bytes()),
                1 => self.write(part.wrapping_add(USED_IDX), &input.u16().to_le_bytes()),
                2 => self.write(entry.wrapping_add(NEXT), &index.to_le_bytes()),
                3 => self.write(entry.wrapping_add(COUNTER), &input.edgy().to_le_bytes()),
                4 | 5 => self.write(entry.wrapping_add(INFLIGHT), &[input.u8()]),
                6 => {
                    let (at, len) =
                        (input.below(self.announced.mmap_size), usize::from(input.u8()));
                    self.write(at, input.bytes(len));
                }
                _ => match input.u8() % 4 {
                    0 => self.announced.mmap_size = input.edgy(),
                    1 => self.announced.mmap_offset = input.edgy(),
                    2 => self.announced.num_queues = input.below(5) as u16,
                    _ => self.queue = input.below(5) as u16,
                },
            }
            self.expected = None;
        }
    }

    /// Takes it up for a ring that shows `used_index`. `None` if it is refused, which must be said on
    /// one line.
    pub fn take_up(&mut self, used_index: u16) -> Option<Tracker> {
        if used_index != self.used_index {
            // A hostile guest's ring is not where the earlier daemon saw it.
            self.expected = None;
        }
        let file = self.laid().file.try_clone().expect("a descriptor");
        let taken = Region::map(&self.announced, file).and_then(|region| {
            let region = Arc::new(region);
            let recover =
                || Tracker::recover(&region, self.queue.into(), self.ring_size, used_index);
            Ok((recover()?, recover().expect("what was taken up can be taken up again")))
        });
        let (mut first, second) = match taken {
            Ok(taken) => taken,
            Err(why) => {
                assert!(self.expected.is_none(), "a good region was refused: {why}");
                assert!(!why.is_empty() && !why.contains('\n'), "not one line: {why:?}");
                return None;
            }
        };
        self.again = std::iter::from_fn(|| first.replay()).collect();
        assert_eq!(self.again.len(), usize::from(second.to_replay()), "not the same a second time");
        let mut sorted = self.again.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, self.marked(), "not what is marked");
        assert!(sorted.last().is_none_or(|head| *head < self.ring_size), "outside the ring");
        let counter = |head: &u16| u64::from_le_bytes(self.read(self.entry(*head) + COUNTER));
        assert!(self.again.is_sorted_by_key(counter), "not in the order of the counters");
        if let Some(expected) = &self.expected {
            assert_eq!(&self.again, expected, "not what was in flight");
        }
        self.used_index = used_index;
        Some(second)
    }

    /// The queue has ended with nothing in flight: what is marked still is what a broken one had not
    /// come to. `used_index` is the ring's, if that can be relied on.
    pub fn check_end(&self, is_broken: bool, used_index: Option<u16>) {
        let marked = self.marked();
        if !is_broken {
            assert!(marked.is_empty(), "{marked:?} are marked, and nothing is in flight");
        }
        for head in marked {
            assert!(self.again.contains(&head), "{head} is marked and was never in flight");
        }
        if let Some(used_index) = used_index {
            let recorded = u16::from_le_bytes(self.read(self.part() + USED_IDX));
            assert_eq!(recorded, used_index, "the used index was not recorded");
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        FREE.with_borrow_mut(|free| free.extend(self.laid.take()));
    }
}

/// One that keeps to the specification until it dies.
struct Daemon<'a> {
    kept: &'a Kept,
    stores_left: u8,
    /// What the guest sees.
    used: u16,
}

impl Daemon<'_> {
    /// `None`: it is dead.
    fn store(&mut self, at: u64, bytes: &[u8]) -> Option<()> {
        self.stores_left = self.stores_left.checked_sub(1)?;
        self.kept.write(at, bytes);
        Some(())
    }

    /// What is marked comes into `flying`, in the order of taking.
    fn live(
        &mut self,
        input: &mut Input<'_>,
        offered: &[u16],
        flying: &mut Vec<u16>,
        back: &mut HandedBack,
    ) -> Option<()> {
        let (part, taken) = (self.kept.part(), input.below(offered.len() as u64 + 1) as usize);
        let first = u64::from(input.u32());
        for (counter, head) in (first..).zip(&offered[..taken]) {
            let entry = self.kept.entry(*head);
            self.store(entry + COUNTER, &counter.to_le_bytes())?;
            self.store(entry + INFLIGHT, &[1])?;
            flying.push(*head);
        }
        let mut left = flying.clone();
        while !left.is_empty() {
            let count = 1 + input.below(left.len() as u64) as usize;
            let batch: Vec<u16> =
                (0..count).map(|_| left.remove(input.below(left.len() as u64) as usize)).collect();
            for head in &batch {
                back.heads.push(*head);
                let last: [u8; 2] = self.kept.read(part + LAST_BATCH_HEAD);
                self.store(self.kept.entry(*head) + NEXT, &last)?;
                self.store(part + LAST_BATCH_HEAD, &head.to_le_bytes())?;
            }
            // The ring's index is a store like the others.
            self.stores_left = self.stores_left.checked_sub(1)?;
            back.shown += count as u16;
            self.used = self.used.wrapping_add(count as u16);
            for head in &batch {
                self.store(self.kept.entry(*head) + INFLIGHT, &[0])?;
            }
            self.store(part + USED_IDX, &self.used.to_le_bytes())?;
        }
        Some(())
    }
}
