//! The warm fast path allocates nothing and takes no lock: both are counted here.
//!
//! The test is a process of its own. Its requests go through a graph to a leaf and back, and, from a guest's ring,
//! through an export and back.

#[path = "no_alloc/guest.rs"]
mod guest;
#[path = "no_alloc/messages.rs"]
mod messages;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock, mpsc};
use std::time::Duration;
use vublk::block::{
    Access, Attachment, Graph, NewBitmap, Node, Perm, Perms, Registry, Target, WriteFlags,
};
use vublk::export::core::metrics::Serves;
use vublk::export::core::{Address, DiskOptions, Export, ExportMetrics, Parts};
use vublk::export::vhost_user_blk::{DeviceOptions, Options as ServerOptions, Server};
use vublk::io::epoch::{Announcer, Generation};
use vublk::io::sync::locks_taken;
use vublk::io::{
    AlignedBuf, Deadline, Io, IoResult, IoVec, Op, Polled, Segments, Socket, Source, SourceId,
    Started, Token, Worker, WorkerOptions,
};
use vublk::options::keyval;
use vublk_testkit::ring::{Desc, RingLayout};
use vublk_testkit::spec::{desc_flag, protocol, status};
use vublk_testkit::{Disk, Memory, Options};
use vublk_vfio::PciAddress;
use vublk_vfio::fake::{Config, Fake, Media};

thread_local! {
    static ALLOCATED: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, which counts for each thread.
struct Counting;

fn count() {
    // A thread that ends has no counter any more, and nobody asks it.
    let _ = ALLOCATED.try_with(|allocated| allocated.set(allocated.get() + 1));
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[vublk::format::LIST, vublk::protocol::LIST]));

const DEPTH: usize = 32;
const WARM: u64 = 2_000;
const COUNTED: u64 = 20_000;
const BLOCK: usize = 4096;

/// What a run found.
struct Found {
    allocations: u64,
    locks: u64,
    pending: u64,
}

/// Keeps [`DEPTH`] requests in flight, reads and writes in turn, as an export's queue does.
struct Load {
    node: Arc<Node>,
    announcer: Announcer,
    slots: Vec<Slot>,
    free: Vec<u32>,
    begun: u64,
    ended: u64,
    /// How many did not end at once.
    pending: u64,
    blocks: u64,
    at_warm: Option<(u64, u64)>,
    done: mpsc::Sender<Found>,
}

struct Slot {
    /// Kept for the memory that the list names.
    _buf: AlignedBuf,
    list: [libc::iovec; 1],
    generation: Option<Generation>,
}

impl Load {
    fn new(node: Arc<Node>, done: mpsc::Sender<Found>) -> Load {
        let announcer = node.announcer();
        let slot = |_| {
            let mut buf = AlignedBuf::new(BLOCK, BLOCK).unwrap();
            let list = [IoVec::from_mut(&mut buf).as_raw()[0]];
            Slot { _buf: buf, list, generation: None }
        };
        Load {
            blocks: node.len() / BLOCK as u64,
            node,
            announcer,
            slots: (0..DEPTH).map(slot).collect(),
            free: (0..DEPTH as u32).collect(),
            begun: 0,
            ended: 0,
            pending: 0,
            at_warm: None,
            done,
        }
    }

    fn counters() -> (u64, u64) {
        (ALLOCATED.with(Cell::get), locks_taken())
    }

    fn end(&mut self, tag: u32, result: IoResult) {
        result.unwrap();
        let generation = self.slots[tag as usize].generation.take();
        self.announcer.end(generation.expect("it was begun"));
        self.free.push(tag);
        self.ended += 1;
        if self.ended == WARM {
            self.at_warm = Some(Self::counters());
        }
    }
}

impl Source for Load {
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled {
        if self.ended >= WARM + COUNTED {
            if self.free.len() < DEPTH {
                return Polled::Idle;
            }
            let (allocations, locks) = Self::counters();
            let (warm_allocations, warm_locks) = self.at_warm.unwrap();
            let _ = self.done.send(Found {
                allocations: allocations - warm_allocations,
                locks: locks - warm_locks,
                pending: self.pending,
            });
            return Polled::Ended;
        }
        let mut polled = Polled::Idle;
        let mut at_once = [None; DEPTH];
        {
            let turn = self.announcer.enter();
            while let Some(tag) = self.free.pop() {
                polled = Polled::Busy;
                let access =
                    if self.begun.is_multiple_of(2) { Access::Read } else { Access::Write };
                let at = self.begun * 7 % self.blocks * BLOCK as u64;
                self.begun += 1;
                let slot = &mut self.slots[tag as usize];
                slot.generation = Some(turn.begin());
                let mapping = self.node.map(turn.in_flight(), at, BLOCK as u64, access);
                assert_eq!(mapping.len, BLOCK as u64);
                let started = match mapping.target {
                    Target::Data { leaf, offset } => {
                        let op = access.op(offset, Segments::new(&slot.list, BLOCK as u64));
                        // SAFETY: the slot stays in place until the load ends, with nothing in
                        // flight.
                        unsafe { leaf.start(io, op, Token { source: me, tag }) }
                    }
                    Target::Zero => Started::Done(Ok(())),
                    Target::Slow => panic!("the path is slow"),
                };
                match started {
                    Started::Done(result) => at_once[tag as usize] = Some(result),
                    Started::Pending => self.pending += 1,
                }
            }
        }
        for (tag, result) in at_once.into_iter().enumerate() {
            if let Some(result) = result {
                self.end(tag as u32, result);
            }
        }
        polled
    }

    fn has_work(&self) -> bool {
        !self.free.is_empty()
    }

    fn complete(&mut self, _: &Rc<Io>, tag: u32, result: IoResult) {
        self.end(tag, result);
    }

    fn publish(&mut self) {
        self.announcer.settle();
    }

    fn arm(&mut self) -> bool {
        self.free.is_empty()
    }

    fn disarm(&mut self) {}
}

/// Runs a load over what `options` open, and asserts that it cost nothing but itself.
fn costs_nothing(options: &str, pending: bool) {
    costs_nothing_with(options, pending, &[]);
}

/// The same while bitmaps of these granularities record.
fn costs_nothing_with(options: &str, pending: bool, bitmaps: &'static [u64]) {
    let poll_max = Duration::ZERO;
    let worker =
        Worker::start("counted", WorkerOptions { poll_max, ..WorkerOptions::default() }).unwrap();
    let graph = Graph::new(&REGISTRY);
    let map = keyval::parse(&format!("{options},node-name=top"), None).unwrap().options;
    let node = graph.open_on(&worker, map).unwrap();
    let perms = Perms { held: Perm::CONSISTENT_READ | Perm::WRITE, shared: Perm::all() };
    let _attachment: Attachment = graph.attach(&node, "a load", perms, None).unwrap();
    if options.contains("driver=nvme") {
        // A worker gets its queue pair with its first request.
        let node = node.clone();
        let read = worker.block_on(move || async move {
            let mut bytes = [0; 512];
            node.read(0, &IoVec::from_mut(&mut bytes)).await
        });
        read.unwrap();
    }
    if !options.starts_with("driver=raw") {
        // Clusters are made by the first write.
        let node = node.clone();
        let written = worker.block_on(move || async move {
            let bytes = vec![1; node.len() as usize];
            node.write(0, &IoVec::from_ref(&bytes), WriteFlags::empty()).await
        });
        written.unwrap();
    }
    let recorded = node.clone();
    worker.block_on(move || async move {
        for &granularity in bitmaps {
            let (name, granularity) = (granularity.to_string(), Some(granularity));
            let new = NewBitmap { name, granularity, ..NewBitmap::default() };
            recorded.add_bitmap(new).await.unwrap();
        }
    });
    let (sender, receiver) = mpsc::channel();
    let load = node.clone();
    worker.send(move |local| {
        local.attach(Box::new(Load::new(load, sender)), None);
    });
    let found = receiver.recv_timeout(Duration::from_secs(60)).expect("the load ends");
    assert_eq!((found.allocations, found.locks), (0, 0), "allocations and locks of {options}");
    let wanted = if pending { WARM + COUNTED } else { 0 };
    assert!(found.pending >= wanted, "{} of the requests went through the ring", found.pending);
    for bitmap in node.bitmaps().all() {
        // Every other block is written, in an order that meets all of them or every second one.
        let dirty = bitmap.info().count;
        assert!(dirty >= node.len() / 2, "{} bytes are dirty: {options}", dirty);
    }
}

#[test]
fn recording_in_bitmaps_allocates_nothing_and_locks_nothing() {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let path = file.path().display();
    let options = format!("driver=raw,file.driver=file,file.filename={path}");
    costs_nothing_with(&options, true, &[512, 65536]);
}

#[test]
fn requests_to_null_through_raw_allocate_nothing_and_lock_nothing() {
    costs_nothing("driver=raw,file.driver=null-co", false);
    costs_nothing("driver=raw,file.driver=null-co,file.read-zeroes=on", false);
    costs_nothing("driver=raw,offset=1048576,size=1048576,file.driver=null-co", false);
}

#[test]
fn requests_to_a_file_through_raw_allocate_nothing_and_lock_nothing() {
    for direct in ["off", "on"] {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let path = file.path().display();
        let options = format!("driver=raw,file.driver=file,file.filename={path}");
        costs_nothing(&format!("{options},cache.direct={direct}"), true);
    }
}

#[test]
fn requests_to_an_nvme_controller_allocate_nothing_and_lock_nothing() {
    // The fake controller works in the worker's own thread, and must cost nothing either.
    let namespaces = vec![Media::null(1 << 20, 9)];
    let fake = Fake::new(Config { namespaces, ..Config::default() });
    let address: PciAddress = "1:00:00.0".parse().unwrap();
    vublk::protocol::nvme::adopt(address, fake.function());
    costs_nothing(&format!("driver=raw,file.driver=nvme,file.device={address}"), true);
    let counts = fake.counts();
    assert!(counts.submission_doorbells * 8 < counts.commands, "{counts:?}");
}

#[test]
fn requests_to_allocated_clusters_of_images_allocate_nothing_and_lock_nothing() {
    for (format, create) in [
        ("qcow2", "cluster_size=4k"),
        ("qcow2", "cluster_size=64k"),
        ("qcow2", "cluster_size=64k,extended_l2=on"),
        ("qcow", "encryption=off"),
        ("qed", "cluster_size=4k"),
        ("vdi", "static=off"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=twoGbMaxExtentFlat"),
        ("parallels", "cluster_size=64k"),
        ("vhdx", "block_size=1M"),
        ("vpc", "force_size=on"),
        ("vpc", "force_size=on,subformat=fixed"),
    ] {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = file.path().to_str().unwrap();
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", format, "-o", create, path, "1M"])
            .status();
        assert!(made.unwrap().success());
        let options = format!("driver={format},file.driver=file,file.filename={path}");
        costs_nothing(&options, true);
    }
}

#[test]
fn the_counters_count() {
    let (allocations, locks) = Load::counters();
    drop(std::hint::black_box(Box::new(1)));
    drop(vublk::io::sync::Mutex::new(1).lock());
    assert_eq!(Load::counters(), (allocations + 1, locks + 1));
}
