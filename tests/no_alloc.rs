//! The warm fast road allocates nothing and takes no lock: counted, in a process of its own, on
//! requests that go through a graph to a leaf and back.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Arc, LazyLock, mpsc};
use std::time::Duration;
use vublk::block::{Access, Attachment, Graph, Node, Perm, Perms, Registry, Target, Transfer};
use vublk::io::epoch::{Announcer, Generation};
use vublk::io::sync::locks_taken;
use vublk::io::{
    AlignedBuf, Io, IoResult, IoVec, Polled, Source, SourceId, Started, Token, Worker,
    WorkerOptions,
};
use vublk::options::keyval;

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
    generation: Generation,
}

impl Load {
    fn new(node: Arc<Node>, done: mpsc::Sender<Found>) -> Load {
        let announcer = Announcer::default();
        node.add_member(announcer.member());
        let slot = |_| {
            let mut buf = AlignedBuf::new(BLOCK, BLOCK).unwrap();
            let list = [IoVec::from_mut(&mut buf).as_raw()[0]];
            Slot { _buf: buf, list, generation: Generation::default() }
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
        self.announcer.end(self.slots[tag as usize].generation);
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
                slot.generation = turn.begin();
                let mapping = self.node.map(turn.in_flight(), at, BLOCK as u64, access);
                assert_eq!(mapping.len, BLOCK as u64);
                let started = match mapping.target {
                    Target::Data { leaf, offset } => {
                        let len = BLOCK as u32;
                        let transfer = Transfer { access, offset, len, segments: &slot.list };
                        // SAFETY: the slot stays in place until the load ends, with nothing in
                        // flight.
                        unsafe { leaf.start(io, transfer, Token { source: me, tag }) }
                    }
                    Target::Zero => Started::Done(Ok(())),
                    Target::Slow => panic!("the road is slow"),
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
    let poll_max = Duration::ZERO;
    let worker = Worker::start("counted", WorkerOptions { poll_max, cpu: None }).unwrap();
    let graph = Graph::new(&REGISTRY);
    let map = keyval::parse(&format!("{options},node-name=top"), None).unwrap().options;
    let node = graph.open_on(&worker, map).unwrap();
    let perms = Perms { held: Perm::CONSISTENT_READ | Perm::WRITE, shared: Perm::all() };
    let _attachment: Attachment = graph.attach(&node, "a load", perms, None).unwrap();
    let (sender, receiver) = mpsc::channel();
    let load = node.clone();
    worker.send(move |local| {
        local.attach(Box::new(Load::new(load, sender)), None);
    });
    let found = receiver.recv_timeout(Duration::from_secs(60)).expect("the load ends");
    assert_eq!((found.allocations, found.locks), (0, 0), "allocations and locks of {options}");
    let wanted = if pending { WARM + COUNTED } else { 0 };
    assert!(found.pending >= wanted, "{} of the requests went through the ring", found.pending);
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
fn the_counters_count() {
    let (allocations, locks) = Load::counters();
    drop(std::hint::black_box(Box::new(1)));
    drop(vublk::io::sync::Mutex::new(1).lock());
    assert_eq!(Load::counters(), (allocations + 1, locks + 1));
}
