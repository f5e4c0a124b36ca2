//! Tests of reads and writes and of the placement of their data.

use crate::fixture::{Disk, Guest, iovec, pattern, segments};
use vublk_vfio::fake::{Config, Fault, Media};
use vublk_vfio::spec::{IoOpcode, Status};

fn disk() -> Disk {
    Disk::new(Config::default())
}

#[test]
fn what_was_written_is_read_through_bounce_buffers_and_from_registered_memory() {
    for block_shift in [9, 12] {
        let namespaces = vec![Media::new(8 << 20, block_shift)];
        let mut disk = Disk::new(Config { namespaces, ..Config::default() });
        let bytes = pattern(1, 300 << 10);
        let bytes = &bytes[..bytes.len() >> block_shift << block_shift];
        disk.write(4096, bytes);
        assert_eq!(disk.read(4096, bytes.len()), bytes);
        assert_eq!(disk.pair.counts().bounced, 2);

        let guest = Guest::new(1 << 20);
        let registration = disk.controller.register(guest.range()).unwrap();
        disk.controller.space().settle();
        let list = [guest.iovec(4, bytes.len())];
        let request = disk.namespace.read(4096, bytes.len() as u32, segments(&list), 7);
        assert_eq!(disk.one(request), Status::SUCCESS);
        assert_eq!(guest.bytes(4, bytes.len()), bytes);
        assert_eq!(disk.pair.counts().bounced, 2, "no copy is made");
        registration.end().unwrap();
        let request = disk.namespace.read(4096, bytes.len() as u32, segments(&list), 7);
        assert_eq!(disk.one(request), Status::SUCCESS);
        assert_eq!(disk.pair.counts().bounced, 3, "the device does not reach it any more");
        disk.check();
    }
}

/// How the data of a command gets to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// It is reached where it is, by pages.
    Pages,
    /// By pages or, with this alignment, by a scatter gather list.
    List(u64),
    Bounce,
}

/// What a controller whose SGLS has `sgls` makes of data that is `best` reached so.
fn route(best: Route, sgls: u32) -> Route {
    match (best, sgls) {
        (Route::List(_), 1) => best,
        (Route::List(4), 2) => best,
        (Route::List(_), _) => Route::Bounce,
        (best, _) => best,
    }
}

#[test]
fn scattered_memory_of_any_alignment_is_read_and_written_whole() {
    let cases: &[(&[(usize, usize)], Route)] = &[
        (&[(0, 4096), (0x8000, 4096), (0x4000, 512)], Route::Pages),
        (&[(0x0e00, 512), (0x3000, 4096), (0x9000, 1024)], Route::Pages),
        (&[(0, 512), (0x200, 512), (0x400, 7168)], Route::Pages),
        (&[(0, 512), (0x8000, 512)], Route::List(4)),
        (&[(0x204, 1020), (0x8000, 4), (0x9000, 1024)], Route::List(4)),
        (&[(1, 1023), (0x8000, 1), (0x9003, 4096 - 1024)], Route::List(1)),
        (&[(0x10002, 512)], Route::List(1)),
        (&[(0x10000, 100), (0, 0), (0x20000, 412)], Route::List(4)),
    ];
    for sgls in [0, 1, 2, 3] {
        let mut disk = Disk::new(Config { sgls, ..Config::default() });
        let guest = Guest::new(1 << 20);
        let _registration = disk.controller.register(guest.range()).unwrap();
        disk.controller.space().settle();
        for (seed, (parts, best)) in (10..).zip(cases) {
            let before = disk.pair.counts();
            goes_and_comes_back(&mut disk, &guest, parts, seed);
            let (counts, route) = (disk.pair.counts(), route(*best, sgls));
            let reported = (counts.bounced - before.bounced, counts.scattered - before.scattered);
            let wanted = match route {
                Route::Pages => (0, 0),
                Route::List(_) => (0, 2),
                Route::Bounce => (2, 0),
            };
            assert_eq!(reported, wanted, "SGLS {sgls}: {parts:x?}");
        }
        disk.check();
    }
}

#[test]
fn what_the_device_does_not_reach_is_copied_whatever_lists_it_knows() {
    let mut disk = Disk::new(Config { sgls: 1, ..Config::default() });
    let bytes = pattern(3, 8192);
    disk.write(512, &bytes);
    assert_eq!(disk.read(512, 8192), bytes);
    let counts = disk.pair.counts();
    assert_eq!((counts.bounced, counts.scattered), (2, 0));
    // More pieces than a list's page holds.
    let guest = Guest::new(4 << 20);
    let _registration = disk.controller.register(guest.range()).unwrap();
    disk.controller.space().settle();
    let parts: Vec<_> = (0..512).map(|n| (n * 8192 + 16, 64)).collect();
    goes_and_comes_back(&mut disk, &guest, &parts, 4);
    let counts = disk.pair.counts();
    assert_eq!((counts.bounced, counts.scattered), (4, 0));
    disk.check();
}

/// Writes from the parts of a guest's memory, and reads into them.
fn goes_and_comes_back(disk: &mut Disk, guest: &Guest, parts: &[(usize, usize)], seed: u64) {
    let list: Vec<_> = parts.iter().map(|&(at, len)| guest.iovec(at, len)).collect();
    let len: usize = parts.iter().map(|part| part.1).sum();
    let bytes = pattern(seed, len);
    let mut done = 0;
    for &(at, len) in parts {
        guest.fill(at, &bytes[done..done + len]);
        done += len;
    }
    let request = disk.namespace.write(8192, len as u32, segments(&list), false, 1);
    assert_eq!(disk.one(request), Status::SUCCESS, "{parts:x?}");
    assert_eq!(disk.fake.bytes(1, 8192, len), bytes, "{parts:x?}");
    guest.range().zero();
    let request = disk.namespace.read(8192, len as u32, segments(&list), 1);
    assert_eq!(disk.one(request), Status::SUCCESS, "{parts:x?}");
    let mut done = 0;
    for &(at, len) in parts {
        assert_eq!(guest.bytes(at, len), bytes[done..done + len], "{parts:x?}");
        done += len;
    }
}

#[test]
fn a_turn_rings_one_doorbell_for_all_commands_and_one_for_all_completions() {
    let mut disk = disk();
    let mut buffers = vec![[0u8; 512]; 32];
    let lists: Vec<_> = buffers.iter_mut().map(|bytes| [iovec(bytes)]).collect();
    for _ in 0..100 {
        let requests = (0..).zip(&lists);
        let requests =
            requests.map(|(n, list)| disk.namespace.read(512 * n, 512, segments(list), n));
        let requests = requests.collect();
        let mut tokens: Vec<_> = disk.run(requests).into_iter().map(|(token, _)| token).collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..32).collect::<Vec<_>>());
    }
    let (ours, counts) = (disk.pair.counts(), disk.fake.counts());
    assert_eq!((counts.commands, ours.commands), (3200, 3200));
    assert_eq!((counts.submission_doorbells, counts.completion_doorbells), (100, 100));
    disk.check();
}

#[test]
fn more_than_the_queue_takes_waits_inside_and_the_phase_wraps() {
    let mut disk = Disk::new(Config { max_entries: 4, ..Config::default() });
    assert_eq!(disk.pair.depth(), 3);
    let mut buffers = vec![[0u8; 512]; 500];
    let lists: Vec<_> = buffers.iter_mut().map(|bytes| [iovec(bytes)]).collect();
    let requests = (0..).zip(&lists);
    let requests = requests.map(|(n, list)| disk.namespace.read(512 * n, 512, segments(list), n));
    let requests = requests.collect();
    let mut tokens: Vec<_> = disk.run(requests).into_iter().map(|(token, _)| token).collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..500).collect::<Vec<_>>());
    assert_eq!(disk.pair.in_flight(), 0);
    disk.check();
}

#[test]
fn bounce_buffers_are_bounded_and_requests_wait_for_them() {
    let mut disk = disk();
    let mut buffers = vec![vec![0u8; 1 << 20]; 12];
    for (n, bytes) in (0..).zip(&mut buffers) {
        bytes.fill(n + 1);
    }
    let lists: Vec<_> = buffers.iter_mut().map(|bytes| [iovec(bytes)]).collect();
    let requests = (0..).zip(&lists);
    let requests = requests
        .map(|(n, list)| disk.namespace.write(n << 20, 1 << 20, segments(list), false, n))
        .collect();
    assert!(disk.run(requests).iter().all(|(_, status)| status.is_ok()));
    for n in 0..12 {
        assert_eq!(disk.fake.bytes(1, n << 20, 4096), [n as u8 + 1; 4096]);
    }
    disk.check();
}

#[test]
fn flush_zero_and_discard_do_what_they_say() {
    let mut disk = disk();
    disk.write(0, &[7; 65536]);
    let request = disk.namespace.zero(4096, 8192, true, false, 1);
    assert_eq!(disk.one(request), Status::SUCCESS);
    let mut expected = vec![7; 65536];
    expected[4096..12288].fill(0);
    assert_eq!(disk.read(0, 65536), expected);

    let mut range = disk.namespace.discard_range(32768, 4096).map(u64::to_le_bytes).concat();
    let list = [iovec(&mut range)];
    let request = disk.namespace.discard(segments(&list), 1, 2);
    assert_eq!(disk.one(request), Status::SUCCESS);
    expected[32768..36864].fill(0);
    assert_eq!(disk.read(0, 65536), expected);

    let request = disk.namespace.flush(3);
    assert_eq!(disk.one(request), Status::SUCCESS);
    assert_eq!(disk.fake.flushes(1), 1);
    disk.check();
}

#[test]
fn every_class_of_status_comes_back_as_it_was_and_as_an_errno() {
    let mut disk = disk();
    for (status, errno) in [
        (Status::INVALID_OPCODE, libc::EOPNOTSUPP),
        (Status::INVALID_FIELD, libc::EINVAL),
        (Status::INTERNAL, libc::EIO),
        (Status::OUT_OF_RANGE, libc::EIO),
        (Status::CAPACITY, libc::ENOSPC),
        (Status(0x182), libc::EROFS),
        (Status::WRITE_FAULT, libc::EIO),
        (Status::READ_ERROR, libc::EIO),
        (Status(0x282), libc::EILSEQ),
        (Status(0x286), libc::EACCES),
        (Status(0x300), libc::EIO),
        (Status(0x700), libc::EIO),
        (Status(Status::NOT_READY.0 | Status::DNR), libc::EIO),
    ] {
        let blocks = Some(8..16);
        let opcode = Some(IoOpcode::Read as u8);
        disk.fake.fail(Fault { opcode, blocks, status, times: 1 });
        let mut bytes = [9; 512];
        let list = [iovec(&mut bytes)];
        let request = disk.namespace.read(8 * 512, 512, segments(&list), 1);
        let found = disk.one(request);
        assert_eq!((found, found.errno()), (status, errno));
        assert_eq!(bytes, [9; 512], "a failed read leaves memory alone");
        disk.read(0, 512);
    }
    disk.check();
}

#[test]
fn what_passes_is_tried_again_some_times() {
    let mut disk = disk();
    for status in [Status::NOT_READY, Status::INTERRUPTED, Status::ABORTED] {
        disk.fake.fail(Fault { opcode: None, blocks: None, status, times: 3 });
        disk.read(0, 512);
        disk.fake.fail(Fault { opcode: None, blocks: None, status, times: 4 });
        let mut bytes = [0; 512];
        let list = [iovec(&mut bytes)];
        let request = disk.namespace.read(0, 512, segments(&list), 1);
        assert_eq!(disk.one(request), status);
    }
    disk.check();
}
