//! Processes killed with an image open whose entries are in memory that outlives them.
//!
//! The next one has all that was answered. (Hosts that crash are in [`super::crash`].)

use super::consistency;
use super::judge::{Round, assert_allowed, may_be_wrong, orderly, request};
use super::sim::{DATA, Image, below, disk, image};
use crate::disks::{seed, simulated};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec};
use vublk::protocol::sim::{Change, SimDisk};

pub(super) const LEN: u64 = 64 << 10;
const SECTORS: usize = (LEN / SECTOR) as usize;
const MOST: u64 = 512 << 10;
pub(super) const BELOW: u8 = 250;

/// Memory that is still there when the process is not.
pub struct Memory(Vec<AtomicU64>);

impl Survivor for Memory {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

impl Memory {
    /// Room for so many words, which are zeroes.
    pub fn new(words: usize) -> Arc<Memory> {
        Memory::holding(&vec![0; words])
    }

    /// Memory that another process has left.
    pub fn holding(words: &[u64]) -> Arc<Memory> {
        Arc::new(Memory(words.iter().map(|&word| AtomicU64::new(word)).collect()))
    }

    /// All words.
    pub fn copy(&self) -> Vec<u64> {
        self.0.iter().map(|word| word.load(Ordering::SeqCst)).collect()
    }

    /// How many records it has.
    pub fn records(&self) -> usize {
        self.0.chunks(5).filter(|record| record[0].load(Ordering::SeqCst) != 0).count()
    }
}

/// Makes a disk's image keep its entries in `memory`.
pub async fn attach(node: &Arc<Node>, memory: Arc<Memory>) -> Result<(), Error> {
    let node = node.journaled().expect("an image below that can");
    node.driver().journaled().unwrap().attach(memory).await
}

/// Makes a disk's image hand over its entries, and use the memory no more.
pub async fn detach(node: &Arc<Node>, memory: Arc<Memory>) {
    let node = node.journaled().unwrap();
    node.driver().journaled().unwrap().detach(memory).await.unwrap();
}

/// What is there when the process is killed, and what each sector may hold: what was answered last, or what
/// was not answered yet.
#[derive(Clone, PartialEq)]
struct Killed {
    image: Vec<u8>,
    data: Vec<u8>,
    memory: Vec<u64>,
    allowed: Vec<Vec<u8>>,
}

pub(super) struct Disks {
    pub image: SimDisk,
    data: Option<SimDisk>,
    pub options: String,
}

/// An overlay of a disk that is full of one byte.
pub(super) fn disks(create: &str, image: &[u8], data: &[u8]) -> Disks {
    let (image, file) = disk(image, MOST, |_| {});
    let (_, backing) = disk(&vec![BELOW; LEN as usize], LEN, |_| {});
    let (file, backing) = (below("file", &file), below("backing", &backing));
    let mut options = format!("driver=qcow2,discard=unmap{file}{backing}");
    let data = create.contains(DATA).then(|| {
        let (data, file) = disk(data, LEN, |_| {});
        options += &below("data-file", &file);
        data
    });
    Disks { image, data, options }
}

/// Requests side by side, with flushes, discards and snapshots among them; and what is there at many
/// moments meanwhile.
fn run(create: &str, records: usize, seed: u64) -> Vec<Killed> {
    let Disks { image: file, data, options } =
        disks(create, &image(LEN, create), &vec![0; LEN as usize]);
    let killed: Rc<RefCell<Vec<Killed>>> = Rc::default();
    let all = killed.clone();
    let has_snapshots = !create.contains(DATA);
    simulated(Disorder { short: 0.0, ..Disorder::wild(seed) }, |_| async move {
        let image = Image::open(&options).await;
        let memory = Memory::new(records * 5 + 3);
        attach(&image.node, memory.clone()).await.unwrap();
        let allowed = Rc::new(RefCell::new(vec![vec![BELOW]; SECTORS]));
        let is_over = Rc::new(Cell::new(false));
        let is_looking = Rc::new(Cell::new(true));
        {
            let (memory, allowed, all) = (memory.clone(), allowed.clone(), all.clone());
            let (is_over, is_looking) = (is_over.clone(), is_looking.clone());
            io::current().spawn(async move {
                let mut rng = fastrand::Rng::with_seed(seed);
                while !is_over.get() {
                    let now = Killed {
                        image: file.bytes(),
                        data: data.as_ref().map(SimDisk::bytes).unwrap_or_default(),
                        memory: memory.copy(),
                        allowed: allowed.borrow().clone(),
                    };
                    if all.borrow().last() != Some(&now) {
                        all.borrow_mut().push(now);
                    }
                    io::sleep(Duration::from_micros(rng.u64(1..120))).await;
                }
                is_looking.set(false);
            });
        }
        let mut rng = fastrand::Rng::with_seed(seed ^ 1);
        let mut number = 0;
        for round in 0..14 {
            let next = || {
                number += 1;
                number
            };
            let requests = Round::begin(&image.node, &allowed, &mut rng, 12, next);
            while requests.is_under_way() {
                io::sleep(Duration::from_micros(20)).await;
            }
            match rng.u8(0..6) {
                0 | 1 => image.node.flush().await.unwrap(),
                2 => {
                    let first = rng.usize(0..SECTORS - 24);
                    for sector in &mut allowed.borrow_mut()[first..first + 24] {
                        sector.push(0);
                    }
                    image.node.discard(first as u64 * SECTOR, 24 * SECTOR).await.unwrap();
                    let mut found = vec![0xff; 24 * SECTOR as usize];
                    let at = first as u64 * SECTOR;
                    image.node.read(at, &IoVec::from_mut(&mut found)).await.unwrap();
                    let found = found.chunks(SECTOR as usize);
                    for (sector, found) in allowed.borrow_mut()[first..].iter_mut().zip(found) {
                        *sector = vec![found[0]];
                    }
                }
                3 if has_snapshots && round < 8 => {
                    let snapshots = image.node.driver().image().unwrap().snapshots().unwrap();
                    let name = format!("s{round}");
                    let new = NewSnapshot { name: &name, date: Duration::ZERO, icount: None };
                    snapshots.create(new).await.unwrap();
                    if rng.bool() {
                        snapshots.delete(SnapshotKey::Name(&name)).await.unwrap();
                    }
                }
                _ => {}
            }
        }
        is_over.set(true);
        while is_looking.get() {
            io::sleep(Duration::from_micros(20)).await;
        }
        detach(&image.node, memory.clone()).await;
        assert_eq!(memory.records(), 0, "all is handed over");
        image.close().await;
    });
    killed.take()
}

/// The next process takes up what the memory says, and has all that was answered.
fn judge(create: &str, killed: &Killed, at: &str) {
    match may_be_wrong(&killed.image) {
        // Opening it repairs it, and gives back what nothing refers to.
        true => assert_eq!(Memory::holding(&killed.memory).records(), 0, "{at}"),
        false => {
            let sound = consistency::check(&killed.image, true);
            sound.unwrap_or_else(|error| panic!("{at}: {error}"));
        }
    }
    let Disks { image: file, options, .. } = disks(create, &killed.image, &killed.data);
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
        image.close().await;
    });
    consistency::check(&file.bytes(), true).unwrap_or_else(|error| panic!("{at}: {error}"));
}

const KINDS: [&str; 4] = [
    "cluster_size=4k",
    "cluster_size=512",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,data_file=D",
];

#[test]
fn nothing_that_was_answered_is_lost_with_the_process() {
    let seed = seed();
    let mut kept = 0;
    for (n, create) in KINDS.into_iter().enumerate() {
        // Room for all, and for so few that they are handed over again and again.
        for records in [4096, 6] {
            let seed = seed.wrapping_add(n as u64);
            let all = run(create, records, seed);
            for (moment, killed) in all.iter().enumerate() {
                kept += usize::from(Memory::holding(&killed.memory).records() > 0);
                let at = format!("{create}, {records} records, seed {seed}, moment {moment}");
                judge(create, killed, &at);
            }
        }
    }
    assert!(kept > 100, "{kept} times something was kept");
}

/// The file of an image with one entry that is kept, and the memory.
pub(super) fn with_one_record() -> (Vec<u8>, Vec<u64>) {
    let create = "cluster_size=4k";
    let Disks { image: file, options, .. } = disks(create, &image(LEN, create), &[]);
    let left: Rc<RefCell<(Vec<u8>, Vec<u64>)>> = Rc::default();
    let killed = left.clone();
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        let memory = Memory::new(100);
        attach(&image.node, memory.clone()).await.unwrap();
        request(&image.node, 0, 8192, 512, 1).await;
        *killed.borrow_mut() = (file.bytes(), memory.copy());
        image.close().await;
        assert_eq!(memory.records(), 0, "closing hands it over");
    });
    let (state, words) = left.take();
    assert_eq!(words[..3], [3, 0, 0], "the third cluster was nowhere");
    (state, words)
}

#[test]
fn what_the_memory_says_is_refused_if_it_cannot_be_so() {
    let (state, words) = with_one_record();
    let create = "cluster_size=4k";
    let take_up = |state: &[u8], words: &[u64]| {
        let Disks { image: file, options, .. } = disks(create, state, &[]);
        let (state, memory) = (state.to_vec(), Memory::holding(words));
        let result = Rc::new(RefCell::new(String::new()));
        let clone = result.clone();
        simulated(orderly(), |_| async move {
            let image = Image::open(&options).await;
            if let Err(error) = attach(&image.node, memory.clone()).await {
                *clone.borrow_mut() = error.to_string();
                assert!(memory.records() > 0, "it stays for whoever can use it");
                // The header may have a mark.
                let tables = 512..state.len().min(20 << 10);
                assert!(file.bytes()[tables.clone()] == state[tables], "nothing was changed");
            }
            image.close().await;
        });
        result.take()
    };
    assert_eq!(take_up(&state, &words), "");
    let host = words[3] & !(1 << 63);
    let with = |changes: &[(usize, u64)]| {
        let mut words = words.clone();
        changes.iter().for_each(|&(at, word)| words[at] = word);
        words
    };
    for (what, words) in [
        ("a guest cluster behind the disk", with(&[(0, 1 << 40)])),
        ("the last number there is", with(&[(0, u64::MAX)])),
        ("the header", with(&[(3, 1 << 63)])),
        ("the L1 table", with(&[(3, 1 << 63 | 12288)])),
        ("a cluster behind the file", with(&[(3, 1 << 63 | 1 << 40)])),
        ("not the start of a cluster", with(&[(3, 1 << 63 | host | 512)])),
        ("a cluster that is shared", with(&[(3, host)])),
        ("a compressed cluster", with(&[(3, 1 << 62 | host)])),
        ("no data", with(&[(3, 0)])),
        ("another entry in the old one's place", with(&[(1, 1)])),
        ("an old entry that refers to something", with(&[(1, 1 << 63 | host)])),
        ("two that name one cluster", with(&[(5, 4), (8, 1 << 63 | host)])),
    ] {
        let clone = take_up(&state, &words);
        assert!(clone.contains("cannot be taken up"), "{what}: {clone:?}");
    }
    // Somebody has repaired the image, so that the cluster is free.
    let freed = super::judge::repair(&state);
    let clone = take_up(&freed, &words);
    assert!(clone.contains("have been given to others since"), "{clone:?}");
}

#[test]
fn first_writes_to_the_parts_of_one_cluster_wait_for_one_flush_together() {
    // Bytes of a part; whether the cluster is there before, without data.
    for (create, part, is_there) in
        [("cluster_size=16k,extended_l2=on", 512, false), ("cluster_size=4k", 4096, true)]
    {
        let (file, options) = disk(&image(LEN, create), MOST, |options| options.log = true);
        let (_, backing) = disk(&vec![BELOW; LEN as usize], LEN, |_| {});
        let (file_options, backing) = (below("file", &options), below("backing", &backing));
        let options = format!("driver=qcow2{file_options}{backing}");
        let log = file.clone();
        simulated(orderly(), |_| async move {
            let flushes = || {
                let is_flush = |change: &&Change| matches!(change, Change::Flush { .. });
                log.log().changes().iter().filter(is_flush).count()
            };
            let image = Image::open(&options).await;
            let memory = Memory::new(100);
            attach(&image.node, memory.clone()).await.unwrap();
            if is_there {
                request(&image.node, 0, 0, 8 * part, 1).await;
                request(&image.node, 7, 0, 8 * part, 0).await;
            }
            request(&image.node, 0, 8 * part, 512, 1).await;
            let before = flushes();
            for n in 0..8 {
                request(&image.node, 0, n * part, 512, n as u8 + 2).await;
            }
            assert_eq!(flushes() - before, 0, "{create}");
            assert_eq!(memory.records(), if is_there { 9 } else { 1 }, "{create}");
            image.node.flush().await.unwrap();
            assert_eq!(memory.records(), 0, "{create}");
            assert!(flushes() - before <= 3, "{create}");
            image.close().await;
            let image = Image::open(&options).await;
            let mut found = vec![0xee; 9 * part as usize];
            image.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
            let firsts = found.chunks(part as usize).map(|part| part[0]);
            assert_eq!(firsts.collect::<Vec<_>>(), [2, 3, 4, 5, 6, 7, 8, 9, 1], "{create}");
            let rest = if is_there { 0 } else { BELOW };
            assert!(part == 512 || found[part as usize - 1] == rest, "{create}");
            image.close().await;
        });
        consistency::check(&file.bytes(), true).unwrap();
    }
}

#[test]
fn nothing_is_kept_as_long_as_two_front_ends_might_come_back() {
    let create = "cluster_size=4k";
    let Disks { options, .. } = disks(create, &image(LEN, create), &[]);
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        let (one, other) = (Memory::new(100), Memory::new(100));
        let records = || (one.records(), other.records());
        attach(&image.node, one.clone()).await.unwrap();
        request(&image.node, 0, 0, 512, 1).await;
        assert_eq!(records(), (1, 0));
        attach(&image.node, other.clone()).await.unwrap();
        assert_eq!(records(), (0, 0), "it was handed over");
        request(&image.node, 0, 4096, 512, 1).await;
        assert_eq!(records(), (0, 0));
        detach(&image.node, other.clone()).await;
        request(&image.node, 0, 8192, 512, 1).await;
        assert_eq!(records(), (1, 0));
        detach(&image.node, one.clone()).await;
        request(&image.node, 0, 12288, 512, 1).await;
        assert_eq!(records(), (0, 0));
        image.close().await;
    });
}

#[test]
fn a_snapshot_that_was_made_before_the_guest_came_back_is_not_written_over() {
    let (state, words) = with_one_record();
    let create = "cluster_size=4k";
    let Disks { image: file, options, .. } = disks(create, &state, &[]);
    let left = words.clone();
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        let snapshots = image.node.driver().image().unwrap().snapshots().unwrap();
        let new = NewSnapshot { name: "s", date: Duration::ZERO, icount: None };
        snapshots.create(new).await.unwrap();
        let clone = attach(&image.node, Memory::holding(&left)).await.unwrap_err().to_string();
        assert!(clone.contains("the image has changed since"), "{clone}");
        image.close().await;
    });
    consistency::check(&file.bytes(), true).unwrap();
}
