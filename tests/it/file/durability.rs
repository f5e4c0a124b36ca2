//! Flushes: how many reach the file, and the state after one has failed.

use super::*;
use std::cell::Cell;
use std::rc::Rc;
use vublk::block::{Driver, NodeOptions};
use vublk::io::current;
use vublk::protocol::file::{FileDriver, FileOptions, Flavour};

fn driver(path: &str, flavour: Flavour) -> FileDriver {
    let options = FileOptions::new(path);
    FileDriver::open(flavour, &options, &NodeOptions::default(), false).unwrap()
}

#[test]
fn flushes_that_wait_together_share_one_fsync() {
    let dir = on_disk();
    let image = sparse(dir.path(), "a.img", 1 << 20);
    let driver = driver(image.to_str().unwrap(), Flavour::File);
    let bench = Bench::new();
    let count = bench.run(move || async move {
        let driver = Rc::new(driver);
        driver.write(0, &IoVec::from_ref(&pattern(65536)), WriteFlags::empty()).await.unwrap();
        let done = Rc::new(Cell::new(0));
        for _ in 0..20 {
            let (driver, done) = (driver.clone(), done.clone());
            current().spawn(async move {
                driver.flush().await.unwrap();
                done.set(done.get() + 1);
            });
        }
        while done.get() < 20 {
            vublk::io::sleep(Duration::from_millis(1)).await;
        }
        driver.flushes()
    });
    // The first began alone; the other nineteen came while it ran.
    assert_eq!(count, 2);
}

/// A device whose writes to the page cache work, and fail later, when they are written back: its backing file is on a
/// file system that is too small.
pub struct FullDevice {
    pub device: Loop,
    small: Mount,
    _dir: tempfile::TempDir,
}

impl FullDevice {
    pub fn new() -> FullDevice {
        let dir = on_tmpfs();
        let small = Mount::small(&dir.path().join("small"), 1 << 20);
        let backing = sparse(&small.0, "backing", 16 << 20);
        FullDevice { device: Loop::new(&backing, &[]), small, _dir: dir }
    }

    /// Makes room, so that the next writeback works.
    pub fn grow(&self) {
        tool("mount", &["-o", "remount,size=64m", self.small.0.to_str().unwrap()]);
    }
}

#[test]
fn after_a_failed_flush_every_later_one_fails_until_the_file_is_opened_again() {
    let full = FullDevice::new();
    let path = full.device.0.clone();
    let driver = driver(&path, Flavour::HostDevice);
    let bench = Bench::new();
    let driver = bench.run(move || async move {
        let bytes = pattern(4 << 20);
        driver.write(0, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
        driver.flush().await.unwrap_err();
        driver
    });
    full.grow();
    let driver = bench.run(move || async move {
        // The kernel itself would now say that all is well: the lost pages count as clean.
        let fsyncs = driver.flushes();
        let first = driver.flush().await.unwrap_err();
        assert_eq!(driver.flush().await, Err(first));
        assert_eq!(driver.flushes(), fsyncs);
        // Reads and writes continue.
        let bytes = pattern(4096);
        driver.write(8 << 20, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
        let mut back = vec![0; 4096];
        driver.read(8 << 20, &IoVec::from_mut(&mut back)).await.unwrap();
        assert!(back == bytes);
        assert_eq!(driver.flush().await, Err(first));
        driver
    });
    drop(driver);
    let driver = self::driver(&path, Flavour::HostDevice);
    bench.run(move || async move {
        let bytes = pattern(4096);
        driver.write(0, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
        driver.flush().await.unwrap();
    });
}

#[test]
fn a_failed_durable_write_that_hides_the_loss_of_others_fails_later_flushes() {
    let full = FullDevice::new();
    let driver = driver(&full.device.0, Flavour::HostDevice);
    let bench = Bench::new();
    let driver = bench.run(move || async move {
        let bytes = pattern(4 << 20);
        driver.write(0, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
        driver
    });
    // Written back by somebody else: the failure is the kernel's to report, once.
    let _ = Command::new("sync").arg(&full.device.0).output();
    full.grow();
    bench.run(move || async move {
        let bytes = pattern(4096);
        let durable = driver.write(8 << 20, &IoVec::from_ref(&bytes), WriteFlags::FUA).await;
        assert!(durable.is_err(), "the failed writeback was not reported to a durable write");
        assert_eq!(driver.flush().await, durable);
    });
}

#[test]
fn with_cache_no_flush_nothing_waits_for_the_disk_nor_hears_from_it() {
    let full = FullDevice::new();
    let bench = Bench::new();
    let options = format!("driver=host_device,filename={},cache.no-flush=on", full.device.0);
    let disk = bench.disk(&options).unwrap();
    bench.write(&disk, 0, pattern(4 << 20), WriteFlags::FUA).unwrap();
    bench.flush(&disk).unwrap();
}
