//! copy-on-read, over a test format of which every cluster can be looked at.

use crate::disks::{Opened, open, open_holding, seed, sim_disk, simulated};
use crate::fast_path::FastPath;
use crate::file::Bench;
use crate::layer::CLUSTER;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, AlignedBuf, Errno, IoVec};
use vublk::protocol::sim::{Effect, Fault, Kinds, SimDisk, SimOptions};

const LEN: u64 = 512 << 10;
/// What is copied at once: the format says that its clusters are so large.
const COPIED: u64 = 4 * CLUSTER;

fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|at| (at / 512) as u8 | 1).collect()
}

/// `options` as those of the node `under` another.
fn nest(under: &str, options: &str) -> String {
    options.split(',').map(|option| format!(",{under}.{option}")).collect()
}

/// A chain: copy-on-read over an empty top, over `layers` of these lengths; the lowest holds a
/// pattern, the others nothing.
struct Chain {
    top: SimDisk,
    options: String,
    _lower: Vec<SimDisk>,
}

fn chain(layers: &[u64]) -> Chain {
    let mut below = String::new();
    let mut lower = Vec::new();
    for (n, &len) in layers.iter().enumerate().rev() {
        let bytes = if n + 1 == layers.len() { pattern(len) } else { Vec::new() };
        let disk = SimDisk::holding(SimOptions::new(len), &bytes);
        let name = crate::disks::unique();
        disk.publish(&name);
        lower.push(disk);
        below = match n + 1 == layers.len() {
            true => format!("driver=sim,disk={name},node-name=base"),
            false => format!(
                "driver=layer,node-name=middle{n},file.driver=sim,file.disk={name}{}",
                nest("backing", &below)
            ),
        };
    }
    let (top, file) = sim_disk(SimOptions::new(LEN));
    let layer =
        format!("driver=layer,node-name=layer{}{}", nest("file", &file), nest("backing", &below));
    let options = format!("driver=copy-on-read{}", nest("file", &layer));
    Chain { top, options, _lower: lower }
}

async fn read(node: &Node, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; len as usize];
    node.read(at, &IoVec::from_mut(&mut bytes)).await.unwrap();
    bytes
}

/// The ranges that the top has itself.
async fn allocated(opened: &Opened) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < LEN {
        let extent = opened.node.status(at, LEN - at, Precision::Allocation).await.unwrap();
        if extent.status.contains(Status::ALLOCATED) {
            match found.last_mut() {
                Some((start, len)) if *start + *len == at => *len += extent.len,
                _ => found.push((at, extent.len)),
            }
        }
        at += extent.len;
    }
    found
}

#[test]
fn what_is_read_is_copied_in_whole_clusters_and_read_from_the_copy() {
    simulated(Disorder::wild(1), |local| {
        let fast_path = FastPath::attach(local);
        async move {
            let Chain { top, options, _lower } = chain(&[LEN / 2]);
            let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
            fast_path.serve(&opened.node);
            let mut wanted = pattern(LEN / 2);
            wanted.resize(LEN as usize, 0);
            assert_eq!(allocated(&opened).await, []);
            let buf = || AlignedBuf::new(4096, 4096).unwrap();
            let (_, fast) = fast_path.transfer(Access::Read, COPIED, buf()).await;
            assert_eq!(fast, None, "the backing file's bytes were read past the filter");

            assert!(
                read(&opened.node, COPIED + 100, 50).await == wanted[COPIED as usize + 100..][..50]
            );
            assert_eq!(allocated(&opened).await, [(COPIED, COPIED)]);
            let copy = &top.bytes()[COPIED as usize..2 * COPIED as usize];
            assert!(copy == &wanted[COPIED as usize..2 * COPIED as usize]);

            // It comes from the copy from now on, without the slow path.
            let (bytes, fast) = fast_path.transfer(Access::Read, COPIED, buf()).await;
            assert_eq!(fast, Some(Ok(())));
            assert!(bytes[..] == wanted[COPIED as usize..][..4096]);

            // Across an end of the copy, and where the backing file has ended: zeroes, which cost nothing.
            let (at, len) = (2 * COPIED - 512, COPIED);
            assert!(read(&opened.node, at, len).await == wanted[at as usize..][..len as usize]);
            assert!(read(&opened.node, LEN - 512, 512).await == vec![0; 512]);
            assert_eq!(allocated(&opened).await, [(COPIED, 2 * COPIED), (LEN - COPIED, COPIED)]);
            assert!(top.bytes()[(LEN - COPIED) as usize..].iter().all(|&byte| byte == 0));
            assert!(read(&opened.node, 0, LEN).await == wanted);
            assert_eq!(allocated(&opened).await, [(0, LEN)]);
            fast_path.close();
        }
    });
}

#[test]
fn nothing_below_the_bottom_is_copied() {
    simulated(Disorder::wild(1), |_| async {
        // What a middle layer has is written to it before.
        for (bottom, wanted) in [
            ("base", vec![(0, 2 * COPIED), (LEN - COPIED, COPIED)]),
            // The zeroes behind the base's end are the middle's, but it does not have them itself.
            ("middle0", vec![(COPIED, CLUSTER)]),
            ("layer", vec![]),
        ] {
            let Chain { options, _lower, .. } = chain(&[LEN, LEN / 2]);
            let graph = Graph::new(&crate::disks::REGISTRY);
            let parse = |text: &str| vublk::options::keyval::parse(text, None).unwrap().options;
            // The middle is written to by itself, and then becomes the backing file.
            let (head, middle) = options.split_once(",file.backing.").unwrap();
            let middle = middle.replace("file.backing.", "");
            let middle = graph.open(parse(&middle)).await.unwrap();
            {
                let held = Perm::WRITE;
                let perms = Perms { held, shared: Perm::all() };
                let writer = graph.attach(&middle, "a test", perms, None).unwrap();
                let ones = vec![1; CLUSTER as usize];
                middle.write(COPIED, &IoVec::from_ref(&ones), WriteFlags::empty()).await.unwrap();
                writer.detach().await;
            }
            let options = format!("{head},file.backing=middle0,bottom={bottom},node-name=top");
            let node = graph.open(parse(&options)).await.unwrap();
            let perms = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
            let attachment = graph.attach(&node, "a test", perms, None).unwrap();
            for at in [0, COPIED, LEN - 512] {
                read(&node, at, 512).await;
            }
            let opened = Opened::from_parts(graph, node, attachment);
            assert_eq!(allocated(&opened).await, wanted, "{bottom}");
        }
    });
}

#[test]
fn wrong_bottoms_are_refused_with_the_reason() {
    simulated(Disorder::wild(1), |_| async {
        for (bottom, wanted) in [
            ("nope", "Bottom node 'nope' not found"),
            ("top", "Bottom node 'top' is a filter"),
            ("", "Bottom node '' not found"),
            ("elsewhere", "Bottom node 'elsewhere' is not in the backing chain of 'layer'"),
        ] {
            let Chain { options, _lower, .. } = chain(&[LEN]);
            // The file of the top is no part of its chain.
            let options = options
                .replace("file.file.driver=", "file.file.node-name=elsewhere,file.file.driver=");
            let options = format!("{options},bottom={bottom}");
            let result = open_holding(&options, Perm::CONSISTENT_READ).await;
            assert_eq!(result.err().unwrap().to_string(), wanted);
        }
        let Chain { options, _lower, .. } = chain(&[LEN]);
        for read_only in ["read-only=on", "file.read-only=on"] {
            let options = format!("{options},{read_only}");
            let error =
                open_holding(&options, Perm::CONSISTENT_READ).await.err().unwrap().to_string();
            assert_eq!(error, "Block node is read-only", "{read_only}");
        }
    });
}

#[test]
fn a_copy_that_cannot_be_written_fails_the_read_and_is_made_by_the_next() {
    simulated(Disorder::wild(1), |_| async {
        let Chain { top, options, _lower } = chain(&[LEN]);
        let opened = open(&options).await;
        top.inject(Fault::new(Kinds::WRITE, Effect::Fail(Errno::ENOSPC)).once());
        let mut bytes = [0; 512];
        let result = opened.node.read(0, &IoVec::from_mut(&mut bytes)).await;
        assert_eq!(result, Err(Errno::ENOSPC));
        assert_eq!(allocated(&opened).await, []);
        assert!(read(&opened.node, 0, 512).await == pattern(512));
        assert_eq!(allocated(&opened).await, [(0, COPIED)]);
    });
}

#[test]
fn copies_raise_their_event_so_that_they_can_be_made_to_fail() {
    simulated(Disorder::wild(1), |_| async {
        let Chain { options, _lower, .. } = chain(&[LEN]);
        // The image that is copied to with blkdebug around it.
        let options = format!(
            "{},file.driver=blkdebug,file.inject-error.0.event=cor_write,\
             file.inject-error.0.iotype=write,file.inject-error.0.once=on",
            options.replace(",file.", ",file.image.")
        );
        let opened = open(&options).await;
        let ones = vec![1; CLUSTER as usize];
        opened.node.write(0, &IoVec::from_ref(&ones), WriteFlags::empty()).await.unwrap();
        let mut bytes = [0; 512];
        let result = opened.node.read(COPIED, &IoVec::from_mut(&mut bytes)).await;
        assert_eq!(result, Err(Errno::EIO));
        assert!(read(&opened.node, COPIED, 512).await == pattern(LEN)[COPIED as usize..][..512]);
    });
}

/// A guest's write may come while its cluster is being copied: it must not be undone by the copy.
#[test]
fn writes_and_copies_of_the_same_clusters_wait_for_each_other() {
    let seed = seed();
    for round in 0..30 {
        let seed = seed.wrapping_add(round);
        simulated(Disorder::wild(seed), move |local| {
            let fast_path = FastPath::attach(local);
            async move {
                let Chain { options, _lower, .. } = chain(&[LEN]);
                let opened = open(&options).await;
                fast_path.serve(&opened.node);
                let mut rng = fastrand::Rng::with_seed(seed);
                let mut expected = pattern(LEN);
                let left = Rc::new(RefCell::new(0));
                // Writers own their sectors; readers read around them.
                let mut sectors: Vec<u64> = (0..LEN / 512).collect();
                rng.shuffle(&mut sectors);
                for (n, &sector) in sectors.iter().take(200).enumerate() {
                    let at = sector * 512;
                    let byte = (n as u8 & 0x7e) | 0x80;
                    expected[at as usize..][..512].fill(byte);
                    let delay = Duration::from_micros(rng.u64(0..3000));
                    let (left_too, left) = (left.clone(), left.clone());
                    let node = opened.node.clone();
                    let from = at.saturating_sub(rng.u64(0..20_000)) / 512 * 512;
                    let (fast_path, fast) = (fast_path.clone(), rng.bool());
                    *left.borrow_mut() += 1;
                    io::current().spawn(async move {
                        io::sleep(delay).await;
                        let bytes = vec![byte; 512];
                        node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty())
                            .await
                            .unwrap();
                        assert!(read(&node, at, 512).await == bytes, "its own write is gone");
                        if fast {
                            let buf = AlignedBuf::new(4096, 4096).unwrap();
                            fast_path.transfer(Access::Read, at / 4096 * 4096, buf).await;
                        }
                        *left.borrow_mut() -= 1;
                    });
                    let (node, left) = (opened.node.clone(), left_too);
                    let delay = Duration::from_micros(rng.u64(0..3000));
                    *left.borrow_mut() += 1;
                    io::current().spawn(async move {
                        io::sleep(delay).await;
                        read(&node, from, (at + 512 - from).min(LEN - from)).await;
                        *left.borrow_mut() -= 1;
                    });
                }
                while *left.borrow() > 0 {
                    io::sleep(Duration::from_micros(50)).await;
                }
                assert!(read(&opened.node, 0, LEN).await == expected, "seed {seed}");
                assert_eq!(allocated(&opened).await, [(0, LEN)]);
                fast_path.close();
            }
        });
    }
}

#[test]
fn the_image_is_held_for_copies_only_while_somebody_reads() {
    let bench = Bench::new();
    bench.node("driver=null-co,node-name=image").unwrap();
    let cor = bench.node("driver=copy-on-read,file=image,node-name=cor").unwrap();
    let image = bench.graph.find("image").unwrap();
    assert_eq!(image.held(), Perm::empty());
    let perms = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
    let reader = bench.graph.attach(&cor, "a reader", perms, None).unwrap();
    assert_eq!(image.held(), Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED);
    drop(reader);
    assert_eq!(image.held(), Perm::empty());
}
