//! Failed writes of metadata: it reaches the disk before anything that relies on it.

use super::consistency;
use super::sim::{Image, below, check, disk, image, passing};
use crate::disks::{open_holding, seed, simulated};
use vublk::block::*;
use vublk::format::qcow2::header::Header;
use vublk::io::sim::Disorder;
use vublk::io::{Errno, IoVec};
use vublk::protocol::sim::{Effect, Fault, Kinds};

const LEN: u64 = 256 << 10;

/// Fills an image, sector by sector, while the first `times` writes to its refcount table fail; each
/// write that failed is tried again. The bytes of the file after the image was closed.
fn filled(kind: &str, times: u64) -> Vec<u8> {
    let bytes = image(LEN, kind);
    let (lower, options) = disk(&bytes, 4 << 20, |_| ());
    let options = format!("driver=qcow2{}", below("file", &options));
    let faulty = lower.clone();
    let table = big_endian(&bytes, 48);
    simulated(Disorder::wild(1), move |_| async move {
        let image = Image::open(&options).await;
        let fault = Fault::new(Kinds::WRITE, Effect::Fail(Errno::EIO));
        faulty.inject(fault.within(table..table + 512).times(times));
        let failures = fill(&image.node, times, "a fault strikes one request").await;
        // What fails as more is reserved ahead of need costs no request.
        assert!(times < 3 || failures > 0, "{options}: the fault did not strike");
        image.close().await;
    });
    lower.bytes()
}

/// Writes to all sectors, each again until it works; how often it did not, which is at most so often.
async fn fill(node: &Node, most: u64, otherwise: &str) -> u64 {
    let mut failures = 0;
    for at in (0..LEN).step_by(512) {
        let data = [7; 512];
        let data = IoVec::from_ref(&data);
        while node.write(at, &data, WriteFlags::empty()).await.is_err() {
            failures += 1;
            assert!(failures <= most, "{otherwise}");
        }
    }
    failures
}

fn big_endian(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |n, &byte| n << 8 | u64::from(byte))
}

#[test]
fn a_refcount_block_whose_entry_could_not_be_written_is_entered_before_it_counts() {
    for times in [1, 2, 3, 5] {
        let bytes = filled("cluster_size=512,refcount_bits=64", times);
        check(&bytes, true).unwrap_or_else(|error| panic!("{times} failures: {error}"));
    }
}

#[test]
fn any_one_write_that_fails_costs_a_request_at_most_and_the_image_stays_sound() {
    let bytes = image(LEN, "cluster_size=512,refcount_bits=64");
    for spare in (0..1200).step_by(61) {
        let (lower, options) = disk(&bytes, 4 << 20, |_| ());
        let options = format!("driver=qcow2{}", below("file", &options));
        let faulty = lower.clone();
        simulated(Disorder::wild(spare), move |_| async move {
            let image = Image::open(&options).await;
            let fault = Fault::new(Kinds::WRITE, Effect::Fail(Errno::EIO));
            faulty.inject(fault.after(spare).once());
            fill(&image.node, 1, &format!("write {spare} failed, and then others")).await;
            image.close().await;
        });
        check(&lower.bytes(), false).unwrap_or_else(|error| panic!("write {spare}: {error}"));
    }
}

#[test]
fn the_dirty_bit_that_could_not_be_written_is_written_before_the_first_cluster_is() {
    let bytes = image(LEN, "cluster_size=4k,lazy_refcounts=on");
    let (lower, options) = disk(&bytes, 4 << 20, |_| ());
    let options = format!("driver=qcow2,lazy-refcounts=on{}", below("file", &options));
    let faulty = lower.clone();
    simulated(Disorder::wild(1), move |_| async move {
        let image = Image::open(&options).await;
        let fault = Fault::new(Kinds::WRITE, Effect::Fail(Errno::EIO));
        faulty.inject(fault.within(0..512).times(2));
        let data = [7; 512];
        let write =
            || async { image.node.write(0, &IoVec::from_ref(&data), WriteFlags::empty()).await };
        assert_eq!(write().await, Err(Errno::EIO));
        assert_eq!(write().await, Err(Errno::EIO));
        assert_eq!(write().await, Ok(()));
        assert_eq!(big_endian(&faulty.bytes(), 72) & 1, 1, "the image is not marked as dirty");
        image.close().await;
    });
    assert_eq!(big_endian(&lower.bytes(), 72) & 1, 0);
    check(&lower.bytes(), true).unwrap();
}

#[test]
fn what_many_tables_that_could_not_be_written_have_stopped_goes_on_without_a_flush() {
    let seed = seed();
    for seed in (0..8).map(|n| seed.wrapping_add(n)) {
        let bytes = image(LEN, "cluster_size=512");
        let (lower, options) = disk(&bytes, 4 << 20, |options| {
            options.seed = seed;
            options.traits.request_align = 512;
        });
        let options = format!("driver=qcow2,l2-cache-entry-size=512{}", below("file", &options));
        let faulty = lower.clone();
        let found =
            simulated(Disorder { short: 0.0, ..Disorder::wild(seed) }, move |_| async move {
                let image = Image::open(&options).await;
                let node = &image.node;
                let write = async |at: u64, byte: u8| {
                    let data = [byte; 512];
                    node.write(at, &IoVec::from_ref(&data), WriteFlags::empty()).await
                };
                // One L2 table for every 32 KiB.
                let tables = (0..LEN).step_by(32 << 10);
                for at in tables.clone() {
                    write(at, 1).await.unwrap();
                    write(at + 512, 2).await.unwrap();
                }
                let now = faulty.bytes();
                for n in 0..LEN >> 15 {
                    let table = big_endian(&now, big_endian(&now, 40) as usize + n as usize * 8);
                    let table = table & 0x00ff_ffff_ffff_fe00;
                    let fault = Fault::new(Kinds::WRITE, Effect::Tear(Errno::EIO));
                    faulty.inject(fault.within(table..table + 512));
                }
                let mut failed = 0;
                for at in tables.clone() {
                    failed += u32::from(write(at + 1024, 3).await.is_err());
                }
                assert!(failed > 4, "{failed}");
                assert_eq!(write(0, 4).await, Err(Errno::EIO), "nothing is written meanwhile");
                faulty.heal();
                for at in tables {
                    assert_eq!(write(at, 5).await, Ok(()), "{at}, seed {seed}");
                }
                let mut found = vec![0xee; LEN as usize];
                node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
                node.flush().await.unwrap();
                // As if the machine had crashed now.
                let state = faulty.bytes();
                image.close().await;
                (found, state)
            });
        let (found, state) = found;
        check(&state, false).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let (_disk, options) = passing(&state, state.len() as u64, |_| {});
        let options = format!("driver=qcow2,read-only=on{}", below("file", &options));
        let kept = simulated(Disorder::wild(1), |_| async move {
            let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
            let mut kept = vec![0xee; LEN as usize];
            opened.node.read(0, &IoVec::from_mut(&mut kept)).await.unwrap();
            kept
        });
        assert!(kept == found, "seed {seed}");
        check(&lower.bytes(), false).unwrap();
    }
}

#[test]
fn a_header_that_could_not_be_written_is_the_old_one_or_the_new_one_and_can_be_changed_again() {
    let (old, new) = ("a".repeat(500), "b".repeat(700));
    let create = format!("cluster_size=64k,backing_fmt=raw,backing_file={old}");
    let bytes = image(LEN, &create);
    let name = |bytes: &[u8]| {
        let header = Header::parse(&bytes[..1 << 16]).unwrap();
        String::from_utf8(header.backing_file.unwrap()).unwrap()
    };
    let mut failures = 0;
    for spare in 0..8 {
        let (lower, options) = disk(&bytes, 4 << 20, |_| ());
        let (_, base) = disk(&vec![0; LEN as usize], LEN, |_| ());
        let options = format!("driver=qcow2{}{}", below("file", &options), below("backing", &base));
        let (faulty, was, wanted) = (lower.clone(), old.clone(), new.clone());
        failures += simulated(Disorder::wild(spare), move |_| async move {
            let image = Image::open(&options).await;
            let driver = image.node.driver().image().unwrap();
            let fault = Fault::new(Kinds::WRITE, Effect::Fail(Errno::EIO));
            faulty.inject(fault.within(0..1 << 16).after(spare).once());
            let failed = driver.set_backing(Some(&wanted), Some("raw"), None).await.is_err();
            // The next writes, too, write the header.
            faulty.heal();
            assert!([&was, &wanted].contains(&&name(&faulty.bytes())), "write {spare}");
            // Whatever relies on the header comes after it.
            let data = [7; 512];
            image.node.write(0, &IoVec::from_ref(&data), WriteFlags::empty()).await.unwrap();
            let found = name(&faulty.bytes());
            assert_eq!(driver.info().backing_filename.as_deref(), Some(&*found), "write {spare}");
            driver.set_backing(Some(&wanted), Some("raw"), None).await.unwrap();
            image.close().await;
            u32::from(failed)
        });
        assert_eq!(name(&lower.bytes()), new);
        consistency::check(&lower.bytes(), false).unwrap();
    }
    assert!(failures > 0, "no write of the header failed");
}
