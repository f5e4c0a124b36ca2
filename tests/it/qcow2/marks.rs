//! The mark of an image that is being written: what the next process makes of it, and what QEMU's tools do with it.

use super::journal::{BELOW, Disks, LEN, Memory, attach, disks, with_one_record};
use super::judge::{orderly, request};
use super::sim::{Image, below, check, disk, image};
use crate::disks::simulated;
use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use vublk::io::{Errno, IoVec};
use vublk::protocol::sim::{Effect, Fault, Kinds, SimDisk};

/// The upper bits of the autoclear features.
const MARK: [u8; 2] = *b"vb";

fn mark_of(state: &[u8]) -> [u8; 2] {
    *state[88..].first_chunk().unwrap()
}

/// Runs a line of QEMU's tools on `image.qcow2`, which has these bytes; its bytes afterwards.
fn after(state: &[u8], line: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let place: &Path = dir.path();
    std::fs::write(place.join("image.qcow2"), state).unwrap();
    let ended = Command::new("sh").args(["-ec", line]).current_dir(place).output().unwrap();
    assert!(ended.status.success(), "{line}: {ended:?}");
    std::fs::read(place.join("image.qcow2")).unwrap()
}

#[test]
fn qemu_clears_the_mark_when_it_opens_an_image_to_write_or_repair_it() {
    // Only counted clusters that nothing names are wrong with it.
    let (state, _) = with_one_record();
    assert_eq!(mark_of(&state), MARK);
    for line in ["qemu-img info image.qcow2", "qemu-img check image.qcow2 || [ $? = 3 ]"] {
        assert!(after(&state, line) == state, "{line}");
    }
    for line in [
        "qemu-img check -r leaks image.qcow2",
        "qemu-img check -r all image.qcow2",
        "qemu-img amend -o lazy_refcounts=on image.qcow2",
        "qemu-img snapshot -c s image.qcow2",
        "qemu-img resize -q image.qcow2 1M",
        "qemu-io -f qcow2 -c 'read 0 512' image.qcow2",
    ] {
        assert_eq!(mark_of(&after(&state, line)), [0; 2], "{line}");
    }
}

#[test]
fn what_was_answered_is_taken_up_although_qemu_has_committed_to_the_image_since() {
    let (state, words) = with_one_record();
    let commit = "qemu-img create -q -f qcow2 -F qcow2 -b image.qcow2 -o cluster_size=4k over.qcow2
        qemu-io -f qcow2 -c 'write -P 9 16k 32k' over.qcow2
        qemu-img commit -q over.qcow2";
    let state = after(&state, commit);
    assert_eq!(mark_of(&state), MARK, "QEMU had opened it to read");
    let Disks { image: file, options, .. } = disks("cluster_size=4k", &state, &[]);
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        attach(&image.node, Memory::holding(&words)).await.unwrap();
        // New clusters are none of those.
        request(&image.node, 0, 4096, 4096, 3).await;
        let mut found = vec![0; LEN as usize];
        image.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        assert_eq!((found[0], found[4096], found[8192], found[8704]), (BELOW, 3, 1, BELOW));
        assert!(found[16 << 10..48 << 10].iter().all(|&byte| byte == 9));
        image.close().await;
    });
    check(&file.bytes(), true).unwrap();
}

/// Reads of the L2 tables of an image fail, but for the first table's. Returns where that is.
fn hide_tables(file: &SimDisk) -> u64 {
    let bytes = file.bytes();
    let word = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().unwrap());
    let (l1, entries) = (word(40) as usize, word(36) >> 32);
    let tables = (0..entries as usize).map(|n| word(l1 + n * 8) & !(1 << 63)).filter(|&at| at != 0);
    let tables: Vec<u64> = tables.collect();
    for &table in &tables[1..] {
        let fault = Fault::new(Kinds::READ, Effect::Fail(Errno::EIO));
        file.inject(fault.within(table..table + 512));
    }
    assert!(tables.len() > 8, "{tables:?}");
    tables[0]
}

#[test]
fn taking_over_looks_at_no_tables_but_those_that_records_are_about() {
    let create = "cluster_size=512";
    let len = 1 << 20;
    let (file, options) = disk(&image(len, create), 4 << 20, |_| {});
    let options = format!("driver=qcow2{}", below("file", &options));
    let left: Rc<RefCell<(Vec<u8>, Vec<u64>)>> = Rc::default();
    let killed = left.clone();
    simulated(orderly(), |_| async move {
        let image = Image::open(&options).await;
        for at in (0..len).step_by(32 << 10) {
            request(&image.node, 0, at, 512, 1).await;
        }
        image.node.flush().await.unwrap();
        let memory = Memory::new(100);
        attach(&image.node, memory.clone()).await.unwrap();
        request(&image.node, 0, 512, 512, 2).await;
        assert_eq!(memory.records(), 1);
        *killed.borrow_mut() = (file.bytes(), memory.copy());
        image.close().await;
    });
    let (state, words) = left.take();
    // Another program has opened the image for writing, and closed it.
    let mut opened = state.clone();
    opened[88..96].fill(0);
    for (state, is_touched) in [(state, false), (opened, true)] {
        let (file, options) = disk(&state, 4 << 20, |_| {});
        let options = format!("driver=qcow2{}", below("file", &options));
        let (disk, words) = (file.clone(), words.clone());
        simulated(orderly(), |_| async move {
            let image = Image::open(&options).await;
            hide_tables(&disk);
            let told = attach(&image.node, Memory::holding(&words)).await;
            assert_eq!(told.is_err(), is_touched, "{told:?}");
            disk.heal();
            if is_touched {
                attach(&image.node, Memory::holding(&words)).await.unwrap();
            }
            let mut found = [0; 1024];
            image.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
            assert_eq!((found[511], found[512]), (1, 2));
            image.close().await;
        });
        check(&file.bytes(), true).unwrap();
    }
}

#[test]
fn a_process_without_memory_leaves_alone_what_memory_names() {
    let (state, words) = with_one_record();
    let create = "cluster_size=4k";
    for is_closed in [true, false] {
        let Disks { image: file, options, .. } = disks(create, &state, &[]);
        let now: Rc<RefCell<Vec<u8>>> = Rc::default();
        let left = now.clone();
        simulated(orderly(), |_| async move {
            let image = Image::open(&options).await;
            for n in 8..16 {
                request(&image.node, 0, n * 4096, 4096, 7).await;
            }
            if !is_closed {
                *left.borrow_mut() = file.bytes();
            }
            image.close().await;
            if is_closed {
                *left.borrow_mut() = file.bytes();
            }
        });
        let Disks { image: file, options, .. } = disks(create, &now.take(), &[]);
        let words = words.clone();
        simulated(orderly(), |_| async move {
            let image = Image::open(&options).await;
            attach(&image.node, Memory::holding(&words)).await.unwrap();
            let mut found = vec![0; LEN as usize];
            image.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
            assert_eq!((found[8192], found[8 << 12], found[4096]), (1, 7, BELOW));
            image.close().await;
        });
        check(&file.bytes(), true).unwrap();
    }
}
