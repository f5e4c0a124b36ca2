//! The dirty log of live migration: which pages are marked, bit for bit, and when.

mod bad_logs;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use std::time::{Duration, Instant};

use vublk::block::registry::{DriverEntry, Kind};
use vublk::block::*;
use vublk::export::core::{Address, DiskOptions, Export, Parts};
use vublk::export::vhost_user_blk::{DeviceOptions, Options as ServerOptions, Server};
use vublk::io::{Errno, IoResult, IoVec, Worker, WorkerOptions};
use vublk::options::keyval;
use vublk_testkit::dirty_log::{PAGE, pages, written};
use vublk_testkit::frontend::MemoryMessages;
use vublk_testkit::message::{self, NEED_REPLY, VERSION};
use vublk_testkit::request::{Cut, Placement, Range, Request, Shape};
use vublk_testkit::ring::RingLayout;
use vublk_testkit::spec::{feature, protocol, request_type, status};
use vublk_testkit::{Connection, DirtyLog, Disk, MemoryLayout, Options, Segment};

use super::Daemon;
use super::daemon::{LIMIT, export_of};

type Pages = BTreeSet<u64>;

fn options() -> Options {
    let protocol = protocol::DEFAULT | protocol::LOG_SHMFD;
    Options { protocol, limit: LIMIT, ..Options::default() }
}

/// A log for the guest addresses up to 128 MiB.
fn new_log() -> DirtyLog {
    DirtyLog::new((128 << 20) / PAGE / 8).unwrap()
}

/// The pages of a used ring in which index `index` is entered: header and entry.
fn entered(ring: RingLayout, index: u16) -> Pages {
    let entry = ring.used + 4 + 8 * u64::from(index % ring.size);
    pages(ring.used, 4).chain(pages(entry, 8)).collect()
}

/// The pages of a used ring that hold its event index, which is written whenever the queue rests.
fn event(ring: RingLayout) -> Pages {
    pages(ring.used + 4 + 8 * u64::from(ring.size), 2).collect()
}

/// Waits until all of `wanted` are marked. Gives all that were.
fn wait_marked(log: &DirtyLog, wanted: &Pages) -> Pages {
    let end = Instant::now() + LIMIT;
    let mut seen = log.take();
    while !wanted.is_subset(&seen) {
        assert!(Instant::now() < end, "{wanted:x?} is wanted, {seen:x?} is marked");
        seen.extend(log.take());
    }
    seen
}

/// Runs one request on queue 0, whose chain is laid out by `shape`, and checks its marks: `wanted`
/// picks of the chain what the device writes.
fn check(
    disk: &mut Disk,
    log: &DirtyLog,
    request: &Request,
    shape: &Shape,
    wanted: impl Fn(&[Segment]) -> Pages,
) -> u8 {
    let queue = disk.queue(0);
    let (ring, index) = (queue.ring().layout(), queue.ring().next_used());
    let token = queue.add(request, shape).unwrap();
    let chain = queue.chain(token).unwrap();
    log.take();
    queue.publish().unwrap();
    let done = queue.wait().unwrap();
    let first = log.take();
    let wanted = wanted(&chain);
    let what = format!("{request:?} {shape:?} {chain:x?}");
    assert!(wanted.is_subset(&first), "{what}\nwanted {wanted:x?}\nmarked {first:x?}");
    let used = entered(ring, index);
    let all: Pages = &first | &wait_marked(log, &(&used - &first));
    let extra: Pages = &(&(&all - &wanted) - &used) - &event(ring);
    assert!(extra.is_empty(), "{what}\nwanted {wanted:x?}\nmarked {first:x?}");
    done.status
}

/// Only the status byte.
fn only_status(chain: &[Segment]) -> Pages {
    let last = chain.last().unwrap();
    pages(last.addr + u64::from(last.len) - 1, 1).collect()
}

#[test]
fn each_request_marks_the_pages_that_it_writes_and_no_others() {
    let daemon = Daemon::file("");
    let layout = MemoryLayout::adjacent(4, 4 << 20);
    let mut disk = daemon.open(&Options { layout, ..options() });
    let log = new_log();
    disk.start_logging(&log).unwrap();
    let cuts = [Cut::Natural, Cut::Joined, Cut::Each(700), Cut::Sizes(vec![1, 5000])];
    for placement in [Placement::Packed, Placement::Spread, Placement::Straddling] {
        for (writable, indirect) in cuts.iter().flat_map(|cut| [(cut, false), (cut, true)]) {
            let shape =
                Shape { writable: writable.clone(), indirect, placement, ..Shape::default() };
            for len in [512, 4096, 9 << 9, 64 << 10] {
                if let Cut::Each(_) = writable
                    && len > 4096
                {
                    continue;
                }
                let read = Request::In { sector: 8, len };
                assert_eq!(check(&mut disk, &log, &read, &shape, written), status::OK);
            }
            let shape = Shape { placement: Placement::Packed, ..shape };
            let room = |request_type, data, writable| Request::Raw {
                request_type,
                sector: 0,
                data,
                writable,
            };
            let range = vec![Range { sector: 0, sectors: 8, flags: 0 }];
            for (request, ends) in [
                (Request::Out { sector: 3, data: vec![7; 8192] }, status::OK),
                (Request::Flush, status::OK),
                (Request::WriteZeroes(range), status::OK),
                // Room that nobody asked for stays as it is.
                (room(request_type::OUT, vec![7; 512], 9000), status::OK),
                (room(request_type::FLUSH, vec![], 9000), status::OK),
                (room(77, vec![], 9000), status::UNSUPP),
            ] {
                assert_eq!(check(&mut disk, &log, &request, &shape, only_status), ends);
            }
            assert_eq!(check(&mut disk, &log, &Request::GetId, &shape, written), status::OK);
            // The name takes 20 bytes, wherever they are, of all that there are.
            let id = room(request_type::GET_ID, vec![], 9000);
            let twenty = |chain: &[Segment]| {
                let mut left = 20;
                let mut all = only_status(chain);
                for part in chain.iter().filter(|part| part.device_writes) {
                    let n = left.min(part.len);
                    all.extend(pages(part.addr, u64::from(n)));
                    left -= n;
                }
                all
            };
            assert_eq!(check(&mut disk, &log, &id, &shape, twenty), status::OK);
        }
    }
}

#[test]
fn the_used_ring_is_marked_where_it_is_written_all_the_way_round() {
    let daemon = Daemon::file("");
    for event_index in [0, feature::EVENT_IDX] {
        let features = feature::QEMU & !feature::EVENT_IDX | event_index;
        let mut disk = daemon.open(&Options { features, queue_size: 1024, ..options() });
        let log = new_log();
        disk.start_logging(&log).unwrap();
        let ring = disk.queue(0).ring().layout();
        // Three pages: the flags and the index, the entries, the event index behind them.
        assert_eq!(pages(ring.used, 4 + 8 * 1024 + 2).count(), 3);
        assert_eq!(log.take(), pages(ring.used, 4 + 8 * 1024 + 2).collect(), "as logging begins");
        for sector in 0..1100 {
            let read = Request::In { sector: sector % 8, len: 512 };
            assert_eq!(check(&mut disk, &log, &read, &Shape::default(), written), status::OK);
        }
        // A batch over the end: all of its entries.
        log.take();
        let queue = disk.queue(0);
        let (from, mut wanted) = (queue.ring().next_used(), Pages::new());
        for n in 0..1020 {
            queue.add(&Request::Flush, &Shape::indirect()).unwrap();
            wanted.extend(entered(ring, from.wrapping_add(n)));
        }
        queue.publish().unwrap();
        queue.drain().unwrap();
        wait_marked(&log, &wanted);
        if event_index != 0 {
            // The queue rests, and says up to where it has seen.
            log.take();
            disk.flush().unwrap();
            wait_marked(&log, &event(ring));
        }
    }
}

/// A disk of which every read lands in half and fails.
struct Half;

static HALF: DriverEntry = DriverEntry {
    ..DriverEntry::new("half", Kind::Protocol, |_, _| {
        Box::pin(async { Ok(Box::new(Half) as Box<dyn Driver>) })
    })
};

static WITH_HALF: std::sync::LazyLock<Registry> =
    std::sync::LazyLock::new(|| Registry::new(&[&[&HALF]]));

impl Driver for Half {
    fn entry(&self) -> &'static DriverEntry {
        &HALF
    }

    fn traits(&self) -> Traits {
        Traits::default()
    }

    fn len(&self) -> u64 {
        1 << 20
    }

    fn read<'a>(&'a self, _: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        into.copy_from(&vec![0xaa; into.len() as usize / 2]);
        Box::pin(std::future::ready(Err(Errno(libc::EIO))))
    }

    fn write<'a>(&'a self, _: u64, _: &'a IoVec<'a>, _: WriteFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(std::future::ready(Err(Errno(libc::EIO))))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn status(&self, _: u64, len: u64, _: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        let extent = Extent { len, status: Status::DATA, place: None };
        Box::pin(std::future::ready(Ok(extent)))
    }
}

#[test]
fn a_read_that_fails_is_marked_because_it_may_have_landed_in_part() {
    let worker = Arc::new(Worker::start("half", WorkerOptions::default()).unwrap());
    let graph = Graph::new(&WITH_HALF);
    let map = keyval::parse("driver=half,node-name=top", None).unwrap().options;
    let node = graph.open_on(&worker, map).unwrap();
    let perms = Perms { held: Perm::CONSISTENT_READ | Perm::WRITE, shared: Perm::all() };
    let _attachment = graph.attach(&node, "an export", perms, None).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let disk = DiskOptions { writable: true, write_through: false, failures: Default::default() };
    let workers = vec![worker.clone()];
    let parts = Parts { name: "half".into(), node, disk, workers, first_worker: 0, metrics: None };
    let address = Address::Path { path: path.clone(), mode: None, owner: None };
    let device = DeviceOptions { num_queues: 1, serial: String::new() };
    let served = ServerOptions { address, logical_block_size: 512, device };
    let mut export = Server::new(parts, served).unwrap();
    export.start(Box::new(|| ())).unwrap();
    let mut disk = Disk::open(&path, &options()).unwrap();
    let log = new_log();
    disk.start_logging(&log).unwrap();
    let read = Request::In { sector: 0, len: 64 << 10 };
    assert_eq!(check(&mut disk, &log, &read, &Shape::default(), written), status::IOERR);
    let write = Request::Out { sector: 0, data: vec![1; 4096] };
    assert_eq!(check(&mut disk, &log, &write, &Shape::default(), only_status), status::IOERR);
}

#[test]
fn the_marks_of_a_request_are_there_before_its_used_index() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options { queue_size: 512, ..options() });
    let log = new_log();
    disk.start_logging(&log).unwrap();
    let memory = disk.memory().clone();
    let queue = disk.queue(0);
    let ring = queue.ring().layout();
    for round in 0..10 {
        let mut wanted = Vec::new();
        let base = queue.ring().next_used();
        log.take();
        // Pages of their own.
        for n in 0..256 {
            let read = Request::In { sector: n % 64, len: 8192 };
            let token = queue.add(&read, &Shape::indirect()).unwrap();
            let chain = queue.chain(token).unwrap();
            wanted.push((queue.ring().next_avail(), pages(chain[1].addr, 8192)));
        }
        let seen = AtomicU16::new(base);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let end = Instant::now() + LIMIT;
                let mut at = base;
                while at != base.wrapping_add(256) && Instant::now() < end {
                    let index = ring.used_idx(&memory);
                    while at != index {
                        let (id, _) = ring.used_entry(&memory, at);
                        let missing = (0..256).find(|&n| {
                            // The table of the chain tells its data.
                            let mut entry = [0; 16];
                            memory.read(ring.desc + 16 * u64::from(id), &mut entry);
                            let table = u64::from_le_bytes(entry[..8].try_into().unwrap());
                            memory.read(table + 16, &mut entry);
                            let data = u64::from_le_bytes(entry[..8].try_into().unwrap());
                            n < 2 && !log.is_marked(data / PAGE + n)
                        });
                        assert_eq!(missing, None, "round {round}, used index {at}");
                        at = at.wrapping_add(1);
                        seen.store(at, Ordering::Relaxed);
                    }
                }
            });
            queue.publish().unwrap();
        });
        assert_eq!(seen.into_inner(), base.wrapping_add(256));
        assert_eq!(wanted.len(), queue.drain().unwrap().len());
    }
}

#[test]
fn requests_in_flight_when_logging_begins_are_marked_when_they_end() {
    let daemon = Daemon::null("latency-ns=1000000000", "");
    let mut disk = daemon.open(&options());
    let queue = disk.queue(0);
    let mut chains = Vec::new();
    for n in 0..16 {
        let token = queue.add(&Request::In { sector: n, len: 8192 }, &Shape::default()).unwrap();
        chains.push((token, queue.chain(token).unwrap()));
    }
    queue.publish().unwrap();
    // The queue has taken them when a stop would wait for them; a message to its worker is enough.
    let log = new_log();
    disk.start_logging(&log).unwrap();
    let early = disk.queue(0).reap().unwrap();
    assert_eq!(early, None, "the machine is too slow for this test");
    disk.queue(0).drain().unwrap();
    let marked = log.take();
    for (token, chain) in chains {
        assert!(written(&chain).is_subset(&marked), "request {token}: {chain:x?}\n{marked:x?}");
    }
}

#[test]
fn without_the_feature_nothing_is_marked_and_from_the_acknowledgement_of_its_end_on() {
    let export = export_of("d0", 0);
    let export = format!("{export},writable=on,num-queues=4,iothread.0=a,iothread.1=b");
    let node = "driver=file,node-name=d0,filename=DIR/disk.img";
    let objects = ["--object", "iothread,id=a", "--object", "iothread,id=b"];
    let rest = ["--blockdev", node, "--export", &export];
    let daemon = Daemon::start(&[&objects[..], &rest[..]].concat());
    let mut disk = daemon.open(&Options { num_queues: 4, ..options() });
    let log = new_log();
    disk.connection().set_log_base(&log).unwrap();
    for queue in 0..4 {
        disk.queue(queue).read(0, &mut [0; 4096]).unwrap();
    }
    assert_eq!(log.take(), Pages::new());
    let mut queues = std::mem::take(&mut disk.queues);
    let stop = AtomicBool::new(false);
    // Odd while each request must be marked; another number each time.
    let window = std::sync::atomic::AtomicUsize::new(0);
    let checks = std::sync::atomic::AtomicUsize::new(0);
    let layouts: Vec<_> = queues.iter_mut().map(|queue| queue.ring().layout()).collect();
    std::thread::scope(|scope| {
        let (log, stop, window, checks) = (&log, &stop, &window, &checks);
        let threads: Vec<_> = queues
            .iter_mut()
            .map(|queue| {
                scope.spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        let began = window.load(Ordering::SeqCst);
                        let read = Request::In { sector: 0, len: 8192 };
                        let mut chains = Vec::new();
                        for _ in 0..8 {
                            let token = queue.add(&read, &Shape::indirect()).unwrap();
                            chains.push(queue.chain(token).unwrap());
                        }
                        queue.publish().unwrap();
                        queue.drain().unwrap();
                        let marked = |page: u64| log.is_marked(page);
                        let all = chains.iter().all(|chain| written(chain).into_iter().all(marked));
                        fence(Ordering::SeqCst);
                        if began % 2 == 1 && began == window.load(Ordering::SeqCst) {
                            assert!(all, "{chains:x?}");
                            checks.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                })
            })
            .collect();
        // The queues are with the threads, so the messages are sent without them.
        for _ in 0..20 {
            let features = disk.connection().features() | feature::LOG_ALL;
            disk.connection().set_exact_features(features).unwrap();
            window.fetch_add(1, Ordering::SeqCst);
            // Until requests were looked at, however slow the machine is.
            let (end, before) = (Instant::now() + LIMIT, checks.load(Ordering::SeqCst));
            while checks.load(Ordering::SeqCst) < before + 4 && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            window.fetch_add(1, Ordering::SeqCst);
            disk.connection().set_exact_features(features & !feature::LOG_ALL).unwrap();
            log.take();
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(log.take(), Pages::new(), "it was said to be off");
        }
        stop.store(true, Ordering::SeqCst);
        assert!(checks.load(Ordering::SeqCst) > 0, "no request was looked at");
        for thread in threads {
            thread.join().unwrap();
        }
    });
    disk.queues = queues;
    // The used rings, for which nothing was asked, were not logged all the while.
    disk.start_logging(&log).unwrap();
    let rings: Pages = layouts.iter().flat_map(|ring| pages(ring.used, 4 + 8 * 128 + 2)).collect();
    assert_eq!(log.take(), rings);
    // Another log takes the place of the first, as when memory is added.
    let other = new_log();
    disk.connection().set_log_base(&other).unwrap();
    log.take();
    disk.queue(3).read(0, &mut [0; 4096]).unwrap();
    assert_eq!(log.take(), Pages::new());
    assert!(rings.is_subset(&other.take()));
    disk.stop_logging().unwrap();
    other.take();
    disk.queue(2).read(0, &mut [0; 4096]).unwrap();
    assert_eq!(other.take(), Pages::new());
}

#[test]
fn a_stopped_queue_has_made_its_last_mark() {
    let daemon = Daemon::null("latency-ns=20000000", "");
    let mut disk = daemon.open(&options());
    let log = new_log();
    disk.start_logging(&log).unwrap();
    for _ in 0..20 {
        let queue = disk.queue(0);
        let (ring, from) = (queue.ring().layout(), queue.ring().next_used());
        let mut chains = Vec::new();
        for n in 0..16 {
            let token =
                queue.add(&Request::In { sector: n, len: 4096 }, &Shape::default()).unwrap();
            chains.push(queue.chain(token).unwrap());
        }
        queue.publish().unwrap();
        log.take();
        let base = disk.connection().stop_queue(0).unwrap();
        let marked = log.take();
        let done = base.wrapping_sub(from);
        for (n, chain) in (0..done).zip(&chains) {
            let wanted: Pages = &written(chain) | &entered(ring, from.wrapping_add(n));
            assert!(wanted.is_subset(&marked), "{n} of {done}: {chain:x?}\n{marked:x?}");
        }
        disk.connection().config().unwrap();
        assert_eq!(log.take(), Pages::new(), "it had stopped");
        disk.start_queue(0, base).unwrap();
        disk.connection().enable_queue(0, true).unwrap();
        disk.queue(0).drain().unwrap();
    }
}

#[test]
fn memory_that_is_added_while_logging_is_marked_too() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options {
        layout: MemoryLayout::gapped(5, 2 << 20),
        regions: Some(1),
        memory_messages: MemoryMessages::Slots,
        ..options()
    });
    let log = new_log();
    disk.start_logging(&log).unwrap();
    let memory = disk.memory().clone();
    let shape = Shape { placement: Placement::Spread, ..Shape::default() };
    for count in 2..=5 {
        disk.connection().add_region(&memory.regions()[count - 1]).unwrap();
        memory.set_usable_regions(count);
    }
    for _ in 0..5 {
        let read = Request::In { sector: 0, len: 16384 };
        assert_eq!(check(&mut disk, &log, &read, &shape, written), status::OK);
    }
    // And not at the wrong place when the regions change places in the table.
    disk.connection().remove_region(&memory.regions()[2]).unwrap();
    disk.connection().add_region(&memory.regions()[2]).unwrap();
    let read = Request::In { sector: 0, len: 16384 };
    assert_eq!(check(&mut disk, &log, &read, &shape, written), status::OK);
}
