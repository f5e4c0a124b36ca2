//! Concurrent random requests against a model of each sector.
//!
//! They run over images of several kinds, in any order of completions, with failures, on two workers. The images are
//! sound afterwards.

use super::consistency;
use super::sim::{DATA, Image, below, check, disk, image};
use crate::disks::{seed, simulated};
use crate::fast_path::FastPath;
use crate::model::{CLIENTS, LEN, Run, Value};
use std::sync::mpsc;
use std::time::Duration;
use vublk::block::Abilities;
use vublk::io::sim::Disorder;
use vublk::io::{Worker, WorkerOptions};
use vublk::protocol::sim::{Effect, Fault, Kinds, SimDisk, SimOptions};

const KINDS: &[&str] = &[
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=64k",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,compat=0.10",
    "cluster_size=8k,lazy_refcounts=on",
    "cluster_size=4k,data_file=D",
    "cluster_size=16k,extended_l2=on,data_file=D",
    "cluster_size=8k,data_file=D,data_file_raw=on",
];

/// What is below the image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ground {
    /// A file that grows with zeroes, and takes requests of any alignment.
    Grows,
    /// A device of fixed length, full of garbage.
    Garbage,
    /// A file of 4 KiB blocks, with an empty disk below.
    Overlay,
    /// As much memory for L2 tables as one table has.
    SmallCache,
}

const MOST: u64 = 2 << 20;

pub fn setup(kind: &str, ground: Ground, seed: u64) -> (Vec<SimDisk>, String) {
    let bytes = image(LEN, kind);
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut disks = Vec::new();
    let shape = |options: &mut SimOptions| {
        options.seed = seed;
        options.traits.max_transfer = 16384;
        options.traits.request_align = if ground == Ground::Grows { 1 } else { 512 };
        if ground == Ground::Overlay {
            (options.traits.request_align, options.traits.buffer_align) = (4096, 512);
            (options.traits.zero_align, options.traits.discard_align) = (4096, 4096);
        }
    };
    let (lower, options) = match ground {
        Ground::Garbage => {
            let mut device = bytes.clone();
            let used = bytes.len().next_multiple_of(4096);
            device.resize(used, 0);
            device.resize_with(MOST as usize, || rng.u8(1..));
            disk(&device, MOST, |options| {
                shape(options);
                options.traits.abilities -= Abilities::DISCARD_ZEROES;
            })
        }
        _ => disk(&bytes, MOST, shape),
    };
    disks.push(lower);
    let mut all = format!("driver=qcow2,discard=unmap{}", below("file", &options));
    if kind.contains(DATA) {
        // What is in it belongs to nobody, unless it is a disk by itself.
        let is_raw = kind.contains("data_file_raw=on");
        let bytes: Vec<u8> = (0..LEN).map(|_| if is_raw { 0 } else { rng.u8(1..) }).collect();
        let (data, options) = disk(&bytes, LEN, shape);
        disks.push(data);
        all += &below("data-file", &options);
    }
    if ground == Ground::Overlay && !kind.contains("data_file_raw=on") {
        let (backing, options) = disk(&[], LEN, |options| options.len = LEN - 20480);
        disks.push(backing);
        all += &below("backing", &options);
    }
    if ground == Ground::SmallCache {
        all += ",l2-cache-size=1,l2-cache-entry-size=512";
    }
    (disks, all)
}

/// Where a transfer can be cut anywhere, none is: two writes side by side would share a word.
pub fn disorder(ground: Ground, seed: u64) -> Disorder {
    let short = if ground == Ground::Grows { 0.0 } else { 0.2 };
    Disorder { short, ..Disorder::wild(seed) }
}

fn whole(what: &str, disk: &SimDisk, leaks: bool) {
    let bytes = disk.bytes();
    consistency::check(&bytes, false).unwrap_or_else(|error| panic!("{what}: {error}"));
    check(&bytes, leaks).unwrap_or_else(|error| panic!("{what}: {error}"));
}

#[test]
fn any_order_of_completions_agrees_with_the_model() {
    let seed = seed();
    for (n, kind) in KINDS.iter().enumerate() {
        for ground in [Ground::Grows, Ground::Garbage, Ground::Overlay, Ground::SmallCache] {
            let seed = seed.wrapping_add((n as u64 * 4 + ground as u64) << 32);
            let what = format!("{kind}, {ground:?}, seed {seed}");
            println!("{what}");
            let (disks, options) = setup(kind, ground, seed);
            let result = simulated(disorder(ground, seed), |local| {
                let fast_path = FastPath::attach(local);
                async move {
                    let image = Image::open(&options).await;
                    let run = Run::new(&image.node, Value::Write(0), false);
                    let result = run.clients(fast_path, seed, 120).await;
                    image.close().await;
                    result
                }
            });
            result.unwrap_or_else(|error| panic!("{what}: {error}"));
            whole(&what, &disks[0], true);
        }
    }
}

#[test]
fn failing_and_torn_requests_agree_with_the_model() {
    let seed = seed();
    for (n, kind) in KINDS.iter().enumerate() {
        for ground in [Ground::Grows, Ground::Garbage, Ground::Overlay] {
            let seed = seed.wrapping_add((n as u64 * 4 + ground as u64) << 32);
            let what = format!("{kind}, {ground:?}, seed {seed}");
            println!("{what}");
            let (disks, options) = setup(kind, ground, seed);
            let faulty = disks[0].clone();
            let result = simulated(disorder(ground, seed), |local| {
                let fast_path = FastPath::attach(local);
                async move {
                    let image = Image::open(&options).await;
                    let errno = vublk::io::Errno::EIO;
                    let writes = Kinds::WRITE | Kinds::ZERO;
                    let all = Kinds::all();
                    let tear = match ground {
                        Ground::Grows => Effect::Fail(errno),
                        _ => Effect::Tear(errno),
                    };
                    faulty.inject(Fault::new(writes, tear).with_probability(0.02));
                    faulty.inject(Fault::new(all, Effect::Fail(errno)).with_probability(0.02));
                    let run = Run::new(&image.node, Value::Anything, true);
                    let result = run.clients(fast_path, seed, 150).await;
                    faulty.heal();
                    image.close().await;
                    result
                }
            });
            result.unwrap_or_else(|error| panic!("{what}: {error}"));
            whole(&what, &disks[0], false);
        }
    }
}

#[test]
fn two_workers_agree_with_the_model() {
    let seed = seed();
    for (n, kind) in KINDS.iter().enumerate() {
        let ground = [Ground::Grows, Ground::Overlay, Ground::SmallCache][n % 3];
        let (disks, options) = setup(kind, ground, seed);
        let quiet = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
        let workers: Vec<_> =
            (0..2).map(|n| Worker::start(&format!("qcow{n}"), quiet).unwrap()).collect();
        let image = workers[0].block_on(move || async move { Image::open(&options).await });
        let run = Run::new(&image.node, Value::Write(0), false);
        let (sender, results) = mpsc::channel();
        for (n, worker) in workers.iter().enumerate() {
            let (run, sender) = (run.clone(), sender.clone());
            let seed = seed.wrapping_add(n as u64 * CLIENTS);
            worker.send(move |local| {
                let fast_path = FastPath::attach(local);
                local.io().spawn(async move {
                    let _ = sender.send(run.clients(fast_path, seed, 300).await);
                });
            });
        }
        for _ in &workers {
            let result = results.recv_timeout(Duration::from_secs(100)).expect("the clients end");
            result.unwrap_or_else(|error| panic!("{kind} (seed {seed}): {error}"));
        }
        drop(run);
        workers[0].block_on(move || async move { image.close().await });
        whole(&format!("{kind}, {ground:?}, seed {seed}"), &disks[0], true);
    }
}
