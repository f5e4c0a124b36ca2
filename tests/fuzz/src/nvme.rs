//! A hostile NVMe controller: completions of commands that it was not given, twice, never, with any
//! status, events without end.
//!
//! The laws: each request ends once, even if that takes the controller's death; nothing panics or
//! hangs; memory that a request names is written to by nobody once the request has ended.

use std::time::{Duration, Instant};
use vublk_vfio::dma::Pages;
use vublk_vfio::fake::{Config, Fake, Media};
use vublk_vfio::{Controller, Done, Options, Segments};

const REQUESTS: usize = 48;
const BLOCK: usize = 512;
/// What a request's memory holds that has ended.
const ENDED: u8 = 0xee;

/// Runs one input.
pub fn run(data: &[u8]) {
    let namespaces = vec![Media::new(1 << 20, 9)];
    let fake = Fake::new(Config { namespaces, max_entries: 8, ..Config::default() });
    let options = Options {
        io_timeout: Duration::from_millis(20),
        admin_timeout: Duration::from_millis(200),
        max_pairs: 1,
        look: Duration::from_millis(20),
        absence: Duration::from_millis(100),
    };
    let controller = Controller::open(fake.function(), &options).expect("an honest controller");
    let namespace = controller.namespace(1).expect("its namespace");
    let mut pair = controller.queue_pair().expect("its queues");
    let memory = Pages::new(REQUESTS * BLOCK, 4096).expect("memory");
    // Half of it is reached by the device, half goes through bounce buffers.
    let reached = memory.range().part(0, REQUESTS * BLOCK / 2).expect("half of it");
    let _registration = controller.register(reached).expect("addresses");
    controller.space().settle();
    let base = memory.range().address();
    let lists: Vec<_> = (0..REQUESTS)
        .map(|n| [libc::iovec { iov_base: (base + n * BLOCK) as *mut _, iov_len: BLOCK }])
        .collect();
    fake.go_rogue(data);
    for (n, list) in lists.iter().enumerate() {
        // SAFETY: the lists and the memory outlive the loop below, which waits for all requests.
        let segments = unsafe { Segments::new(list) };
        pair.submit(namespace.read((n * BLOCK) as u64, BLOCK as u32, segments, n as u64));
        pair.ring();
    }
    let mut ends = [0u32; REQUESTS];
    let (began, mut looks) = (Instant::now(), 0u32);
    while pair.in_flight() > 0 {
        let mut note = |Done { token, .. }: Done| {
            ends[token as usize] += 1;
            memory.range().write(token as usize * BLOCK, &[ENDED; BLOCK]);
        };
        pair.reap(&mut note);
        looks += 1;
        if looks.is_multiple_of(64) {
            pair.tick(&mut note);
        }
        pair.ring();
        assert!(began.elapsed() < Duration::from_secs(15), "it hangs: {ends:?}");
        if looks.is_multiple_of(8) {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    assert_eq!(ends, [1; REQUESTS]);
    drop((pair, controller));
    let mut bytes = vec![0; REQUESTS * BLOCK];
    memory.range().read(0, &mut bytes);
    assert!(bytes.iter().all(|&byte| byte == ENDED), "written to after its request had ended");
}
