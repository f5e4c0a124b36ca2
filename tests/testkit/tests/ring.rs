//! The driver's ring against a small device in the same process, written from the specification alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vublk_testkit::memory::{Memory, MemoryLayout};
use vublk_testkit::request::{Cut, Laid, Placement, Request, Segment, Shape};
use vublk_testkit::ring::{DriverRing, RingLayout};
use vublk_testkit::spec::{desc_flag, status};
use vublk_testkit::{Error, spec};

/// The device side: a byte-array disk.
struct Device {
    memory: Arc<Memory>,
    ring: RingLayout,
    next: u16,
    used: u16,
    disk: Vec<u8>,
}

impl Device {
    fn new(driver: &DriverRing) -> Device {
        Device {
            memory: driver.memory().clone(),
            ring: driver.layout(),
            next: 0,
            used: 0,
            disk: vec![0; 1 << 20],
        }
    }

    fn desc(&self, table: u64, index: u16) -> (u64, u32, u16, u16) {
        let mut raw = [0u8; 16];
        self.memory.read(table + 16 * u64::from(index), &mut raw);
        (
            u64::from_le_bytes(raw[0..8].try_into().unwrap()),
            u32::from_le_bytes(raw[8..12].try_into().unwrap()),
            u16::from_le_bytes(raw[12..14].try_into().unwrap()),
            u16::from_le_bytes(raw[14..16].try_into().unwrap()),
        )
    }

    fn chain(&self, head: u16) -> Vec<Segment> {
        let (mut table, mut index) = (self.ring.desc, head);
        let mut segments = Vec::new();
        loop {
            let (addr, len, flags, next) = self.desc(table, index);
            if flags & desc_flag::INDIRECT != 0 {
                assert_eq!(len % 16, 0);
                (table, index) = (addr, 0);
                continue;
            }
            segments.push(Segment { addr, len, device_writes: flags & desc_flag::WRITE != 0 });
            if flags & desc_flag::NEXT == 0 {
                return segments;
            }
            index = next;
        }
    }

    fn pop(&mut self) -> Option<u16> {
        let avail = self.memory.atomic_u16(self.ring.avail + 2);
        if avail.load(Ordering::Acquire) == self.next {
            return None;
        }
        let at = self.ring.avail + 4 + 2 * u64::from(self.next % self.ring.size);
        self.next = self.next.wrapping_add(1);
        Some(self.memory.atomic_u16(at).load(Ordering::Relaxed))
    }

    fn push(&mut self, head: u16, len: u32) {
        let at = self.ring.used + 4 + 8 * u64::from(self.used % self.ring.size);
        self.memory.write(at, &u32::from(head).to_le_bytes());
        self.memory.write(at + 4, &len.to_le_bytes());
        self.used = self.used.wrapping_add(1);
        self.memory.atomic_u16(self.ring.used + 2).store(self.used, Ordering::Release);
    }

    /// Does one IN or OUT and says how many bytes it wrote.
    fn serve(&mut self, head: u16) -> u32 {
        let chain = self.chain(head);
        let mut readable = Vec::new();
        for s in chain.iter().filter(|s| !s.device_writes) {
            let mut bytes = vec![0; s.len as usize];
            self.memory.read(s.addr, &mut bytes);
            readable.extend(bytes);
        }
        let writable: u32 = chain.iter().filter(|s| s.device_writes).map(|s| s.len).sum();
        let kind = u32::from_le_bytes(readable[0..4].try_into().unwrap());
        let at = 512 * u64::from_le_bytes(readable[8..16].try_into().unwrap()) as usize;
        let mut answer = Vec::new();
        match kind {
            spec::request_type::IN => {
                answer.extend_from_slice(&self.disk[at..at + writable as usize - 1]);
            }
            _ => self.disk[at..at + readable.len() - 16].copy_from_slice(&readable[16..]),
        }
        answer.push(status::OK);
        let mut rest = &answer[..];
        for s in chain.iter().filter(|s| s.device_writes) {
            let (now, later) = rest.split_at(s.len as usize);
            self.memory.write(s.addr, now);
            rest = later;
        }
        writable
    }

    /// Serves what is available; `reversed` finishes the batch backwards.
    fn run(&mut self, reversed: bool) -> usize {
        let mut heads: Vec<u16> = std::iter::from_fn(|| self.pop()).collect();
        if reversed {
            heads.reverse();
        }
        for &head in &heads {
            let len = self.serve(head);
            self.push(head, len);
        }
        heads.len()
    }
}

fn ring(layout: MemoryLayout, size: u16, event_idx: bool) -> (DriverRing, Device) {
    let memory = Memory::new(&layout).unwrap();
    let driver = DriverRing::new(&memory, size, event_idx).unwrap();
    let device = Device::new(&driver);
    (driver, device)
}

fn seed() -> u64 {
    let seed = std::env::var("VUBLK_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or(1u64);
    println!("VUBLK_SEED={seed}");
    seed
}

#[test]
fn any_shape_of_request_in_any_order_carries_its_bytes_over_many_turns_of_the_ring() {
    let mut random = fastrand::Rng::with_seed(seed());
    let (mut driver, mut device) = ring(MemoryLayout::adjacent(3, 1 << 20), 64, true);
    let mut model = vec![0u8; 1 << 20];
    let cut = |random: &mut fastrand::Rng| match random.u8(0..4) {
        0 => Cut::Natural,
        1 => Cut::Joined,
        2 => Cut::Each(random.usize(100..600)),
        _ => Cut::Sizes(vec![random.usize(1..16), random.usize(1..40), 512]),
    };
    let mut turns = 0;
    while turns < 3000 {
        let mut batch = Vec::new();
        let mut touched: Vec<u64> = Vec::new();
        for _ in 0..random.usize(1..6) {
            let sector = random.u64(0..2000);
            if touched.iter().any(|t| t.abs_diff(sector) < 4) {
                continue;
            }
            touched.push(sector);
            let len = 512 * random.usize(1..4);
            let at = sector as usize * 512;
            let request = if random.bool() {
                Request::In { sector, len }
            } else {
                let data: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(len).collect();
                model[at..at + len].copy_from_slice(&data);
                Request::Out { sector, data }
            };
            let shape = Shape {
                readable: cut(&mut random),
                writable: cut(&mut random),
                indirect: random.bool(),
                placement: [Placement::Packed, Placement::Spread][random.usize(0..2)],
            };
            let laid = Laid::new(driver.memory(), &request, &shape).unwrap();
            match driver.add(&laid.segments(), shape.indirect) {
                Ok(head) => batch.push((head, request, laid, at, len)),
                Err(Error::RingFull(..)) if !batch.is_empty() => {
                    // It was not sent: the model must not have it either.
                    if let Request::Out { .. } = request {
                        model[at..at + len].copy_from_slice(&device.disk[at..at + len]);
                    }
                    break;
                }
                Err(e) => panic!("{e}"),
            }
        }
        driver.publish().unwrap();
        assert_eq!(device.run(random.bool()), batch.len());
        while let Some(used) = driver.pop().unwrap() {
            let i = batch.iter().position(|b| b.0 == used.head).unwrap();
            let (_, request, laid, at, len) = batch.remove(i);
            let (data, status) = laid.outcome().unwrap();
            assert_eq!(status, status::OK);
            match request {
                Request::In { .. } => {
                    assert_eq!(data, model[at..at + len]);
                    assert_eq!(used.len as usize, len + 1);
                }
                _ => assert_eq!(used.len, 1),
            }
            turns += 1;
        }
        assert!(batch.is_empty());
        assert_eq!(driver.free_descriptors(), 64);
    }
    assert_eq!(device.disk, model);
}

fn one_read(driver: &mut DriverRing) -> Laid {
    let request = Request::In { sector: 0, len: 512 };
    let laid = Laid::new(driver.memory(), &request, &Shape::default()).unwrap();
    driver.add(&laid.segments(), false).unwrap();
    laid
}

#[test]
fn without_event_index_a_kick_is_sent_unless_the_device_waves_it_off() {
    let (mut driver, mut device) = ring(MemoryLayout::single(1 << 20), 16, false);
    let _first = one_read(&mut driver);
    assert!(driver.publish().unwrap());
    assert!(!driver.publish().unwrap(), "nothing new, no kick");
    let flags = driver.memory().atomic_u16(driver.layout().used);
    flags.store(spec::USED_NO_NOTIFY, Ordering::Relaxed);
    let _second = one_read(&mut driver);
    assert!(!driver.publish().unwrap());
    assert_eq!(device.run(false), 2);
}

#[test]
fn with_event_index_a_kick_is_sent_only_when_the_index_asked_for_is_passed() {
    let (mut driver, mut device) = ring(MemoryLayout::single(1 << 20), 16, true);
    let _first = one_read(&mut driver);
    assert!(driver.publish().unwrap(), "avail_event is 0 at the start");
    device.run(false);
    let layout = driver.layout();
    let event = layout.used + 4 + 8 * u64::from(layout.size);
    driver.memory().atomic_u16(event).store(2, Ordering::Relaxed);
    let _second = one_read(&mut driver);
    assert!(!driver.publish().unwrap(), "it asked for the third");
    let _third = one_read(&mut driver);
    assert!(driver.publish().unwrap());
}

#[test]
fn a_wait_ends_at_a_call_and_has_a_bound() {
    let (mut driver, mut device) = ring(MemoryLayout::single(1 << 20), 16, true);
    let short = Duration::from_millis(1);
    assert!(matches!(driver.wait(short), Err(Error::Timeout(..))));
    let _laid = one_read(&mut driver);
    driver.publish().unwrap();
    let call = driver.call_fd().try_clone().unwrap();
    let served = std::thread::spawn(move || {
        device.run(false);
        call.write(1).unwrap();
    });
    driver.wait(Duration::from_secs(60)).unwrap();
    assert!(driver.pop().unwrap().is_some());
    served.join().unwrap();
}

#[test]
fn a_used_entry_that_was_never_in_flight_is_refused() {
    let (mut driver, mut device) = ring(MemoryLayout::single(1 << 20), 16, true);
    device.push(3, 0);
    assert!(matches!(driver.pop(), Err(Error::BadUsed(_))));
}

#[test]
fn a_full_ring_refuses_and_a_finished_chain_makes_room() {
    let (mut driver, mut device) = ring(MemoryLayout::single(1 << 20), 16, true);
    let mut laid: Vec<Laid> = (0..5).map(|_| one_read(&mut driver)).collect();
    let request = Request::In { sector: 0, len: 512 };
    let more = Laid::new(driver.memory(), &request, &Shape::default()).unwrap();
    let refused = driver.add(&more.segments(), false);
    assert!(matches!(refused, Err(Error::RingFull(3, 1))));
    driver.add(&more.segments(), true).unwrap();
    laid.push(more);
    driver.publish().unwrap();
    assert_eq!(device.run(true), 6);
    assert_eq!(std::iter::from_fn(|| driver.pop().unwrap()).count(), 6);
    assert_eq!((driver.free_descriptors(), driver.in_flight()), (16, 0));
}
