//! The disks behind the fuzzed queues and sessions: simulated ones, which panic at a request that
//! the block contract forbids, under raw or bare, and null.

use super::image;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use vublk::block::{Attachment, Graph, Perm, Perms, Registry};
use vublk::export::core::failure::FailureOptions;
use vublk::export::core::{Disk, DiskOptions};
use vublk::export::vhost_user_blk::DeviceOptions;
use vublk::export::vhost_user_blk::device::Device;
use vublk::io::Errno;
use vublk::options::keyval;
use vublk::protocol::sim::{self, Effect, Fault, Kinds, SimDisk, SimOptions};

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[vublk::format::LIST, vublk::protocol::LIST, &[&sim::ENTRY]]));

/// Bytes of every disk here: few, because each input has a new disk.
pub const LEN: u64 = 64 << 10;

/// What a disk is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub graph: Under,
    /// Whether a simulated disk fails and delays some requests.
    pub faulty: bool,
    /// What is done about requests that fail.
    pub failures: FailureOptions,
    pub writable: bool,
    pub write_through: bool,
    pub logical_block_size: u32,
    pub num_queues: u16,
}

/// What lies below the export.
#[derive(Clone, Copy, Debug)]
pub enum Under {
    /// A simulated disk with a fast road.
    Fast,
    /// One without.
    Slow,
    /// raw with an offset, over a simulated disk that wants aligned requests and memory.
    Aligned,
    Null,
    /// A file with locks, so that requests in flight can be tracked.
    File,
}

/// An open disk.
pub struct Opened {
    pub device: Arc<Device>,
    _attachment: Attachment,
    _graph: Graph,
}

fn describe(wanted: Wanted) -> String {
    let len = LEN;
    if matches!(wanted.graph, Under::Null) {
        return format!("driver=raw,file.driver=null-co,file.size={len},file.read-zeroes=on");
    }
    if matches!(wanted.graph, Under::File) {
        // One for the process; the file goes with the last who has it open.
        let path = std::env::temp_dir().join(format!("vublk-fuzz-{}", std::process::id()));
        std::fs::File::create(&path).and_then(|file| file.set_len(LEN)).expect("a temporary file");
        return format!("driver=file,locking=on,filename={}", path.display());
    }
    let mut options = SimOptions::new(LEN + 8192);
    options.max_len = options.len;
    options.fast = !matches!(wanted.graph, Under::Slow);
    if matches!(wanted.graph, Under::Aligned) {
        options.traits.request_align = 4096;
        options.traits.buffer_align = 512;
        options.traits.max_segments = 16;
    }
    let sim = SimDisk::new(options);
    if wanted.faulty {
        let delay = Effect::Delay(Duration::from_millis(1));
        sim.inject(Fault::new(Kinds::all(), Effect::Fail(Errno::EIO)).with_probability(0.1));
        sim.inject(Fault::new(Kinds::all(), delay).with_probability(0.2));
    }
    let name = image::disk_name();
    sim.publish(&name);
    match wanted.graph {
        Under::Aligned => {
            format!("driver=raw,offset=4096,size={len},file.driver=sim,file.disk={name}")
        }
        _ => format!("driver=sim,disk={name}"),
    }
}

/// Opens a disk. On a worker.
pub async fn open(wanted: Wanted) -> Opened {
    let graph = Graph::new(&REGISTRY);
    let options = format!("{},node-name=top", describe(wanted));
    let map = keyval::parse(&options, None).expect("well-formed options").options;
    let file = map.get("filename").and_then(|name| name.as_str()).map(str::to_owned);
    let node = graph.open(map).await.expect("a disk that can be opened");
    let held =
        if wanted.writable { Perm::CONSISTENT_READ | Perm::WRITE } else { Perm::CONSISTENT_READ };
    let perms =
        Perms { held, shared: if file.is_some() { Perm::CONSISTENT_READ } else { Perm::all() } };
    let attachment = graph.attach(&node, "a fuzz target", perms, None).expect("nobody else is");
    if let Some(path) = file {
        let _ = std::fs::remove_file(path);
    }
    let options = DiskOptions {
        writable: wanted.writable,
        write_through: wanted.write_through,
        failures: wanted.failures,
    };
    let disk = Disk::new("fuzz", node, options, wanted.logical_block_size, None);
    let device = DeviceOptions { num_queues: wanted.num_queues, serial: "fuzz".to_owned() };
    let device = Arc::new(Device::new(disk, device));
    Opened { device, _attachment: attachment, _graph: graph }
}
