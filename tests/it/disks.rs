//! Disks for the tests: graphs opened from option strings, over simulated rings or real workers.
//!
//! `sim` opens a published simulated disk, and `suspend` is a filter whose every operation is
//! suspended once before and once after it reaches the node below. `layer` is a format with a backing
//! file ([`crate::layer`]), `flat` one on the layer of tables ([`crate::flat`]).

use std::cell::Cell;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::Poll;
use vublk::block::registry::{DriverEntry, Kind};
use vublk::block::*;
use vublk::crypto::{Hidden, secrets};
use vublk::io::sim::{Disorder, SimRing};
use vublk::io::{IoResult, IoVec, Local, Worker, WorkerOptions, run_local};
use vublk::options::{Map, NodeRef, Value, keyval};
use vublk::protocol::nvme;
use vublk::protocol::sim::{self, SimDisk, SimOptions, Tries};
use vublk_vfio::PciAddress;
use vublk_vfio::fake::{Config, Fake};

pub static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    let tests: &[&DriverEntry] =
        &[&sim::ENTRY, &SUSPEND, &crate::layer::ENTRY, &crate::flat::ENTRY];
    Registry::new(&[vublk::format::LIST, vublk::filter::LIST, vublk::protocol::LIST, tests])
});

/// The seed of a random test: from `VUBLK_SEED`, or 1. It is printed, and shown when the
/// test fails.
pub fn seed() -> u64 {
    let given = std::env::var("VUBLK_SEED").ok().map(|text| text.parse().expect("a number"));
    let seed = given.unwrap_or(1u64);
    println!("VUBLK_SEED={seed}");
    seed
}

/// How many crashes are tried after each change: `most`, or `VUBLK_CRASHES` if that is more.
pub fn crashes(most: usize) -> Tries {
    let given = std::env::var("VUBLK_CRASHES").ok().map(|text| text.parse().expect("a number"));
    Tries::from(given.unwrap_or(0).max(most))
}

/// A name that no other disk of this process has.
pub fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("disk{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A new simulated disk, and the options that open it.
pub fn sim_disk(options: SimOptions) -> (SimDisk, String) {
    let (disk, name) = (SimDisk::new(options), unique());
    disk.publish(&name);
    (disk, format!("driver=sim,disk={name}"))
}

/// A new NVMe controller in memory, and the options that open its first namespace.
pub fn nvme_disk(config: Config) -> (Fake, String) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let (domain, bus) = (0x1_0000 + (number >> 8) as u32, number as u8);
    let address = PciAddress { domain, bus, device: 0, function: 0 };
    let fake = Fake::new(config);
    nvme::adopt(address, fake.function());
    (fake, format!("driver=nvme,device={address}"))
}

/// Runs a test on a simulated ring.
pub fn simulated<T, F>(disorder: Disorder, make: impl FnOnce(&mut Local) -> F) -> T
where
    T: 'static,
    F: Future<Output = T> + 'static,
{
    let ring = SimRing::new(disorder).expect("a simulated ring");
    run_local(Box::new(ring), make)
}

/// An open disk with all permissions.
pub struct Opened {
    _graph: Graph,
    pub node: Arc<Node>,
    _attachment: Attachment,
}

impl Opened {
    pub fn from_parts(graph: Graph, node: Arc<Node>, attachment: Attachment) -> Opened {
        Opened { _graph: graph, node, _attachment: attachment }
    }
}

/// Opens what `options` describe and takes `held` on it.
pub async fn open_holding(options: &str, held: Perm) -> Result<Opened, Error> {
    let graph = Graph::new(&REGISTRY);
    let options = format!("{options},node-name=top");
    let map = keyval::parse(&options, None).expect("well-formed options").options;
    let node = graph.open(map).await?;
    let attachment = graph.attach(&node, "a test", Perms { held, shared: Perm::all() }, None)?;
    Ok(Opened { _graph: graph, node, _attachment: attachment })
}

pub async fn open(options: &str) -> Opened {
    let opened = open_holding(options, Perm::CONSISTENT_READ | Perm::WRITE).await;
    opened.unwrap_or_else(|error| panic!("{options}: {error}"))
}

/// Lets everything else that is ready run first.
pub async fn suspend_once() {
    let suspended = Cell::new(false);
    std::future::poll_fn(|cx| {
        if suspended.replace(true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

static SUSPEND: DriverEntry = DriverEntry {
    children: &[Role::File],
    ..DriverEntry::new("suspend", Kind::Filter, |opening, mut options| {
        Box::pin(async move {
            let file: NodeRef = options.take_as("file")?.expect("a test gives a file");
            let child = opening.child(Role::File, file, Perms::NONE).await?;
            Ok(Box::new(Suspend([child])) as Box<dyn Driver>)
        })
    })
};

struct Suspend([Child; 1]);

impl Suspend {
    async fn around<T>(&self, what: impl AsyncFnOnce(&Node) -> T) -> T {
        suspend_once().await;
        let result = what(&self.0[0].node()).await;
        suspend_once().await;
        result
    }
}

impl PassThrough for Suspend {
    fn entry(&self) -> &'static DriverEntry {
        &SUSPEND
    }

    fn below(&self) -> &[Child; 1] {
        &self.0
    }

    async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        self.around(async |node: &Node| node.read(at, into).await).await
    }

    async fn write(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        self.around(async |node: &Node| node.write(at, from, flags).await).await
    }

    async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.around(async |node: &Node| node.zero(at, len, flags).await).await
    }

    async fn discard(&self, at: u64, len: u64) -> IoResult {
        self.around(async |node: &Node| node.discard(at, len).await).await
    }

    async fn flush(&self) -> IoResult {
        self.around(async |node: &Node| node.flush().await).await
    }

    async fn status(&self, at: u64, len: u64, precision: Precision) -> IoResult<Extent> {
        self.around(async |node: &Node| node.status(at, len, precision).await).await
    }
}

/// A file of zeroes that is where direct I/O works, beside the build.
pub fn file_on_disk(len: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    file.as_file().set_len(len).expect("room");
    file
}

/// The program whose check judges an image of a format, and is given `check`, `-f` and the format: QEMU has none for vpc.
pub fn judge(format: &str) -> &'static str {
    if format == "vpc" { env!("CARGO_BIN_EXE_vublk") } else { "qemu-img" }
}

/// A new image of a format, made as its entry says, and the options that open it. The disk has `len` zero bytes.
pub fn new_image(entry: &'static DriverEntry, len: u64) -> (tempfile::NamedTempFile, String) {
    let file = file_on_disk(0);
    let path = file.path().to_str().unwrap().to_owned();
    let options = REGISTRY.new_file(&path).unwrap();
    let mut given = Map::new();
    if entry.create.is_some_and(|create| create.options.iter().any(|o| o.name == "force_size")) {
        // Otherwise the disk is as large as a geometry can say.
        given.insert("force_size", Value::Bool(true));
    }
    let mut key = String::new();
    if entry.options.iter().any(|option| option.name == "key-secret") {
        secrets::add("new-image", Hidden::copied(b"a passphrase"));
        given.insert("key-secret", "new-image");
        given.insert("iter-time", "1");
        key = ",key-secret=new-image".into();
    }
    let creation =
        Creation::new(&REGISTRY, entry.name, (&path, options), given, Some(len)).unwrap();
    let worker = Worker::start("new image", WorkerOptions::default()).unwrap();
    let made = worker.block_on(move || async move { creation.run().await }).unwrap();
    // Under a cipher, what was not written is anything.
    assert_eq!(made.reads_zeroes, key.is_empty(), "{}", entry.name);
    let options = format!("driver={},file.driver=file,file.filename={path}{key}", entry.name);
    if !made.reads_zeroes {
        let options = options.clone();
        let zero = move || async move {
            let opened = open(&options).await;
            opened.node.zero(0, len, ZeroFlags::empty()).await.unwrap();
        };
        worker.block_on(zero);
    }
    (file, options)
}
