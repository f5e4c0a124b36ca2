//! A guest's requests, from its ring through an export to a leaf and back.

use super::*;

/// How a guest lays its requests out.
#[derive(Clone, Copy, Debug)]
struct Chains {
    indirect: bool,
    /// Pieces of the data, each of a block.
    pieces: u16,
}

/// Descriptors of a chain in the ring's own table, at most.
const CHAIN: u16 = 8;

/// A guest's ring with [`DEPTH`] requests, read and write in turn, that are made available again and
/// again: each in the same chain, so that the export finds every head warm.
struct Guest {
    disk: Disk,
    memory: Arc<Memory>,
    layout: RingLayout,
    statuses: Vec<u64>,
    _buffers: Vec<vublk_testkit::memory::Buffer>,
}

impl Guest {
    fn new(path: &std::path::Path, chains: Chains) -> Guest {
        // What is in flight is tracked, too.
        let protocol = protocol::DEFAULT | protocol::INFLIGHT_SHMFD;
        let options = Options { queue_size: DEPTH as u16 * CHAIN, protocol, ..Options::default() };
        let mut disk = Disk::open(path, &options).unwrap();
        assert!(disk.inflight().is_some());
        let memory = disk.memory().clone();
        let layout = disk.queue(0).ring().layout();
        let (mut statuses, mut buffers) = (Vec::new(), Vec::new());
        for request in 0..DEPTH as u16 {
            let writes = request % 2 == 1;
            // The header, then the data, then the status; in indirect form the table comes last.
            let frame = memory.alloc(512, 512).unwrap();
            let len = BLOCK as u64 * u64::from(chains.pieces);
            // A block apart, so that the pieces are no single segment in disguise.
            let data = memory.alloc(2 * len, BLOCK as u64).unwrap();
            let sector = u64::from(request) * 8;
            let header = [u64::from(writes), sector].map(u64::to_le_bytes).concat();
            memory.write(frame.addr(), &header);
            let kind = if writes { 0 } else { desc_flag::WRITE };
            let mut chain = vec![(frame.addr(), 16, 0)];
            let piece = |i| (data.addr() + 2 * BLOCK as u64 * u64::from(i), BLOCK as u32, kind);
            chain.extend((0..chains.pieces).map(piece));
            chain.push((frame.addr() + 16, 1, desc_flag::WRITE));
            let head = request * CHAIN;
            let (table, first) = match chains.indirect {
                true => (frame.addr() + 32, 0),
                false => (layout.desc, head),
            };
            let last = chain.len() as u16 - 1;
            for (i, &(addr, len, flags)) in (0..).zip(&chain) {
                let flags = if i < last { flags | desc_flag::NEXT } else { flags };
                let desc = Desc { addr, len, flags, next: first + i + 1 };
                layout.write_desc(&memory, table, first + i, desc);
            }
            if chains.indirect {
                let len = chain.len() as u32 * 16;
                let desc = Desc { addr: table, len, flags: desc_flag::INDIRECT, next: 0 };
                layout.write_desc(&memory, layout.desc, head, desc);
            }
            statuses.push(frame.addr() + 16);
            buffers.extend([frame, data]);
        }
        Guest { disk, memory, layout, statuses, _buffers: buffers }
    }

    /// Makes all requests available this many times, and waits for them.
    fn run(&mut self, rounds: u64) {
        for _ in 0..rounds {
            let ring = self.disk.queue(0).ring();
            (0..DEPTH as u16).for_each(|request| ring.add_head(request * CHAIN));
            let end = ring.next_avail();
            self.statuses.iter().for_each(|&at| self.memory.write(at, &[status::UNTOUCHED]));
            self.layout.set_used_event(&self.memory, end.wrapping_sub(1));
            ring.publish().unwrap();
            while self.layout.used_idx(&self.memory) != end {
                assert!(ring.wait_call(Duration::from_secs(60)).unwrap(), "no call");
            }
            for &at in &self.statuses {
                let mut status = [0];
                self.memory.read(at, &mut status);
                assert_eq!(status, [status::OK]);
            }
        }
    }
}

/// Serves what `options` open to a guest, and asserts that ten times the requests cost the worker
/// not one allocation and not one lock more.
fn a_guest_costs_nothing(options: &str, chains: Chains) {
    for watched in [false, true] {
        a_watched_guest_costs_nothing(options, chains, watched);
    }
}

fn a_watched_guest_costs_nothing(options: &str, chains: Chains, watched: bool) {
    let worker = Arc::new(Worker::start("counted", WorkerOptions::default()).unwrap());
    let graph = Graph::new(&REGISTRY);
    let map = keyval::parse(&format!("{options},node-name=top"), None).unwrap().options;
    let node = graph.open_on(&worker, map).unwrap();
    let perms = Perms { held: Perm::CONSISTENT_READ | Perm::WRITE, shared: Perm::all() };
    let _attachment: Attachment = graph.attach(&node, "an export", perms, None).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let disk = DiskOptions { writable: true, write_through: false, failures: Default::default() };
    let metrics = watched.then(|| {
        Arc::new(ExportMetrics::new("disk", (Serves::of(&node), node.len()), true, 1, true))
    });
    let counted = metrics.clone();
    let workers = vec![worker.clone()];
    let parts = Parts { name: "disk".into(), node, disk, workers, first_worker: 0, metrics };
    let address = Address::Path { path: path.clone(), mode: None, owner: None };
    let device = DeviceOptions { num_queues: 1, serial: String::new() };
    let options_of = ServerOptions { address, logical_block_size: 512, device };
    let mut export = Server::new(parts, options_of).unwrap();
    export.start(Box::new(|| ())).unwrap();
    let mut guest = Guest::new(&path, chains);
    guest.run(100);
    // What the question itself costs is in both.
    let mut cost = |rounds| {
        let before = worker.call(|_| Load::counters());
        guest.run(rounds);
        let after = worker.call(|_| Load::counters());
        (after.0 - before.0, after.1 - before.1)
    };
    assert_eq!(cost(50), cost(500), "allocations and locks of {options}, {chains:?}, {watched}");
    if let Some(metrics) = counted {
        // The end of the last ones is booked in the turn after theirs, which ends before this does.
        worker.call(|_| ());
        let (_, queue) = metrics.queues().next().unwrap();
        for operation in &queue.operations[..2] {
            let all = operation.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed));
            assert_eq!(all.sum::<u64>(), 650 * DEPTH as u64 / 2);
        }
    }
}

const CHAINS: [Chains; 4] = [
    Chains { indirect: false, pieces: 1 },
    Chains { indirect: false, pieces: 4 },
    Chains { indirect: true, pieces: 1 },
    Chains { indirect: true, pieces: 16 },
];

#[test]
fn requests_of_a_guest_to_null_allocate_nothing_and_lock_nothing() {
    for chains in CHAINS {
        a_guest_costs_nothing("driver=raw,file.driver=null-co", chains);
        a_guest_costs_nothing("driver=raw,file.driver=null-co,file.read-zeroes=on", chains);
    }
}

#[test]
fn requests_of_a_guest_to_a_file_allocate_nothing_and_lock_nothing() {
    for chains in CHAINS {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let path = file.path().display();
        let options = format!("driver=raw,file.driver=file,file.filename={path}");
        a_guest_costs_nothing(&options, chains);
    }
}
