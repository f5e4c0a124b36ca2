//! Crashes of a machine while a disk is resized.
//!
//! The disk has the old length or the new one, nothing is corrupt, its contents are there, and the new part is
//! zeroes.

use super::judge::{assert_allowed, orderly, sound};
use super::sim::{DATA, Disks, EVERY, Image, Judged, below, disk, image, passing, try_every};
use crate::disks::{crashes, open_holding, seed, simulated};
use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use vublk::block::*;
use vublk::format::qcow2::header::Header;
use vublk::io::IoVec;
use vublk::io::sim::Disorder;
use vublk::protocol::sim::{SimOptions, Tries};

/// At the beginning, in sectors.
const START: usize = 96;
const FILE: u64 = 1 << 20;
const BACKING: u8 = 250;

#[derive(Clone, Default)]
struct Known {
    /// From which length of the log on.
    from: usize,
    /// What each sector may hold, beyond the end, too: what is found there once the disk has it.
    allowed: Vec<Vec<u8>>,
    /// Lengths that the disk may have, in sectors.
    sizes: Vec<usize>,
}

struct Case {
    create: &'static str,
    /// The most that the disk gets, in sectors.
    most: usize,
    garbage: bool,
    has_backing: bool,
    /// Of requests to the disk below. With 1, no transfer comes out short, as a short one would tear
    /// an entry.
    align: u32,
}

const CASES: &[Case] = &[
    Case { create: "cluster_size=4k", most: 512, garbage: false, has_backing: false, align: 512 },
    Case { create: "cluster_size=4k", most: 512, garbage: true, has_backing: false, align: 1 },
    Case { create: "cluster_size=4k", most: 512, garbage: false, has_backing: true, align: 512 },
    // The L1 table moves.
    Case { create: "cluster_size=512", most: 4500, garbage: false, has_backing: false, align: 1 },
    Case {
        create: "cluster_size=512,refcount_bits=64",
        most: 4500,
        garbage: true,
        has_backing: true,
        align: 512,
    },
    Case {
        create: "cluster_size=16k,extended_l2=on",
        most: 512,
        garbage: true,
        has_backing: true,
        align: 512,
    },
    Case {
        create: "cluster_size=4k,data_file=D",
        most: 512,
        garbage: true,
        has_backing: true,
        align: 512,
    },
    Case {
        create: "cluster_size=4k,data_file=D,data_file_raw=on",
        most: 512,
        garbage: false,
        has_backing: false,
        align: 1,
    },
    Case {
        create: "cluster_size=4k,lazy_refcounts=on",
        most: 512,
        garbage: true,
        has_backing: true,
        align: 1,
    },
    // The L1 table moves.
    Case {
        create: "cluster_size=512,lazy_refcounts=on",
        most: 4500,
        garbage: false,
        has_backing: false,
        align: 512,
    },
    // What would show the backing file is refused.
    Case {
        create: "cluster_size=4k,compat=0.10",
        most: 512,
        garbage: false,
        has_backing: true,
        align: 1,
    },
];

#[derive(Default)]
struct Model {
    now: Known,
    history: Vec<Known>,
}

impl Model {
    fn book(&mut self, log: usize) {
        self.now.from = log;
        self.history.push(self.now.clone());
    }
}

fn run(case: &Case, seed: u64, tries: Tries, sample: usize, steps: u8) -> Judged {
    let bytes = image(START as u64 * SECTOR, case.create);
    let mut rng = fastrand::Rng::with_seed(seed);
    let shape = |options: &mut SimOptions| {
        options.log = true;
        options.fixed = case.garbage && !case.create.contains(DATA);
        options.traits.request_align = case.align;
        options.traits.buffer_align = case.align;
    };
    let (image_disk, options) = if case.garbage && !case.create.contains(DATA) {
        let mut device = bytes.clone();
        device.resize(bytes.len().next_multiple_of(65536), 0);
        device.resize_with(FILE as usize, || rng.u8(240..250));
        disk(&device, FILE, shape)
    } else {
        disk(&bytes, FILE, shape)
    };
    let mut options = format!("driver=qcow2,discard=unmap{}", below("file", &options));
    // What the image says alone makes nothing lazy.
    if case.create.contains("lazy_refcounts=on") {
        options += ",lazy-refcounts=on";
    }
    let mut backing = String::new();
    if case.has_backing {
        // Longer than the disk is most of the time.
        let len = 4096 * SECTOR;
        backing = below("backing", &disk(&vec![BACKING; len as usize], len, |_| {}).1);
        options += &backing;
    }
    let data = case.create.contains(DATA).then(|| {
        let len = START as u64 * SECTOR;
        let bytes: Vec<u8> =
            (0..len).map(|_| if case.garbage { rng.u8(240..250) } else { 0 }).collect();
        let (data, below_it) = disk(&bytes, FILE, shape);
        options += &below("data-file", &below_it);
        data
    });
    let disks = Rc::new(Disks { image: image_disk, data });
    let shown = if case.has_backing { BACKING } else { 0 };
    let mut allowed = vec![vec![shown]; START];
    allowed.resize(case.most, vec![0]);
    let now = Known { from: 0, allowed, sizes: vec![START] };
    let model = Rc::new(RefCell::new(Model { history: vec![now.clone()], now }));
    let what = format!("{}, garbage {}, seed {seed}", case.create, case.garbage);
    let short = if case.align == 1 { 0.0 } else { 0.2 };
    let most = case.most;
    simulated(Disorder { short, ..Disorder::wild(seed) }, |_| {
        let (model, disks) = (model.clone(), disks.clone());
        async move {
            let image = Image::open(&options).await;
            let mut now = model.take();
            for number in 1..=steps {
                one_step(&image, &mut now, &|| disks.changes(), number, (&mut rng, most)).await;
            }
            image.close().await;
            model.replace(now);
        }
    });
    let model = model.borrow();
    let (mut n, all) = (0, disks.changes());
    let mut judged = Judged::default();
    disks.crashes(seed, tries, |prefix, state, data| {
        let at = format!("{what}, after {prefix} of {all} changes");
        let known = model.history.partition_point(|known| known.from <= prefix) - 1;
        if !judged.is_new(prefix, known, state, data) {
            return;
        }
        let sound = sound(case.create, state, n % sample == 0, &at);
        n += 1;
        let Known { allowed, sizes, .. } = &model.history[known];
        let found = contents(state, data, &backing);
        let count = found.len() / SECTOR as usize;
        assert!(sizes.contains(&count), "{at}: {count} sectors, not one of {sizes:?}");
        let assert_allowed = |found: &[u8], whose| assert_allowed(found, allowed, &at, whose);
        assert_allowed(&found, "the disk");
        if case.create.contains("data_file_raw=on") {
            assert_allowed(&data[..data.len().min(found.len())], "the raw data file");
        }
        if let Cow::Owned(repaired) = &sound {
            let found = contents(repaired, data, &backing);
            assert_eq!(found.len() / SECTOR as usize, count, "{at}: the repaired disk's length");
            assert_allowed(&found, "the repaired disk");
        }
    });
    judged
}

async fn one_step(
    image: &Image,
    model: &mut Model,
    log: &dyn Fn() -> usize,
    number: u8,
    (rng, most): (&mut fastrand::Rng, usize),
) {
    let old = model.now.sizes[0];
    let first = rng.usize(0..old);
    let count = rng.usize(1..=(old - first).min(30));
    let (at, len) = (first as u64 * SECTOR, count as u64 * SECTOR);
    let kind = rng.u8(0..10);
    let value = if kind == 4 { 0 } else { number };
    if kind < 5 {
        let sectors = &mut model.now.allowed[first..first + count];
        sectors.iter_mut().for_each(|sector| sector.push(value));
        model.book(log());
    }
    match kind {
        4 => image.node.zero(at, len, ZeroFlags::UNMAP).await.unwrap(),
        0..4 => {
            let bytes = vec![value; len as usize];
            let from = IoVec::from_ref(&bytes);
            image.node.write(at, &from, WriteFlags::empty()).await.unwrap();
        }
        5 => {
            image.node.flush().await.unwrap();
            let last = |sector: &mut Vec<u8>| *sector = vec![sector[sector.len() - 1]];
            model.now.allowed.iter_mut().for_each(last);
            model.book(log());
        }
        _ => {
            let new = match rng.bool() {
                true => rng.usize(1..most),
                false => rng.usize(1..=old),
            };
            let cropped = &mut model.now.allowed[new.min(old)..old];
            cropped.iter_mut().for_each(|sector| sector.push(0));
            model.now.sizes = vec![old, new];
            model.book(log());
            let resized = image.resize(new as u64 * SECTOR).await;
            let new = match resized {
                Ok(()) => new,
                Err(error) => {
                    let what = error.to_string();
                    assert!(what.starts_with("Failed to zero out new clusters"), "{what}");
                    old
                }
            };
            let end = old.max(new);
            model.now.allowed[new.min(old)..end].iter_mut().for_each(|sector| *sector = vec![0]);
            model.now.sizes = vec![new];
            model.book(log());
        }
    }
}

fn contents(state: &[u8], data: &[u8], backing: &str) -> Vec<u8> {
    let (_disk, options) = passing(state, state.len() as u64, |_| {});
    let mut options = format!("driver=qcow2,read-only=on{}{backing}", below("file", &options));
    let data = (!data.is_empty()).then(|| passing(data, data.len() as u64, |_| {}));
    if let Some((_, below_it)) = &data {
        options += &below("data-file", below_it);
    }
    let mut head = state
        [..Header::cluster_bits(state.first_chunk().unwrap()).map_or(512, |b| 1 << b)]
        .to_vec();
    head.resize(head.len().max(512), 0);
    let len = Header::parse(&head).unwrap().size;
    simulated(orderly(), |_| async move {
        let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
        assert_eq!(opened.node.len(), len);
        let mut found = vec![0xee; len as usize];
        opened.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        found
    })
}

#[test]
fn no_crash_while_a_disk_is_resized_corrupts_it_or_shows_what_was_not_there() {
    let seed = seed();
    for (n, case) in CASES.iter().enumerate() {
        println!("{} {} {}", case.create, case.garbage, case.has_backing);
        run(case, seed.wrapping_add(n as u64), crashes(4), 101, 10);
    }
}

#[test]
fn nothing_that_a_crash_of_a_few_steps_can_leave_is_another_disk() {
    let seed = seed();
    for create in ["cluster_size=4k", "cluster_size=4k,data_file=D"] {
        let case = Case { create, most: 160, garbage: false, has_backing: false, align: 512 };
        try_every(seed, |seed| run(&case, seed, EVERY, 101, 5));
    }
}
