//! Metadata that could not be written: what is counted on afterwards reaches the disk before
//! anything that relies on it.

use super::sim::{Image, below, check, disk, image};
use crate::disks::simulated;
use vublk::block::*;
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
        let mut failures = 0;
        for at in (0..LEN).step_by(512) {
            let data = [7; 512];
            let data = IoVec::from_ref(&data);
            while image.node.write(at, &data, WriteFlags::empty()).await.is_err() {
                failures += 1;
                assert!(failures <= times, "a fault strikes one request");
            }
        }
        assert_eq!(failures, times, "{options}: the fault did not strike");
        image.close().await;
    });
    lower.bytes()
}

fn big_endian(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |n, &byte| n << 8 | u64::from(byte))
}

#[test]
fn a_refcount_block_whose_entry_could_not_be_written_is_entered_before_it_counts() {
    for times in [1, 2, 3] {
        let bytes = filled("cluster_size=512,refcount_bits=64", times);
        check(&bytes, true).unwrap_or_else(|error| panic!("{times} failures: {error}"));
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
