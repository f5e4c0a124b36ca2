//! The driver `nvme` over a controller in memory, shared by workers, nodes and guests.

mod served;
mod targets;

use crate::disks::{REGISTRY, nvme_disk};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vublk::block::{Access, Error, Graph, Node, Perm, Perms, Precision, WriteFlags};
use vublk::io::{AlignedBuf, Errno, IoVec, Worker, WorkerOptions};
use vublk::options::keyval;
use vublk_vfio::fake::{Broken, Config, Media};

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

/// Whether a worker's requests go to its own queue at once.
fn is_fast(worker: &Worker, node: &Arc<Node>) -> bool {
    let node = node.clone();
    worker.call(move |_| {
        let announcer = node.announcer();
        let turn = announcer.enter();
        let mapping = node.map(turn.in_flight(), 0, 4096, Access::Write);
        matches!(mapping.target, vublk::block::Target::Data { .. })
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
fn a_change_that_no_event_reports_is_known_once_a_resize_has_asked_for_it() {
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

#[test]
fn the_fast_path_ends_at_the_controller_once_the_worker_has_a_queue() {
    let (_fake, options) = nvme_disk(Config::default());
    let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
    let node = open_on(&graph, &worker, "disk", &options).unwrap();
    let held = hold(&graph, &node);
    assert!(!is_fast(&worker, &node));
    write(&worker, &node, 0, 1).unwrap();
    assert!(is_fast(&worker, &node));
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

#[test]
fn a_namespace_that_is_another_s_is_opened_inactive_and_looked_at_anew_when_it_becomes_ours() {
    let (fake, options) = nvme_disk(Config::default());
    let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
    let options = format!("driver=raw,active=off,file.{}", options.replace(",", ",file."));
    let node = open_on(&graph, &worker, "disk", &options).unwrap();
    let held = hold(&graph, &node);
    assert!(!node.is_active());
    assert!(write(&worker, &node, 0, 1).is_err());
    assert_eq!(fake.counts().commands, 0);
    // Who has it makes it longer.
    fake.resize_silently(1, 1 << 18);
    let (same, clone) = (node.clone(), graph.clone());
    worker.block_on(move || async move { clone.activate(&same).await }).unwrap();
    assert_eq!(node.len(), 128 << 20);
    write(&worker, &node, 100 << 20, 7).unwrap();
    assert_eq!(fake.bytes(1, 100 << 20, 4096), vec![7; 4096]);
    drop((held, node));
    close(&graph, &worker);
    assert!(!fake.has_mappings());
    assert_eq!(fake.complaints(), Vec::<String>::new());
}

#[test]
fn an_inactive_node_lets_its_controller_go_too() {
    let (fake, options) = nvme_disk(Config::default());
    let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
    drop(open_on(&graph, &worker, "disk", &format!("{options},active=off")).unwrap());
    close(&graph, &worker);
    assert!(!fake.has_mappings());
    drop(open_on(&graph, &worker, "again", &options).unwrap());
    close(&graph, &worker);
}

#[test]
fn the_time_out_of_requests_is_the_controller_s_and_all_its_namespaces_share_it() {
    let namespaces = vec![Media::new(1 << 20, 9), Media::new(1 << 20, 9)];
    let (fake, options) = nvme_disk(Config { namespaces, ..Config::default() });
    let (graph, worker) = (Graph::new(&REGISTRY), worker("nvme"));
    let first = open_on(&graph, &worker, "first", &format!("{options},io-timeout=1")).unwrap();
    let other = open_on(&graph, &worker, "b", &format!("{options},namespace=2,io-timeout=2"));
    let other = other.err().expect("it has another").to_string();
    assert!(other.ends_with("open with io-timeout=1, which all its namespaces share"), "{other}");
    let second = open_on(&graph, &worker, "second", &format!("{options},namespace=2")).unwrap();
    let held = [hold(&graph, &first), hold(&graph, &second)];
    // Taken and not done: aborted in time, and given again.
    fake.hold();
    let waits = {
        let (worker, first) = (worker.clone(), first.clone());
        std::thread::spawn(move || write(&worker, &first, 0, 5))
    };
    let aborted =
        |event: &vublk_vfio::fake::Event| matches!(event, vublk_vfio::fake::Event::Aborted(..));
    wait_until("it was aborted", || fake.events().iter().any(aborted));
    fake.release();
    waits.join().unwrap().unwrap();
    assert_eq!(fake.bytes(1, 0, 4096), vec![5; 4096]);
    drop((held, first, second));
    close(&graph, &worker);
}
