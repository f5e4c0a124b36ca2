//! Fuzzing the NVMe driver with a hostile controller.
//!
//! It completes commands that it was not given, completes them twice, never, or with any status, and sends events
//! without end.
//!
//! The laws: each request ends once, even if that takes the controller's death; nothing panics or
//! hangs; memory that a request names is written to by nobody once the request has ended.

use std::cell::RefCell;
use std::time::Duration;
use vublk_vfio::dma::Pages;
use vublk_vfio::fake::{Config, Fake, Media};
use vublk_vfio::{Controller, Done, Namespace, Options, QueuePair, Registration, Segments, Watch};

const REQUESTS: usize = 48;
const BLOCK: usize = 512;
/// What a request's memory holds that has ended.
const ENDED: u8 = 0xee;
/// Looks at the pair between two of its ticks, by which it measures time.
const TICK_LOOKS: u32 = 4;
/// Looks after which it hangs: a hundred times what resets until the controller's death take.
const PATIENCE: u32 = 20_000;
/// Runs that a controller is used for: it keeps a list of what has happened to it.
const RUNS: u32 = 1000;

thread_local! {
    /// A controller of an earlier run that is as good as new. Opening one takes longer than most runs.
    static KEPT: RefCell<Option<Rig>> = const { RefCell::new(None) };
}

/// A controller, and memory for requests to it.
struct Rig {
    fake: Fake,
    controller: Controller,
    namespace: Namespace,
    _registration: Registration,
    memory: Pages,
    runs: u32,
}

impl Rig {
    fn new() -> Rig {
        let namespaces = vec![Media::new((REQUESTS * BLOCK) as u64, 9)];
        let fake = Fake::new(Config { namespaces, max_entries: 8, ..Config::default() });
        let options = Options {
            io_timeout: Duration::from_millis(20),
            admin_timeout: Duration::from_millis(200),
            max_pairs: 1,
            check_interval: Duration::from_millis(20),
            absence: Duration::from_millis(100),
        };
        let controller = Controller::open_unwatched(fake.function(), &options);
        let controller = controller.expect("an honest controller");
        let namespace = controller.namespace(1).expect("its namespace");
        let memory = Pages::new(REQUESTS * BLOCK, 4096).expect("memory");
        // Half of it is reached by the device, half goes through bounce buffers.
        let reached = memory.range().part(0, REQUESTS * BLOCK / 2).expect("half of it");
        let registration = controller.register(reached).expect("addresses");
        controller.space().settle();
        Rig { fake, controller, namespace, memory, _registration: registration, runs: 0 }
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut rig = KEPT.take().unwrap_or_else(Rig::new);
    let mut pair = rig.controller.queue_pair().expect("its queues");
    let mut watch = Watch::default();
    rig.memory.range().zero();
    rig.fake.go_rogue(data);
    requests(&rig, &mut pair, &mut watch);
    // A reset that was begun comes to its end.
    for _ in 0..4 {
        pair.reap(|Done { token, .. }| panic!("request {token} ends again"));
        rig.controller.poll(&mut watch);
    }
    drop(pair);
    let mut bytes = vec![0; REQUESTS * BLOCK];
    rig.memory.range().read(0, &mut bytes);
    assert!(bytes.iter().all(|&byte| byte == ENDED), "written to after its request had ended");
    rig.runs += 1;
    if !rig.controller.is_dead() && rig.runs < RUNS {
        KEPT.set(Some(rig));
    }
}

/// Gives requests to the controller, and waits until all have ended.
fn requests(rig: &Rig, pair: &mut QueuePair, watch: &mut Watch) {
    let base = rig.memory.range().address();
    let lists: Vec<_> = (0..REQUESTS)
        .map(|n| [libc::iovec { iov_base: (base + n * BLOCK) as *mut _, iov_len: BLOCK }])
        .collect();
    for (n, list) in lists.iter().enumerate() {
        // SAFETY: the lists and the memory outlive the loop below, which waits for all requests.
        let segments = unsafe { Segments::new(list) };
        pair.submit(rig.namespace.read((n * BLOCK) as u64, BLOCK as u32, segments, n as u64));
        pair.ring();
    }
    let (mut ends, mut looks) = ([0u32; REQUESTS], 0);
    while pair.in_flight() > 0 {
        let mut note = |Done { token, .. }: Done| {
            ends[token as usize] += 1;
            rig.memory.range().write(token as usize * BLOCK, &[ENDED; BLOCK]);
        };
        pair.reap(&mut note);
        looks += 1;
        if looks % TICK_LOOKS == 0 {
            pair.tick(&mut note);
        }
        pair.ring();
        rig.controller.poll(watch);
        assert!(looks < PATIENCE, "it hangs: {ends:?}");
    }
    assert_eq!(ends, [1; REQUESTS]);
}
