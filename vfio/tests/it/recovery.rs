//! Tests of time-outs, aborts, resets and removal.
//!
//! Nothing hangs, and memory that the device may still write to is not used again.

use crate::fixture::{Disk, Guest, iovec, options, segments, wait, wait_until};
use std::time::Duration;
use vublk_vfio::Controller;
use vublk_vfio::fake::{Broken, Config, Event, Fake};
use vublk_vfio::spec::Status;

fn disk() -> Disk {
    Disk::new(Config::default())
}

#[test]
fn a_command_that_takes_too_long_is_aborted_and_given_again() {
    let mut disk = disk();
    disk.fake.hold();
    let mut bytes = [0; 512];
    let list = [iovec(&mut bytes)];
    let request = disk.namespace.read(0, 512, segments(&list), 5);
    disk.pair.submit(request);
    disk.pair.ring();
    let fake = disk.fake.clone();
    let releaser = std::thread::spawn(move || {
        wait_until("it is aborted", || fake.events().contains(&Event::Aborted(1, 0)));
        fake.release();
    });
    assert_eq!(disk.wait(1), [(5, Status::SUCCESS)]);
    releaser.join().unwrap();
    assert_eq!(disk.controller.resets(), 0);
    disk.check();
}

#[test]
fn an_abort_that_does_nothing_ends_nothing() {
    let mut disk = disk();
    disk.fake.break_down(Broken { no_abort: true, ..Broken::default() });
    disk.fake.hold();
    let mut bytes = [0; 512];
    let list = [iovec(&mut bytes)];
    let request = disk.namespace.read(0, 512, segments(&list), 5);
    disk.pair.submit(request);
    disk.pair.ring();
    for _ in 0..5 {
        disk.pair.tick(|done| panic!("{done:?}"));
    }
    wait_until("the abort was given", || disk.fake.events().contains(&Event::Admin(8)));
    assert_eq!(disk.pair.reap(|done| panic!("{done:?}")), 0);
    assert_eq!(disk.pair.in_flight(), 1);
    // Others continue meanwhile, with other identifiers.
    disk.fake.release();
    assert_eq!(disk.wait(1), [(5, Status::SUCCESS)]);
    disk.check();
}

#[test]
fn a_reset_in_flight_gives_everything_again_once_the_controller_has_let_go() {
    let mut disk = disk();
    let guest = Guest::new(64 << 10);
    let _registration = disk.controller.register(guest.range()).unwrap();
    disk.controller.space().settle();
    let lists: Vec<_> = (0..16).map(|n| [guest.iovec(n * 4096, 4096)]).collect();
    for round in 0..3 {
        disk.fake.hold();
        for (n, list) in (0..).zip(&lists) {
            guest.fill(n as usize * 4096, &[round * 16 + n as u8 + 1; 4096]);
            let at = n * 4096;
            disk.pair.submit(disk.namespace.write(at, 4096, segments(list), false, n));
        }
        disk.pair.ring();
        assert_eq!(disk.fake.held(), 16);
        let resets = disk.controller.resets();
        disk.controller.reset();
        // What is not done before the reset is done after it.
        let fake = disk.fake.clone();
        let controller = disk.controller.clone();
        let releaser = std::thread::spawn(move || {
            wait_until("it is reset", || controller.resets() > resets);
            wait_until("commands are given again", || fake.held() == 16);
            fake.release();
        });
        let done = disk.wait(16);
        assert!(done.iter().all(|(_, status)| status.is_ok()), "{done:?}");
        releaser.join().unwrap();
        for n in 0..16 {
            let byte = round * 16 + n as u8 + 1;
            assert_eq!(disk.fake.bytes(1, n * 4096, 4096), [byte; 4096]);
        }
    }
    disk.check();
}

#[test]
fn a_fatal_error_and_a_reset_by_others_are_recovered_from() {
    let mut disk = disk();
    disk.write(0, &[1; 512]);
    disk.fake.break_down(Broken { fatal: true, ..Broken::default() });
    wait_until("it is noticed", || disk.controller.resets() == 1);
    assert_eq!(disk.read(0, 512), [1; 512]);
    disk.fake.reset_from_outside();
    wait_until("it is noticed", || disk.controller.resets() == 2);
    assert_eq!(disk.read(0, 512), [1; 512]);
}

#[test]
fn a_device_whose_registers_cannot_be_read_while_somebody_resets_it_is_not_gone() {
    for registers in [u32::MAX, 0] {
        let mut disk = disk();
        disk.write(0, &[1; 512]);
        disk.fake.hold();
        let mut bytes = [0; 512];
        let list = [iovec(&mut bytes)];
        disk.pair.submit(disk.namespace.read(0, 512, segments(&list), 1));
        disk.pair.ring();
        // As the kernel does it: nothing can be read, the function is reset, and is there again.
        disk.fake.break_down(Broken { registers: Some(registers), ..Broken::default() });
        std::thread::sleep(Duration::from_millis(200));
        disk.fake.reset_from_outside();
        disk.fake.break_down(Broken::default());
        disk.fake.release();
        assert_eq!(disk.wait(1), [(1, Status::SUCCESS)]);
        assert_eq!(bytes, [1; 512]);
        assert!(!disk.controller.is_dead() && disk.controller.resets() >= 1);
        disk.check();
    }
}

#[test]
fn a_reset_in_the_middle_of_ours_is_followed_by_another_of_ours() {
    let mut disk = disk();
    disk.write(0, &[1; 512]);
    // It takes nothing while it is started, until it is reset once more.
    disk.fake.break_down(Broken { never_ready: true, ..Broken::default() });
    let before = disk.fake.events().len();
    disk.controller.reset();
    let clone = disk.fake.clone();
    let resets = std::thread::spawn(move || {
        let enabled = || clone.events()[before..].contains(&Event::Enabled);
        wait_until("it is started", enabled);
        clone.break_down(Broken::default());
        clone.reset_from_outside();
    });
    // A reset waits for the pair's thread, which is this one.
    while !resets.is_finished() || disk.controller.resets() < 2 {
        assert_eq!(disk.read(0, 512), [1; 512]);
    }
    resets.join().unwrap();
    assert_eq!(disk.read(0, 512), [1; 512]);
    assert!(!disk.controller.is_dead());
    disk.check();
}

#[test]
fn a_controller_that_does_not_stop_is_reset_as_a_function_and_goes_on() {
    let mut disk = disk();
    disk.fake.break_down(Broken { stays_ready: true, ..Broken::default() });
    disk.fake.hold();
    let mut bytes = [0; 512];
    let list = [iovec(&mut bytes)];
    let request = disk.namespace.read(0, 512, segments(&list), 5);
    disk.pair.submit(request);
    disk.pair.ring();
    disk.controller.reset();
    let fake = disk.fake.clone();
    let releaser = std::thread::spawn(move || {
        wait_until("the function is reset", || fake.events().contains(&Event::FunctionReset));
        wait_until("it is given again", || fake.held() == 1);
        fake.release();
    });
    assert_eq!(disk.wait(1), [(5, Status::SUCCESS)]);
    releaser.join().unwrap();
    disk.check();
}

#[test]
fn nothing_hangs_when_the_device_goes_and_it_reaches_no_memory_before_that_is_reported() {
    for registers in [u32::MAX, 0] {
        let mut disk = disk();
        let guest = Guest::new(64 << 10);
        let registration = disk.controller.register(guest.range()).unwrap();
        disk.controller.space().settle();
        disk.fake.hold();
        let lists: Vec<_> = (0..16).map(|n| [guest.iovec(n * 4096, 4096)]).collect();
        for (n, list) in (0..).zip(&lists) {
            disk.pair.submit(disk.namespace.read(n * 4096, 4096, segments(list), n));
        }
        disk.pair.ring();
        assert_eq!(disk.fake.held(), 16);
        disk.fake.break_down(Broken { registers: Some(registers), ..Broken::default() });
        let fake = disk.fake.clone();
        let done = disk.wait(16);
        assert!(done.iter().all(|&(_, status)| status == Status::GONE), "{done:?}");
        assert!(!fake.has_mappings(), "it still reaches memory");
        assert!(disk.controller.is_dead());
        let request = disk.namespace.read(0, 512, segments(&lists[0]), 99);
        assert_eq!(disk.one(request), Status::GONE);
        assert!(disk.controller.queue_pair().is_err() && disk.controller.health().is_err());
        registration.end().unwrap();
    }
}

#[test]
fn what_cannot_be_reset_is_given_up() {
    let mut disk = disk();
    let broken = Broken { stays_ready: true, no_reset: true, ..Broken::default() };
    disk.fake.break_down(broken);
    disk.fake.hold();
    let mut bytes = [0; 512];
    let list = [iovec(&mut bytes)];
    disk.pair.submit(disk.namespace.read(0, 512, segments(&list), 5));
    disk.pair.ring();
    disk.controller.reset();
    assert_eq!(disk.wait(1), [(5, Status::GONE)]);
    assert!(!disk.fake.has_mappings());
}

#[test]
fn a_controller_that_never_answers_is_given_up_in_the_end() {
    let mut disk = disk();
    let broken = Broken { mute_admin: true, ..Broken::default() };
    disk.fake.break_down(broken);
    disk.fake.hold();
    let mut bytes = [0; 512];
    let list = [iovec(&mut bytes)];
    disk.pair.submit(disk.namespace.read(0, 512, segments(&list), 5));
    disk.pair.ring();
    assert_eq!(disk.wait(1), [(5, Status::GONE)]);
    assert!(disk.controller.is_dead());
}

#[test]
fn a_queue_pair_that_is_dropped_with_commands_in_flight_deletes_its_queues_first() {
    let fake = Fake::new(Config::default());
    let controller = Controller::open(fake.function(), &options()).unwrap();
    let namespace = controller.namespace(1).unwrap();
    let mut bytes = [0; 512];
    let list = [iovec(&mut bytes)];
    for _ in 0..20 {
        let mut pair = controller.queue_pair().unwrap();
        fake.hold();
        pair.submit(namespace.read(0, 512, segments(&list), 5));
        pair.ring();
        assert_eq!(fake.held(), 1);
        drop(pair);
        assert_eq!(fake.held(), 0);
        fake.release();
    }
    let mut pair = controller.queue_pair().unwrap();
    pair.submit(namespace.read(0, 512, segments(&list), 5));
    pair.ring();
    assert_eq!(wait(&mut pair, 1), [(5, Status::SUCCESS)]);
    drop(pair);
    controller.close();
    assert_eq!(fake.complaints(), Vec::<String>::new());
    assert!(!fake.has_mappings());
}
