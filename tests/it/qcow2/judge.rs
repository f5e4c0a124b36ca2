//! The checks that all crash suites apply to the states that crashes leave.

use super::consistency;
use super::sim::{Image, below, check, passing};
use crate::disks::simulated;
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec};

const SECTOR: usize = 512;
/// What a repair may add to a file, in bytes.
const ROOM: u64 = 768 << 10;

/// A simulation in which all goes its way, for looking at what is there.
pub fn orderly() -> Disorder {
    Disorder { seed: 1, max_delay: Duration::ZERO, short: 0.0, interrupted: 0.0 }
}

/// Whether the image says that its refcounts may be wrong. Version 2 cannot say it.
pub fn may_be_wrong(state: &[u8]) -> bool {
    state[79] & 1 == 1 || state[7] == 2
}

/// The image after a repair.
pub fn repair(state: &[u8]) -> Vec<u8> {
    let (disk, options) = passing(state, state.len() as u64 + ROOM, |_| {});
    let options = format!("driver=qcow2{}", below("file", &options));
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        let mut said = String::new();
        let mut say = |line: &str| said += line;
        let report = image.node.driver().image().unwrap().check(Fix::All, &mut say).await.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{said}");
        image.close().await;
    });
    disk.bytes()
}

/// An image made with the options `create`, which must be sound: as it is, or repaired if its refcounts
/// are lazy, which may be behind until then. qemu-img is asked too, if that is wanted.
pub fn sound<'a>(create: &str, state: &'a [u8], ask_qemu: bool, at: &str) -> Cow<'a, [u8]> {
    let is_lazy = create.contains("lazy_refcounts=on") && may_be_wrong(state);
    let state = if is_lazy { Cow::Owned(repair(state)) } else { Cow::Borrowed(state) };
    consistency::check(&state, false).unwrap_or_else(|error| panic!("{at}: {error}"));
    if ask_qemu {
        check(&state, false).unwrap_or_else(|error| panic!("{at}: {error}"));
    }
    state
}

/// Each sector is one of those that it may be, whole.
pub fn assert_allowed(found: &[u8], allowed: &[Vec<u8>], at: &str, whose: &str) {
    let count = found.len() / SECTOR;
    for (n, sector) in found.chunks(SECTOR).enumerate() {
        let whole = sector.iter().all(|&b| b == sector[0]);
        assert!(
            whole && allowed[n].contains(&sector[0]),
            "{at}: sector {n} of {count} of {whose} holds {}, not one of {:?}",
            sector[0],
            allowed[n]
        );
    }
}

/// One request of a random workload, by a number below eight: 6 and 7 zero, the others write `value`.
pub async fn request(node: &Node, kind: u8, at: u64, len: u64, value: u8) {
    match kind {
        6 => node.zero(at, len, ZeroFlags::UNMAP).await.unwrap(),
        7 => node.zero(at, len, ZeroFlags::empty()).await.unwrap(),
        _ => {
            let bytes = vec![value; len as usize];
            node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
        }
    }
}

/// What each sector of a disk may hold.
pub type Allowed = Rc<RefCell<Vec<Vec<u8>>>>;

/// Requests side by side, each on sectors of its own.
pub struct Round {
    writers: usize,
    done: Rc<Cell<usize>>,
}

impl Round {
    /// Begins up to four requests of up to `most` sectors; `next` gives the bytes that writes have. Meanwhile a sector
    /// may hold what it held and what is written to it.
    pub fn begin(
        node: &Arc<Node>,
        allowed: &Allowed,
        rng: &mut fastrand::Rng,
        most: usize,
        mut next: impl FnMut() -> u8,
    ) -> Round {
        let writers = rng.usize(1..=4);
        let per_writer = allowed.borrow().len() / writers;
        let done = Rc::new(Cell::new(0));
        for writer in 0..writers {
            let number = next();
            let first = writer * per_writer + rng.usize(0..per_writer);
            let count = rng.usize(1..=((writer + 1) * per_writer - first).min(most));
            let sectors = first..first + count;
            let kind = rng.u8(0..8);
            let value = if kind >= 6 { 0 } else { number };
            for sector in &mut allowed.borrow_mut()[sectors.clone()] {
                sector.push(value);
            }
            let (node, done, allowed) = (node.clone(), done.clone(), allowed.clone());
            io::current().spawn(async move {
                let (at, len) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
                request(&node, kind, at, len, value).await;
                // From here on it is answered.
                for sector in &mut allowed.borrow_mut()[sectors] {
                    *sector = vec![value];
                }
                done.set(done.get() + 1);
            });
        }
        Round { writers, done }
    }

    pub fn is_under_way(&self) -> bool {
        self.done.get() < self.writers
    }
}
