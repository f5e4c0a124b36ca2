//! Images in memory: made once, changed by inputs, and opened on a simulated disk by the calling
//! thread, so that a run needs no file, no other thread and no sleep.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use vublk::block::{Attachment, Creation, Error, Graph, Node, Perm, Perms, Registry};
use vublk::io::sim::{Disorder, SimRing};
use vublk::io::{Worker, WorkerOptions, run_on};
use vublk::options::{Map, keyval, qemuopts};
use vublk::protocol::sim::{self, SimDisk, SimOptions};

/// Bytes by which an image can grow.
const ROOM: u64 = 256 << 10;

/// Caches of the least size: making larger ones costs more than all that an input does.
const CACHES: &str = ",l2-cache-size=32768,refcount-cache-size=65536";

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[vublk::format::LIST, vublk::protocol::LIST, &[&sim::ENTRY]]));

thread_local! {
    /// Disks are found by name; a thread has one name, which each run takes over.
    static NAME: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The name of this thread's simulated disk.
pub fn disk_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let new = || format!("fuzz{}", NEXT.fetch_add(1, Ordering::Relaxed));
    NAME.with_borrow_mut(|name| name.get_or_insert_with(new).clone())
}

/// The bytes of a new qcow2 image with these creation options. It is made in a file, which is gone
/// when this returns.
pub fn create(options: &str) -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("vublk-fuzz-{}-{n}.qcow2", std::process::id()));
    let name = path.to_str().expect("a name").to_owned();
    let given = qemuopts::parse(options, None).expect("options").options;
    let file = Map::from_iter([("driver", "file"), ("filename", &name)]);
    let creation = Creation::new(vublk::drivers::registry(), "qcow2", (&name, file), given, None);
    let creation = creation.expect("an image to make");
    let worker = Worker::start("create", WorkerOptions::default()).expect("a worker");
    worker.block_on(move || async move { creation.run().await }).expect("an image");
    let bytes = std::fs::read(&path).expect("an image");
    let _ = std::fs::remove_file(&path);
    bytes
}

/// A simulated disk that holds `bytes`.
pub fn disk(bytes: &[u8]) -> SimDisk {
    let mut options = SimOptions::new(bytes.len() as u64);
    options.max_len += ROOM;
    SimDisk::holding(options, bytes)
}

/// An open node, held for writing.
pub struct Opened {
    graph: Graph,
    hold: Attachment,
}

impl Opened {
    /// Opens `disk` as this thread's disk; `driver` is of the node on top, `None` for the bare disk.
    async fn new(disk: &SimDisk, driver: Option<&str>, held: Perms) -> Result<Opened, Error> {
        let name = disk_name();
        disk.publish(&name);
        let options = match driver {
            Some(driver) => format!("driver={driver}{CACHES},file.driver=sim,file.disk={name}"),
            None => format!("driver=sim,disk={name}"),
        };
        let options = keyval::parse(&format!("{options},node-name=image"), None);
        let graph = Graph::new(&REGISTRY);
        let node = graph.open(options.expect("well-formed options").options).await?;
        let hold = graph.attach(&node, "a fuzz target", held, None)?;
        Ok(Opened { graph, hold })
    }

    async fn close(self) {
        self.hold.detach().await;
        self.graph.close().await;
    }
}

/// Opens the disk as a qcow2 image, lets `work` use it, and closes it.
pub fn with_qcow2(
    disk: &SimDisk,
    work: impl AsyncFnOnce(&Arc<Node>) -> Result<(), Error> + 'static,
) -> Result<(), Error> {
    let held = Perm::CONSISTENT_READ | Perm::WRITE;
    with(disk, Some("qcow2"), Perms { held, shared: Perm::all() }, work)
}

/// Opens the bare disk for a check that may repair what it holds.
pub fn with_disk<T: 'static>(
    disk: &SimDisk,
    work: impl AsyncFnOnce(&Arc<Node>) -> Result<T, Error> + 'static,
) -> Result<T, Error> {
    let held = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    with(disk, None, Perms { held, shared: Perm::empty() }, work)
}

fn with<T: 'static>(
    disk: &SimDisk,
    driver: Option<&'static str>,
    perms: Perms,
    work: impl AsyncFnOnce(&Arc<Node>) -> Result<T, Error> + 'static,
) -> Result<T, Error> {
    let calm =
        Disorder { seed: 1, max_delay: Duration::from_micros(50), short: 0.0, interrupted: 0.0 };
    let ring = SimRing::new(calm).expect("a simulated ring");
    let disk = disk.clone();
    run_on(Box::new(ring), async move {
        let opened = Opened::new(&disk, driver, perms).await?;
        let result = work(opened.hold.node()).await;
        opened.close().await;
        result
    })
}
