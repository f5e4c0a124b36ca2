//! A node's services for its driver, seen on a simulated disk that asserts its contract.

use crate::disks::{REGISTRY, open, open_holding, sim_disk, simulated};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, Errno, IoVec};
use vublk::options::keyval;
use vublk::protocol::sim::{Change, Effect, Fault, Kinds, SimOptions};
use vublk::service::Service;

const LEN: u64 = 64 << 10;

/// A disk with a log and `traits`, which starts from those that can do everything.
fn logged(traits: impl FnOnce(&mut Traits)) -> SimOptions {
    let mut options = SimOptions { log: true, ..SimOptions::new(LEN) };
    traits(&mut options.traits);
    options
}

fn pattern(len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251 + salt) as u8).collect()
}

/// What changed the disk, in short: kind, offset, length.
fn changes(log: &[Change]) -> Vec<(&'static str, u64, u64)> {
    log.iter()
        .map(|change| match change {
            Change::Write { offset, data, durable: false } => ("write", *offset, data.len() as u64),
            Change::Write { offset, data, .. } => ("durable", *offset, data.len() as u64),
            Change::Zero { offset, len, unmap: false } => ("zero", *offset, *len),
            Change::Zero { offset, len, .. } => ("unmap", *offset, *len),
            Change::Discard { offset, len } => ("discard", *offset, *len),
            Change::Flush { .. } => ("flush", 0, 0),
        })
        .collect()
}

#[test]
fn requests_of_any_shape_reach_disks_of_any_alignment_and_limit() {
    let shapes = [(1, 1), (512, 1), (512, 4), (512, 512), (4096, 512), (4096, 4096), (512, 4096)];
    for (request_align, buffer_align) in shapes {
        simulated(Disorder::wild(1), |_| async move {
            let (disk, options) = sim_disk(logged(|traits| {
                traits.request_align = request_align;
                traits.buffer_align = buffer_align;
                traits.max_transfer = 8192;
                traits.max_segments = 2;
                traits.zero_align = 4096;
                traits.discard_align = 4096;
                traits.max_zero = 16384;
            }));
            let opened = open(&options).await;
            let mut expected = vec![0; LEN as usize];
            for at in [0, 1, 511, 512, 4095, 4096, 30_000] {
                for len in [1, 511, 512, 513, 4096, 5000, 8192, 20_000] {
                    let salt = at + len;
                    // In many small segments at odd addresses.
                    let mut bytes = pattern(len + 3, salt);
                    let bytes = &mut bytes[3..];
                    expected[at..at + len].copy_from_slice(bytes);
                    let parts: Vec<_> = bytes.chunks_mut(700).map(IoVec::from_mut).collect();
                    let list = IoVec::concat(&parts.iter().collect::<Vec<_>>());
                    opened.node.write(at as u64, &list, WriteFlags::empty()).await.unwrap();
                    let mut read = vec![0; len + 2];
                    let (before, after) = read.split_at_mut(len / 2);
                    let (before, after) = (IoVec::from_mut(before), IoVec::from_mut(after));
                    let list = IoVec::concat(&[&before, &after]);
                    let from = at.saturating_sub(1);
                    opened.node.read(from as u64, &list).await.unwrap();
                    assert_eq!(read, expected[from..from + len + 2]);
                }
            }
            assert!(disk.bytes() == expected, "alignments {request_align} and {buffer_align}");
        });
    }
}

#[test]
fn a_partial_write_keeps_what_concurrent_partial_writes_of_its_block_wrote() {
    for seed in 0..20 {
        let disk = simulated(Disorder::wild(seed), |_| async {
            let (disk, options) = sim_disk(logged(|traits| traits.request_align = 4096));
            let opened = Rc::new(open(&options).await);
            let left = Rc::new(Cell::new(16));
            for n in 0..16u64 {
                let (opened, left) = (opened.clone(), left.clone());
                io::current().spawn(async move {
                    let bytes = [n as u8 + 1; 512];
                    let list = IoVec::from_ref(&bytes);
                    opened.node.write(n * 512, &list, WriteFlags::empty()).await.unwrap();
                    left.set(left.get() - 1);
                });
            }
            while left.get() > 0 {
                io::sleep(Duration::from_micros(100)).await;
            }
            disk
        });
        let expected: Vec<u8> = (0..16 * 512).map(|n| (n / 512 + 1) as u8).collect();
        assert!(disk.bytes()[..16 * 512] == expected, "seed {seed}");
    }
}

#[test]
fn zeroing_is_native_where_whole_units_are_and_written_at_the_ends() {
    simulated(Disorder::wild(1), |_| async {
        let (disk, options) = sim_disk(logged(|traits| {
            traits.request_align = 512;
            traits.zero_align = 4096;
            traits.max_zero = 8192;
        }));
        let opened = open(&options).await;
        let ones = vec![1; LEN as usize];
        opened.node.write(0, &IoVec::from_ref(&ones), WriteFlags::empty()).await.unwrap();
        let before = disk.log().changes().len();
        opened.node.zero(3584, 16384, ZeroFlags::UNMAP).await.unwrap();
        let log = disk.log();
        assert_eq!(
            changes(&log.changes()[before..]),
            [
                ("write", 3584, 512),
                // `discard=unmap` was not asked for.
                ("zero", 4096, 8192),
                ("zero", 12288, 4096),
                ("write", 16384, 3584)
            ]
        );
        let mut expected = ones;
        expected[3584..3584 + 16384].fill(0);
        assert!(disk.bytes() == expected);
    });
}

#[test]
fn zeroing_that_the_disk_cannot_do_is_written_unless_only_a_quick_way_is_wanted() {
    simulated(Disorder::wild(1), |_| async {
        let (disk, options) = sim_disk(logged(|traits| traits.abilities = Abilities::empty()));
        let opened = open(&format!("{options},discard=unmap")).await;
        let result = opened.node.zero(0, 8192, ZeroFlags::NO_FALLBACK).await;
        assert_eq!(result, Err(Errno::ENOTSUP));
        assert_eq!(disk.log().changes(), []);
        opened.node.zero(0, 8192, ZeroFlags::UNMAP).await.unwrap();
        assert_eq!(changes(disk.log().changes()), [("write", 0, 8192)]);
    });
}

#[test]
fn zeroing_that_fails_as_unsupported_where_the_disk_promised_it_is_written() {
    simulated(Disorder { short: 0.0, ..Disorder::wild(1) }, |_| async {
        let (disk, options) = sim_disk(logged(|_| {}));
        disk.inject(Fault::new(Kinds::ZERO, Effect::Fail(Errno::ENOTSUP)));
        let opened = open(&options).await;
        let result = opened.node.zero(0, 8192, ZeroFlags::NO_FALLBACK).await;
        assert_eq!(result, Err(Errno::ENOTSUP));
        opened.node.zero(0, 8192, ZeroFlags::empty()).await.unwrap();
        assert_eq!(changes(disk.log().changes()), [("write", 0, 8192)]);
        disk.heal();
        disk.inject(Fault::new(Kinds::ZERO, Effect::Fail(Errno::ENOSPC)));
        let result = opened.node.zero(0, 8192, ZeroFlags::empty()).await;
        assert_eq!(result, Err(Errno::ENOSPC), "no other way is tried after a real failure");
    });
}

#[test]
fn discards_are_trimmed_to_whole_units_and_obey_the_option() {
    simulated(Disorder::wild(1), |_| async {
        let make = || {
            sim_disk(logged(|traits| {
                traits.discard_align = 4096;
                traits.max_discard = 8192;
            }))
        };
        let (disk, options) = make();
        let opened = open(&format!("{options},discard=unmap")).await;
        opened.node.discard(1, 4095 + 4096).await.unwrap();
        opened.node.discard(5000, 2000).await.unwrap();
        opened.node.discard(20_000, 20_000).await.unwrap();
        assert_eq!(
            changes(disk.log().changes()),
            [("discard", 4096, 4096), ("discard", 20480, 8192), ("discard", 28672, 8192)]
        );
        let (disk, options) = make();
        let opened = open(&options).await;
        opened.node.discard(0, LEN).await.unwrap();
        assert_eq!(disk.log().changes(), [], "the default is to ignore discards");
    });
}

#[test]
fn writes_of_zeroes_become_zero_requests_when_asked_for() {
    simulated(Disorder { short: 0.0, ..Disorder::wild(1) }, |_| async {
        let zeroes = [0; 8192];
        let mut almost = zeroes;
        almost[8191] = 1;
        for (options, expected) in [
            ("", "write"),
            (",detect-zeroes=on", "zero"),
            (",detect-zeroes=unmap,discard=unmap", "unmap"),
        ] {
            let (disk, sim) = sim_disk(logged(|_| {}));
            let opened = open(&format!("{sim}{options}")).await;
            opened.node.write(0, &IoVec::from_ref(&zeroes), WriteFlags::empty()).await.unwrap();
            opened.node.write(0, &IoVec::from_ref(&almost), WriteFlags::empty()).await.unwrap();
            let log = disk.log();
            assert_eq!(changes(log.changes()), [(expected, 0, 8192), ("write", 0, 8192)]);
        }
    });
}

#[test]
fn a_durable_write_is_durable_with_and_without_the_ability() {
    simulated(Disorder { short: 0.0, ..Disorder::wild(1) }, |_| async {
        for native in [true, false] {
            let (disk, options) = sim_disk(logged(|traits| {
                traits.abilities.set(Abilities::FUA, native);
                traits.request_align = 512;
            }));
            let opened = open(&options).await;
            let ones = [1; 512];
            opened.node.write(0, &IoVec::from_ref(&ones), WriteFlags::FUA).await.unwrap();
            opened.node.zero(512, 512, ZeroFlags::FUA).await.unwrap();
            let first = if native {
                vec![("durable", 0, 512)]
            } else {
                vec![("write", 0, 512), ("flush", 0, 0)]
            };
            let rest = vec![("zero", 512, 512), ("flush", 0, 0)];
            assert_eq!(changes(disk.log().changes()), [first, rest].concat());
        }
    });
}

#[test]
fn errors_reach_the_caller_and_only_of_the_request_that_failed() {
    simulated(Disorder { short: 0.0, ..Disorder::wild(1) }, |_| async {
        let (disk, options) = sim_disk(logged(|_| {}));
        let opened = open(&options).await;
        let all = Kinds::READ | Kinds::WRITE | Kinds::ZERO | Kinds::FLUSH;
        disk.inject(Fault::new(all, Effect::Fail(Errno::ENOSPC)).within(0..4096));
        let mut bytes = [1; 4096];
        let node = &opened.node;
        assert_eq!(node.read(0, &IoVec::from_mut(&mut bytes)).await, Err(Errno::ENOSPC));
        let list = IoVec::from_ref(&bytes);
        assert_eq!(node.write(0, &list, WriteFlags::empty()).await, Err(Errno::ENOSPC));
        assert_eq!(node.zero(0, 4096, ZeroFlags::empty()).await, Err(Errno::ENOSPC));
        assert_eq!(node.flush().await, Err(Errno::ENOSPC));
        assert_eq!(node.write(4096, &list, WriteFlags::empty()).await, Ok(()));
    });
}

#[test]
fn requests_outside_the_disk_or_without_permission_are_refused() {
    simulated(Disorder::wild(1), |_| async {
        let (_, options) = sim_disk(logged(|_| {}));
        let opened = open(&options).await;
        let mut bytes = [0; 1024];
        for at in [LEN - 1023, LEN, u64::MAX - 511, u64::MAX] {
            let list = IoVec::from_mut(&mut bytes);
            assert_eq!(opened.node.read(at, &list).await, Err(Errno::EIO));
            assert_eq!(opened.node.write(at, &list, WriteFlags::empty()).await, Err(Errno::EIO));
            assert_eq!(opened.node.zero(at, 1024, ZeroFlags::empty()).await, Err(Errno::EIO));
            assert_eq!(opened.node.discard(at, 1024).await, Err(Errno::EIO));
            assert!(opened.node.status(at, 1024, Precision::Zeroes).await.is_err());
        }
        drop(opened);
        let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
        let list = IoVec::from_mut(&mut bytes);
        assert_eq!(opened.node.read(0, &list).await, Ok(()));
        assert_eq!(opened.node.write(0, &list, WriteFlags::empty()).await, Err(Errno::EPERM));
        assert_eq!(opened.node.zero(0, 1024, ZeroFlags::empty()).await, Err(Errno::EPERM));
        assert_eq!(opened.node.discard(0, 1024).await, Err(Errno::EPERM));
        let announcer = opened.node.announcer();
        let turn = announcer.enter();
        let map = |access| opened.node.map(turn.in_flight(), 0, 1024, access).target;
        assert!(matches!(map(Access::Write), Target::Slow), "nor is there a fast way around");
        assert!(!matches!(map(Access::Read), Target::Slow));
    });
}

#[test]
fn an_odd_length_ends_in_zeroes_until_they_are_written() {
    simulated(Disorder::wild(1), |_| async {
        for request_align in [1, 512, 4096] {
            let traits = Traits { request_align, ..Traits::default() };
            let (_, options) = sim_disk(SimOptions { traits, ..SimOptions::new(8192 + 1000) });
            let opened = open(&options).await;
            let len = opened.node.len();
            assert_eq!(len, 8192 + 1024);
            let mut read = vec![1; 2048];
            opened.node.read(len - 2048, &IoVec::from_mut(&mut read)).await.unwrap();
            assert_eq!(read, [0; 2048]);
            let extent = opened.node.status(len - 24, 24, Precision::Zeroes).await.unwrap();
            assert_eq!((extent.len, extent.status.contains(Status::ZERO)), (24, true));

            let ones = [1; 512];
            let list = IoVec::from_ref(&ones);
            opened.node.write(len - 512, &list, WriteFlags::empty()).await.unwrap();
            opened.node.read(len - 2048, &IoVec::from_mut(&mut read)).await.unwrap();
            assert_eq!((&read[..1536], &read[1536..]), (&[0; 1536][..], &ones[..]));
            let extent = opened.node.status(len - 24, 24, Precision::Zeroes).await.unwrap();
            assert!(!extent.status.contains(Status::ZERO), "request_align {request_align}");
            assert_eq!(opened.node.len(), len);
        }
    });
}

#[test]
fn a_request_that_hangs_holds_up_only_those_that_must_wait_for_it() {
    simulated(Disorder::wild(1), |_| async {
        let (disk, options) = sim_disk(logged(|traits| traits.request_align = 4096));
        let opened = Rc::new(open(&options).await);
        disk.inject(Fault::new(Kinds::READ, Effect::Hang).within(0..4096).once());
        let done = Rc::new(Cell::new(0));
        for n in 0..2u8 {
            let (opened, done) = (opened.clone(), done.clone());
            // The first hangs in its read; the second is of the same block.
            io::current().spawn(async move {
                let bytes = [n + 1; 512];
                let at = n as u64 * 512;
                opened.node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
                done.set(done.get() + 1);
            });
        }
        let other = [9; 512];
        opened.node.write(8192, &IoVec::from_ref(&other), WriteFlags::empty()).await.unwrap();
        io::sleep(Duration::from_secs(10)).await;
        assert_eq!(done.get(), 0);
        disk.release();
        while done.get() < 2 {
            io::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!((disk.bytes()[0], disk.bytes()[512]), (1, 2));
    });
}

#[test]
fn blocks_larger_than_a_bounce_buffer_are_read_and_written_whole() {
    const BLOCK: u32 = 2 << 20;
    simulated(Disorder::wild(1), |_| async {
        let mut options = SimOptions { log: true, ..SimOptions::new(4 * u64::from(BLOCK)) };
        options.traits.request_align = BLOCK;
        options.traits.buffer_align = 4096;
        options.traits.zero_align = BLOCK;
        options.traits.discard_align = BLOCK;
        let (disk, options) = sim_disk(options);
        let opened = open(&options).await;
        let mut expected = vec![0; 4 * BLOCK as usize];
        for (at, len) in [(0, BLOCK), (BLOCK, 2 * BLOCK), (1000, 512), (BLOCK - 512, BLOCK + 1024)]
        {
            let (at, len) = (at as usize, len as usize);
            // At an odd address, so that whole blocks bounce, too.
            let bytes = pattern(len + 1, at);
            expected[at..at + len].copy_from_slice(&bytes[1..]);
            let list = IoVec::from_ref(&bytes[1..]);
            opened.node.write(at as u64, &list, WriteFlags::empty()).await.unwrap();
            let mut read = vec![0; len + 1];
            opened.node.read(at as u64, &IoVec::from_mut(&mut read[1..])).await.unwrap();
            assert!(read[1..] == bytes[1..], "{len} bytes at {at}");
        }
        assert!(disk.bytes() == expected);
    });
}

#[test]
fn all_nodes_of_a_disk_have_one_share_of_the_threads_for_work_that_blocks() {
    let service = Service::start(&REGISTRY, OpenPolicy::default()).unwrap();
    let add = |text: &str| {
        let options = keyval::parse(text, None).unwrap().options;
        service.wait(async move |service| service.blockdev_add(options).await).unwrap()
    };
    let whole = add("driver=layer,node-name=whole,file.driver=raw,file.file.driver=null-co,\
         backing.driver=raw,backing.file.driver=null-co");
    for below in whole.below() {
        assert_eq!(below.blocking(), whole.blocking(), "{}", below.name());
    }
    // Storage that was there before has its share already; a backing file may be many disks'.
    let storage = add("driver=null-co,node-name=storage");
    let base = add("driver=raw,node-name=base,file.driver=null-co");
    let over = add("driver=layer,node-name=over,file.driver=raw,file.file=storage,backing=base");
    assert_ne!(storage.blocking(), whole.blocking());
    assert_ne!(over.blocking(), base.blocking());
    assert_eq!(over.driver().children()[0].node().blocking(), storage.blocking());
    assert_eq!(over.blocking(), storage.blocking());
}
