//! Tests of starting, identifying, refusing and stopping a controller.

use crate::fixture::{Disk, Guest, open, options, pattern, segments, wait_until};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vublk_vfio::Controller;
use vublk_vfio::fake::{Broken, Config, Event, Fake, Media};
use vublk_vfio::spec::Status;

fn refused(config: Config, broken: Broken) -> String {
    let fake = Fake::new(config);
    fake.break_down(broken);
    let error = match Controller::open(fake.function(), &options()) {
        Ok(controller) => controller.namespace(1).map(drop).unwrap_err(),
        Err(error) => error,
    };
    assert!(!error.to_string().contains('\n'));
    error.to_string()
}

fn with(namespaces: Vec<Media>) -> Config {
    Config { namespaces, ..Config::default() }
}

#[test]
fn a_controller_is_stopped_then_given_interrupts_then_enabled_and_in_the_end_shut_down() {
    let fake = Fake::new(Config::default());
    open(&fake).close();
    let events = fake.events();
    let at = |event: Event| {
        let found = events.iter().position(|other| *other == event);
        found.unwrap_or_else(|| panic!("no {event:?} in {events:?}"))
    };
    let order = [
        at(Event::BusMaster(true)),
        at(Event::Vectors(9)),
        at(Event::Enabled),
        at(Event::Shutdown),
        at(Event::Disabled),
        at(Event::BusMaster(false)),
    ];
    assert!(order.is_sorted(), "{events:?}");
    assert_eq!(fake.complaints(), Vec::<String>::new());
    assert!(!fake.has_mappings(), "all memory is taken back");
}

#[test]
fn a_controller_that_somebody_left_running_is_stopped_before_memory_is_given_to_it() {
    let fake = Fake::new(Config::default());
    fake.leave_running();
    let _controller = open(&fake);
    let events = fake.events();
    assert_eq!(events[0], Event::Disabled, "{events:?}");
}

#[test]
fn a_controller_that_does_not_stop_is_reset_as_a_function_without_bus_mastering() {
    let fake = Fake::new(Config::default());
    fake.leave_running();
    fake.break_down(Broken { stays_ready: true, ..Broken::default() });
    let _controller = open(&fake);
    let events = fake.events();
    let expected = [Event::Disabled, Event::BusMaster(false), Event::FunctionReset];
    assert_eq!(events[..3], expected, "{events:?}");
}

#[test]
fn what_a_controller_is_like_is_reported() {
    let namespaces = vec![Media::new(1 << 20, 9), Media::new(2 << 20, 12)];
    let config = Config { namespaces, mdts: 3, limits: Some((2, 8)), ..Config::default() };
    let controller = open(&Fake::new(config));
    assert_eq!(controller.identity().serial, "FAKE");
    assert_eq!(controller.identity().model, "Fake NVMe");
    assert_eq!(controller.namespaces().unwrap(), [1, 2]);
    assert_eq!(controller.max_pairs(), 8);
    let (first, second) = (controller.namespace(1).unwrap(), controller.namespace(2).unwrap());
    assert_eq!((first.len(), first.block_size()), (1 << 20, 512));
    assert_eq!((second.len(), second.block_size()), (2 << 20, 4096));
    assert_eq!(first.limits().transfer, 32 << 10, "MDTS counts in pages of 4 KiB");
    assert_eq!((first.limits().zero, first.limits().discard), (16 << 10, 4096));
    assert_eq!(controller.health().unwrap().temperature, 300);
}

#[test]
fn limits_that_a_controller_does_not_tell_are_those_of_a_transfer() {
    let config = Config { limits: None, mdts: 1, ..Config::default() };
    let namespace = open(&Fake::new(config)).namespace(1).unwrap();
    assert_eq!(namespace.limits().zero, 8192);
    let none = Config { optional_commands: 0, ..Config::default() };
    let namespace = open(&Fake::new(none)).namespace(1).unwrap();
    assert_eq!((namespace.limits().zero, namespace.limits().discard), (0, 0));
}

#[test]
fn doorbells_lie_and_pages_and_transfers_are_as_long_as_the_capabilities_say() {
    for (doorbell_stride, page_shift) in [(0, 0), (0, 1), (2, 0), (2, 1)] {
        let which = format!("stride {doorbell_stride}, page shift {page_shift}");
        let config = Config { doorbell_stride, page_shift, mdts: 3, ..Config::default() };
        let mut disk = Disk::new(config);
        let most = u64::from(disk.namespace.limits().transfer);
        assert_eq!(most, (4096 << page_shift) << 3, "{which}: MDTS counts in smallest pages");
        let bytes = pattern(1, most as usize);
        // More rounds than the queue has entries, so that both doorbells wrap.
        for round in 0..300 {
            let at = round % 2 * most;
            disk.write(at, &bytes);
            assert!(disk.read(at, bytes.len()) == bytes, "{which}: round {round}");
        }
        // A second pair has doorbells of its own.
        let mut other = disk.controller.queue_pair().unwrap();
        std::mem::swap(&mut disk.pair, &mut other);
        assert!(disk.read(0, bytes.len()) == bytes, "{which}: the second pair");
        std::mem::swap(&mut disk.pair, &mut other);
        // Data that the device reaches itself begins in the middle of a page, and takes a list.
        let guest = Guest::new(1 << 20);
        let registration = disk.controller.register(guest.range()).unwrap();
        disk.controller.space().settle();
        let bounced = disk.pair.counts().bounced;
        let list = [guest.iovec(4096 + 512, bytes.len())];
        let request = disk.namespace.read(most, bytes.len() as u32, segments(&list), 7);
        assert_eq!(disk.one(request), Status::SUCCESS, "{which}");
        assert!(guest.bytes(4096 + 512, bytes.len()) == bytes, "{which}: into registered memory");
        assert_eq!(disk.pair.counts().bounced, bounced, "{which}: no copy is made");
        registration.end().unwrap();
        // Nor does the controller take more.
        disk.check();
        let mut more = vec![0; bytes.len() + 512];
        let list = [crate::fixture::iovec(&mut more)];
        let request = disk.namespace.read(0, more.len() as u32, segments(&list), 8);
        assert_eq!(disk.one(request).code(), Status::INVALID_FIELD.code(), "{which}");
    }
}

#[test]
fn what_cannot_be_used_is_refused_in_one_line_that_says_why() {
    let sound = Broken::default();
    let zoned = Media { set: 2, ..Media::new(1 << 20, 9) };
    let metadata = Media { metadata: 8, ..Media::new(1 << 20, 9) };
    for (config, broken, words) in [
        (with(vec![]), sound, "there is no namespace 1"),
        (with(vec![Media::new(0, 9)]), sound, "there is no namespace 1"),
        (with(vec![zoned]), sound, "zoned"),
        (with(vec![metadata]), sound, "8 bytes of metadata"),
        (with(vec![Media::new(1 << 20, 13)]), sound, "2^13"),
        (Config { vectors: 0, ..Config::default() }, sound, "MSI-X"),
        (Config::default(), Broken { registers: Some(u32::MAX), ..sound }, "gone"),
        (Config::default(), Broken { registers: Some(0), ..sound }, "gone"),
        (Config::default(), Broken { never_ready: true, ..sound }, "not ready after 0.5 s"),
        (Config::default(), Broken { mute_admin: true, ..sound }, "no answer in time"),
    ] {
        let error = refused(config, broken);
        assert!(error.starts_with("fake: ") && error.contains(words), "{error}: no '{words}'");
    }
    let controller = open(&Fake::new(Config::default()));
    for id in [0, u32::MAX] {
        let error = controller.namespace(id).unwrap_err().to_string();
        assert!(error.contains("numbered from 1"), "{error}");
    }
    let error = controller.namespace(7).unwrap_err().to_string();
    assert_eq!(error, "fake: there is no namespace 7: there are 1");
}

#[test]
fn there_are_as_many_queue_pairs_as_the_controller_grants() {
    let fake = Fake::new(Config { pairs: 2, ..Config::default() });
    let controller = open(&fake);
    let first = controller.queue_pair().unwrap();
    let second = controller.queue_pair().unwrap();
    assert_eq!((first.id(), second.id(), first.depth()), (1, 2, 255));
    let Err(error) = controller.queue_pair() else { panic!("a third pair") };
    assert_eq!(error.errno(), libc::EBUSY);
    drop(first);
    assert_eq!(controller.queue_pair().unwrap().id(), 1);
    drop(second);
    assert_eq!(fake.complaints(), Vec::<String>::new());
}

#[test]
fn a_namespace_that_changes_is_reported_of_and_has_its_new_length() {
    let fake = Fake::new(Config::default());
    let controller = open(&fake);
    let namespace = controller.namespace(1).unwrap();
    let called = Arc::new(AtomicU64::new(0));
    let clone = called.clone();
    let listener: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
        clone.fetch_add(1, Ordering::SeqCst);
    });
    controller.listen(&listener);
    for round in 1..=5 {
        fake.resize(1, 1000 * round);
        wait_until("the length is known", || namespace.len() == 512_000 * round);
        wait_until("it is told", || called.load(Ordering::SeqCst) == round);
    }
    assert_eq!(fake.complaints(), Vec::<String>::new());
}

#[test]
fn a_wish_for_the_device_is_heard() {
    let fake = Fake::new(Config::default());
    let controller = open(&fake);
    assert!(!controller.is_wanted_back());
    fake.request_back();
    wait_until("it is wanted back", || controller.is_wanted_back());
}

#[test]
fn health_and_errors_are_reported_and_who_may_not_wait_is_reported_what_was_said_last() {
    let mut health = vec![0; 512];
    health[1..6].copy_from_slice(&[0x37, 0x01, 97, 10, 3]);
    let mut errors = vec![0; 2 * 64];
    errors[0] = 1;
    errors[12..14].copy_from_slice(&(0x281u16 << 1).to_le_bytes());
    let fake = Fake::new(Config { health, errors, ..Config::default() });
    let controller = open(&fake);
    let reported = controller.health().unwrap();
    assert_eq!(
        (reported.temperature, reported.spare, reported.spare_threshold, reported.used),
        (311, 97, 10, 3)
    );
    let errors: Vec<_> = controller.errors().unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(errors, ["error 1: queue 0, namespace 0, block 0: unrecovered read error (0x281)"]);
    assert_eq!(controller.last_health(), None, "nobody has asked yet");
    wait_until("the controller has answered", || controller.last_health() == Some(reported));
    let asked = || fake.events().iter().filter(|event| **event == Event::Admin(2)).count();
    let before = asked();
    (0..100).for_each(|_| assert_eq!(controller.last_health(), Some(reported)));
    assert_eq!(asked(), before, "what is fresh is not asked for again");
    fake.break_down(Broken { mute_admin: true, ..Broken::default() });
    assert_eq!(controller.last_health(), Some(reported));
}
