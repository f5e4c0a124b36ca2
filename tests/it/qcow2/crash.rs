//! Crashes of a machine with an image open.
//!
//! Whatever is left of what was not flushed, nothing is corrupt, and each sector holds what was last flushed or
//! something written since.

use super::consistency;
use super::journal::{Memory, attach};
use super::judge::{assert_allowed, orderly, request, sound};
use super::sim::{DATA, Disks, EVERY, Image, Judged, below, disk, image, passing, try_every};
use crate::disks::{crashes, open_holding, seed, simulated};
use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec};
use vublk::protocol::sim::{SimOptions, Tries};

const LEN: u64 = 64 << 10;
const SECTORS: usize = (LEN / SECTOR) as usize;
const MOST: u64 = 512 << 10;

/// What each sector may hold: the number of the write that is durable, and of those after it.
type Allowed = Vec<Vec<u8>>;

#[derive(Default)]
struct Model {
    allowed: Allowed,
    /// From which length of the log on what was allowed.
    history: Vec<(usize, Allowed)>,
}

struct Case {
    create: &'static str,
    /// What is under the image reads as garbage, and its length is fixed.
    garbage: bool,
    /// A backing file full of this byte.
    backing: Option<u8>,
    cache: &'static str,
    /// Of requests to the disk below. With 1, no transfer comes out short, as a short one would tear
    /// an entry.
    align: u32,
}

const CASES: &[Case] = &[
    Case { create: "cluster_size=4k", garbage: false, backing: None, cache: "", align: 512 },
    Case { create: "cluster_size=4k", garbage: true, backing: None, cache: "", align: 1 },
    Case { create: "cluster_size=4k", garbage: false, backing: Some(250), cache: "", align: 512 },
    Case {
        create: "cluster_size=512,refcount_bits=64",
        garbage: false,
        backing: None,
        cache: "",
        align: 1,
    },
    Case {
        create: "cluster_size=512",
        garbage: true,
        backing: Some(250),
        cache: ",l2-cache-size=1",
        align: 512,
    },
    Case {
        create: "cluster_size=16k,extended_l2=on",
        garbage: false,
        backing: None,
        cache: "",
        align: 1,
    },
    Case {
        create: "cluster_size=16k,extended_l2=on",
        garbage: true,
        backing: Some(250),
        cache: "",
        align: 512,
    },
    Case {
        create: "cluster_size=4k",
        garbage: true,
        backing: None,
        cache: ",discard-no-unref=on",
        align: 512,
    },
    Case {
        create: "cluster_size=16k,extended_l2=on",
        garbage: false,
        backing: Some(250),
        cache: ",discard-no-unref=on",
        align: 1,
    },
    Case {
        create: "cluster_size=4k,compat=0.10",
        garbage: false,
        backing: None,
        cache: "",
        align: 1,
    },
    Case {
        create: "cluster_size=4k,lazy_refcounts=on",
        garbage: true,
        backing: Some(250),
        cache: "",
        align: 1,
    },
    Case {
        create: "cluster_size=512,lazy_refcounts=on",
        garbage: false,
        backing: None,
        cache: ",l2-cache-size=1",
        align: 512,
    },
    Case {
        create: "cluster_size=4k,data_file=D",
        garbage: true,
        backing: Some(250),
        cache: "",
        align: 512,
    },
    Case {
        create: "cluster_size=16k,extended_l2=on,data_file=D",
        garbage: true,
        backing: None,
        cache: "",
        align: 1,
    },
    Case {
        create: "cluster_size=4k,data_file=D,data_file_raw=on",
        garbage: false,
        backing: None,
        cache: "",
        align: 512,
    },
];

/// What a run does. With `packs`, clusters that nothing was written to are written compressed.
#[derive(Clone, Copy)]
struct Work {
    rounds: usize,
    /// Requests side by side, at most.
    writers: usize,
    packs: bool,
    /// Entries of an overlay are kept in memory that outlives the process.
    keeps: bool,
}

const LONG: Work = Work { rounds: 6, writers: 4, packs: false, keeps: false };

/// Requests side by side on different sectors, flushes among them.
async fn work(
    node: std::sync::Arc<Node>,
    disks: Rc<Disks>,
    model: Rc<RefCell<Model>>,
    seed: u64,
    Work { rounds, writers: most_writers, packs, .. }: Work,
) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let unit = (node.compression_unit().unwrap() / SECTOR) as usize;
    let mut fresh: Vec<usize> = (0..SECTORS / unit).collect();
    rng.shuffle(&mut fresh);
    if !packs {
        fresh.clear();
    }
    let now = |model: &mut Model| {
        let at = disks.changes();
        let allowed = model.allowed.clone();
        model.history.push((at, allowed));
    };
    let mut number = 0u8;
    for _ in 0..rounds {
        for _ in 0..rng.usize(0..4) {
            let Some(cluster) = fresh.pop() else { break };
            number += 1;
            let sectors = cluster * unit..(cluster + 1) * unit;
            {
                let mut model = model.borrow_mut();
                model.allowed[sectors].iter_mut().for_each(|sector| sector.push(number));
                now(&mut model);
            }
            let bytes = vec![number; unit * SECTOR as usize];
            let at = (cluster * unit) as u64 * SECTOR;
            let from = IoVec::from_ref(&bytes);
            node.write_compressed(at, &from, WriteFlags::empty()).await.unwrap();
        }
        // Each of a few at once takes its own part of the disk.
        let writers = rng.usize(1..=most_writers);
        let per_writer = SECTORS / writers;
        let done: Rc<RefCell<usize>> = Rc::default();
        let mut begun = Vec::new();
        for writer in 0..writers {
            number += 1;
            let first = writer * per_writer + rng.usize(0..per_writer);
            let count = rng.usize(1..=((writer + 1) * per_writer - first).min(20));
            let sectors = first..first + count;
            let overlaps = |c: usize| c * unit < first + count && first < (c + 1) * unit;
            fresh.retain(|&cluster| !overlaps(cluster));
            let kind = rng.u8(0..8);
            let value = if kind >= 6 { 0 } else { number };
            {
                let mut model = model.borrow_mut();
                model.allowed[sectors.clone()].iter_mut().for_each(|sector| sector.push(value));
                now(&mut model);
            }
            let (node, done) = (node.clone(), done.clone());
            let (at, len) = (first as u64 * SECTOR, count as u64 * SECTOR);
            io::current().spawn(async move {
                request(&node, kind, at, len, value).await;
                *done.borrow_mut() += 1;
            });
            begun.push(sectors);
        }
        while *done.borrow() < writers {
            io::sleep(Duration::from_micros(50)).await;
        }
        // A discard may or may not happen: zero, from then on, is one of the values.
        if rng.u8(0..3) == 0 {
            let first = rng.usize(0..SECTORS);
            let count = rng.usize(1..=(SECTORS - first).min(40));
            let overlaps = |c: usize| c * unit < first + count && first < (c + 1) * unit;
            fresh.retain(|&cluster| !overlaps(cluster));
            {
                let mut model = model.borrow_mut();
                model.allowed[first..first + count].iter_mut().for_each(|sector| {
                    let last = sector[sector.len() - 1];
                    sector.extend([0, last]);
                });
                now(&mut model);
            }
            node.discard(first as u64 * SECTOR, count as u64 * SECTOR).await.unwrap();
            // It has: find out where.
            let mut found = vec![0xff; (count as u64 * SECTOR) as usize];
            node.read(first as u64 * SECTOR, &IoVec::from_mut(&mut found)).await.unwrap();
            let mut model = model.borrow_mut();
            for (n, sector) in found.chunks(SECTOR as usize).enumerate() {
                model.allowed[first + n].push(sector[0]);
            }
            now(&mut model);
        }
        if rng.u8(0..2) == 0 {
            node.flush().await.unwrap();
            let mut model = model.borrow_mut();
            for sector in &mut model.allowed {
                *sector = vec![sector[sector.len() - 1]];
            }
            now(&mut model);
        }
    }
}

fn run(case: &Case, seed: u64, tries: Tries, sample: usize, does: Work) -> Judged {
    let bytes = image(LEN, case.create);
    let mut rng = fastrand::Rng::with_seed(seed);
    let shape = |options: &mut SimOptions| {
        options.log = true;
        options.traits.request_align = case.align;
        options.traits.buffer_align = case.align;
        if case.garbage {
            options.traits.abilities -= Abilities::DISCARD_ZEROES;
        }
    };
    let (image_disk, options) = if case.garbage && !case.create.contains(DATA) {
        let mut device = bytes.clone();
        device.resize(bytes.len().next_multiple_of(65536), 0);
        device.resize_with(MOST as usize, || rng.u8(240..250));
        disk(&device, MOST, shape)
    } else {
        disk(&bytes, MOST, shape)
    };
    let mut options =
        format!("driver=qcow2,discard=unmap{}{}", below("file", &options), case.cache);
    // What the image says alone makes nothing lazy.
    if case.create.contains("lazy_refcounts=on") {
        options += ",lazy-refcounts=on";
    }
    let mut backing = String::new();
    if let Some(byte) = case.backing {
        let (_, below_it) = disk(&vec![byte; LEN as usize], LEN, |_| {});
        backing = below("backing", &below_it);
        options += &backing;
    }
    let data = case.create.contains(DATA).then(|| {
        let bytes: Vec<u8> =
            (0..LEN).map(|_| if case.garbage { rng.u8(240..250) } else { 0 }).collect();
        let (data, below_it) = disk(&bytes, LEN, shape);
        options += &below("data-file", &below_it);
        data
    });
    let disks = Rc::new(Disks { image: image_disk, data });
    let model = Rc::new(RefCell::new(Model {
        allowed: vec![vec![case.backing.unwrap_or(0)]; SECTORS],
        history: Vec::new(),
    }));
    let initial = model.borrow().allowed.clone();
    model.borrow_mut().history.push((0, initial));
    let what = format!("{}, garbage {}, seed {seed}", case.create, case.garbage);
    let short = if case.align == 1 { 0.0 } else { 0.2 };
    simulated(Disorder { short, ..Disorder::wild(seed) }, |_| {
        let (model, disks) = (model.clone(), disks.clone());
        async move {
            let image = Image::open(&options).await;
            if does.keeps {
                // So few that they are handed over meanwhile, too.
                attach(&image.node, Memory::new(5 * 12)).await.unwrap();
            }
            work(image.node.clone(), disks.clone(), model.clone(), seed, does).await;
            image.close().await;
            let mut model = model.borrow_mut();
            let at = disks.changes();
            let last = model.allowed.iter().map(|sector| vec![sector[sector.len() - 1]]).collect();
            model.history.push((at, last));
        }
    });
    let model = model.borrow();
    let (mut n, all) = (0, disks.changes());
    let mut judged = Judged::default();
    disks.crashes(seed, tries, |prefix, state, data| {
        let at = format!("{what}, after {prefix} of {all} changes");
        let known = model.history.partition_point(|(from, _)| *from <= prefix) - 1;
        if !judged.is_new(prefix, known, state, data) {
            return;
        }
        let sound = sound(case.create, state, n % sample == 0, &at);
        n += 1;
        let (_, allowed) = &model.history[known];
        let assert_allowed = |found: &[u8], whose| assert_allowed(found, allowed, &at, whose);
        assert_allowed(&contents(state, data, &backing), "the disk");
        if let Cow::Owned(repaired) = &sound {
            assert_allowed(&contents(repaired, data, &backing), "the repaired disk");
        }
        if case.create.contains("data_file_raw=on") {
            assert_allowed(data, "the raw data file");
        }
    });
    judged
}

fn contents(state: &[u8], data: &[u8], backing: &str) -> Vec<u8> {
    let (_disk, options) = passing(state, state.len() as u64, |_| {});
    let mut options = format!("driver=qcow2,read-only=on{}{backing}", below("file", &options));
    let data = (!data.is_empty()).then(|| passing(data, data.len() as u64, |_| {}));
    if let Some((_, below_it)) = &data {
        options += &below("data-file", below_it);
    }
    simulated(orderly(), |_| async move {
        let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
        let mut found = vec![0xee; LEN as usize];
        opened.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        found
    })
}

#[test]
fn no_crash_corrupts_an_image_or_invents_what_nobody_wrote() {
    let seed = seed();
    for (n, case) in CASES.iter().enumerate() {
        println!("{} {} {:?}", case.create, case.garbage, case.backing);
        run(case, seed.wrapping_add(n as u64), crashes(6), 101, LONG);
    }
}

#[test]
fn no_crash_shows_what_was_not_copied_where_entries_are_kept_in_memory() {
    let seed = seed();
    let cases = CASES.iter().filter(|case| case.backing.is_some());
    for (n, case) in cases.enumerate() {
        println!("{} {}", case.create, case.garbage);
        run(case, seed.wrapping_add(n as u64), crashes(6), 101, Work { keeps: true, ..LONG });
    }
}

#[test]
fn nothing_that_a_crash_of_a_few_requests_can_leave_is_corrupt() {
    let seed = seed();
    let short = Work { rounds: 3, writers: 2, packs: false, keeps: false };
    // One that can discard, one that cannot, and two with two disks.
    let two = CASES.iter().filter(|case| case.create.starts_with("cluster_size=4k,data_file=D"));
    for case in CASES[..2].iter().chain(two) {
        println!("{} {} {:?}", case.create, case.garbage, case.backing);
        try_every(seed, |seed| run(case, seed, EVERY, 101, short));
    }
}

#[test]
fn no_crash_corrupts_an_image_that_compressed_clusters_are_written_to() {
    let seed = seed();
    // An external data file has none.
    let cases = CASES.iter().filter(|case| !case.create.contains(DATA));
    for (n, case) in cases.enumerate() {
        println!("{} {} {:?}", case.create, case.garbage, case.backing);
        run(case, seed.wrapping_add(n as u64), crashes(3), 101, Work { packs: true, ..LONG });
    }
}

#[test]
fn an_image_that_gives_up_what_its_backing_file_has_too_never_shows_anything_else() {
    let seed = seed();
    let kinds = [
        "cluster_size=4k",
        "cluster_size=512",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=4k,data_file=D",
    ];
    for (n, create) in kinds.into_iter().enumerate() {
        let bytes = image(LEN, create);
        let (image_disk, options) = disk(&bytes, MOST, |options| options.log = true);
        let (_, below_it) = disk(&vec![7; LEN as usize], LEN, |_| {});
        let backing = below("backing", &below_it);
        let mut options = format!("driver=qcow2,discard=unmap{}{backing}", below("file", &options));
        let data = create.contains(DATA).then(|| {
            let (data, below_it) = disk(&vec![9; LEN as usize], LEN, |options| options.log = true);
            options += &below("data-file", &below_it);
            data
        });
        let disks = Rc::new(Disks { image: image_disk, data });
        let seed = seed.wrapping_add(n as u64);
        let disorder = Disorder { short: 0.0, ..Disorder::wild(seed) };
        let from = Rc::new(RefCell::new(0));
        simulated(disorder, |_| {
            let (disks, from) = (disks.clone(), from.clone());
            async move {
                let image = Image::open(&options).await;
                let bytes = vec![7; LEN as usize / 2];
                for at in [0, LEN / 2] {
                    image
                        .node
                        .write(at, &IoVec::from_ref(&bytes), WriteFlags::empty())
                        .await
                        .unwrap();
                }
                image.node.flush().await.unwrap();
                *from.borrow_mut() = disks.changes();
                image.node.driver().image().unwrap().make_empty().await.unwrap();
                let extent = image.node.status(0, LEN, Precision::Allocation).await.unwrap();
                assert!(!extent.status.contains(Status::ALLOCATED) && extent.len == LEN);
                image.close().await;
            }
        });
        let from = *from.borrow();
        disks.crashes(seed, crashes(6), |prefix, state, data| {
            if prefix >= from {
                let at = format!("{create}, seed {seed}, after {prefix}");
                consistency::check(state, false).unwrap_or_else(|error| panic!("{at}: {error}"));
                assert!(contents(state, data, &backing).iter().all(|&byte| byte == 7), "{at}");
            }
        });
    }
}
