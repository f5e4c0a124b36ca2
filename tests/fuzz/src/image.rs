//! Images in memory: made once, changed by inputs, and opened on a simulated disk.
//!
//! The calling thread opens them, so that a run needs no file, no other thread and no sleep.

use super::worker::worker;
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use vublk::block::{Attachment, Creation, Error, Graph, Node, Perm, Perms, Registry};
use vublk::format::{qcow2, raw, vhdx, vpc};
use vublk::io::sim::Disorder;
use vublk::options::{Map, keyval, qemuopts};
use vublk::protocol::file;
use vublk::protocol::sim::{self, SimDisk, SimOptions};

/// Bytes by which an image can grow.
const ROOM: u64 = 256 << 10;

/// The driver, with caches of the least size: making larger ones costs more than all that an input does.
const QCOW2: &str = "qcow2,l2-cache-size=32768,refcount-cache-size=65536";

/// The drivers that open an image: none of files or servers, so that names in damaged images lead nowhere. A short list
/// lets the linker drop the other drivers and their counters, which libFuzzer reads after each input.
static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    Registry::new(&[&[&qcow2::ENTRY, &raw::ENTRY, &vhdx::ENTRY, &vpc::ENTRY, &sim::ENTRY]])
});

/// The drivers that make one.
static MAKERS: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[&[&qcow2::ENTRY, &vhdx::ENTRY, &vpc::ENTRY, &file::FILE]]));

/// The disk of one image.
#[derive(Clone)]
struct Kept {
    image: &'static [u8],
    disk: SimDisk,
    name: String,
}

thread_local! {
    /// The thread's disks. Their memory is used again.
    static DISKS: RefCell<Vec<Kept>> = const { RefCell::new(Vec::new()) };
    /// The index of the disk that is opened.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// A name for a simulated disk.
pub fn disk_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("fuzz{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The bytes of a new qcow2 image with these creation options.
pub fn create(options: &str) -> Vec<u8> {
    create_as("qcow2", options)
}

/// The bytes of a new image of a format. It is made in a file, which is gone when this returns.
pub fn create_as(format: &str, options: &str) -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("vublk-fuzz-{}-{n}.{format}", std::process::id()));
    let name = path.to_str().expect("a name").to_owned();
    let given = qemuopts::parse(options, None).expect("options").options;
    let file = Map::from_iter([("driver", "file"), ("filename", &name)]);
    let creation = Creation::new(&MAKERS, format, (&name, file), given, None);
    let creation = creation.expect("an image to make");
    worker(0).block_on(move || async move { creation.run().await }).expect("an image");
    let bytes = std::fs::read(&path).expect("an image");
    let _ = std::fs::remove_file(&path);
    bytes
}

/// Makes this image's disk the current one, undoes all changes to it, and returns it.
pub fn put(image: &'static [u8]) -> SimDisk {
    let disk = DISKS.with_borrow_mut(|disks| {
        let found = disks.iter().position(|kept| std::ptr::eq(kept.image, image));
        CURRENT.set(found.unwrap_or(disks.len()));
        if found.is_none() {
            let at_once = true;
            let options = SimOptions { at_once, ..SimOptions::new(image.len() as u64 + ROOM) };
            let (disk, name) = (SimDisk::new(options), disk_name());
            disk.publish(&name);
            disks.push(Kept { image, disk, name });
        }
        disks[CURRENT.get()].disk.clone()
    });
    disk.renew(image, ROOM);
    disk
}

fn current() -> Kept {
    DISKS.with_borrow(|disks| disks[CURRENT.get()].clone())
}

/// The contents of the current disk.
pub fn bytes() -> Vec<u8> {
    current().disk.bytes()
}

/// An open node, held for writing.
pub struct Opened {
    graph: Graph,
    hold: Attachment,
}

impl Opened {
    /// Opens the current disk; `driver` is of the node on top, `None` for the bare disk.
    async fn new(driver: Option<&str>, held: Perms) -> Result<Opened, Error> {
        let Kept { name, .. } = current();
        let options = match driver {
            Some(driver) => format!("driver={driver},file.driver=sim,file.disk={name}"),
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

/// Opens the current disk as a qcow2 image, lets `work` use it, and closes it.
pub fn with_qcow2(
    work: impl AsyncFnOnce(&Arc<Node>) -> Result<(), Error> + 'static,
) -> Result<(), Error> {
    with_format(QCOW2, work)
}

/// Opens the current disk as an image of this driver, with the driver's options, lets `work` use it, and closes it.
pub fn with_format(
    driver: &'static str,
    work: impl AsyncFnOnce(&Arc<Node>) -> Result<(), Error> + 'static,
) -> Result<(), Error> {
    let held = Perm::CONSISTENT_READ | Perm::WRITE;
    with(Some(driver), Perms { held, shared: Perm::all() }, work)
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
