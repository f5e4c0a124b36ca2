//! Snapshots made and deleted while many requests are in flight.
//!
//! They run on simulated rings with failures and on two workers. Each snapshot permanently shows what could be read
//! at one moment of its making, and the requests agree with their model.

use super::consistency;
use super::model::{Ground, disorder, setup};
use super::sim::{Image, check};
use crate::disks::{open_holding, seed, simulated};
use crate::fast_path::FastPath;
use crate::model::{CLIENTS, LEN, Run, Value};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec, Worker, WorkerOptions};
use vublk::protocol::sim::{Effect, Fault, Kinds, SimDisk};

const KINDS: &[&str] = &[
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,compat=0.10",
    "cluster_size=8k,lazy_refcounts=on",
];

/// A snapshot that is there, and when it was made.
struct Kept {
    name: String,
    began: u64,
    ended: u64,
}

fn snapshots(node: &Node) -> &dyn Snapshots {
    node.driver().image().unwrap().snapshots().unwrap()
}

/// Makes snapshots and deletes some again; those that are left for certain. The names of those of
/// which nobody knows begin with a question mark.
async fn change_snapshots(run: Run, node: Arc<Node>, seed: u64, faulty: bool) -> Vec<Kept> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut kept: Vec<Kept> = Vec::new();
    for n in 0..6 {
        io::sleep(Duration::from_micros(rng.u64(0..3000))).await;
        if kept.len() > 1 && rng.bool() {
            let gone = kept.swap_remove(rng.usize(0..kept.len()));
            run.forget_kept(gone.began);
            let deleted = snapshots(&node).delete(SnapshotKey::Name(&gone.name)).await;
            assert!(faulty || deleted.is_ok(), "{deleted:?}");
            continue;
        }
        let name = format!("s{n}");
        let began = run.begin_kept();
        let new = NewSnapshot { name: &name, date: Duration::ZERO, icount: None };
        match snapshots(&node).create(new).await {
            Ok(_) => kept.push(Kept { name, began, ended: run.now() }),
            Err(error) => {
                assert!(faulty, "{error}");
                run.forget_kept(began);
            }
        }
    }
    kept
}

/// Looks at each snapshot, and whether all is whole.
fn judge(what: &str, disk: &SimDisk, options: &str, run: &Run, kept: Vec<Kept>, leaks: bool) {
    let bytes = disk.bytes();
    let is_dirty = bytes[79] & 1 == 1;
    let options = options.to_owned();
    let (run, judged) = (run.clone(), what.to_owned());
    simulated(Disorder::wild(1), |_| async move {
        if is_dirty {
            assert!(!leaks, "{judged}: the image is dirty");
            // Opening it repairs it.
            Image::open(&options).await.close().await;
        }
        for one in kept {
            let options = options.replace(",discard=unmap", ",read-only=on");
            let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
            let snapshots = snapshots(&opened.node);
            snapshots.load(SnapshotKey::Name(&one.name)).await.unwrap();
            let mut found = vec![0xee; LEN as usize];
            opened.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
            let shown = run.check_kept(one.began, one.ended, &found);
            shown.unwrap_or_else(|error| panic!("{judged}: {}: {error}", one.name));
        }
    });
    let bytes = disk.bytes();
    consistency::check(&bytes, true).unwrap_or_else(|error| panic!("{what}: {error}"));
    check(&bytes, leaks).unwrap_or_else(|error| panic!("{what}: {error}"));
}

#[test]
fn snapshots_made_among_requests_show_one_moment_and_do_not_change() {
    let seed = seed();
    for (n, kind) in KINDS.iter().enumerate() {
        for ground in [Ground::Grows, Ground::Garbage, Ground::SmallCache] {
            let seed = seed.wrapping_add((n as u64 * 4 + ground as u64) << 32);
            let what = format!("{kind}, {ground:?}, seed {seed}");
            println!("{what}");
            let (disks, options) = setup(kind, ground, seed);
            let all = options.clone();
            let (run, kept) = simulated(disorder(ground, seed), |local| {
                let fast_path = FastPath::attach(local);
                async move {
                    let image = Image::open(&all).await;
                    let run = Run::new(&image.node, Value::Write(0), false);
                    let kept = beside(&run, &image.node, fast_path, seed, false).await;
                    image.close().await;
                    (run, kept)
                }
            });
            judge(&what, &disks[0], &options, &run, kept, true);
        }
    }
}

/// Clients, and snapshots beside them.
async fn beside(
    run: &Run,
    node: &Arc<Node>,
    fast_path: FastPath,
    seed: u64,
    faulty: bool,
) -> Vec<Kept> {
    let kept: Rc<RefCell<Option<Vec<Kept>>>> = Rc::default();
    let (result, snapshots) =
        (kept.clone(), change_snapshots(run.clone(), node.clone(), seed, faulty));
    io::current().spawn(async move {
        let kept = snapshots.await;
        *result.borrow_mut() = Some(kept);
    });
    let clients = run.clone().clients(fast_path, seed, 120).await;
    clients.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    loop {
        if let Some(kept) = kept.take() {
            return kept;
        }
        io::sleep(Duration::from_micros(300)).await;
    }
}

#[test]
fn snapshots_of_failing_storage_are_whole_or_not_there() {
    let seed = seed();
    for (n, kind) in KINDS.iter().enumerate() {
        for ground in [Ground::Grows, Ground::Garbage] {
            let seed = seed.wrapping_add((n as u64 * 4 + ground as u64) << 32);
            let what = format!("{kind}, {ground:?}, seed {seed}");
            println!("{what}");
            let (disks, options) = setup(kind, ground, seed);
            let (all, faulty) = (options.clone(), disks[0].clone());
            let (run, kept) = simulated(disorder(ground, seed), |local| {
                let fast_path = FastPath::attach(local);
                async move {
                    let image = Image::open(&all).await;
                    let errno = io::Errno::EIO;
                    let fail = Fault::new(Kinds::all(), Effect::Fail(errno)).with_probability(0.01);
                    faulty.inject(fail);
                    let run = Run::new(&image.node, Value::Anything, true);
                    let kept = beside(&run, &image.node, fast_path, seed, true).await;
                    faulty.heal();
                    image.close().await;
                    (run, kept)
                }
            });
            // Version 2 cannot say that something is wrong, which only a repair finds.
            if !kind.contains("compat=0.10") {
                judge(&what, &disks[0], &options, &run, kept, false);
            }
        }
    }
}

#[test]
fn snapshots_made_under_two_workers_show_one_moment() {
    let seed = seed();
    for (n, kind) in KINDS.iter().enumerate() {
        let ground = [Ground::Grows, Ground::SmallCache][n % 2];
        let (disks, options) = setup(kind, ground, seed);
        let quiet = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
        let start = |n: usize| Worker::start(&format!("snap{n}"), quiet).unwrap();
        let workers: Vec<_> = (0..3).map(start).collect();
        let all = options.clone();
        let image = workers[0].block_on(move || async move { Image::open(&all).await });
        let run = Run::new(&image.node, Value::Write(0), false);
        let (sender, results) = mpsc::channel();
        for (n, worker) in workers[1..].iter().enumerate() {
            let (run, sender) = (run.clone(), sender.clone());
            let seed = seed.wrapping_add(n as u64 * CLIENTS);
            worker.send(move |local| {
                let fast_path = FastPath::attach(local);
                local.io().spawn(async move {
                    let _ = sender.send(run.clients(fast_path, seed, 400).await);
                });
            });
        }
        let (beside, node) = (run.clone(), image.node.clone());
        let kept = workers[0]
            .block_on(move || async move { change_snapshots(beside, node, seed, false).await });
        for _ in &workers[1..] {
            let result = results.recv_timeout(Duration::from_secs(100)).expect("the clients end");
            result.unwrap_or_else(|error| panic!("{kind} (seed {seed}): {error}"));
        }
        workers[0].block_on(move || async move { image.close().await });
        let what = format!("{kind}, {ground:?}, seed {seed}");
        judge(&what, &disks[0], &options, &run, kept, true);
    }
}
