//! Data: written, zeroed, discarded and read back; the end of the file; holes; a full disk.

use super::*;
use std::os::unix::fs::MetadataExt;
use vublk::block::Status;

fn options(path: &Path) -> String {
    format!("driver=file,filename={},discard=unmap", path.display())
}

/// Random requests against a copy in memory.
pub fn matches_a_model(bench: &Bench, disk: &Disk, holes_read_zero: bool) {
    let seed = crate::disks::seed();
    let node = disk.node.clone();
    bench.run(move || async move {
        let mut random = fastrand::Rng::with_seed(seed);
        let len = node.len();
        let mut model = read(&node, 0, len as usize).await.unwrap();
        for step in 0..300 {
            let at = random.u64(..len);
            let most = if random.u8(..8) == 0 { len } else { 20_000 };
            let mut n = random.u64(1..=(len - at).min(most));
            let mut at = at;
            if random.bool() {
                (at, n) = (at & !511, n.next_multiple_of(512));
                n = n.min(len - at);
            }
            let range = at as usize..(at + n) as usize;
            match random.u8(..10) {
                0..4 => {
                    let bytes: Vec<u8> = (0..n).map(|_| random.u8(1..)).collect();
                    let mut flags = WriteFlags::empty();
                    flags.set(WriteFlags::FUA, random.u8(..4) == 0);
                    node.write(at, &IoVec::from_ref(&bytes), flags).await.unwrap();
                    model[range.clone()].copy_from_slice(&bytes);
                }
                4 | 5 => {
                    let mut flags = ZeroFlags::empty();
                    flags.set(ZeroFlags::UNMAP, random.bool());
                    node.zero(at, n, flags).await.unwrap();
                    model[range.clone()].fill(0);
                }
                6 => {
                    node.discard(at, n).await.unwrap();
                    let now = read(&node, at, n as usize).await.unwrap();
                    let kept = now
                        .iter()
                        .zip(&model[range.clone()])
                        .all(|(a, b)| if holes_read_zero { *a == 0 || a == b } else { true });
                    assert!(kept, "step {step}: a discard made up data");
                    model[range.clone()].copy_from_slice(&now);
                }
                7 => node.flush().await.unwrap(),
                8 => {
                    let extent = node.status(at, n, Precision::Zeroes).await.unwrap();
                    if extent.status.contains(Status::ZERO) {
                        let hole = &model[at as usize..][..extent.len as usize];
                        assert!(hole.iter().all(|&b| b == 0), "step {step}: data called a hole");
                    }
                }
                _ => {}
            }
            let now = read(&node, at, n as usize).await.unwrap();
            assert!(now == model[range], "step {step}: {n} bytes at {at} differ");
        }
        assert_eq!(node.len(), len, "the disk changed its length");
        assert!(read(&node, 0, len as usize).await.unwrap() == model);
    });
}

#[test]
fn random_requests_match_a_model_on_every_file_system_buffered_and_direct() {
    for (dir, cache) in
        [(on_disk(), "off"), (on_disk(), "on"), (on_tmpfs(), "off"), (on_tmpfs(), "on")]
    {
        // No multiple of a sector: the last one is incomplete.
        let image = sparse(dir.path(), "a.img", (1 << 20) + 700);
        let bench = Bench::new();
        let options = format!("{},cache.direct={cache}", options(&image));
        let disk = bench.disk(&options).unwrap();
        println!("{options}");
        matches_a_model(&bench, &disk, true);
        drop((disk, bench));
        assert!(std::fs::metadata(&image).unwrap().len() <= (1 << 20) + 1024);
    }
}

#[test]
fn a_file_system_with_blocks_of_4_kib_takes_direct_requests_of_one_sector() {
    let dir = on_tmpfs();
    let device = Loop::new(&sparse(dir.path(), "fs", 64 << 20), &["--sector-size", "4096"]);
    tool("mkfs.ext4", &["-q", &device.0]);
    let mount = Mount::new(&dir.path().join("mnt"), &[&device.0]);
    let image = sparse(&mount.0, "a.img", 10 * 512 + 100);
    let bench = Bench::new();
    let disk = bench.disk(&format!("{},cache.direct=on", options(&image))).unwrap();
    assert_eq!(disk.node.traits().request_align, 4096);
    assert_eq!(disk.node.len(), 11 * 512);
    // In blocks that are read, changed and written whole, the last of them beyond the end.
    bench.write(&disk, 3 * 512, pattern(512), WriteFlags::empty()).unwrap();
    bench.write(&disk, 10 * 512, pattern(512), WriteFlags::empty()).unwrap();
    assert_eq!(disk.node.len(), 11 * 512, "a write made the disk longer");
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 11 * 512);
    let mut wanted = vec![0; 11 * 512];
    wanted[3 * 512..4 * 512].copy_from_slice(&pattern(512));
    wanted[10 * 512..].copy_from_slice(&pattern(512));
    assert!(bench.read(&disk, 0, 11 * 512).unwrap() == wanted);
    matches_a_model(&bench, &disk, true);
}

#[test]
fn a_direct_read_of_the_incomplete_last_sector_ends_in_zeroes() {
    let dir = on_disk();
    let image = dir.path().join("a.img");
    std::fs::write(&image, pattern(5120 + 100)).unwrap();
    let bench = Bench::new();
    let disk = bench.disk(&format!("{},cache.direct=on", options(&image))).unwrap();
    let mut wanted = pattern(5120 + 100);
    wanted.resize(5120 + 512, 0);
    assert!(bench.read(&disk, 0, 5120 + 512).unwrap() == wanted);
    bench.write(&disk, 5120, pattern(512), WriteFlags::FUA).unwrap();
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 5120 + 512);
    let found = bench.map(&disk, Precision::Zeroes);
    assert!(found.iter().all(|(_, extent)| extent.status.contains(Status::DATA)), "{found:?}");
    assert!(bench.read(&disk, 5120, 512).unwrap() == pattern(512));
}

#[test]
fn holes_are_found_and_are_nowhere_else() {
    for dir in [on_disk(), on_tmpfs()] {
        let image = sparse(dir.path(), "a.img", 8 << 20);
        let bench = Bench::new();
        let disk = bench.disk(&options(&image)).unwrap();
        bench.write(&disk, 1 << 20, pattern(1 << 20), WriteFlags::empty()).unwrap();
        bench.write(&disk, 4 << 20, pattern(65536), WriteFlags::empty()).unwrap();
        let data: Vec<_> = bench
            .map(&disk, Precision::Zeroes)
            .into_iter()
            .filter(|(_, extent)| extent.status.contains(Status::DATA))
            .map(|(at, extent)| (at, extent.len))
            .collect();
        assert_eq!(data, [(1 << 20, 1 << 20), (4 << 20, 65536)]);
        // Who only wants to know which layer decides is not made to wait for the file system.
        let all = bench.map(&disk, Precision::Allocation);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].1.status, Status::DATA | Status::ALLOCATED);
        // What became a hole is one.
        bench.discard(&disk, 0, 8 << 20).unwrap();
        let holes = bench.map(&disk, Precision::Zeroes);
        assert!(holes.iter().all(|(_, e)| e.status == Status::ZERO | Status::ALLOCATED));
    }
}

#[test]
fn zeroing_gives_space_back_only_when_it_may() {
    for dir in [on_disk(), on_tmpfs()] {
        let image = dir.path().join("a.img");
        std::fs::write(&image, pattern(1 << 20)).unwrap();
        let used = || std::fs::metadata(&image).unwrap().blocks() * 512;
        let bench = Bench::new();
        let disk = bench.disk(&options(&image)).unwrap();
        bench.zero(&disk, 0, 1 << 20, ZeroFlags::NO_FALLBACK).unwrap();
        assert!(bench.read(&disk, 0, 1 << 20).unwrap().iter().all(|&b| b == 0));
        assert!(used() >= 1 << 20, "{} bytes are left", used());
        bench.write(&disk, 0, pattern(1 << 20), WriteFlags::empty()).unwrap();
        let flags = ZeroFlags::NO_FALLBACK | ZeroFlags::UNMAP;
        bench.zero(&disk, 0, 1 << 20, flags).unwrap();
        assert!(bench.read(&disk, 0, 1 << 20).unwrap().iter().all(|&b| b == 0));
        assert!(used() < 64 << 10, "{} bytes are left", used());
    }
}

#[test]
fn zeroing_the_incomplete_last_sector_leaves_the_disk_as_long_as_it_was() {
    for dir in [on_disk(), on_tmpfs()] {
        for flags in [ZeroFlags::empty(), ZeroFlags::UNMAP] {
            let image = dir.path().join("a.img");
            std::fs::write(&image, pattern(1000)).unwrap();
            let bench = Bench::new();
            let disk = bench.disk(&options(&image)).unwrap();
            bench.zero(&disk, 512, 512, flags).unwrap();
            assert_eq!(disk.node.len(), 1024);
            let mut wanted = pattern(512);
            wanted.resize(1024, 0);
            assert!(bench.read(&disk, 0, 1024).unwrap() == wanted);
        }
    }
}

#[test]
fn a_full_file_system_fails_the_write_that_finds_it_full_and_nothing_else() {
    let dir = on_tmpfs();
    let mount = Mount::small(&dir.path().join("small"), 1 << 20);
    let image = sparse(&mount.0, "a.img", 8 << 20);
    let bench = Bench::new();
    let disk = bench.disk(&options(&image)).unwrap();
    bench.write(&disk, 0, pattern(512 << 10), WriteFlags::empty()).unwrap();
    for flags in [WriteFlags::empty(), WriteFlags::FUA] {
        let error = bench.write(&disk, 1 << 20, pattern(2 << 20), flags).unwrap_err();
        assert_eq!(error.0, libc::ENOSPC);
    }
    assert!(bench.read(&disk, 0, 512 << 10).unwrap() == pattern(512 << 10));
    // No data was lost that was told to be written: the disk can still be flushed.
    bench.flush(&disk).unwrap();
    bench.discard(&disk, 0, 8 << 20).unwrap();
    bench.write(&disk, 1 << 20, pattern(512 << 10), WriteFlags::FUA).unwrap();
    bench.flush(&disk).unwrap();
}

#[test]
fn a_longer_disk_ends_in_zeroes_and_a_shorter_one_must_be_asked_for() {
    for dir in [on_disk(), on_tmpfs()] {
        let image = dir.path().join("a.img");
        std::fs::write(&image, pattern(1000)).unwrap();
        let bench = Bench::new();
        let disk = bench.disk(&options(&image)).unwrap();
        bench.resize(&disk, 1 << 20, false).unwrap();
        assert_eq!(disk.node.len(), 1 << 20);
        let mut wanted = pattern(1000);
        wanted.resize(1 << 20, 0);
        assert!(bench.read(&disk, 0, 1 << 20).unwrap() == wanted);
        let text = bench.resize(&disk, 4096, false).unwrap_err().to_string();
        assert!(text.contains("4096 bytes are less than its 1048576"), "{text}");
        assert_eq!(disk.node.len(), 1 << 20);
        bench.resize(&disk, 4096, true).unwrap();
        assert_eq!((disk.node.len(), std::fs::metadata(&image).unwrap().len()), (4096, 4096));
    }
}

#[test]
fn the_space_that_a_disk_takes_is_reported() {
    let dir = on_disk();
    let image = sparse(dir.path(), "a.img", 8 << 20);
    let bench = Bench::new();
    let disk = bench.disk(&options(&image)).unwrap();
    bench.write(&disk, 0, pattern(1 << 20), WriteFlags::FUA).unwrap();
    let node = disk.node.clone();
    let used =
        bench.run(move || async move { node.driver().image().unwrap().allocated().await }).unwrap();
    assert_eq!(used, std::fs::metadata(&image).unwrap().blocks() * 512);
    assert!((1 << 20..2 << 20).contains(&used), "{used}");
}
