//! The disks behind the fuzzed queues and sessions: simulated ones, under raw or bare, and null.
//!
//! A simulated disk panics at a request that the block contract forbids.

use super::image;
use std::cell::RefCell;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use vublk::block::{Attachment, Graph, Node, Perm, Perms, Registry};
use vublk::export::core::failure::FailureOptions;
use vublk::export::core::{Disk, DiskOptions};
use vublk::export::vhost_user_blk::DeviceOptions;
use vublk::export::vhost_user_blk::device::Device;
use vublk::format::raw;
use vublk::io::Errno;
use vublk::options::keyval;
use vublk::protocol::null;
use vublk::protocol::sim::{self, Effect, Fault, Kinds, SimDisk, SimOptions};

/// A short list lets the linker drop the other drivers and their counters, which libFuzzer reads after each input.
static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[&[&raw::ENTRY, &null::CO, &sim::ENTRY]]));

/// Bytes of every disk here: few, because each input has a new disk.
pub const LEN: u64 = 64 << 10;
/// Those of a simulated one.
const SIM_LEN: u64 = LEN + 8192;
static ZEROES: [u8; SIM_LEN as usize] = [0; SIM_LEN as usize];

/// What a disk is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub graph: Under,
    /// Whether a simulated disk fails and delays some requests.
    pub faulty: bool,
    /// The reaction to requests that fail.
    pub failures: FailureOptions,
    pub writable: bool,
    pub write_through: bool,
    pub logical_block_size: u32,
    pub num_queues: u16,
}

/// What is below the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Under {
    /// A simulated disk with a fast path.
    Fast,
    /// One without.
    Slow,
    /// raw with an offset, over a simulated disk that wants aligned requests and memory.
    Aligned,
    Null,
}

/// An open graph.
struct Opened {
    under: Under,
    writable: bool,
    node: Arc<Node>,
    /// The disk below it, if that is a simulated one.
    sim: Option<SimDisk>,
    _attachment: Attachment,
    _graph: Graph,
}

thread_local! {
    /// The graphs that this thread has opened. They stay open, because opening one takes longer than most runs.
    static OPENED: RefCell<Vec<&'static Opened>> = const { RefCell::new(Vec::new()) };
}

/// What to open, and the simulated disk in it.
fn describe(under: Under) -> (String, Option<SimDisk>) {
    let len = LEN;
    if under == Under::Null {
        let null = format!("driver=raw,file.driver=null-co,file.size={len},file.read-zeroes=on");
        return (null, None);
    }
    let mut options = SimOptions::new(SIM_LEN);
    options.fast = under != Under::Slow;
    if under == Under::Aligned {
        options.traits.request_align = 4096;
        options.traits.buffer_align = 512;
        options.traits.max_segments = 16;
    }
    let (sim, name) = (SimDisk::new(options), image::disk_name());
    sim.publish(&name);
    let described = match under {
        Under::Aligned => {
            format!("driver=raw,offset=4096,size={len},file.driver=sim,file.disk={name}")
        }
        _ => format!("driver=sim,disk={name}"),
    };
    (described, Some(sim))
}

async fn open_graph(under: Under, writable: bool) -> Opened {
    let graph = Graph::new(&REGISTRY);
    let (options, sim) = describe(under);
    let options = format!("{options},node-name=top");
    let map = keyval::parse(&options, None).expect("well-formed options").options;
    let node = graph.open(map).await.expect("a disk that can be opened");
    let held = if writable { Perm::CONSISTENT_READ | Perm::WRITE } else { Perm::CONSISTENT_READ };
    let perms = Perms { held, shared: Perm::all() };
    let attachment = graph.attach(&node, "a fuzz target", perms, None).expect("nobody else is");
    Opened { under, writable, node, sim, _attachment: attachment, _graph: graph }
}

/// A disk as it is when it is new. On a worker of a thread that has nothing else in flight.
pub async fn node(graph: Under, writable: bool, faulty: bool) -> Arc<Node> {
    let is_match = |opened: &&&Opened| opened.under == graph && opened.writable == writable;
    let found = OPENED.with_borrow(|all| all.iter().find(is_match).copied());
    let opened = match found {
        Some(opened) => opened,
        None => {
            let opened: &'static Opened = Box::leak(Box::new(open_graph(graph, writable).await));
            OPENED.with_borrow_mut(|all| all.push(opened));
            opened
        }
    };
    if let Some(sim) = &opened.sim {
        sim.renew(&ZEROES, 0);
        if faulty {
            let delay = Effect::Delay(Duration::from_millis(1));
            sim.inject(Fault::new(Kinds::all(), Effect::Fail(Errno::EIO)).with_probability(0.1));
            sim.inject(Fault::new(Kinds::all(), delay).with_probability(0.2));
        }
    }
    opened.node.clone()
}

/// The same as the disk of a front end.
pub async fn open(wanted: Wanted) -> Arc<Device> {
    let node = node(wanted.graph, wanted.writable, wanted.faulty).await;
    let options = DiskOptions {
        writable: wanted.writable,
        write_through: wanted.write_through,
        failures: wanted.failures,
    };
    let disk = Disk::new("fuzz", node, options, wanted.logical_block_size, None);
    let device = DeviceOptions { num_queues: wanted.num_queues, serial: "fuzz".to_owned() };
    Arc::new(Device::new(disk, device))
}
