//! The cost of discarding many clusters, in operations of the file below.

use super::consistency;
use super::judge::orderly;
use super::sim::{Image, below, disk, image};
use crate::disks::simulated;
use vublk::block::*;
use vublk::io::IoVec;
use vublk::protocol::sim::Change;

const CLUSTER: u64 = 4096;
const CLUSTERS: u64 = 1536;
const LEN: u64 = CLUSTERS * CLUSTER;

/// What reached the file.
#[derive(Debug, Default)]
struct Counts {
    writes: usize,
    discards: usize,
    discarded: u64,
    flushes: usize,
}

/// Fills an image in the order that `place` gives its clusters, changes it with `empty`, and closes it; what that change
/// and the end cost.
fn cost_of(
    options: &str,
    place: impl Fn(u64) -> u64 + Copy + 'static,
    empty: impl AsyncFnOnce(&Node) + 'static,
) -> Counts {
    let bytes = image(LEN, "cluster_size=4k");
    let (file, below_it) = disk(&bytes, 4 * LEN, |options| options.log = true);
    let options = format!("driver=qcow2,{options}{}", below("file", &below_it));
    let log = file.clone();
    let before = simulated(orderly(), move |_| async move {
        let image = Image::open(&options).await;
        for n in 0..CLUSTERS {
            let data = [7; CLUSTER as usize];
            let at = place(n) * CLUSTER;
            image.node.write(at, &IoVec::from_ref(&data), WriteFlags::empty()).await.unwrap();
        }
        image.node.flush().await.unwrap();
        let before = log.log().changes().len();
        empty(&image.node).await;
        image.node.flush().await.unwrap();
        image.close().await;
        before
    });
    consistency::check(&file.bytes(), false).unwrap();
    let mut counts = Counts::default();
    for change in &file.log().changes()[before..] {
        match change {
            Change::Write { .. } => counts.writes += 1,
            Change::Discard { len, .. } => {
                counts.discards += 1;
                counts.discarded += len;
            }
            Change::Zero { .. } => {}
            Change::Flush { .. } => counts.flushes += 1,
        }
    }
    println!("{counts:?}");
    counts
}

async fn discard_all(node: &Node) {
    node.discard(0, LEN).await.unwrap();
}

async fn unmap_all(node: &Node) {
    node.zero(0, LEN, ZeroFlags::UNMAP).await.unwrap();
}

#[test]
fn a_discard_of_many_clusters_writes_each_refcount_block_once_and_punches_holes_by_runs() {
    let forwards = |n| n;
    let backwards = |n| CLUSTERS - 1 - n;
    let both = [
        cost_of("discard=unmap", forwards, discard_all),
        cost_of("discard=unmap", backwards, unmap_all),
    ];
    for counts in both {
        // Some batches, each with a few refcount blocks and runs; and a few slices of entries.
        assert!(counts.writes < 64, "{counts:?}");
        assert!(counts.discards < 64, "{counts:?}");
        assert!(counts.flushes < 32, "{counts:?}");
        assert_eq!(counts.discarded, LEN, "{counts:?}");
    }
}

#[test]
fn discarded_clusters_that_are_kept_are_punched_by_runs() {
    let backwards = |n| CLUSTERS - 1 - n;
    let counts = cost_of("discard=unmap,discard-no-unref=on", backwards, discard_all);
    assert!(counts.discards < 64, "{counts:?}");
    assert_eq!(counts.discarded, LEN, "{counts:?}");
}
