//! Processes killed with an image open whose entries are in memory that outlives them.
//!
//! The images are of formats other than qcow2. The next process has all that was answered. (Invalid records are in
//! `qcow2::journal`.)

use crate::disks::{seed, simulated};
use crate::qcow2::journal::{Memory, attach, detach};
use crate::qcow2::judge::{Round, assert_allowed, orderly, request};
use crate::qcow2::sim::{Image, below, disk};
use std::cell::RefCell;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec};
use vublk::protocol::sim::SimDisk;

const LEN: u64 = 64 << 10;
const SECTORS: usize = (LEN / SECTOR) as usize;
const MOST: u64 = 512 << 10;
const BELOW: u8 = 250;

/// Formats with a journal, and how their images are made.
const KINDS: [(&str, &str); 4] = [
    ("qed", "cluster_size=4k,table_size=2"),
    ("qed", "cluster_size=8k,table_size=2"),
    ("vmdk", "zeroed_grain=on"),
    ("qcow", "encryption=off"),
];

/// What is there when the process is killed, and what each sector may hold.
#[derive(Clone, PartialEq)]
struct Killed {
    image: Vec<u8>,
    memory: Vec<u64>,
    allowed: Vec<Vec<u8>>,
}

fn image(format: &str, create: &str) -> Vec<u8> {
    image_of(format, create, LEN)
}

fn image_of(format: &str, create: &str, len: u64) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format, "-o", create]).arg(file.path());
    assert!(command.arg(len.to_string()).status().unwrap().success());
    let mut image = std::fs::read(file.path()).unwrap();
    if format == "vmdk" {
        // Grains of 4 KiB, which QEMU reads and does not make.
        image[20] = 8;
    }
    image
}

/// An overlay of a disk that is full of one byte.
fn over(format: &str, image: &[u8]) -> (SimDisk, String) {
    let (image, file) = disk(image, MOST, |_| {});
    let (_, backing) = disk(&vec![BELOW; LEN as usize], LEN, |_| {});
    let (file, backing) = (below("file", &file), below("backing", &backing));
    (image, format!("driver={format},discard=unmap{file}{backing}"))
}

/// Requests side by side, with flushes among them; and what is there at many moments meanwhile.
fn run(format: &'static str, image: &[u8], records: usize, seed: u64) -> Vec<Killed> {
    let (file, options) = over(format, image);
    let killed: Rc<RefCell<Vec<Killed>>> = Rc::default();
    let all = killed.clone();
    simulated(Disorder { short: 0.0, ..Disorder::wild(seed) }, |_| async move {
        let image = Image::open(&options).await;
        let memory = Memory::new(records * 5 + 3);
        attach(&image.node, memory.clone()).await.unwrap();
        let allowed = Rc::new(RefCell::new(vec![vec![BELOW]; SECTORS]));
        let mut rng = fastrand::Rng::with_seed(seed);
        for round in 0..12u8 {
            let mut number = round * 4;
            let next = || {
                number += 1;
                number
            };
            let requests = Round::begin(&image.node, &allowed, &mut rng, 12, next);
            while requests.is_under_way() {
                let now = Killed {
                    image: file.bytes(),
                    memory: memory.copy(),
                    allowed: allowed.borrow().clone(),
                };
                if all.borrow().last() != Some(&now) {
                    all.borrow_mut().push(now);
                }
                io::sleep(Duration::from_micros(rng.u64(1..120))).await;
            }
            if rng.u8(0..4) == 0 {
                image.node.flush().await.unwrap();
            }
        }
        detach(&image.node, memory.clone()).await;
        assert_eq!(memory.records(), 0, "all is handed over");
        image.close().await;
    });
    killed.take()
}

/// The next process takes up what the memory says, and has all that was answered; what it writes goes over none of it.
fn judge(format: &str, killed: &Killed, at: &str) {
    let (file, options) = over(format, &killed.image);
    let memory = Memory::holding(&killed.memory);
    let (killed, whence) = (killed.clone(), at.to_owned());
    simulated(orderly(), |_| async move {
        let at = &*whence;
        let image = Image::open(&options).await;
        attach(&image.node, memory.clone()).await.unwrap_or_else(|error| panic!("{at}: {error}"));
        assert_eq!(memory.records(), 0, "{at}: what was taken up is handed over");
        let mut found = vec![0xee; LEN as usize];
        image.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        assert_allowed(&found, &killed.allowed, at, "the disk");
        // New clusters are those that nothing names any more, and then others.
        for n in 0..LEN / 4096 {
            request(&image.node, 0, n * 4096, 512, 99).await;
            found[(n * 4096) as usize..][..512].fill(99);
        }
        let mut after = vec![0xee; LEN as usize];
        image.node.read(0, &IoVec::from_mut(&mut after)).await.unwrap();
        assert!(after == found, "{at}: what was written later is over something else");
        image.close().await;
    });
    let kept = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(kept.path(), file.bytes()).unwrap();
    let mut command = Command::new("qemu-img");
    let checked = command.args(["check", "-f", format]).arg(kept.path()).output().unwrap();
    // 63: QEMU does not check the format.
    assert!(matches!(checked.status.code(), Some(0 | 3 | 63)), "{at}: {checked:?}");
}

#[test]
fn nothing_that_was_answered_is_lost_with_the_process_whatever_the_format() {
    let seed = seed();
    let mut kept = 0;
    for (n, (format, create)) in KINDS.into_iter().enumerate() {
        let new = image(format, create);
        // Room for all, and for so few that they are handed over again and again.
        for records in [4096, 6] {
            let seed = seed.wrapping_add(n as u64);
            let all = run(format, &new, records, seed);
            for (moment, killed) in all.iter().enumerate().step_by(3) {
                kept += usize::from(Memory::holding(&killed.memory).records() > 0);
                let at =
                    format!("{format} {create}, {records} records, seed {seed}, moment {moment}");
                judge(format, killed, &at);
            }
        }
    }
    assert!(kept > 10, "{kept} times something was kept");
}

#[test]
fn entries_that_wait_are_seen_after_their_tables_have_left_the_cache() {
    // Slices so far apart are in one set of the cache, which has room for fewer.
    const APART: u64 = 32 << 30;
    let state = image_of("qed", "cluster_size=64k,table_size=1", 16 * APART);
    let (_, options) = disk(&state, 64 << 20, |_| {});
    let options = format!("driver=qed{}", below("file", &options));
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        let memory = Memory::new(200);
        attach(&image.node, memory.clone()).await.unwrap();
        for n in 0..16 {
            request(&image.node, 0, n * APART, 512, n as u8 + 1).await;
        }
        assert_eq!(memory.records(), 16, "all of them wait");
        for n in 0..16 {
            let mut found = [0; 512];
            image.node.read(n * APART, &IoVec::from_mut(&mut found)).await.unwrap();
            assert_eq!(found, [n as u8 + 1; 512]);
        }
        image.close().await;
    });
}

#[test]
fn a_killed_process_leaves_no_space_behind_in_a_qed_image() {
    for has_memory in [false, true] {
        let mut state = image("qed", "cluster_size=4k,table_size=2");
        for life in 0..5u64 {
            let (file, options) = over("qed", &state);
            let is_last = life == 4;
            state = simulated(orderly(), move |_| async move {
                let image = Image::open(&options).await;
                if has_memory {
                    // The guest was started again: what another one's memory named is gone with it.
                    attach(&image.node, Memory::new(100)).await.unwrap();
                }
                request(&image.node, 0, life * 4096, 512, 7).await;
                image.node.flush().await.unwrap();
                let killed = file.bytes();
                image.close().await;
                if is_last { file.bytes() } else { killed }
            });
        }
        let kept = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(kept.path(), &state).unwrap();
        let check = Command::new("qemu-img").args(["check", "-f", "qed"]).arg(kept.path()).output();
        let check = check.unwrap();
        assert_eq!(check.status.code(), Some(0), "memory: {has_memory}: {check:?}");
        // The header, both tables, and the clusters.
        assert_eq!(state.len(), (5 + 5) * 4096, "memory: {has_memory}");
    }
}
