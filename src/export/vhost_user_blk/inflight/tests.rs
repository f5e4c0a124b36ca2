//! Tests with a daemon that dies between any two stores, and with arbitrary memory.

use super::*;
use std::cell::Cell;

thread_local! {
    /// Stores until the daemon of this thread dies; none: it does not.
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    static DEAD: Cell<bool> = const { Cell::new(false) };
    static STORES: Cell<u64> = const { Cell::new(0) };
}

/// Asked before each store: the dead store nothing.
pub fn is_alive() -> bool {
    match LEFT.get() {
        Some(0) => DEAD.set(true),
        Some(left) => LEFT.set(Some(left - 1)),
        None => {}
    }
    STORES.set(STORES.get() + u64::from(!DEAD.get()));
    !DEAD.get()
}

const SIZE: u16 = 8;

/// What outlives the daemon besides the region: the guest and its ring.
struct Guest {
    /// Every chain that was ever made available.
    available: Vec<u16>,
    /// Every element of the used ring; the guest sees those before `used_index`.
    used: Vec<u16>,
    used_index: u16,
    seen: usize,
    free: Vec<u16>,
    random: fastrand::Rng,
    /// Chains that daemons have marked, in the order of `available`.
    taken: usize,
}

impl Guest {
    fn new(seed: u64) -> Guest {
        Guest {
            available: Vec::new(),
            used: Vec::new(),
            used_index: 0,
            seen: 0,
            free: (0..SIZE).collect(),
            random: fastrand::Rng::with_seed(seed),
            taken: 0,
        }
    }

    /// Takes back what it sees used, and makes up to `most` chains available.
    fn act(&mut self, most: usize) {
        while self.seen < self.used_index as usize {
            self.free.push(self.used[self.seen]);
            self.seen += 1;
        }
        for _ in 0..most.min(self.free.len()) {
            let at = self.random.usize(..self.free.len());
            self.available.push(self.free.swap_remove(at));
        }
    }

    /// The chains that were marked and that the guest does not see used, as they were taken.
    fn in_flight(&self) -> Vec<u16> {
        let mut in_flight = self.available[..self.taken].to_vec();
        for head in &self.used[..self.used_index as usize] {
            let at = in_flight.iter().position(|taken| taken == head);
            in_flight.remove(at.expect("a chain was handed back that was not in flight"));
        }
        in_flight
    }
}

/// A daemon, until it dies after a number of stores, or has done `rounds` and then all that is left.
fn daemon(region: &Arc<Region>, guest: &mut Guest, life: Option<u64>, rounds: usize) {
    LEFT.set(life);
    DEAD.set(false);
    let mut tracker = Tracker::recover(region, 0, SIZE, guest.used_index).unwrap();
    if DEAD.get() {
        return;
    }
    let mut in_flight = Vec::new();
    while let Some(head) = tracker.replay() {
        in_flight.push(head);
    }
    assert_eq!(in_flight, guest.in_flight(), "what is done again");
    let mut next = guest.used_index as usize + in_flight.len();
    assert_eq!(next, guest.taken, "where the available ring goes on");
    guest.used.truncate(guest.used_index as usize);
    let mut round = 0;
    while round < rounds || !in_flight.is_empty() || next < guest.available.len() {
        round += 1;
        if round <= rounds {
            let most = guest.random.usize(..4);
            guest.act(most);
        }
        for _ in 0..guest.random.usize(..4).min(guest.available.len() - next) {
            let head = guest.available[next];
            tracker.mark(head);
            if DEAD.get() {
                return;
            }
            guest.taken += 1;
            next += 1;
            in_flight.push(head);
        }
        for _ in 0..guest.random.usize(..5).min(in_flight.len()) {
            let at = guest.random.usize(..in_flight.len());
            let head = in_flight.swap_remove(at);
            guest.used.push(head);
            tracker.link(head);
        }
        if is_alive() {
            guest.used_index = guest.used.len() as u16;
        }
        tracker.settle(guest.used_index);
        if DEAD.get() {
            return;
        }
    }
}

#[test]
fn a_daemon_that_dies_at_any_store_leaves_what_was_in_flight_and_nothing_else() {
    let mut runs = 0;
    for seed in 0..4 {
        STORES.set(0);
        let fresh = || Arc::new(Region::new(1, SIZE).unwrap().0);
        daemon(&fresh(), &mut Guest::new(seed), None, 12);
        let stores = STORES.get();
        assert!(stores > 50, "only {stores} stores");
        for first in 0..stores {
            // The second dies in its recovery, or a little later.
            for second in 0..24 {
                let (region, mut guest) = (fresh(), Guest::new(seed));
                daemon(&region, &mut guest, Some(first), 12);
                daemon(&region, &mut guest, Some(second), 12);
                daemon(&region, &mut guest, None, 12);
                guest.act(0);
                assert!(guest.in_flight().is_empty());
                assert_eq!(guest.used.len(), guest.available.len());
                assert_eq!(guest.free.len(), SIZE as usize);
                runs += 1;
            }
        }
    }
    assert!(runs > 4000, "{runs}");
}

#[test]
fn the_layout_is_the_specifications() {
    assert_eq!((size_of::<Header>(), size_of::<Entry>()), (16, 16));
    let (region, announced, file) = Region::new(2, 4).unwrap();
    assert_eq!({ announced.mmap_size }, (2 * 128 + OWN_LEN) as u64);
    let mut trailer = [9; 64];
    file.read_exact_at(&mut trailer, 256).unwrap();
    assert_eq!((&trailer[..8], trailer[8..] == [0; 56]), (&b"vublk\0\x02\0"[..], true));
    assert_eq!(size_of_val(&announced), 24);
    let mut bytes = [0; 256];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let mut fresh = [0; 128];
    (fresh[8], fresh[10]) = (1, 4);
    assert_eq!(bytes, [fresh, fresh].concat()[..]);

    let region = Arc::new(region);
    let mut tracker = Tracker::recover(&region, 1, 4, 0).unwrap();
    tracker.mark(3);
    tracker.mark(1);
    tracker.link(1);
    tracker.link(3);
    file.read_exact_at(&mut bytes, 0).unwrap();
    let mut part = fresh;
    part[12] = 3; // last_batch_head
    part[16 + 16] = 1; // of entry 1: inflight
    part[16 + 16 + 8] = 1; // counter
    part[16 + 48] = 1; // of entry 3: inflight
    part[16 + 48 + 6] = 1; // next
    assert_eq!(bytes, [fresh, part].concat()[..]);
    tracker.settle(2);
    file.read_exact_at(&mut bytes, 0).unwrap();
    part[14] = 2; // used_idx
    (part[16 + 16], part[16 + 48]) = (0, 0);
    assert_eq!(bytes, [fresh, part].concat()[..]);
}

fn refused(announced: VhostUserInflight, file: &File) -> String {
    Region::map(&announced, file.try_clone().unwrap()).err().expect("it should be refused")
}

#[test]
fn a_region_that_cannot_be_ours_is_refused() {
    let (_, announced, file) = Region::new(2, 16).unwrap();
    let len = announced.mmap_size - OWN_LEN as u64;
    assert!(Region::map(&announced, file.try_clone().unwrap()).is_ok());
    let with =
        |size, offset, queues, entries| VhostUserInflight::new(size, offset, queues, entries);
    for (announced, why) in [
        (with(len - 1, 0, 2, 16), "2 queues of 16 take"),
        (with(0, 0, 2, 16), "2 queues of 16 take"),
        (with(len, 0, 0, 16), "for 0 queues"),
        (with(len, 0, 2, 0), "queues of 0"),
        (with(u64::MAX, 0, 2, 2048), "queues of 2048"),
        (with(u64::MAX, 0, u16::MAX, 1024), "its file ends at"),
        (with(len, 1 << 20, 2, 16), "its file ends at"),
        (with(len, u64::MAX, 2, 16), "its file ends at"),
        (with(len / 2, 64, 1, 16), "at 64: "),
        (with(len, 0, 2, 8), "16 entries (version 1 and 8 entries"),
        (with(announced.mmap_size, 0, 1, 8), "16 entries (version 1 and 8 entries"),
    ] {
        let said = refused(announced, &file);
        assert!(said.contains(why), "{said}");
    }
    let plain = tempfile::tempfile().unwrap();
    plain.set_len(len).unwrap();
    assert!(refused(announced, &plain).contains("not sealed"));
    file.write_all_at(&[2], len / 2 + 8).unwrap();
    assert!(refused(announced, &file).contains("queue 1 has version 2"));
    // Never used.
    file.write_all_at(&[0; 4], len / 2 + 8).unwrap();
    let region = Arc::new(Region::map(&announced, file.try_clone().unwrap()).unwrap());
    Tracker::recover(&region, 1, 16, 0).unwrap();
    let mut header = [0; 4];
    file.read_exact_at(&mut header, len / 2 + 8).unwrap();
    assert_eq!(header, [1, 0, 16, 0]);
}

#[test]
fn a_trailer_counts_only_if_it_is_ours_and_is_there() {
    let (region, announced, file) = Region::new(2, 16).unwrap();
    region.set_write_cache(false);
    let parts = announced.mmap_size - OWN_LEN as u64;
    let found = |size| {
        let announced = VhostUserInflight::new(size, 0, 2, 16);
        Region::map(&announced, file.try_clone().unwrap()).unwrap().write_cache()
    };
    assert_eq!(found(announced.mmap_size), Some(false));
    assert_eq!(found(u64::MAX), Some(false));
    assert_eq!(found(announced.mmap_size - 1), None);
    assert_eq!(found(parts), None);
    file.write_all_at(&[0xff], parts + 8).unwrap();
    assert_eq!(found(announced.mmap_size), Some(false), "what is not zero is off");
    file.write_all_at(b"V", parts).unwrap();
    assert_eq!(found(announced.mmap_size), None);
}

#[test]
fn a_region_that_contradicts_its_ring_is_refused() {
    let recover = |bytes: &[(u64, u8)], queue, ring, used| {
        let (region, _, file) = Region::new(1, 16).unwrap();
        for (at, byte) in bytes {
            file.write_all_at(&[*byte], *at).unwrap();
        }
        Tracker::recover(&Arc::new(region), queue, ring, used).err().unwrap_or_default()
    };
    assert_eq!(recover(&[], 0, 16, 0), "");
    assert!(recover(&[], 1, 16, 0).contains("has 1 queues"));
    assert!(recover(&[], 0, 32, 0).contains("has 16 entries, the ring 32"));
    // A batch of one, that begins outside or leads there.
    assert!(recover(&[(12, 16)], 0, 16, 1).contains("leads to entry 16"));
    assert!(recover(&[(16 + 7, 1)], 0, 16, 2).contains("leads to entry 256"));
    // Entry 9 in flight.
    let ninth = 16 + 9 * 16;
    assert!(recover(&[(ninth, 1)], 0, 8, 0).contains("chain 9, the ring 8"));
    assert!(recover(&[(ninth, 1)], 0, 16, 17).contains("ends at used index 0, the ring at 17"));
    // Nothing in flight: the ring is a new one.
    assert_eq!(recover(&[(14, 7)], 0, 16, 0), "");
}

#[test]
fn whatever_a_region_holds_no_chain_is_done_twice_or_lies_outside_the_ring() {
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..3000 {
        let (region, announced, file) = Region::new(1, 16).unwrap();
        let mut bytes = vec![0; announced.mmap_size as usize];
        random.fill(&mut bytes);
        if random.bool() {
            // Likely values, so that more is reached.
            bytes.iter_mut().for_each(|byte| *byte &= 0x0f & (*byte >> 4));
        }
        bytes[8..12].copy_from_slice(&[1, 0, 16, 0]);
        file.write_all_at(&bytes, 0).unwrap();
        let used = random.u16(..) & (random.u16(..) >> random.u8(..12));
        let Ok(mut tracker) = Tracker::recover(&Arc::new(region), 0, 16, used) else { continue };
        let mut heads = Vec::new();
        while let Some(head) = tracker.replay() {
            assert!(head < 16 && !heads.contains(&head), "{head} after {heads:?}");
            heads.push(head);
        }
        tracker.mark(3);
        tracker.link(3);
        tracker.settle(used.wrapping_add(1));
    }
}

#[test]
fn a_front_end_may_announce_the_size_that_it_has_asked_for() {
    let (_, announced, file) = Region::for_any_ring(2, 128).unwrap();
    for size in [128, 1024] {
        let announced = VhostUserInflight::new(announced.mmap_size, 0, 2, size);
        let region = Arc::new(Region::map(&announced, file.try_clone().unwrap()).unwrap());
        for queue in 0..2 {
            assert!(Tracker::recover(&region, queue, 1024, 0).is_ok());
        }
    }
    // What the memory says of itself has to fit its length.
    file.write_all_at(&[16, 0], 10).unwrap();
    let announced = VhostUserInflight::new(announced.mmap_size, 0, 2, 128);
    assert!(refused(announced, &file).contains("16 entries (version 1 and 128 entries"));
}
