//! Fast writes in flight while the permission for them is withdrawn.

use super::sim::{Image, below, disk, image};
use crate::disks::{seed, simulated};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use vublk::block::*;
use vublk::io::epoch::Guard;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec};
use vublk::options::{Map, Value};

const LEN: u64 = 1 << 20;

#[derive(Clone, Copy, Debug)]
enum Change {
    Snapshot,
    Freeze,
    HandOver,
    StoreBitmaps,
    Amend,
}

impl Change {
    async fn make(self, node: &Node) {
        let driver = node.driver();
        let image = driver.image().unwrap();
        match self {
            Change::Snapshot => {
                let new = NewSnapshot { name: "s", date: Duration::ZERO, icount: None };
                image.snapshots().unwrap().create(new).await.map(drop).unwrap();
            }
            Change::Freeze => driver.freeze().await.unwrap(),
            Change::HandOver => driver.hand_over().unwrap().inactivate().await.unwrap(),
            Change::StoreBitmaps => driver.bitmap_store().unwrap().store().await.unwrap(),
            Change::Amend => {
                let lazy = Map::from_iter([("lazy_refcounts", Value::Bool(true))]);
                image.amend(lazy).await.unwrap();
            }
        }
    }
}

fn is_fast(node: &Node, guard: &Guard<'_>) -> bool {
    let mapping = node.map(guard.in_flight(), 0, 4096, Access::Write);
    matches!(mapping.target, Target::Data { .. })
}

#[test]
fn whatever_withdraws_the_permission_of_fast_writes_waits_for_those_under_way() {
    use Change::{Amend, Freeze, HandOver, Snapshot, StoreBitmaps};
    for change in [Snapshot, Freeze, HandOver, StoreBitmaps, Amend] {
        let bytes = image(LEN, "");
        simulated(Disorder::wild(seed()), move |_| async move {
            let (_sim, options) = disk(&bytes, 4 << 20, |_| {});
            let options = format!("driver=qcow2{}", below("file", &options));
            let image = Box::pin(Image::open(&options)).await;
            let node = image.node.clone();
            let ones = vec![1; 1 << 16];
            node.write(0, &IoVec::from_ref(&ones), WriteFlags::empty()).await.unwrap();
            let announcer = node.announcer();
            let guard = announcer.enter();
            assert!(is_fast(&node, &guard), "{change:?}");
            let write = guard.begin();
            drop(guard);
            let is_made = Rc::new(Cell::new(false));
            let (clone, setter) = (node.clone(), is_made.clone());
            io::current().spawn(async move {
                Box::pin(change.make(&clone)).await;
                setter.set(true);
            });
            io::sleep(Duration::from_secs(10)).await;
            assert!(!is_made.get(), "{change:?} has not waited");
            let guard = announcer.enter();
            assert!(!is_fast(&node, &guard), "{change:?}: a write begins");
            drop(guard);
            announcer.end(write);
            announcer.settle();
            while !is_made.get() {
                io::sleep(Duration::from_secs(1)).await;
            }
            drop((node, announcer));
            Box::pin(image.close()).await;
        });
    }
}
