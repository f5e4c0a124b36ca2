//! Rings that stop and start, and front ends that disconnect and return.
//!
//! Nothing acknowledged is lost, and nothing in flight is forgotten.

use std::os::unix::net::UnixStream;

use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vublk_testkit::frontend::MemoryMessages;
use vublk_testkit::message;
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::{protocol, status};
use vublk_testkit::{Disk, MemoryLayout, Options, Queue};

use super::daemon::LIMIT;
use super::{Daemon, pattern};

/// A disk whose requests take 50 ms each.
const SLOW: &str = "latency-ns=50000000";

fn submit_reads(queue: &mut Queue, count: u64) {
    for sector in 0..count {
        queue.add(&Request::In { sector, len: 512 }, &Shape::indirect()).unwrap();
    }
    queue.publish().unwrap();
}

/// Takes what has come back, without waiting.
fn reap_all(queue: &mut Queue) -> usize {
    let mut count = 0;
    while let Some(done) = queue.reap().unwrap() {
        assert_eq!(done.status, status::OK);
        count += 1;
    }
    count
}

fn restart(disk: &mut Disk, base: u16) {
    disk.start_queue(0, base).unwrap();
    disk.connection().enable_queue(0, true).unwrap();
}

#[test]
fn a_stop_waits_for_what_is_in_flight_and_gives_the_index_to_go_on_at() {
    let daemon = Daemon::null(SLOW, "");
    let mut disk = daemon.open(&Options::default());
    let mut total = 0u16;
    for _ in 0..4 {
        submit_reads(disk.queue(0), 32);
        let base = disk.connection().stop_queue(0).unwrap();
        let done = reap_all(disk.queue(0));
        total = total.wrapping_add(done as u16);
        // What was taken is done; what was not is for the next start.
        assert_eq!(base, total);
        restart(&mut disk, base);
        total += disk.queue(0).drain().unwrap().len() as u16;
        assert_eq!(total % 32, 0);
    }
}

#[test]
fn a_disabled_ring_takes_nothing_until_it_is_enabled_again() {
    let daemon = Daemon::file("num-queues=2");
    let mut disk = daemon.open(&Options { num_queues: 2, ..Options::default() });
    for _ in 0..20 {
        disk.connection().enable_queue(0, false).unwrap();
        submit_reads(disk.queue(0), 8);
        // The other queue works meanwhile, and by then a kick of the first would have been seen.
        for sector in 0..8 {
            disk.queue(1).read(sector, &mut [0; 512]).unwrap();
        }
        assert_eq!(disk.queue(0).reap().unwrap(), None);
        disk.connection().enable_queue(0, true).unwrap();
        assert_eq!(disk.queue(0).drain().unwrap().len(), 8);
    }
}

#[test]
fn disabling_a_ring_waits_for_what_is_in_flight() {
    let daemon = Daemon::null(SLOW, "");
    let mut disk = daemon.open(&Options::default());
    submit_reads(disk.queue(0), 16);
    disk.connection().enable_queue(0, false).unwrap();
    let done = reap_all(disk.queue(0));
    disk.connection().enable_queue(0, true).unwrap();
    assert_eq!(done + disk.queue(0).drain().unwrap().len(), 16);
}

#[test]
fn a_started_ring_is_looked_at_without_a_kick() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    for turn in 0..20 {
        let base = disk.connection().stop_queue(0).unwrap();
        assert_eq!(base, turn);
        let queue = disk.queue(0);
        queue.add(&Request::In { sector: 0, len: 512 }, &Shape::default()).unwrap();
        queue.ring().publish_quietly();
        restart(&mut disk, base);
        assert_eq!(disk.queue(0).wait().unwrap().status, status::OK);
    }
}

#[test]
fn a_front_end_that_comes_back_finds_its_disk_and_its_requests() {
    let mut daemon = Daemon::null(SLOW, "num-queues=2");
    let mut disk = daemon.open(&Options { num_queues: 2, ..Options::default() });
    for _ in 0..3 {
        submit_reads(disk.queue(0), 20);
        submit_reads(disk.queue(1), 20);
        disk.reconnect().unwrap();
        for number in 0..2 {
            let done = disk.queue(number).drain().unwrap();
            assert_eq!(done.len(), 20);
            assert!(done.iter().all(|c| c.status == status::OK));
        }
    }
    drop(disk);
    daemon.assert_serves(0);
}

#[test]
fn writes_that_were_acknowledged_before_a_disconnect_are_there_after_it() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    for turn in 0..10u8 {
        disk.write(8 * u64::from(turn), &pattern(4096, turn)).unwrap();
        // In flight when the connection breaks: done or done again, the same bytes.
        for i in 0..16 {
            let request = Request::Out { sector: 800 + 8 * i, data: pattern(4096, turn) };
            disk.queue(0).submit(&request, &Shape::default()).unwrap();
        }
        disk.reconnect().unwrap();
        disk.queue(0).drain().unwrap();
        for i in 0..16usize {
            assert!(daemon.image()[(800 + 8 * i) * 512..][..4096] == pattern(4096, turn));
        }
    }
    for turn in 0..10u8 {
        assert!(daemon.image()[usize::from(turn) * 4096..][..4096] == pattern(4096, turn));
    }
}

#[test]
fn a_second_front_end_waits_until_the_first_has_gone() {
    let daemon = Daemon::file("");
    let mut first = daemon.open(&Options::default());
    let second = UnixStream::connect(daemon.socket(0)).unwrap();
    // GET_FEATURES, which needs nothing before it.
    message::send(&second, 1, message::VERSION, None, &[], &[]).unwrap();
    for sector in 0..100 {
        first.read(sector, &mut [0; 512]).unwrap();
    }
    second.set_nonblocking(true).unwrap();
    let mut byte = [0];
    let early = std::io::Read::read(&mut &second, &mut byte).unwrap_err();
    assert_eq!(early.kind(), std::io::ErrorKind::WouldBlock, "the first one is still served");
    second.set_nonblocking(false).unwrap();
    drop(first);
    let answer = message::receive(&second, LIMIT).unwrap().unwrap();
    assert_eq!(answer.request, 1);
}

#[test]
fn front_ends_that_come_and_go_at_every_step_leave_nothing_behind() {
    let mut daemon = Daemon::file("num-queues=2");
    daemon.assert_serves(0);
    daemon.wait_log("front end disconnected", 1);
    let before = daemon.server.open_files();
    for turn in 0..40 {
        let mut disk = daemon.open(&Options { num_queues: 2, ..Options::default() });
        submit_reads(disk.queue(turn % 2), 32);
        drop(disk);
        drop(UnixStream::connect(daemon.socket(0)).unwrap());
    }
    daemon.assert_serves(0);
    daemon.wait_log("front end disconnected", 82);
    assert_eq!(daemon.server.open_files(), before, "descriptors are closed with their session");
}

#[test]
fn a_kick_descriptor_may_be_replaced_while_the_ring_runs() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    for turn in 0..50 {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        // With requests in flight half of the time.
        submit_reads(disk.queue(0), turn % 2 * 8);
        disk.connection().vhost().set_vring_kick(0, &kick).unwrap();
        let queue = disk.queue(0);
        queue.drain().unwrap();
        queue.add(&Request::In { sector: 1, len: 512 }, &Shape::default()).unwrap();
        queue.ring().publish_quietly();
        kick.write(1).unwrap();
        assert_eq!(queue.wait().unwrap().status, status::OK);
    }
}

#[test]
fn a_call_descriptor_may_be_replaced_while_the_ring_runs() {
    let daemon = Daemon::null(SLOW, "");
    let mut disk = daemon.open(&Options::default());
    for _ in 0..3 {
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        let ring = disk.queue(0).ring();
        let layout = ring.layout();
        layout.set_used_event(&ring.memory().clone(), ring.next_used());
        disk.connection().vhost().set_vring_call(0, &call).unwrap();
        disk.connection().config().unwrap();
        // The word that comes with being set.
        let _ = call.read();
        submit_reads(disk.queue(0), 1);
        let mut poll = libc::pollfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(&call),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd, for the duration of the call.
        let ready = unsafe { libc::poll(&mut poll, 1, LIMIT.as_millis() as i32) };
        assert_eq!(ready, 1, "the new descriptor is told");
        assert_eq!(reap_all(disk.queue(0)), 1);
    }
}

#[test]
fn a_call_descriptor_that_comes_after_a_completion_is_reported_of_it() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    let request = Request::In { sector: 0, len: 512 };
    for _ in 0..10 {
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        disk.queue(0).run(&request).unwrap();
        disk.connection().vhost().set_vring_call(0, &call).unwrap();
        disk.connection().config().unwrap();
        assert!(call.read().is_ok(), "it was not told");
        // The driver's own goes back in.
        let own = disk.queue(0).ring().call_fd().try_clone().unwrap();
        disk.connection().vhost().set_vring_call(0, &own).unwrap();
    }
}

#[test]
fn a_reset_device_starts_from_nothing_on_the_same_connection() {
    let daemon = Daemon::file("");
    let options =
        Options { protocol: protocol::DEFAULT | protocol::RESET_DEVICE, ..Options::default() };
    let mut disk = daemon.open(&options);
    for turn in 0..3u8 {
        disk.write(0, &pattern(4096, turn)).unwrap();
        submit_reads(disk.queue(0), 8);
        disk.connection().set_write_cache(false).unwrap();
        disk.connection().reset_device().unwrap();
        let done = reap_all(disk.queue(0));
        assert_eq!(disk.connection().config().unwrap().wce, 1, "reset brings the default back");
        let memory = disk.memory().clone();
        let base = disk.queue(0).ring().resume_base();
        let connection = disk.connection();
        connection.set_features().unwrap();
        let table = vublk_testkit::frontend::MemoryMessages::Table;
        connection.share_memory(&memory, 1, table).unwrap();
        restart(&mut disk, base);
        assert_eq!(done + disk.queue(0).drain().unwrap().len(), 8);
    }
}

/// From GET_FEATURES on, as QEMU begins with each device that it plugs in on one connection.
fn plug_again(mut disk: Disk, options: &Options) -> Disk {
    let stream = disk.connection().stream().try_clone().unwrap();
    drop(disk);
    Disk::from_stream(stream, options).unwrap()
}

#[test]
fn a_device_that_is_plugged_in_again_on_one_connection_starts_from_nothing() {
    let layouts = [
        MemoryLayout::gapped(3, 4 << 20),
        MemoryLayout::gapped(3, 4 << 20),
        MemoryLayout::single(16 << 20),
        MemoryLayout::gapped(2, 16 << 20),
    ];
    for messages in [MemoryMessages::Slots, MemoryMessages::Table] {
        for more in [0, protocol::INFLIGHT_SHMFD] {
            let daemon = Daemon::serve(
                "driver=raw,node-name=d0,file.driver=file,file.filename=DIR/disk.img",
                "writable=on,num-queues=2",
            );
            let mut last = None;
            for (turn, layout) in layouts.iter().enumerate() {
                let options = Options {
                    layout: layout.clone(),
                    memory_messages: messages,
                    num_queues: 1 + turn % 2,
                    protocol: protocol::DEFAULT | protocol::CONFIGURE_MEM_SLOTS | more,
                    ..Options::default()
                };
                let mut disk = match last.take() {
                    Some(disk) => plug_again(disk, &options),
                    None => daemon.open(&options),
                };
                let mut back = vec![0; 4096];
                if turn > 0 {
                    disk.read(8 * turn as u64 - 8, &mut back).unwrap();
                    assert_eq!(back, pattern(4096, turn as u8 - 1), "{messages:?} {turn}");
                }
                disk.write(8 * turn as u64, &pattern(4096, turn as u8)).unwrap();
                disk.stop().unwrap();
                last = Some(disk);
            }
        }
    }
}

#[test]
fn settings_that_are_sent_again_change_nothing() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    let memory = disk.memory().clone();
    let data = pattern(4096, 5);
    for _ in 0..5 {
        disk.connection().set_write_cache(false).unwrap();
        disk.connection().vhost().set_owner().unwrap();
        disk.connection().set_features().unwrap();
        assert_eq!(disk.connection().config().unwrap().wce, 0, "the guest's choice stays");
        let table = vublk_testkit::frontend::MemoryMessages::Table;
        disk.connection().share_memory(&memory, 1, table).unwrap();
        disk.connection().enable_queue(0, true).unwrap();
        disk.write(0, &data).unwrap();
        let base = disk.connection().stop_queue(0).unwrap();
        restart(&mut disk, base);
        disk.connection().enable_queue(0, true).unwrap();
        let mut back = vec![0; 4096];
        disk.read(0, &mut back).unwrap();
        assert_eq!(back, data);
    }
}

#[test]
fn the_daemon_ends_with_a_front_end_connected_and_requests_in_flight() {
    let mut daemon = Daemon::null(SLOW, "num-queues=2");
    let mut disk = daemon.open(&Options { num_queues: 2, ..Options::default() });
    submit_reads(disk.queue(0), 32);
    submit_reads(disk.queue(1), 32);
    // Taken: one of each queue has come back.
    disk.queue(0).wait().unwrap();
    disk.queue(1).wait().unwrap();
    submit_reads(disk.queue(0), 1);
    let socket = daemon.socket(0);
    daemon.server.signal(libc::SIGTERM).unwrap();
    let ended = daemon.server.wait_exit(LIMIT).unwrap();
    assert!(ended.success(), "{ended}");
    assert!(!socket.exists() && !daemon.path("pid").exists());
    // What was taken was also answered.
    for number in 0..2 {
        let queue = disk.queue(number);
        while queue.reap().unwrap().is_some() {}
        assert!(queue.in_flight() <= 1, "{} were forgotten", queue.in_flight());
    }
}

#[test]
fn a_second_front_end_that_has_to_wait_is_reported_of_once() {
    let mut daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    let waiting = [(); 2].map(|()| UnixStream::connect(daemon.socket(0)).unwrap());
    daemon.wait_log("another front end has connected: it waits until this one disconnects", 1);
    disk.read(0, &mut [0; 512]).unwrap();
    drop(disk);
    drop(waiting);
    daemon.assert_serves(0);
    let log = daemon.end();
    // Those that waited may have been seen to wait for each other, too.
    let times = log.matches("another front end has connected").count();
    assert!((1..=3).contains(&times), "{log}");
}
