//! Dirty bitmaps against a model: every write is recorded, whatever path it takes, and nothing else.

use crate::disks::{open, open_holding, seed, sim_disk, simulated};
use crate::fast_path::FastPath;
use std::cell::RefCell;
use std::rc::Rc;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, AlignedBuf, IoVec};
use vublk::protocol::sim::SimOptions;

const LEN: u64 = 1 << 20;
const GRANULARITIES: [u64; 3] = [512, 4096, 65536];

fn new(name: &str, granularity: u64) -> NewBitmap {
    let granularity = Some(granularity);
    NewBitmap { name: name.into(), granularity, ..NewBitmap::default() }
}

/// The first bytes of the pieces that are dirty.
fn dirty(node: &Node, name: &str) -> Vec<u64> {
    let bitmap = node.bitmaps().find(name).unwrap();
    let granularity = bitmap.granularity();
    let words = bitmap.bits().words().collect::<Vec<_>>();
    let bits =
        (0..words.len() as u64 * 64).filter(|n| words[*n as usize / 64] >> (n % 64) & 1 == 1);
    bits.map(|n| n * granularity).collect()
}

/// What a bitmap should hold, a flag for each of its pieces.
struct Model {
    name: String,
    granularity: u64,
    recording: bool,
    dirty: Vec<bool>,
}

impl Model {
    fn mark(&mut self, at: u64, len: u64) {
        if self.recording && len > 0 {
            let pieces = at / self.granularity..=(at + len - 1) / self.granularity;
            pieces.for_each(|piece| self.dirty[piece as usize] = true);
        }
    }

    fn check(&self, node: &Node) {
        let wanted = (0..).zip(&self.dirty).filter(|(_, dirty)| **dirty);
        let wanted: Vec<u64> = wanted.map(|(piece, _)| piece * self.granularity).collect();
        assert_eq!(dirty(node, &self.name), wanted, "{}", self.name);
        let count = node.bitmaps().find(&self.name).unwrap().info().count;
        assert_eq!(count, wanted.len() as u64 * self.granularity);
    }
}

async fn change(node: &Node, model: &mut Model, rng: &mut fastrand::Rng) {
    let name = &model.name;
    match rng.u8(0..4) {
        0 => {
            node.clear_bitmap(name).await.unwrap();
            model.dirty.fill(false);
        }
        1 => {
            node.remove_bitmap(name).await.unwrap();
            node.add_bitmap(new(name, model.granularity)).await.unwrap();
            model.recording = true;
            model.dirty.fill(false);
        }
        _ => {
            model.recording = rng.bool();
            node.enable_bitmap(name, model.recording).await.unwrap();
        }
    }
    node.settle_bitmaps().await;
}

/// Random requests and changes, some side by side, checked when all is at rest.
async fn work(node: std::sync::Arc<Node>, fast_path: FastPath, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut models = Vec::new();
    for granularity in GRANULARITIES {
        let (name, dirty) = (granularity.to_string(), vec![false; (LEN / granularity) as usize]);
        node.add_bitmap(new(&name, granularity)).await.unwrap();
        models.push(Model { name, granularity, recording: true, dirty });
    }
    let align = u64::from(node.traits().request_align);
    let fast: Rc<RefCell<u32>> = Rc::default();
    for _ in 0..40 {
        let running: Rc<RefCell<u32>> = Rc::default();
        for _ in 0..rng.u32(1..5) {
            let (at, len) = (rng.u64(0..LEN), rng.u64(1..100_000));
            let (kind, fua) = (rng.u8(0..8), rng.bool());
            let (at, len) = if kind < 4 {
                // Only whole blocks continue the fast path.
                let at = at / align * align;
                (at, len.next_multiple_of(align).min(LEN - at))
            } else {
                (at, len.min(LEN - at))
            };
            if kind == 7 {
                let unit = u64::from(node.traits().discard_align);
                let (from, to) = (at.next_multiple_of(unit), (at + len) / unit * unit);
                models.iter_mut().for_each(|model| model.mark(from, to.saturating_sub(from)));
            } else {
                models.iter_mut().for_each(|model| model.mark(at, len));
            }
            *running.borrow_mut() += 1;
            let (node, fast_path, running, fast) =
                (node.clone(), fast_path.clone(), running.clone(), fast.clone());
            io::current().spawn(async move {
                let mut buf = AlignedBuf::new(len as usize, 4096).unwrap();
                buf.fill(1);
                match kind {
                    0..4 => {
                        let (buf, done) = fast_path.transfer(Access::Write, at, buf).await;
                        match done {
                            Some(done) => {
                                *fast.borrow_mut() += 1;
                                done.unwrap();
                            }
                            None => {
                                let from = IoVec::from_ref(&buf);
                                node.write(at, &from, WriteFlags::empty()).await.unwrap();
                            }
                        }
                    }
                    4 | 5 => {
                        let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
                        node.write(at, &IoVec::from_ref(&buf), flags).await.unwrap();
                    }
                    6 => node.zero(at, len, ZeroFlags::UNMAP).await.unwrap(),
                    _ => node.discard(at, len).await.unwrap(),
                }
                *running.borrow_mut() -= 1;
            });
        }
        while *running.borrow() > 0 {
            io::sleep(std::time::Duration::from_micros(20)).await;
        }
        models.iter().for_each(|model| model.check(&node));
        let index = rng.usize(0..models.len());
        change(&node, &mut models[index], &mut rng).await;
        models.iter().for_each(|model| model.check(&node));
    }
    assert!(*fast.borrow() > 0, "nothing went on the fast path");
}

#[test]
fn every_write_zero_and_discard_is_recorded_on_either_path_and_nothing_else_is() {
    let seed = seed();
    for align in [1, 512, 4096] {
        let mut options = SimOptions::new(LEN);
        options.traits.request_align = align;
        options.traits.zero_align = align;
        options.traits.discard_align = align;
        let (_disk, options) = sim_disk(options);
        let options = format!("driver=raw,discard=unmap,file.discard=unmap,{}", below(&options));
        simulated(Disorder::wild(seed), move |local| {
            let fast_path = FastPath::attach(local);
            async move {
                let opened = open(&options).await;
                fast_path.serve(&opened.node);
                work(opened.node.clone(), fast_path.clone(), seed).await;
                fast_path.close();
            }
        });
    }
}

fn below(options: &str) -> String {
    let all: Vec<_> = options.split(',').map(|option| format!("file.{option}")).collect();
    all.join(",")
}

#[test]
fn a_write_past_the_end_is_recorded_in_a_bitmap_that_grows_with_the_disk() {
    let mut options = SimOptions::new(4096);
    options.max_len = 1 << 20;
    let (_disk, options) = sim_disk(options);
    simulated(Disorder::wild(1), |_| async move {
        let held = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
        let opened = open_holding(&options, held).await.unwrap();
        let node = &opened.node;
        node.add_bitmap(new("a", 512)).await.unwrap();
        let bytes = [1; 512];
        let mut wanted = vec![1024];
        node.write(1024, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
        for at in (4096..1 << 19).step_by(100 * 512) {
            node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
            wanted.push(at);
            assert_eq!(dirty(node, "a"), wanted);
        }
    });
}

#[test]
fn bitmaps_are_refused_in_the_words_of_qemu() {
    let (_disk, options) = sim_disk(SimOptions::new(LEN));
    simulated(Disorder::wild(1), |_| async move {
        let opened = open(&options).await;
        let node = &opened.node;
        let refused = async |new: NewBitmap| node.add_bitmap(new).await.unwrap_err().to_string();
        assert_eq!(refused(new("", 512)).await, "Bitmap name cannot be empty");
        for wrong in [0, 1, 256, 513, 1000] {
            let wanted = "Granularity must be power of 2 and at least 512";
            assert_eq!(refused(new("a", wrong)).await, wanted);
        }
        let long = "x".repeat(1024);
        assert_eq!(refused(new(&long, 512)).await, format!("Bitmap name too long: {long}"));
        node.add_bitmap(new("a", 512)).await.unwrap();
        assert_eq!(refused(new("a", 1024)).await, "Bitmap already exists: a");
        let persistent = NewBitmap { persistent: true, ..new("b", 512) };
        let wanted = "Can't store persistent bitmaps to top: Operation not supported";
        assert_eq!(refused(persistent).await, wanted);
        let bitmap = node.bitmaps().find("a").unwrap();
        bitmap.set_busy(true);
        let wanted = "Bitmap 'a' is currently in use by another operation and cannot be used";
        for error in [
            node.clear_bitmap("a").await,
            node.remove_bitmap("a").await,
            node.enable_bitmap("a", false).await,
            node.merge_bitmaps("a", &[]).await,
        ] {
            assert_eq!(error.unwrap_err().to_string(), wanted);
        }
        bitmap.set_busy(false);
        let error = node.remove_bitmap("b").await.unwrap_err().to_string();
        assert_eq!(error, "Dirty bitmap 'b' not found");
    });
}
