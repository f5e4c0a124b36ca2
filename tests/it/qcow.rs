//! qcow images (version 1) on simulated disks: a model test and a crash test.
//!
//! Random requests agree with a model. After each crash an image opens, each sector holds what was last flushed or
//! something written since, and no cluster has two owners.

use crate::disks::{crashes, seed, simulated};
use crate::fast_path::FastPath;
use crate::model::{self, CLIENTS, Run, Value};
use crate::qcow2::sim::{Image, below, disk, passing};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, Errno, IoVec, Worker, WorkerOptions};
use vublk::protocol::sim::{Effect, Fault, Kinds, SimOptions};

/// Of the disk that crashes are tried with.
const LEN: u64 = 64 << 10;
const SECTORS: usize = (LEN / SECTOR) as usize;
/// Bytes that the image's file may have.
const MOST: u64 = 2 << 20;
/// What the backing file has in each byte.
const BELOW: u8 = 200;

/// A new image's file; over a backing file clusters have 512 bytes, otherwise 4 KiB.
fn image(len: u64, has_backing: bool) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-u", "-f", "qcow"]);
    if has_backing {
        command.args(["-b", "below", "-F", "raw"]);
    }
    command.arg(file.path()).arg(len.to_string());
    assert!(command.status().unwrap().success());
    std::fs::read(file.path()).unwrap()
}

/// Requests are whole sectors: a transfer that comes out short tears none.
fn sectors(options: &mut SimOptions) {
    options.traits.request_align = 512;
}

/// The options of an image, with the backing file if there is one.
fn over(file: &str, backing: Option<&str>) -> String {
    let backing = backing.map(|disk| below("backing", disk)).unwrap_or_default();
    format!("driver=qcow,discard=unmap{}{backing}", below("file", file))
}

/// Fails if two things of an image share bytes of its file, or one is past its end.
fn assert_sound(bytes: &[u8]) {
    let u64_at = |at: u64| {
        let bytes = bytes.get(at as usize..at as usize + 8).expect("a table is in the file");
        u64::from_be_bytes(bytes.try_into().unwrap())
    };
    let (cluster_bits, table_bits) = (u32::from(bytes[32]), u32::from(bytes[33]));
    let (size, l1) = (u64_at(24), u64_at(40));
    let tables = size.div_ceil(1 << (cluster_bits + table_bits));
    let mut used = BTreeMap::from([(0, 48), (l1, l1 + tables * 8)]);
    let mut add = |from: u64, len: u64, what: &str| {
        assert!(from + len <= bytes.len() as u64, "{what} at {from:#x} is past the end");
        assert_eq!(used.insert(from, from + len), None, "{what} at {from:#x} is named twice");
    };
    for table in (0..tables).map(|n| u64_at(l1 + n * 8)).filter(|&table| table != 0) {
        add(table, 8 << table_bits, "a table");
        for entry in (0..1 << table_bits).map(|n| u64_at(table + n * 8)) {
            let shift = 63 - cluster_bits;
            match entry {
                0 => {}
                _ if entry >> 63 == 0 => add(entry, 1 << cluster_bits, "a cluster"),
                _ => add(
                    entry & ((1 << shift) - 1),
                    (entry >> shift) & ((1 << cluster_bits) - 1),
                    "a packed cluster",
                ),
            }
        }
    }
    let mut end = 0;
    for (from, to) in used {
        assert!(from >= end, "what is at {from:#x} overlaps with what ends at {end:#x}");
        end = to;
    }
}

/// What each sector may hold: the number of the write that is durable, and of those after it.
type Allowed = Vec<Vec<u8>>;

/// Writes, also packed, zeroes, discards and flushes at random. Returns, for each length of the log, what may be found
/// from there on.
async fn work(
    image: &Image,
    first: u8,
    seed: u64,
    changes: impl Fn() -> usize,
) -> Vec<(usize, Allowed)> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut allowed = vec![vec![first]; SECTORS];
    let mut history = vec![(0, allowed.clone())];
    let unit = image.node.compression_unit().unwrap();
    for number in 1..=70u8 {
        let is_packed = number % 3 == 0;
        let unit = if is_packed { unit } else { SECTOR };
        let units = LEN / unit;
        let at = rng.u64(0..units);
        let count = rng.u64(1..=(units - at).min((24 * SECTOR / unit).max(2)));
        let (at, len) = (at * unit, count * unit);
        let value = if number % 4 == 0 && !is_packed { 0 } else { number };
        let before = allowed.clone();
        let sectors = (at / SECTOR) as usize..((at + len) / SECTOR) as usize;
        allowed[sectors.clone()].iter_mut().for_each(|sector| sector.push(value));
        history.push((changes(), allowed.clone()));
        let bytes = vec![value; len as usize];
        let from = IoVec::from_ref(&bytes);
        let flags = WriteFlags::empty();
        match number % 8 {
            _ if is_packed => match image.node.write_compressed(at, &from, flags).await {
                // Something is there already, in one of the clusters.
                Err(Errno::EIO) => {
                    let kept = allowed[sectors.clone()].iter_mut().zip(&before[sectors.clone()]);
                    kept.for_each(|(now, before)| now.extend(before.clone()));
                }
                written => written.unwrap(),
            },
            0 => image.node.zero(at, len, ZeroFlags::UNMAP).await.unwrap(),
            4 => image.node.zero(at, len, ZeroFlags::empty()).await.unwrap(),
            _ => image.node.write(at, &from, flags).await.unwrap(),
        }
        // Which of the two a sector holds after a packed write that was refused.
        let mut found = vec![0; len as usize];
        image.node.read(at, &IoVec::from_mut(&mut found)).await.unwrap();
        for (sector, bytes) in allowed[sectors].iter_mut().zip(found.chunks(SECTOR as usize)) {
            assert!(sector.contains(&bytes[0]));
            sector.push(bytes[0]);
        }
        if rng.u8(0..5) == 0 {
            image.node.flush().await.unwrap();
            for sector in &mut allowed {
                *sector = vec![*sector.last().unwrap()];
            }
        }
        history.push((changes(), allowed.clone()));
        io::sleep(Duration::from_micros(10)).await;
    }
    history
}

/// What the disk holds after a crash.
fn reopened(state: &[u8], backing: Option<&str>) -> Vec<u8> {
    let orderly = Disorder { seed: 1, max_delay: Duration::ZERO, short: 0.0, interrupted: 0.0 };
    let (disk, options) = passing(state, 2 * MOST, sectors);
    let (sender, receiver) = mpsc::channel();
    let options = over(&options, backing);
    simulated(orderly, |_| async move {
        let image = Image::open(&options).await;
        let mut found = vec![0xff; LEN as usize];
        image.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        // New clusters get in nobody's way.
        let written = [77; 3 << 9];
        let from = IoVec::from_ref(&written);
        image.node.write(LEN / 2, &from, WriteFlags::empty()).await.unwrap();
        image.close().await;
        sender.send(found).unwrap();
    });
    assert_sound(&disk.bytes());
    receiver.recv().unwrap()
}

#[test]
fn what_was_flushed_survives_every_crash_of_a_qcow_image() {
    let seed = seed();
    for has_backing in [false, true] {
        let (_backing, backing) = disk(&[BELOW; LEN as usize], LEN, sectors);
        let backing = has_backing.then_some(&*backing);
        let (disk, name) = disk(&image(LEN, has_backing), MOST, |options| {
            options.log = true;
            sectors(options);
        });
        let (sender, receiver) = mpsc::channel();
        let (log_of, options) = (disk.clone(), over(&name, backing));
        let first = if has_backing { BELOW } else { 0 };
        simulated(Disorder::wild(seed), |_| async move {
            let image = Image::open(&options).await;
            let changes = || log_of.log().changes().len();
            let history = work(&image, first, seed, changes).await;
            image.close().await;
            sender.send(history).unwrap();
        });
        assert_sound(&disk.bytes());
        let history = receiver.recv().unwrap();
        let log = disk.log();
        let mut tried = 0;
        for crash in log.crashes(seed, crashes(4)) {
            let known = history.iter().rev().find(|(from, _)| *from <= crash.prefix);
            let (_, allowed) = known.expect("the first holds from the beginning");
            let found = reopened(&log.image(&crash), backing);
            for (n, sector) in found.chunks(SECTOR as usize).enumerate() {
                let whole = sector.iter().all(|&byte| byte == sector[0]);
                assert!(
                    whole && allowed[n].contains(&sector[0]),
                    "seed {seed}, backing {has_backing}, after {} changes: sector {n} holds {}, not one of {:?}",
                    crash.prefix,
                    sector[0],
                    allowed[n]
                );
            }
            tried += 1;
        }
        assert!(tried > 200, "only {tried} crashes were tried");
    }
}

#[test]
fn an_image_that_is_emptied_shows_its_backing_file_after_every_crash() {
    let seed = seed();
    let (_backing, backing) = disk(&[BELOW; LEN as usize], LEN, sectors);
    let (disk, name) = disk(&image(LEN, true), MOST, |options| {
        options.log = true;
        sectors(options);
    });
    let (log_of, options) = (disk.clone(), over(&name, Some(&backing)));
    let (sender, receiver) = mpsc::channel();
    simulated(Disorder::wild(seed), |_| async move {
        let image = Image::open(&options).await;
        let bytes = vec![BELOW; LEN as usize / 2];
        let from = IoVec::from_ref(&bytes);
        image.node.write(1000, &from, WriteFlags::empty()).await.unwrap();
        let packed = IoVec::from_ref(&bytes[..4096]);
        image.node.write_compressed(LEN - 4096, &packed, WriteFlags::empty()).await.unwrap();
        image.node.flush().await.unwrap();
        let from = log_of.log().changes().len();
        image.node.driver().image().unwrap().make_empty().await.unwrap();
        // Clusters are used again.
        let from_again = IoVec::from_ref(&bytes[..20_000]);
        image.node.write(500, &from_again, WriteFlags::empty()).await.unwrap();
        image.close().await;
        sender.send(from).unwrap();
    });
    let from = receiver.recv().unwrap();
    let log = disk.log();
    for crash in log.crashes(seed, crashes(8)).filter(|crash| crash.prefix >= from) {
        let found = reopened(&log.image(&crash), Some(&backing));
        assert!(found.iter().all(|&byte| byte == BELOW), "after {} changes", crash.prefix);
    }
    assert!(disk.bytes().len() < 64 << 10, "{} bytes are left", disk.bytes().len());
}

/// An image for the model, over an empty disk that is shorter if it has a backing file.
fn for_the_model(has_backing: bool, shape: impl Fn(&mut SimOptions)) -> (Vec<impl Sized>, String) {
    let (file, options) = disk(&image(model::LEN, has_backing), MOST, &shape);
    if !has_backing {
        return (vec![file], over(&options, None));
    }
    let (lower, backing) = disk(&[], model::LEN, |options| {
        shape(options);
        options.len = model::LEN - 20480;
    });
    (vec![file, lower], over(&options, Some(&backing)))
}

#[test]
fn any_order_of_completions_agrees_with_the_model() {
    let seed = seed();
    for (has_backing, align) in [(false, 1), (true, 1), (false, 4096), (true, 4096)] {
        let (_disks, options) = for_the_model(has_backing, |options| {
            options.traits.max_transfer = 16384;
            (options.traits.request_align, options.traits.buffer_align) = (align, align.min(512));
            (options.traits.zero_align, options.traits.discard_align) = (align, align);
        });
        // Where a transfer can be cut anywhere, none is: two writes side by side would share a word.
        let short = if align == 1 { 0.0 } else { 0.2 };
        let result = simulated(Disorder { short, ..Disorder::wild(seed) }, |local| {
            let fast_path = FastPath::attach(local);
            async move {
                let image = Image::open(&options).await;
                let run = Run::new(&image.node, Value::Write(0), false);
                let result = run.clients(fast_path, seed, 150).await;
                image.close().await;
                result
            }
        });
        let what = format!("backing {has_backing}, align {align}, seed {seed}");
        result.unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

#[test]
fn failing_requests_agree_with_the_model_and_leave_a_sound_image() {
    let seed = seed();
    for has_backing in [false, true] {
        let (file, name) = disk(&image(model::LEN, has_backing), MOST, sectors);
        let (_lower, backing) = disk(&[], model::LEN, sectors);
        let options = over(&name, has_backing.then_some(&*backing));
        let faulty = file.clone();
        let result = simulated(Disorder::wild(seed), |local| {
            let fast_path = FastPath::attach(local);
            async move {
                let image = Image::open(&options).await;
                let (writes, all) = (Kinds::WRITE | Kinds::ZERO, Kinds::all());
                let tear = Effect::Tear(Errno::EIO);
                faulty.inject(Fault::new(writes, tear).with_probability(0.02));
                let fail = Effect::Fail(Errno::EIO);
                faulty.inject(Fault::new(all, fail).with_probability(0.02));
                let run = Run::new(&image.node, Value::Anything, true);
                let result = run.clients(fast_path, seed, 150).await;
                faulty.heal();
                image.close().await;
                result
            }
        });
        result.unwrap_or_else(|error| panic!("backing {has_backing}, seed {seed}: {error}"));
        assert_sound(&file.bytes());
    }
}

#[test]
fn two_workers_agree_with_the_model() {
    let seed = seed();
    for has_backing in [false, true] {
        let (_disks, options) = for_the_model(has_backing, |_| ());
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
                    let _ = sender.send(run.clients(fast_path, seed, 200).await);
                });
            });
        }
        for _ in &workers {
            let result = results.recv_timeout(Duration::from_secs(100)).expect("the clients end");
            result.unwrap_or_else(|error| panic!("backing {has_backing}, seed {seed}: {error}"));
        }
        drop(run);
        workers[0].block_on(move || async move { image.close().await });
    }
}
