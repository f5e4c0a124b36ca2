//! Processes that are killed again and again with an image open leave no leaked clusters.
//!
//! These would be clusters reserved, taken for requests in flight, or about to be freed.

use super::consistency;
use super::journal::{Memory, attach};
use super::judge::{Round, assert_allowed, orderly, request};
use super::sim::{Image, below, check, disk, image};
use crate::disks::{seed, simulated};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec};
use vublk::protocol::sim::SimDisk;

const LEN: u64 = 1 << 20;
const SECTORS: usize = (LEN / SECTOR) as usize;
const MOST: u64 = 16 << 20;
const LIVES: u64 = 24;

/// What is there when a process is killed.
#[derive(Clone)]
struct Killed {
    image: Vec<u8>,
    memory: Vec<u64>,
    allowed: Vec<Vec<u8>>,
}

/// How many clusters of an image are counted more often than they are referred to.
fn leaks(image: &[u8]) -> u64 {
    let (_, options) = disk(image, MOST, |_| {});
    let options = format!("driver=qcow2{}", below("file", &options));
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        let shown = image.node.driver().image().unwrap();
        let report = shown.check(Fix::Nothing, &mut |_: &str| ()).await.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0));
        image.close().await;
        report.leaks
    })
}

/// What is there at this moment.
fn killed_now(file: &SimDisk, memory: &Memory, allowed: &RefCell<Vec<Vec<u8>>>) -> Killed {
    let allowed = allowed.borrow().clone();
    Killed { image: file.bytes(), memory: memory.copy(), allowed }
}

/// Takes over from a process that was killed, works, and is killed. Returns what is left, and the image as it was when
/// it had taken over. `close`: it does nothing, and is closed.
fn live(before: Killed, seed: u64, close: bool) -> (Killed, Vec<u8>) {
    let (file, options) = disk(&before.image, MOST, |_| {});
    let options = format!("driver=qcow2,discard=unmap{}", below("file", &options));
    let disorder = Disorder { short: 0.0, ..Disorder::wild(seed) };
    simulated(disorder, move |_| async move {
        let image = Image::open(&options).await;
        let memory = Memory::holding(&before.memory);
        attach(&image.node, memory.clone()).await.unwrap();
        let at_first = file.bytes();
        let mut found = vec![0xee; LEN as usize];
        image.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        assert_allowed(&found, &before.allowed, &format!("seed {seed}"), "the disk");
        let found = found.chunks(SECTOR as usize).map(|sector| vec![sector[0]]);
        let allowed = Rc::new(RefCell::new(found.collect::<Vec<_>>()));
        if close {
            image.close().await;
            return (killed_now(&file, &memory, &allowed), at_first);
        }
        let killed: Rc<RefCell<Option<Killed>>> = Rc::default();
        let is_looking = Rc::new(Cell::new(true));
        {
            let (file, memory, allowed) = (file.clone(), memory.clone(), allowed.clone());
            let (killed, is_looking) = (killed.clone(), is_looking.clone());
            io::current().spawn(async move {
                let wait = fastrand::Rng::with_seed(seed).u64(1..6000);
                io::sleep(Duration::from_micros(wait)).await;
                *killed.borrow_mut() = Some(killed_now(&file, &memory, &allowed));
                is_looking.set(false);
            });
        }
        let mut rng = fastrand::Rng::with_seed(seed ^ 1);
        let mut value = 0;
        while is_looking.get() {
            let next = || {
                value = value % 200 + 1;
                value
            };
            let requests = Round::begin(&image.node, &allowed, &mut rng, 100, next);
            while requests.is_under_way() {
                io::sleep(Duration::from_micros(20)).await;
            }
            if rng.u8(0..4) == 0 {
                image.node.flush().await.unwrap();
            }
        }
        image.close().await;
        (killed.take().unwrap(), at_first)
    })
}

/// The same; how many clusters were leaked when it had taken over.
fn live_and_count(before: Killed, seed: u64, close: bool) -> (Killed, u64) {
    let (killed, at_first) = live(before, seed, close);
    (killed, leaks(&at_first))
}

fn new_image(create: &str, has_snapshot: bool) -> Killed {
    let (file, options) = disk(&image(LEN, create), MOST, |_| {});
    let options = format!("driver=qcow2{}", below("file", &options));
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        if has_snapshot {
            request(&image.node, 0, 0, LEN / 2, 250).await;
            let snapshots = image.node.driver().image().unwrap().snapshots().unwrap();
            let new = NewSnapshot { name: "s", date: Duration::ZERO, icount: None };
            snapshots.create(new).await.unwrap();
        }
        image.close().await;
    });
    let first = if has_snapshot { 250 } else { 0 };
    let half = |n| vec![if n < SECTORS / 2 { first } else { 0 }];
    let allowed = (0..SECTORS).map(half).collect();
    Killed { image: file.bytes(), memory: vec![0; 1000 * 5 + 1], allowed }
}

#[test]
fn nothing_stays_leaked_however_often_the_process_is_killed() {
    let seed = seed();
    for (n, (create, has_snapshot)) in [
        ("cluster_size=4k", false),
        ("cluster_size=512", false),
        ("cluster_size=4k", true),
        ("cluster_size=16k,extended_l2=on", false),
        ("cluster_size=4k,compat=0.10", true),
    ]
    .into_iter()
    .enumerate()
    {
        let mut now = new_image(create, has_snapshot);
        let mut left = 0;
        for life in 0..LIVES {
            let seed = seed.wrapping_add((n as u64) << 32 | life);
            let at = format!("{create}, life {life}, seed {seed}");
            consistency::check(&now.image, true).unwrap_or_else(|error| panic!("{at}: {error}"));
            left += leaks(&now.image);
            let (killed, leaked) = live_and_count(now, seed, false);
            assert_eq!(leaked, 0, "{at}: it has taken back all that was left");
            now = killed;
        }
        assert!(left > LIVES, "{create}: {left} clusters were leaked in all");
        let (end, _) = live_and_count(now, seed, true);
        check(&end.image, true).unwrap_or_else(|error| panic!("{create}: {error}"));
        let len = end.image.len() as u64;
        assert!(len < 3 * LEN, "{create}: a file of {len} bytes");
    }
}

#[test]
fn what_a_killed_process_has_left_is_taken_back_where_no_memory_names_it() {
    for create in ["cluster_size=4k", "cluster_size=64k"] {
        let mut state = image(LEN, create);
        for life in 0..4u64 {
            let (file, options) = disk(&state, MOST, |_| {});
            let options = format!("driver=qcow2{}", below("file", &options));
            state = simulated(orderly(), move |_| async move {
                let image = Image::open(&options).await;
                request(&image.node, 0, life * (128 << 10), 4096, 1).await;
                request(&image.node, 0, life * (128 << 10) + (64 << 10), 4096, 2).await;
                image.node.flush().await.unwrap();
                let killed = file.bytes();
                image.close().await;
                killed
            });
            let left = leaks(&state);
            assert!((1..=16).contains(&left), "{create}, life {life}: {left} clusters are leaked");
        }
        // An opening that only reads changes nothing.
        for writes in [false, true] {
            let (file, options) = disk(&state, MOST, |_| {});
            let options = format!("driver=qcow2{}", below("file", &options));
            let found = simulated(orderly(), move |_| async move {
                let image = Image::open(&options).await;
                if writes {
                    request(&image.node, 0, LEN / 2, 512, 3).await;
                }
                image.close().await;
                file.bytes()
            });
            match writes {
                true => check(&found, true).unwrap(),
                false => assert!(found == state, "{create}"),
            }
        }
    }
}
