//! Images in memory: made once, changed by inputs, and opened on a simulated disk by the calling
//! thread, so that a run needs no file, no other thread and no sleep.

use super::worker::worker;
use std::cell::OnceCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use vublk::block::{Attachment, Creation, Error, Graph, Node, Perm, Perms, Registry};
use vublk::io::sim::Disorder;
use vublk::io::{Worker, WorkerOptions};
use vublk::options::{Map, keyval, qemuopts};
use vublk::protocol::sim::{self, SimDisk, SimOptions};

/// Bytes by which an image can grow.
const ROOM: u64 = 256 << 10;
/// The most that an image can have before.
const MOST: u64 = 768 << 10;

/// Caches of the least size: making larger ones costs more than all that an input does.
const CACHES: &str = ",l2-cache-size=32768,refcount-cache-size=65536";

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[vublk::format::LIST, vublk::protocol::LIST, &[&sim::ENTRY]]));

thread_local! {
    /// The thread's disk and its name. Its memory is used again.
    static DISK: OnceCell<(SimDisk, String)> = const { OnceCell::new() };
}

/// A name for a simulated disk.
pub fn disk_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("fuzz{}", NEXT.fetch_add(1, Ordering::Relaxed))
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

/// The thread's simulated disk holds `bytes` from now on.
pub fn put(bytes: &[u8]) {
    published().0.renew(bytes, ROOM);
}

/// What the thread's disk holds.
pub fn bytes() -> Vec<u8> {
    published().0.bytes()
}

fn published() -> (SimDisk, String) {
    DISK.with(|disk| {
        let new = || {
            let (disk, name) = (SimDisk::new(SimOptions::new(MOST + ROOM)), disk_name());
            disk.publish(&name);
            (disk, name)
        };
        disk.get_or_init(new).clone()
    })
}

/// An open node, held for writing.
pub struct Opened {
    graph: Graph,
    hold: Attachment,
}

impl Opened {
    /// Opens the thread's disk; `driver` is of the node on top, `None` for the bare disk.
    async fn new(driver: Option<&str>, held: Perms) -> Result<Opened, Error> {
        let (_, name) = published();
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

/// Opens the thread's disk as a qcow2 image, lets `work` use it, and closes it.
pub fn with_qcow2(
    work: impl AsyncFnOnce(&Arc<Node>) -> Result<(), Error> + 'static,
) -> Result<(), Error> {
    let held = Perm::CONSISTENT_READ | Perm::WRITE;
    with(Some("qcow2"), Perms { held, shared: Perm::all() }, work)
}

/// Opens the bare disk for a check that may repair what it holds.
pub fn with_disk<T: 'static>(
    work: impl AsyncFnOnce(&Arc<Node>) -> Result<T, Error> + 'static,
) -> Result<T, Error> {
    let held = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    with(None, Perms { held, shared: Perm::empty() }, work)
}

fn with<T: 'static>(
    driver: Option<&'static str>,
    perms: Perms,
    work: impl AsyncFnOnce(&Arc<Node>) -> Result<T, Error> + 'static,
) -> Result<T, Error> {
    let calm =
        Disorder { seed: 1, max_delay: Duration::from_micros(50), short: 0.0, interrupted: 0.0 };
    worker(0).drive(calm, move |_| async move {
        let opened = Opened::new(driver, perms).await?;
        let result = work(opened.hold.node()).await;
        opened.close().await;
        result
    })
}
