//! Held requests, which outlive whatever happens to their ring.
//!
//! They are retried when the storage works again or an operator asks for it.

use super::{Stage, block, options, submit_write, write_of};
use std::time::Duration;
use vublk::protocol::sim::Kinds;
use vublk_testkit::dirty_log::{PAGE, written};
use vublk_testkit::memory::MemoryLayout;
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::ring::Desc;
use vublk_testkit::spec::{desc_flag, status};
use vublk_testkit::{DirtyLog, Disk, Options};

const STOP: &str = "werror=stop,rerror=stop";

/// Every head of queue 0 that is marked in flight.
pub fn marked(disk: &Disk) -> Vec<usize> {
    use std::os::unix::fs::FileExt;
    let (announced, file) = disk.inflight().expect("it is offered");
    let mut part = vec![0; 16 + 16 * usize::from(announced.queue_size)];
    file.read_exact_at(&mut part, announced.mmap_offset).unwrap();
    (0..usize::from(announced.queue_size)).filter(|n| part[16 + 16 * n] != 0).collect()
}

/// The disk holds the blocks of these numbers.
fn assert_written(stage: &Stage, numbers: impl Iterator<Item = u64>) {
    let bytes = stage.sim.bytes();
    for number in numbers {
        assert!(bytes[number as usize * 4096..][..4096] == block(number), "block {number}");
    }
}

/// So many writes are held.
fn hold_writes(stage: &mut Stage, disk: &mut Disk, count: u64) {
    stage.fails(Kinds::WRITE, libc::EIO);
    (0..count).for_each(|number| submit_write(disk, number));
    stage.wait_held(count as usize);
}

fn assert_all(disk: &mut Disk, count: usize, status: u8) {
    let done = disk.queue(0).drain().unwrap();
    assert_eq!(done.len(), count);
    assert!(done.iter().all(|one| one.status == status), "{done:?}");
}

#[test]
fn held_requests_come_back_by_themselves_when_the_storage_works_again() {
    let mut stage = Stage::new(STOP);
    let mut disk = stage.open(false);
    hold_writes(&mut stage, &mut disk, 3);
    // The first trial, after a second, fails; the second is two seconds later.
    while stage.info().errors < 6 {
        std::thread::sleep(Duration::from_millis(1));
    }
    stage.sim.heal();
    assert_all(&mut disk, 3, status::OK);
    assert_written(&stage, 0..3);
    assert_eq!(stage.info().held, 0);
}

#[test]
fn the_ring_goes_on_while_requests_are_held_and_an_operator_has_them_tried_again() {
    let mut stage = Stage::new(STOP);
    let mut disk = stage.open(true);
    disk.write(8 * 100, &block(100)).unwrap();
    stage.fails(Kinds::READ, libc::EIO);
    hold_writes(&mut stage, &mut disk, 4);
    let read = Request::In { sector: 8 * 100, len: 4096 };
    disk.queue(0).submit(&read, &Shape::default()).unwrap();
    stage.wait_held(5);
    for _ in 0..100 {
        disk.queue(0).submit(&Request::Flush, &Shape::default()).unwrap();
        assert_eq!(disk.queue(0).wait().unwrap().status, status::OK);
        disk.queue(1).get_id().unwrap();
    }
    assert_eq!(marked(&disk).len(), 5);
    // In vain.
    stage.service().retry_held("e0").unwrap();
    while stage.info().errors < 10 {
        std::thread::sleep(Duration::from_millis(1));
    }
    stage.wait_held(5);
    stage.sim.heal();
    stage.service().retry_held("e0").unwrap();
    assert_all(&mut disk, 5, status::OK);
    assert_written(&stage, 0..4);
    assert!(marked(&disk).is_empty());
    assert!(stage.service().retry_held("e1").is_err());
}

#[test]
fn an_operator_has_held_requests_failed() {
    for tracked in [false, true] {
        let mut stage = Stage::new(STOP);
        let mut disk = stage.open(tracked);
        hold_writes(&mut stage, &mut disk, 5);
        stage.service().fail_held("e0").unwrap();
        assert_all(&mut disk, 5, status::IOERR);
        assert_eq!(stage.info().held, 0);
        stage.sim.heal();
        disk.write(0, &block(0)).unwrap();
        assert!(stage.service().fail_held("e1").is_err());
    }
}

#[test]
fn a_guest_can_have_its_whole_ring_held_and_no_more() {
    let mut stage = Stage::new(STOP);
    let mut disk = stage.open(false);
    hold_writes(&mut stage, &mut disk, 16);
    assert!(disk.queue(0).submit(&write_of(16), &Shape::indirect()).is_err(), "the ring is full");
    stage.sim.heal();
    stage.service().retry_held("e0").unwrap();
    assert_all(&mut disk, 16, status::OK);
    assert_written(&stage, 0..16);
}

#[test]
fn a_resize_does_not_wait_for_held_requests() {
    let mut stage = Stage::new(STOP);
    let mut disk = stage.open(false);
    hold_writes(&mut stage, &mut disk, 3);
    let service = stage.service();
    let node = service.graph().find("d0").unwrap();
    service.wait(async move |service| service.resize(&node, 2 << 20).await).unwrap();
    assert_eq!(stage.info().held, 3);
    stage.sim.heal();
    stage.service().retry_held("e0").unwrap();
    assert_all(&mut disk, 3, status::OK);
    assert_written(&stage, 0..3);
}

#[test]
fn a_ring_that_stops_fails_what_it_holds_where_nothing_tracks_it() {
    let mut stage = Stage::new(STOP);
    let mut disk = stage.open(false);
    hold_writes(&mut stage, &mut disk, 3);
    assert_eq!(disk.connection().stop_queue(0).unwrap(), 3);
    assert_all(&mut disk, 3, status::IOERR);
    assert_eq!(stage.info().held, 0);
    // And an export that ends.
    drop(disk);
    let mut disk = stage.open(false);
    (0..3).for_each(|number| submit_write(&mut disk, number));
    stage.wait_held(3);
    stage.service = None;
    assert_all(&mut disk, 3, status::IOERR);
}

#[test]
fn a_ring_that_stops_and_starts_takes_up_again_what_it_held_where_that_is_tracked() {
    let mut stage = Stage::new(STOP);
    let mut disk = stage.open(true);
    hold_writes(&mut stage, &mut disk, 3);
    submit_flush(&mut disk);
    let base = disk.connection().stop_queue(0).unwrap();
    assert_eq!(base, 4, "as many were made available");
    assert_eq!((marked(&disk).len(), stage.info().held), (3, 0));
    assert!(disk.queue(0).reap().unwrap().is_none(), "they are with nobody");
    // The storage still fails.
    disk.start_queue(0, base).unwrap();
    disk.connection().enable_queue(0, true).unwrap();
    stage.wait_held(3);
    disk.stop().unwrap();
    stage.sim.heal();
    disk.start_queue(0, base).unwrap();
    disk.connection().enable_queue(0, true).unwrap();
    assert_all(&mut disk, 3, status::OK);
    assert_written(&stage, 0..3);
    disk.write(8 * 7, &block(7)).unwrap();
    assert!(marked(&disk).is_empty());
}

fn submit_flush(disk: &mut Disk) {
    disk.queue(0).submit(&Request::Flush, &Shape::default()).unwrap();
    assert_eq!(disk.queue(0).wait().unwrap().status, status::OK);
}

#[test]
fn a_daemon_that_ends_leaves_held_requests_to_the_one_after_it() {
    let mut stage = Stage::new(STOP);
    let mut disk = stage.open(true);
    hold_writes(&mut stage, &mut disk, 5);
    for _ in 0..3 {
        stage.start();
        assert_eq!(marked(&disk).len(), 5);
        disk.reconnect().unwrap();
        stage.wait_held(5);
        assert!(disk.queue(0).reap().unwrap().is_none());
    }
    stage.sim.heal();
    stage.service().retry_held("e0").unwrap();
    assert_all(&mut disk, 5, status::OK);
    assert_written(&stage, 0..5);
    assert!(marked(&disk).is_empty());
}

#[test]
fn a_front_end_that_goes_and_comes_back_finds_its_requests_held() {
    let mut stage = Stage::new(STOP);
    let mut disk = stage.open(true);
    hold_writes(&mut stage, &mut disk, 5);
    disk.reconnect().unwrap();
    stage.wait_held(5);
    stage.sim.heal();
    stage.service().retry_held("e0").unwrap();
    assert_all(&mut disk, 5, status::OK);
    assert_written(&stage, 0..5);
}

#[test]
fn held_requests_are_found_again_when_the_memory_table_changes() {
    for tracked in [false, true] {
        let mut stage = Stage::new(STOP);
        let layout = MemoryLayout::adjacent(3, 1 << 20);
        let mut disk = stage.open_with(&Options {
            layout,
            regions: Some(2),
            memory_messages: vublk_testkit::frontend::MemoryMessages::Slots,
            ..options(tracked)
        });
        hold_writes(&mut stage, &mut disk, 4);
        let memory = disk.memory().clone();
        disk.connection().add_region(&memory.regions()[2]).unwrap();
        stage.wait_held(4);
        disk.connection().remove_region(&memory.regions()[2]).unwrap();
        stage.wait_held(4);
        stage.sim.heal();
        stage.service().retry_held("e0").unwrap();
        assert_all(&mut disk, 4, status::OK);
        assert_written(&stage, 0..4);
        disk.write(0, &block(0)).unwrap();
    }
}

#[test]
fn at_the_end_of_a_migration_held_requests_are_failed_and_marked_dirty() {
    let mut stage = Stage::new(STOP);
    let more = options(true);
    let protocol = more.protocol | vublk_testkit::spec::protocol::LOG_SHMFD;
    let mut disk = stage.open_with(&Options { protocol, ..more });
    disk.write(8 * 100, &block(100)).unwrap();
    stage.fails(Kinds::READ, libc::EIO);
    hold_writes(&mut stage, &mut disk, 2);
    let read = Request::In { sector: 8 * 100, len: 4096 };
    let token = disk.queue(0).add(&read, &Shape::indirect()).unwrap();
    let chain = disk.queue(0).chain(token).unwrap();
    disk.queue(0).publish().unwrap();
    stage.wait_held(3);
    let log = DirtyLog::new((128 << 20) / PAGE / 8).unwrap();
    disk.start_logging(&log).unwrap();
    disk.connection().stop_queue(0).unwrap();
    assert_all(&mut disk, 3, status::IOERR);
    assert!(marked(&disk).is_empty());
    let dirty = log.take();
    assert!(written(&chain).is_subset(&dirty), "{dirty:x?}");
}

#[test]
fn a_reset_device_has_nothing_held() {
    let mut stage = Stage::new(STOP);
    let mut disk = stage.open(true);
    hold_writes(&mut stage, &mut disk, 4);
    disk.connection().reset_device().unwrap();
    assert_eq!((stage.info().held, marked(&disk).len()), (0, 0));
}

#[test]
fn a_held_chain_that_the_guest_has_changed_is_checked_again() {
    let mut stage = Stage::new(STOP);
    let mut disk = stage.open(false);
    stage.fails(Kinds::WRITE, libc::EIO);
    disk.queue(0).submit(&write_of(1), &Shape::default()).unwrap();
    stage.wait_held(1);
    // A loop, then memory that is not there; the head is the first descriptor of a fresh ring.
    let memory = disk.memory().clone();
    let layout = disk.queue(0).ring().layout();
    let desc = Desc { addr: u64::MAX - 4096, len: 4096, flags: desc_flag::NEXT, next: 0 };
    (0..16).for_each(|index| layout.write_desc(&memory, layout.desc, index, desc));
    stage.service().retry_held("e0").unwrap();
    stage.wait_held(0);
    // That queue has stopped; the other continues, and the disk serves the next front end.
    disk.queue(1).get_id().unwrap();
    stage.sim.heal();
    drop(disk);
    stage.open(false).write(0, &block(0)).unwrap();
    // The same when they are failed rather than tried.
    let mut disk = stage.open(false);
    hold_writes(&mut stage, &mut disk, 2);
    let memory = disk.memory().clone();
    let layout = disk.queue(0).ring().layout();
    (0..16).for_each(|index| layout.write_desc(&memory, layout.desc, index, desc));
    stage.service().fail_held("e0").unwrap();
    stage.wait_held(0);
    drop(disk);
    stage.sim.heal();
    stage.open(false).write(0, &block(0)).unwrap();
}
