//! Requests that the storage does not finish.
//!
//! Their connection is closed, and nothing is started again before they have ended.

use super::held::marked;
use super::{Stage, block, submit_write, write_of};
use vublk::protocol::sim::{Effect, Fault, Kinds};
use vublk_testkit::Disk;
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::status;

/// The first operation of these kinds hangs until the disk is healed.
fn hang(stage: &Stage, kinds: Kinds) {
    stage.sim.inject(Fault::new(kinds, Effect::Hang).once());
}

/// Waits until the server has closed the connection; it answers until then.
fn wait_closed(disk: &mut Disk) {
    while disk.connection().config().is_ok() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_request_that_hangs_costs_its_connection_and_is_not_begun_again_before_it_has_ended() {
    for tracked in [true, false] {
        let stage = Stage::new("io-timeout=1");
        let mut disk = stage.open(tracked);
        hang(&stage, Kinds::WRITE);
        submit_write(&mut disk, 1);
        wait_closed(&mut disk);
        // The next connection is answered, its rings wait.
        disk.reconnect().unwrap();
        submit_write(&mut disk, 2);
        disk.queue(1).submit(&Request::GetId, &Shape::default()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(disk.queue(0).reap().unwrap().is_none());
        assert!(disk.queue(1).reap().unwrap().is_none());
        if tracked {
            assert_eq!(marked(&disk).len(), 1, "what hangs is still in flight");
        }
        assert!(stage.sim.bytes()[8192..][..4096] == [0; 4096], "the second write has begun");
        stage.sim.release();
        let done = disk.queue(0).drain().unwrap();
        assert_eq!(done.len(), 2);
        assert!(done.iter().all(|one| one.status == status::OK));
        assert_eq!(disk.queue(1).wait().unwrap().status, status::OK);
        for number in 1..3 {
            assert!(stage.sim.bytes()[number * 4096..][..4096] == block(number as u64));
        }
        disk.write(0, &block(0)).unwrap();
    }
}

#[test]
fn a_ring_that_is_to_stop_is_not_waited_for_without_end() {
    for (kinds, request) in [
        (Kinds::READ, Request::In { sector: 8, len: 4096 }),
        (Kinds::FLUSH, Request::Flush),
        (Kinds::WRITE, write_of(1)),
    ] {
        let mut stage = Stage::new("io-timeout=1");
        let mut disk = stage.open(true);
        disk.write(8, &block(9)).unwrap();
        hang(&stage, kinds);
        disk.queue(0).submit(&request, &Shape::indirect()).unwrap();
        while marked(&disk).is_empty() {
            std::thread::yield_now();
        }
        disk.connection().stop_queue(0).unwrap_err();
        // The service continues.
        assert_eq!(stage.info().id, "e0");
        stage.sim.release();
        disk.reconnect().unwrap();
        assert!(disk.queue(0).drain().unwrap().iter().all(|one| one.status == status::OK));
        disk.write(0, &block(0)).unwrap();
    }
}

#[test]
fn a_connection_ends_although_what_the_guest_has_written_cannot_be_handed_over() {
    let stage = Stage::with_image("io-timeout=1");
    let mut disk = stage.open(true);
    disk.write(8, &block(1)).unwrap();
    // The entry is in the front end's memory alone.
    hang(&stage, Kinds::WRITE);
    disk.reconnect().unwrap();
    submit_write(&mut disk, 2);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(disk.queue(0).reap().unwrap().is_none(), "nothing begins before it has ended");
    stage.sim.release();
    assert_eq!(disk.queue(0).wait().unwrap().status, status::OK);
    for number in 1..3 {
        let mut found = [0; 4096];
        disk.read(number * 8, &mut found).unwrap();
        assert!(found[..] == block(number));
    }
}

#[test]
fn an_export_ends_when_its_last_request_has() {
    let mut stage = Stage::new("io-timeout=1");
    let mut disk = stage.open(true);
    hang(&stage, Kinds::WRITE);
    submit_write(&mut disk, 1);
    wait_closed(&mut disk);
    let service = stage.service();
    service.wait(async |service| service.export_del("e0", true).await).unwrap();
    assert!(stage.info().shutting_down);
    stage.sim.release();
    while !stage.service().exports().is_empty() {
        stage.service().take_ended();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(stage.sim.bytes()[4096..][..4096] == block(1));
    assert!(marked(&disk).is_empty(), "it has been handed back");
}

#[test]
fn without_a_deadline_a_slow_request_is_waited_for() {
    let stage = Stage::new("io-timeout=0");
    let mut disk = stage.open(false);
    hang(&stage, Kinds::WRITE);
    submit_write(&mut disk, 1);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    disk.connection().config().unwrap();
    stage.sim.release();
    assert_eq!(disk.queue(0).wait().unwrap().status, status::OK);
}

#[test]
fn requests_that_take_a_while_do_not_meet_the_deadline() {
    let stage = Stage::new("io-timeout=1");
    let mut disk = stage.open(false);
    let delay = Effect::Delay(std::time::Duration::from_millis(250));
    stage.sim.inject(Fault::new(Kinds::WRITE, delay));
    // Each takes its time, and one is in flight always: longer than the deadline, all together.
    (0..2).for_each(|number| submit_write(&mut disk, number));
    for number in 2..16 {
        assert_eq!(disk.queue(0).wait().unwrap().status, status::OK);
        submit_write(&mut disk, number);
    }
    assert_eq!(disk.queue(0).drain().unwrap().len(), 2);
    disk.connection().config().unwrap();
}
