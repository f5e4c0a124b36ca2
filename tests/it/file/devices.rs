//! Block devices: loop devices over files.

use super::transfers::matches_a_model;
use super::*;
use std::os::unix::fs::MetadataExt;
use vublk::block::{Abilities, Preallocation};

fn options(device: &Loop) -> String {
    format!("driver=host_device,filename={},discard=unmap", device.0)
}

#[test]
fn random_requests_match_a_model_on_block_devices_buffered_and_direct() {
    for sectors in ["512", "4096"] {
        for cache in ["off", "on"] {
            let dir = on_tmpfs();
            let backing = sparse(dir.path(), "backing", 1 << 20);
            let device = Loop::new(&backing, &["--sector-size", sectors]);
            let bench = Bench::new();
            let options = format!("{},cache.direct={cache}", options(&device));
            println!("{options} with sectors of {sectors}");
            let disk = bench.disk(&options).unwrap();
            assert_eq!(disk.node.len(), device.size());
            if cache == "on" {
                assert_eq!(disk.node.traits().request_align.to_string(), sectors);
            }
            matches_a_model(&bench, &disk, false);
            bench.flush(&disk).unwrap();
        }
    }
}

#[test]
fn discards_and_unmapping_zeroes_reach_what_is_under_the_device() {
    let dir = on_tmpfs();
    let backing = sparse(dir.path(), "backing", 4 << 20);
    let device = Loop::new(&backing, &[]);
    let used = || std::fs::metadata(&backing).unwrap().blocks() * 512;
    let bench = Bench::new();
    let disk = bench.disk(&options(&device)).unwrap();
    let abilities = disk.node.traits().abilities;
    assert!(abilities.contains(Abilities::DISCARD | Abilities::ZERO | Abilities::ZERO_UNMAP));
    bench.write(&disk, 0, pattern(4 << 20), WriteFlags::empty()).unwrap();
    bench.flush(&disk).unwrap();
    assert_eq!(used(), 4 << 20);
    bench.discard(&disk, 0, 1 << 20).unwrap();
    assert_eq!(used(), 3 << 20);
    bench.zero(&disk, 1 << 20, 1 << 20, ZeroFlags::UNMAP | ZeroFlags::NO_FALLBACK).unwrap();
    assert_eq!(used(), 2 << 20);
    bench.zero(&disk, 2 << 20, 1 << 20, ZeroFlags::empty()).unwrap();
    assert!(bench.read(&disk, 1 << 20, 2 << 20).unwrap().iter().all(|&b| b == 0));
    assert!(bench.read(&disk, 3 << 20, 1 << 20).unwrap() == pattern(4 << 20)[3 << 20..]);
}

#[test]
fn a_device_keeps_its_size_and_a_change_from_outside_can_be_taken_over() {
    let dir = on_tmpfs();
    let backing = sparse(dir.path(), "backing", 1 << 20);
    let device = Loop::new(&backing, &[]);
    let bench = Bench::new();
    let disk = bench.disk(&options(&device)).unwrap();
    let refused = |len| bench.resize(&disk, len, true).unwrap_err().to_string();
    for len in [2 << 20, 512 << 10] {
        assert_eq!(refused(len), "Cannot resize device files");
    }
    let grow = |len| {
        let node = disk.node.clone();
        let grow = move || async move {
            node.driver().image().unwrap().grow(len, Preallocation::Off).await
        };
        bench.run(grow).map_err(|error| error.to_string())
    };
    assert_eq!(grow(2 << 20), Err("Cannot grow device files".into()));
    std::fs::File::options().write(true).open(&backing).unwrap().set_len(2 << 20).unwrap();
    tool("losetup", &["--set-capacity", &device.0]);
    // It is longer than what is asked for now, and has what it has.
    grow((1 << 20) + 512).unwrap();
    assert_eq!(disk.node.len(), 2 << 20);
    bench.resize(&disk, 2 << 20, false).unwrap();
    assert_eq!(disk.node.len(), 2 << 20);
}

#[test]
fn a_read_only_device_is_for_readers() {
    let dir = on_tmpfs();
    let backing = sparse(dir.path(), "backing", 1 << 20);
    let device = Loop::new(&backing, &["--read-only"]);
    let bench = Bench::new();
    let text = bench.disk(&options(&device)).map(|_| ()).unwrap_err().to_string();
    assert!(text.ends_with(": Permission denied"), "{text}");
    let node = bench.node(&format!("{},auto-read-only=on,node-name=a", options(&device))).unwrap();
    assert!(node.traits().abilities.contains(Abilities::READ_ONLY));
    let bytes = bench.run(move || async move { read(&node, 0, 512).await });
    assert_eq!(bytes, Ok(vec![0; 512]));
}

#[test]
fn a_block_device_is_not_taken_for_a_file() {
    let dir = on_tmpfs();
    let backing = sparse(dir.path(), "backing", 1 << 20);
    let device = Loop::new(&backing, &[]);
    let text = Bench::new()
        .disk(&format!("driver=file,filename={}", device.0))
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert_eq!(text, format!("'file' driver requires '{}' to be a regular file", device.0));
}
