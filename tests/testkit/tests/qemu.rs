//! The testkit against a real peer: qemu-storage-daemon serving a raw file or a null disk.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use vublk_testkit::frontend::MemoryMessages;
use vublk_testkit::request::{Cut, Placement, Request, Shape};
use vublk_testkit::spec::{feature, protocol, status};
use vublk_testkit::{Disk, Error, MemoryLayout, Options, Server};

const LIMIT: Duration = Duration::from_secs(30);
const SIZE: u64 = 8 << 20;

/// A daemon with one export, and the directory its files live in.
struct Served {
    server: Server,
    dir: tempfile::TempDir,
}

impl Served {
    fn new(blockdev: &str, export: &str) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        fs::File::create(at("disk")).unwrap().set_len(SIZE).unwrap();
        let blockdev = blockdev.replace("FILE", &at("disk"));
        let socket = at("socket");
        let export = format!(
            "type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={socket},{export}"
        );
        let args = ["--blockdev", &blockdev, "--export", &export, "--pidfile", &at("pid")];
        let program = PathBuf::from("/usr/bin/qemu-storage-daemon");
        let mut server = Server::start(&program, &args).unwrap();
        server.wait_pidfile(&dir.path().join("pid"), LIMIT).unwrap();
        Served { server, dir }
    }

    fn file() -> Served {
        Served::new(
            "driver=file,node-name=n0,filename=FILE,discard=unmap",
            "writable=on,num-queues=4",
        )
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn contents(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("disk")).unwrap()
    }

    fn open(&self, options: &Options) -> Disk {
        Disk::open(&self.socket(), options).unwrap()
    }
}

fn pattern(len: usize, salt: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512) as u8 ^ i as u8 ^ salt).collect()
}

#[test]
fn what_is_written_is_read_back_and_stands_in_the_file() {
    let served = Served::file();
    let mut disk = served.open(&Options::default());
    assert_eq!(disk.config().capacity_sectors, SIZE / 512);
    let data = pattern(64 << 10, 1);
    disk.write(8, &data).unwrap();
    disk.flush().unwrap();
    let mut back = vec![0; data.len()];
    disk.read(8, &mut back).unwrap();
    assert_eq!(back, data);
    assert_eq!(served.contents()[4096..4096 + data.len()], data);
}

#[test]
fn write_zeroes_and_discard_clear_the_range_and_nothing_else() {
    let served = Served::file();
    let mut disk = served.open(&Options::default());
    assert!(disk.has(feature::DISCARD | feature::WRITE_ZEROES));
    disk.write(0, &pattern(48 << 10, 2)).unwrap();
    disk.write_zeroes(16, 16, false).unwrap();
    disk.write_zeroes(32, 16, true).unwrap();
    disk.discard(48, 16, 0).unwrap();
    let mut want = pattern(48 << 10, 2);
    want[16 * 512..64 * 512].fill(0);
    assert_eq!(served.contents()[..want.len()], want);
}

#[test]
fn identity_and_refusals_come_back_as_statuses() {
    let served = Served::file();
    let mut disk = served.open(&Options::default());
    assert_eq!(disk.get_id().unwrap(), "vhost_user_blk");
    let past_the_end = disk.read(SIZE / 512, &mut [0; 512]);
    assert!(matches!(past_the_end, Err(Error::Status(status::IOERR))));
    let unknown = Request::Raw { request_type: 77, sector: 0, data: vec![], writable: 0 };
    assert_eq!(disk.run(&unknown).unwrap().status, status::UNSUPP);
}

#[test]
fn every_shape_of_chain_carries_its_data() {
    let served = Served::file();
    for event_idx in [0, feature::EVENT_IDX] {
        let mut disk = served.open(&Options {
            features: feature::QEMU & !feature::EVENT_IDX | event_idx,
            layout: MemoryLayout::adjacent(4, 4 << 20),
            ..Options::default()
        });
        let cuts = [Cut::Natural, Cut::Each(1000), Cut::Sizes(vec![7, 9, 512])];
        for (i, readable) in cuts.iter().enumerate() {
            for placement in [Placement::Packed, Placement::Spread, Placement::Straddling] {
                for indirect in [false, true] {
                    // qemu-storage-daemon 7.2 counts the halves of a buffer in two regions against
                    // the length of the indirect table ("Looped descriptor") and stops.
                    if indirect && placement == Placement::Straddling {
                        continue;
                    }
                    let queue = disk.queue(0);
                    let shape = Shape {
                        readable: readable.clone(),
                        writable: Cut::Sizes(vec![512, 1024]),
                        indirect,
                        placement,
                    };
                    queue.shape = shape.clone();
                    let data = pattern(16 << 10, i as u8 + 16 * u8::from(indirect));
                    let sector = 32 * i as u64;
                    queue
                        .write(sector, &data)
                        .unwrap_or_else(|e| panic!("{e}: {shape:?} {}", served.server.stderr()));
                    let mut back = vec![0; data.len()];
                    queue.read(sector, &mut back).unwrap();
                    assert_eq!(back, data, "{:?}", queue.shape);
                }
            }
        }
    }
}

#[test]
fn many_requests_in_flight_on_several_queues_all_come_back() {
    let served = Served::file();
    let mut disk = served.open(&Options {
        num_queues: 4,
        queue_size: 256,
        layout: MemoryLayout::gapped(2, 16 << 20),
        ..Options::default()
    });
    assert!(disk.has(feature::MQ));
    for (q, queue) in disk.queues.iter_mut().enumerate() {
        for i in 0..64 {
            let sector = (q * 64 + i) as u64 * 8;
            let data = pattern(4096, (q * 64 + i) as u8);
            let request = Request::Out { sector, data };
            queue.submit(&request, &Shape::indirect()).unwrap();
        }
    }
    for queue in &mut disk.queues {
        let done = queue.drain().unwrap();
        assert_eq!(done.len(), 64);
        assert!(done.iter().all(|c| c.status == status::OK));
        let mut tokens: Vec<u64> = done.iter().map(|c| c.token).collect();
        tokens.sort_unstable();
        assert!(tokens.iter().copied().eq(0..64));
    }
    let contents = served.contents();
    for i in 0..256 {
        assert_eq!(contents[i * 4096..][..4096], pattern(4096, i as u8));
    }
}

#[test]
fn a_disk_goes_on_after_a_stop_after_a_reconnect_and_for_a_new_front_end() {
    let served = Served::file();
    let options = Options::default();
    let mut disk = served.open(&options);
    let data = pattern(4096, 9);
    disk.write(0, &data).unwrap();
    assert_eq!(disk.stop().unwrap(), [1], "one request was taken");
    disk.start_queue(0, 1).unwrap();
    disk.connection().enable_queue(0, true).unwrap();
    let mut back = vec![0; 4096];
    disk.read(0, &mut back).unwrap();
    assert_eq!(back, data);
    disk.reconnect().unwrap();
    disk.write(8, &data).unwrap();
    drop(disk);
    let mut next = served.open(&options);
    next.read(8, &mut back).unwrap();
    assert_eq!(back, data);
}

#[test]
fn memory_can_be_announced_region_by_region_and_added_while_running() {
    let served = Served::file();
    let mut disk = served.open(&Options {
        layout: MemoryLayout::gapped(3, 4 << 20),
        regions: Some(2),
        memory_messages: MemoryMessages::Slots,
        ..Options::default()
    });
    assert_ne!(disk.connection().protocol() & protocol::CONFIGURE_MEM_SLOTS, 0);
    let data = pattern(4096, 3);
    disk.write(0, &data).unwrap();
    let memory = disk.memory().clone();
    disk.connection().add_region(&memory.regions()[2]).unwrap();
    memory.set_usable_regions(3);
    disk.queue(0).shape.placement = Placement::Spread;
    let mut back = vec![0; 4096];
    disk.read(0, &mut back).unwrap();
    assert_eq!(back, data);
}

#[test]
fn a_null_disk_of_the_size_asked_for_answers() {
    let served = Served::new("driver=null-co,node-name=n0,size=1073741824", "writable=on");
    let mut disk = served.open(&Options::default());
    assert_eq!(disk.config().capacity_sectors, 2 << 20);
    disk.write(0, &[1; 512]).unwrap();
    disk.read(0, &mut [0; 512]).unwrap();
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let served = Served::new("driver=file,node-name=n0,filename=FILE,read-only=on", "writable=off");
    let mut disk = served.open(&Options::default());
    assert!(disk.has(feature::RO));
    let refused = disk.write(0, &[1; 512]);
    assert!(matches!(refused, Err(Error::Status(status::IOERR))));
}
