//! The driver `nvme` over a controller in memory: what several workers, nodes and guests share.

use crate::disks::{REGISTRY, nvme_disk};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost::vhost_user::VhostUserFrontend;
use vublk::block::{Access, Error, Graph, Node, Perm, Perms, Precision, WriteFlags};
use vublk::export::vhost_user_blk::{Address, DiskOptions, Export, ExportOptions};
use vublk::io::{AlignedBuf, Errno, IoVec, Worker, WorkerOptions};
use vublk::options::keyval;
use vublk_testkit::spec::protocol;
use vublk_testkit::{Disk, Options};
use vublk_vfio::fake::{Broken, Config, Fake, Media};

fn worker(name: &str) -> Arc<Worker> {
    Arc::new(Worker::start(name, WorkerOptions::default()).unwrap())
}

fn open_on(graph: &Graph, worker: &Worker, name: &str, options: &str) -> Result<Arc<Node>, Error> {
    let map = keyval::parse(&format!("{options},node-name={name}"), None).unwrap().options;
    graph.open_on(worker, map)
}

fn perms() -> Perms {
    Perms { held: Perm::CONSISTENT_READ | Perm::WRITE, shared: Perm::all() }
}

fn hold(graph: &Graph, node: &Arc<Node>) -> vublk::block::Attachment {
    graph.attach(node, "a test", perms(), None).unwrap()
}

fn write(worker: &Worker, node: &Arc<Node>, at: u64, byte: u8) -> Result<(), Errno> {
    let node = node.clone();
    worker.block_on(move || async move {
        let mut bytes = AlignedBuf::new(4096, 4096).unwrap();
        bytes.fill(byte);
        node.write(at, &bytes.io_vec(), WriteFlags::empty()).await
    })
}

fn close(graph: &Graph, worker: &Worker) {
    let graph = graph.clone();
    worker.block_on(move || async move { graph.close().await });
}

fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < Duration::from_secs(60), "waiting until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn nodes_share_a_controller_and_the_last_of_them_shuts_it_down() {
    let namespaces = vec![Media::new(1 << 20, 9), Media::new(1 << 20, 12)];
    let (fake, options) = nvme_disk(Config { namespaces, ..Config::default() });
    let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
    let first = open_on(&graph, &worker, "first", &options).unwrap();
    let again = open_on(&graph, &worker, "again", &options).err().expect("it is in use");
    assert!(again.to_string().ends_with("namespace 1 is open in this process already"), "{again}");
    let absent = open_on(&graph, &worker, "third", &format!("{options},namespace=3"));
    let absent = absent.err().expect("it is not there");
    assert!(absent.to_string().ends_with("there is no namespace 3: there are 1, 2"), "{absent}");
    let second = open_on(&graph, &worker, "second", &format!("{options},namespace=2")).unwrap();
    let held = [hold(&graph, &first), hold(&graph, &second)];
    for (byte, node) in (1..).zip([&first, &second]) {
        write(&worker, node, 8192, byte).unwrap();
        assert_eq!(fake.bytes(u32::from(byte), 8192, 4096), vec![byte; 4096]);
    }
    drop((held, first, second));
    close(&graph, &worker);
    assert!(!fake.has_mappings());
    assert!(fake.events().contains(&vublk_vfio::fake::Event::Shutdown));
    assert_eq!(fake.complaints(), Vec::<String>::new());
}

#[test]
fn workers_beyond_what_the_controller_grants_go_by_those_that_have_queues() {
    let (fake, options) = nvme_disk(Config { pairs: 1, ..Config::default() });
    let graph = Graph::new(&REGISTRY);
    let workers: Vec<_> = (0..3).map(|_| worker("nvme")).collect();
    let node = open_on(&graph, &workers[0], "disk", &options).unwrap();
    let held = hold(&graph, &node);
    for round in 0..20 {
        for (n, worker) in (0..).zip(&workers) {
            let at = u64::from(n) * 4096;
            write(worker, &node, at, round * 3 + n + 1).unwrap();
            assert_eq!(fake.bytes(1, at as usize, 4096), vec![round * 3 + n + 1; 4096]);
        }
    }
    drop((held, node));
    close(&graph, &workers[0]);
    assert_eq!(fake.complaints(), Vec::<String>::new());
}

#[test]
fn a_device_that_goes_costs_errors_and_the_graph_can_be_closed() {
    let (fake, options) = nvme_disk(Config::default());
    let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
    let node = open_on(&graph, &worker, "disk", &options).unwrap();
    let held = hold(&graph, &node);
    write(&worker, &node, 0, 1).unwrap();
    fake.break_down(Broken { registers: Some(u32::MAX), ..Broken::default() });
    assert_eq!(write(&worker, &node, 0, 2), Err(Errno(libc::ENODEV)));
    drop((held, node));
    close(&graph, &worker);
    assert!(!fake.has_mappings());
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
    let export = serve(&node, &worker, &path).start(|| ()).unwrap();
    let attached = graph.attach(&node, "export 'disk'", perms(), Some(export.user())).unwrap();
    let protocol = protocol::DEFAULT | protocol::BACKEND_REQ;
    let mut disk = Disk::open(&path, &Options { protocol, ..Options::default() }).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    disk.connection().vhost().set_backend_request_fd(&theirs).unwrap();
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
fn a_change_that_no_event_tells_of_is_known_once_a_resize_has_asked_for_it() {
    let (fake, options) = nvme_disk(Config::default());
    let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
    let node = open_on(&graph, &worker, "disk", &options).unwrap();
    fake.resize_silently(1, 1 << 18);
    let resize = |len| {
        let (graph, node) = (graph.clone(), node.clone());
        worker.block_on(move || async move { graph.resize(&node, len).await })
    };
    assert_eq!(node.len(), 64 << 20);
    resize(128 << 20).unwrap();
    assert_eq!(node.len(), 128 << 20);
    write(&worker, &node, 100 << 20, 1).expect_err("nobody holds the permission");
    let held = hold(&graph, &node);
    write(&worker, &node, 100 << 20, 1).unwrap();
    assert_eq!(resize(1 << 30).unwrap_err().to_string(), "Cannot grow device files");
    drop((held, node));
    close(&graph, &worker);
}

/// Serves the disk to a front end.
fn serve(node: &Arc<Node>, worker: &Arc<Worker>, path: &Path) -> Export {
    let disk = DiskOptions {
        writable: true,
        write_through: false,
        logical_block_size: 512,
        num_queues: 1,
        serial: String::new(),
        failures: Default::default(),
    };
    let workers = vec![worker.clone()];
    let options =
        ExportOptions { name: "disk".into(), disk, workers, first_worker: 0, metrics: None };
    let address = Address::Path { path: path.to_owned(), mode: None, owner: None };
    Export::new(node.clone(), address, options).unwrap()
}

/// Writes, and tells the length of the mapping that the device takes the data from.
fn write_from(fake: &Fake, disk: &mut Disk, bytes: &[u8]) -> Option<usize> {
    fake.hold();
    let theirs = fake.clone();
    let looks = std::thread::spawn(move || {
        wait_until("the command has come", || theirs.held() == 1);
        let found = theirs.mapping_len(theirs.held_commands()[0].data().0);
        theirs.release();
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
        let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
        let node = open_on(&graph, &worker, "disk", &options).unwrap();
        let held = hold(&graph, &node);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let export = serve(&node, &worker, &path).start(|| ()).unwrap();
        let mut disk = Disk::open(&path, &Options::default()).unwrap();
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
        disk.stop().unwrap();
        drop((disk, export, held, node));
        close(&graph, &worker);
        assert!(!fake.has_mappings());
        assert_eq!(fake.complaints(), Vec::<String>::new());
    }
}

#[test]
fn the_fast_road_ends_at_the_controller_once_the_worker_has_a_queue() {
    let (_fake, options) = nvme_disk(Config::default());
    let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
    let node = open_on(&graph, &worker, "disk", &options).unwrap();
    let held = hold(&graph, &node);
    let is_fast = |node: &Arc<Node>| {
        let node = node.clone();
        worker.call(move |_| {
            let announcer = vublk::io::epoch::Announcer::default();
            let turn = announcer.enter();
            let mapping = node.map(turn.in_flight(), 0, 4096, Access::Write);
            matches!(mapping.target, vublk::block::Target::Data { .. })
        })
    };
    assert!(!is_fast(&node));
    write(&worker, &node, 0, 1).unwrap();
    assert!(is_fast(&node));
    let same = node.clone();
    let extent =
        worker.block_on(move || async move { same.status(0, 4096, Precision::Zeroes).await });
    assert_eq!(extent.unwrap().place.unwrap().offset, 0);
    let mut bytes = [1u8; 512];
    let same = node.clone();
    worker
        .block_on(move || async move { same.read(1, &IoVec::from_mut(&mut bytes)).await })
        .unwrap();
    drop((held, node));
    close(&graph, &worker);
}
