//! A controller in memory under an export: a guest's memory, faults, changes.

use super::{close, hold, open_on, perms, wait_until, worker};
use crate::disks::{REGISTRY, nvme_disk};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vublk::block::{Attachment, Graph, Node};
use vublk::export::core::{Address, DiskOptions, Export, Parts};
use vublk::export::vhost_user_blk::{DeviceOptions, Options as ServerOptions, Server};
use vublk::io::Worker;
use vublk_testkit::frontend::MemoryMessages;
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::{protocol, status};
use vublk_testkit::{Disk, MemoryLayout, Options};
use vublk_vfio::fake::{Config, Fake, Fault};
use vublk_vfio::spec::{IoOpcode, Status};

/// Serves the disk to a front end.
fn serve(node: &Arc<Node>, worker: &Arc<Worker>, path: &Path) -> Server {
    let disk = DiskOptions { writable: true, write_through: false, failures: Default::default() };
    let workers = vec![worker.clone()];
    let (name, node) = ("disk".into(), node.clone());
    let parts = Parts { name, node, disk, workers, first_worker: 0, metrics: None };
    let address = Address::Path { path: path.to_owned(), mode: None, owner: None };
    let device = DeviceOptions { num_queues: 1, serial: String::new() };
    Server::new(parts, ServerOptions { address, logical_block_size: 512, device }).unwrap()
}

/// A disk of a controller that is served to a front end.
struct Served {
    graph: Graph,
    worker: Arc<Worker>,
    node: Arc<Node>,
    held: Attachment,
    folder: TempDir,
    export: Server,
}

impl Served {
    fn new(options: &str) -> Served {
        let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
        let node = open_on(&graph, &worker, "disk", options).unwrap();
        let held = hold(&graph, &node);
        let folder = tempfile::tempdir().unwrap();
        let mut export = serve(&node, &worker, &folder.path().join("socket"));
        export.start(Box::new(|| ())).unwrap();
        Served { graph, worker, node, held, folder, export }
    }

    fn open(&self, options: &Options) -> Disk {
        Disk::open(&self.folder.path().join("socket"), options).unwrap()
    }

    /// Ends all of it, the front end first.
    fn end(self, mut disk: Disk) {
        disk.stop().unwrap();
        drop((disk, self.export, self.held, self.node));
        close(&self.graph, &self.worker);
    }
}

/// Writes, and tells the length of the mapping that the device takes the data from.
fn write_from(fake: &Fake, disk: &mut Disk, bytes: &[u8]) -> Option<usize> {
    fake.hold();
    let clone = fake.clone();
    let looks = std::thread::spawn(move || {
        wait_until("the command has come", || clone.held() == 1);
        let found = clone.mapping_len(clone.held_commands()[0].data().0);
        clone.release();
        found
    });
    disk.write(8, bytes).unwrap();
    looks.join().unwrap()
}

#[test]
fn the_device_reads_and_writes_a_guest_s_memory_where_it_is_unless_that_is_switched_off() {
    for guest_dma in [true, false] {
        let (fake, options) = nvme_disk(Config::default());
        let switch = if guest_dma { "on" } else { "off" };
        let options =
            format!("driver=raw,file.{},file.guest-dma={switch}", options.replace(",", ",file."));
        let served = Served::new(&options);
        let mut disk = served.open(&Options::default());
        let marker = crate::vhost_user::pattern(4096, 7);
        let bounce = Some(4 << 20);
        if guest_dma {
            // The memory is pinned in the background.
            wait_until("nothing is copied", || write_from(&fake, &mut disk, &marker) != bounce);
        }
        let found = write_from(&fake, &mut disk, &marker);
        assert_eq!(found == bounce, !guest_dma, "{found:?}");
        assert_eq!(fake.bytes(1, 4096, 4096), marker);
        let mut bytes = vec![0; 4096];
        disk.read(8, &mut bytes).unwrap();
        assert_eq!(bytes, marker);
        served.end(disk);
        assert!(!fake.has_mappings());
        assert_eq!(fake.complaints(), Vec::<String>::new());
    }
}

#[test]
fn a_namespace_that_changes_has_its_new_length_for_everybody_above_without_being_asked() {
    let (fake, options) = nvme_disk(Config::default());
    let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
    let leaf = open_on(&graph, &worker, "leaf", &options).unwrap();
    let node = open_on(&graph, &worker, "disk", "driver=raw,file=leaf").unwrap();
    let held = hold(&graph, &node);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let mut export = serve(&node, &worker, &path);
    export.start(Box::new(|| ())).unwrap();
    let attached = graph.attach(&node, "export 'disk'", perms(), Some(export.user())).unwrap();
    let protocol = protocol::DEFAULT | protocol::BACKEND_REQ;
    let mut disk = Disk::open(&path, &Options { protocol, ..Options::default() }).unwrap();
    let (mut ours, clone) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    disk.connection().vhost().set_backend_request_fd(&clone).unwrap();
    // Longer, shorter, and back.
    for mib in [128, 16, 64] {
        fake.resize(1, mib << 11);
        // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
        let mut header = [0; 12];
        ours.read_exact(&mut header).unwrap();
        assert_eq!(header, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(disk.connection().config().unwrap().capacity_sectors, mib << 11);
        assert_eq!((leaf.len(), node.len()), (mib << 20, mib << 20));
        let last = (mib << 11) - 8;
        disk.write(last, &[mib as u8; 4096]).unwrap();
        assert_eq!(fake.bytes(1, (last * 512) as usize, 4096), vec![mib as u8; 4096]);
        disk.write(last + 8, &[1; 4096]).unwrap_err();
    }
    disk.stop().unwrap();
    drop((disk, export, attached, held, node, leaf));
    close(&graph, &worker);
    assert_eq!(fake.complaints(), Vec::<String>::new());
}

#[test]
fn memory_that_a_command_in_flight_names_is_taken_back_only_when_that_has_ended() {
    const MIB: usize = 1 << 20;
    let (fake, options) = nvme_disk(Config::default());
    let served = Served::new(&options);
    // Rings in the first region, the data in the second, which comes and goes.
    let mut disk = served.open(&Options {
        layout: MemoryLayout(vec![(0, MIB), (1 << 30, 2 * MIB)]),
        regions: Some(1),
        memory_messages: MemoryMessages::Slots,
        ..Options::default()
    });
    let memory = disk.memory().clone();
    let region = &memory.regions()[1];
    for round in 0..4u8 {
        disk.connection().add_region(region).unwrap();
        let [header, ended] = [16, 1].map(|len| memory.alloc_in(0, len, 16).unwrap());
        let (sector, len) = (8u64, 64 << 10);
        header.write(&[&1u64.to_le_bytes()[..], &sector.to_le_bytes()].concat());
        ended.write(&[0xee]);
        let data = crate::vhost_user::pattern(len, round);
        memory.write(1 << 30, &data);
        let piece = |addr, len: usize, device_writes| vublk_testkit::Segment {
            addr,
            len: len as u32,
            device_writes,
        };
        let chain = [
            piece(header.addr(), 16, false),
            piece(1 << 30, len, false),
            piece(ended.addr(), 1, true),
        ];
        // Until the memory is pinned, which goes on in the background, the data is copied.
        let direct = |fake: &Fake| {
            let command = fake.held_commands().first().copied();
            command.is_some_and(|command| fake.mapping_len(command.data().0) == Some(2 * MIB))
        };
        let mut tries = 0;
        loop {
            fake.hold();
            disk.queue(0).ring().add(&chain, false).unwrap();
            disk.queue(0).ring().publish().unwrap();
            wait_until("the command has come", || fake.held() == 1);
            if direct(&fake) {
                break;
            }
            fake.release();
            disk.queue(0).ring().wait(Duration::from_secs(60)).unwrap();
            disk.queue(0).ring().pop().unwrap().unwrap();
            tries += 1;
            assert!(tries < 10_000, "it is never pinned");
        }
        let at = fake.held_commands()[0].data().0;
        let releases = {
            let fake = fake.clone();
            std::thread::spawn(move || {
                // Long enough for an answer that does not wait to come.
                std::thread::sleep(Duration::from_millis(200));
                let is_mapped = fake.mapping_len(at).is_some();
                fake.release();
                is_mapped
            })
        };
        disk.connection().remove_region(region).unwrap();
        assert_eq!(fake.mapping_len(at), None, "the device reaches memory that was taken back");
        assert!(releases.join().unwrap(), "the device lost memory that it was reading");
        disk.queue(0).ring().wait(Duration::from_secs(60)).unwrap();
        disk.queue(0).ring().pop().unwrap().unwrap();
        assert_eq!(ended.to_vec(), [status::OK]);
        assert_eq!(fake.bytes(1, 4096, len), data);
    }
    served.end(disk);
    assert!(!fake.has_mappings());
    assert_eq!(fake.complaints(), Vec::<String>::new());
}

#[test]
fn a_flush_that_the_controller_fails_is_failed_to_the_guest_and_the_next_is_asked_for_anew() {
    let (fake, options) = nvme_disk(Config::default());
    let served = Served::new(&options);
    let mut disk = served.open(&Options::default());
    disk.write(0, &[1; 4096]).unwrap();
    let flush = |disk: &mut Disk| {
        let queue = disk.queue(0);
        queue.submit(&Request::Flush, &Shape::default()).unwrap();
        queue.wait().unwrap().status
    };
    let opcode = Some(IoOpcode::Flush as u8);
    for status in [Status::WRITE_FAULT, Status::INTERNAL] {
        fake.fail(Fault { opcode, blocks: None, status, times: 1 });
        let flushes = fake.flushes(1);
        assert_eq!(flush(&mut disk), status::IOERR);
        assert_eq!(fake.flushes(1), flushes);
        // Unlike the kernel, a controller does not forget that it could not write something.
        assert_eq!(flush(&mut disk), status::OK);
        assert_eq!(fake.flushes(1), flushes + 1);
    }
    served.end(disk);
}
