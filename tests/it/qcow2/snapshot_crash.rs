//! Crashes of a machine while snapshots are made, deleted and applied under writes.
//!
//! The disk holds what it may, each snapshot that was answered exists with its contents, and whatever the dirty bit
//! does not warn of is right.

use super::consistency;
use super::judge::{may_be_wrong, orderly, repair, request};
use super::sim::{EVERY, Image, Judged, below, check, disk, image, passing, try_every};
use crate::disks::{crashes, open_holding, seed, simulated};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use vublk::block::*;
use vublk::format::qcow2::header::Header;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec};
use vublk::protocol::sim::{SimDisk, Tries};

const LEN: u64 = 32 << 10;
const SECTORS: usize = (LEN / SECTOR) as usize;
const MOST: u64 = 768 << 10;

/// What each sector may hold.
type Allowed = Vec<Vec<u8>>;

#[derive(Clone, Default)]
struct State {
    /// What the disk may be: all of it as one of these says.
    disk: Vec<Allowed>,
    /// By name: whether it must be there, and what it holds.
    snapshots: BTreeMap<String, (bool, Allowed)>,
}

#[derive(Default)]
struct Model {
    now: State,
    /// From which length of the log on what was so.
    history: Vec<(usize, State)>,
}

struct Case {
    create: &'static str,
    garbage: bool,
    align: u32,
}

const CASES: &[Case] = &[
    Case { create: "cluster_size=4k", garbage: false, align: 512 },
    Case { create: "cluster_size=512,refcount_bits=64", garbage: true, align: 1 },
    Case { create: "cluster_size=16k,extended_l2=on", garbage: true, align: 512 },
    Case { create: "cluster_size=1k,refcount_bits=4", garbage: false, align: 1 },
    Case { create: "cluster_size=4k,compat=0.10", garbage: false, align: 512 },
    Case { create: "cluster_size=4k,lazy_refcounts=on", garbage: true, align: 1 },
];

struct Work {
    node: Arc<Node>,
    disk: SimDisk,
    model: Rc<RefCell<Model>>,
}

impl Work {
    /// Changes what is known.
    fn note(&self, change: impl FnOnce(&mut State)) {
        let mut model = self.model.borrow_mut();
        change(&mut model.now);
        let state = (self.disk.log().changes().len(), model.now.clone());
        model.history.push(state);
    }

    fn snapshots(&self) -> &dyn Snapshots {
        self.node.driver().image().unwrap().snapshots().unwrap()
    }

    fn names(&self) -> Vec<String> {
        self.model.borrow().now.snapshots.keys().cloned().collect()
    }

    /// Writes side by side on different sectors; gives how many have ended.
    fn begin_writes(
        &self,
        rng: &mut fastrand::Rng,
        number: &mut u8,
        writers: usize,
    ) -> Rc<RefCell<usize>> {
        let done: Rc<RefCell<usize>> = Rc::default();
        let per_writer = SECTORS / writers;
        for writer in 0..writers {
            *number += 1;
            let first = writer * per_writer + rng.usize(0..per_writer);
            let count = rng.usize(1..=((writer + 1) * per_writer - first).min(20));
            let kind = rng.u8(0..8);
            let value = if kind >= 6 { 0 } else { *number };
            self.note(|state| {
                let sectors = &mut state.disk[0][first..first + count];
                sectors.iter_mut().for_each(|sector| sector.push(value));
            });
            let (node, done) = (self.node.clone(), done.clone());
            let (at, len) = (first as u64 * SECTOR, count as u64 * SECTOR);
            io::current().spawn(async move {
                request(&node, kind, at, len, value).await;
                *done.borrow_mut() += 1;
            });
        }
        done
    }

    /// What each sector holds once all that has begun has ended.
    fn last(&self) -> Vec<u8> {
        self.model.borrow().now.disk[0].iter().map(|sector| sector[sector.len() - 1]).collect()
    }

    /// Makes one or deletes one, while writes are under way that began `before`.
    async fn change_snapshots(&self, rng: &mut fastrand::Rng, name: String, before: &[u8]) {
        let names = self.names();
        if names.len() < 2 {
            let both = before.iter().zip(self.last());
            let allowed = both.map(|(&before, after)| vec![before, after]).collect();
            self.note(|state| drop(state.snapshots.insert(name.clone(), (false, allowed))));
            let new = NewSnapshot { name: &name, date: Duration::ZERO, icount: None };
            self.snapshots().create(new).await.unwrap();
            self.note(|state| {
                state.snapshots.get_mut(&name).unwrap().0 = true;
            });
        } else {
            let name = names[rng.usize(0..names.len())].clone();
            self.note(|state| state.snapshots.get_mut(&name).unwrap().0 = false);
            self.snapshots().delete(SnapshotKey::Name(&name)).await.unwrap();
            self.note(|state| drop(state.snapshots.remove(&name)));
        }
    }

    /// Turns the disk back to one, while nothing else continues.
    async fn apply(&self, name: &str) {
        self.flush().await;
        let old = self.snapshot(name);
        self.note(|state| state.disk.push(old));
        self.snapshots().apply(SnapshotKey::Name(name)).await.unwrap();
        self.note(|state| drop(state.disk.remove(0)));
        let mut found = vec![0xee; LEN as usize];
        self.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        let found: Allowed = found.chunks(SECTOR as usize).map(|sector| vec![sector[0]]).collect();
        self.note(|state| {
            assert!(fits(&found, &state.disk[0]), "another disk than the snapshot's");
            // It holds one value of each now, and the snapshot the same one.
            state.disk[0] = found.clone();
            state.snapshots.get_mut(name).unwrap().1 = found;
        });
    }

    fn snapshot(&self, name: &str) -> Allowed {
        self.model.borrow().now.snapshots[name].1.clone()
    }

    async fn flush(&self) {
        self.node.flush().await.unwrap();
        self.note(|state| {
            for sector in &mut state.disk[0] {
                *sector = vec![sector[sector.len() - 1]];
            }
        });
    }

    async fn run(self, seed: u64, rounds: usize) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut number = 0;
        for round in 0..rounds {
            let writers = rng.usize(1..=3);
            let before = self.last();
            let done = self.begin_writes(&mut rng, &mut number, writers);
            if rng.u8(0..4) > 0 {
                io::sleep(Duration::from_micros(rng.u64(0..200))).await;
                self.change_snapshots(&mut rng, format!("s{round}"), &before).await;
            }
            while *done.borrow() < writers {
                io::sleep(Duration::from_micros(50)).await;
            }
            if rng.bool() {
                self.flush().await;
            }
            let names = self.names();
            if !names.is_empty() && rng.u8(0..3) == 0 {
                self.apply(&names[rng.usize(0..names.len())]).await;
            }
        }
    }
}

fn fits(found: &Allowed, allowed: &Allowed) -> bool {
    found.iter().zip(allowed).all(|(found, allowed)| allowed.contains(&found[0]))
}

fn run(case: &Case, seed: u64, tries: Tries, sample: usize, rounds: usize) -> Judged {
    let bytes = image(LEN, case.create);
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut device = bytes.clone();
    if case.garbage {
        device.resize(bytes.len().next_multiple_of(65536), 0);
        device.resize_with(MOST as usize, || rng.u8(240..250));
    }
    let (disk_, options) = disk(&device, MOST, |options| {
        options.log = true;
        options.traits.request_align = case.align;
        options.traits.buffer_align = case.align;
    });
    let mut options = format!("driver=qcow2,discard=unmap{}", below("file", &options));
    // What the image says alone makes nothing lazy.
    if case.create.contains("lazy_refcounts=on") {
        options += ",lazy-refcounts=on";
    }
    let model = Rc::new(RefCell::new(Model::default()));
    {
        let mut model = model.borrow_mut();
        model.now.disk = vec![vec![vec![0]; SECTORS]];
        let state = model.now.clone();
        model.history.push((0, state));
    }
    let what = format!("{}, garbage {}, seed {seed}", case.create, case.garbage);
    let short = if case.align == 1 { 0.0 } else { 0.2 };
    simulated(Disorder { short, ..Disorder::wild(seed) }, |_| {
        let (model, disk) = (model.clone(), disk_.clone());
        async move {
            let image = Image::open(&options).await;
            Work { node: image.node.clone(), disk, model }.run(seed, rounds).await;
            image.close().await;
        }
    });
    let log = disk_.log();
    let model = model.borrow();
    let (mut n, mut judged) = (0, Judged::default());
    for crash in log.crashes(seed, tries) {
        let state = log.image(&crash);
        let at = format!("{what}, after {} of {} changes", crash.prefix, log.changes().len());
        let known = model.history.partition_point(|(from, _)| *from <= crash.prefix) - 1;
        if !judged.is_new(crash.prefix, known, &state, &[]) {
            continue;
        }
        let (_, known) = &model.history[known];
        judge(&at, &state, known);
        let repaired = match may_be_wrong(&state) {
            true => repair(&state),
            false => state,
        };
        consistency::check(&repaired, true).unwrap_or_else(|error| panic!("{at}: {error}"));
        if n % sample == 0 {
            check(&repaired, false).unwrap_or_else(|error| panic!("{at}: {error}"));
            judge(&at, &repaired, known);
        }
        n += 1;
    }
    judged
}

/// Whether the disk and its snapshots are what they may be.
fn judge(at: &str, state: &[u8], known: &State) {
    let (names, found) = contents(state, None);
    assert!(
        known.disk.iter().any(|allowed| fits(&found, allowed)),
        "{at}: the disk holds {found:?}, not what one of these says: {:?}",
        known.disk
    );
    for (name, (is_sure, _)) in &known.snapshots {
        assert!(!is_sure || names.contains(name), "{at}: snapshot {name} is gone");
    }
    for name in names {
        let Some((_, allowed)) = known.snapshots.get(&name) else {
            panic!("{at}: snapshot {name} should not be there");
        };
        let (_, found) = contents(state, Some(&name));
        assert!(fits(&found, allowed), "{at}: snapshot {name} holds {found:?}, not {allowed:?}");
    }
}

/// The names of the snapshots, and what the disk holds, or one of them.
fn contents(state: &[u8], snapshot: Option<&str>) -> (Vec<String>, Allowed) {
    let bits = Header::cluster_bits(state.first_chunk().unwrap()).unwrap();
    let header = Header::parse(&state[..1 << bits]).unwrap();
    assert_eq!(header.size, LEN);
    let (_disk, options) = passing(state, state.len() as u64, |_| {});
    let options = format!("driver=qcow2,read-only=on{}", below("file", &options));
    let snapshot = snapshot.map(str::to_owned);
    simulated(orderly(), |_| async move {
        let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
        let snapshots = opened.node.driver().image().unwrap().snapshots().unwrap();
        let names = snapshots.list().unwrap().into_iter().map(|one| one.name).collect();
        if let Some(name) = snapshot {
            snapshots.load(SnapshotKey::Name(&name)).await.unwrap();
        }
        let mut found = vec![0xee; LEN as usize];
        opened.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        let sectors = found.chunks(SECTOR as usize).map(|sector| {
            assert!(sector.iter().all(|&byte| byte == sector[0]), "a torn sector");
            vec![sector[0]]
        });
        (names, sectors.collect())
    })
}

#[test]
fn no_crash_loses_a_snapshot_or_lets_it_change() {
    let seed = seed();
    for (n, case) in CASES.iter().enumerate() {
        println!("{} {}", case.create, case.garbage);
        run(case, seed.wrapping_add(n as u64), crashes(3), 53, 5);
    }
}

#[test]
fn nothing_that_a_crash_of_a_few_requests_can_leave_loses_a_snapshot() {
    let seed = seed();
    try_every(seed, |seed| run(&CASES[0], seed, EVERY, 101, 2));
}
