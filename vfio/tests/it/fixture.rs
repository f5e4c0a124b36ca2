//! What the tests share: a controller over a fake, memory for requests, and a loop that drives a queue pair.

use std::time::{Duration, Instant};
use vublk_vfio::fake::{Config, Fake};
use vublk_vfio::spec::Status;
use vublk_vfio::{Controller, Done, HostRange, Namespace, Options, QueuePair, Request, Segments};

/// Short waits, so that what takes too long does so soon.
pub fn options() -> Options {
    Options {
        io_timeout: Duration::from_millis(400),
        admin_timeout: Duration::from_millis(400),
        max_pairs: 8,
        check_interval: Duration::from_millis(50),
        absence: Duration::from_millis(500),
    }
}

pub fn open(fake: &Fake) -> Controller {
    Controller::open(fake.function(), &options()).unwrap()
}

pub struct Disk {
    pub fake: Fake,
    pub controller: Controller,
    pub namespace: Namespace,
    pub pair: QueuePair,
}

impl Disk {
    pub fn new(config: Config) -> Disk {
        let fake = Fake::new(config);
        let controller = open(&fake);
        let namespace = controller.namespace(1).unwrap();
        let pair = controller.queue_pair().unwrap();
        Disk { fake, controller, namespace, pair }
    }

    /// Runs requests to their ends, in any order; their statuses by token.
    pub fn run(&mut self, requests: Vec<Request>) -> Vec<(u64, Status)> {
        let count = requests.len();
        for request in requests {
            self.pair.submit(request);
        }
        self.pair.ring();
        self.wait(count)
    }

    /// Waits for the ends of `count` requests.
    pub fn wait(&mut self, count: usize) -> Vec<(u64, Status)> {
        wait(&mut self.pair, count)
    }

    pub fn one(&mut self, request: Request) -> Status {
        self.run(vec![request])[0].1
    }

    pub fn read(&mut self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; len];
        let list = [iovec(&mut bytes)];
        let request = self.namespace.read(at, len as u32, segments(&list), 1);
        assert_eq!(self.one(request), Status::SUCCESS);
        bytes
    }

    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        let list = [iovec(&mut bytes)];
        let len = bytes.len() as u32;
        let request = self.namespace.write(at, len, segments(&list), false, 1);
        assert_eq!(self.one(request), Status::SUCCESS);
    }

    /// The driver broke no rule.
    pub fn check(&self) {
        assert_eq!(self.fake.complaints(), Vec::<String>::new());
    }
}

pub fn wait(pair: &mut QueuePair, count: usize) -> Vec<(u64, Status)> {
    let (mut done, began) = (Vec::new(), Instant::now());
    let mut ticked = Instant::now();
    while done.len() < count {
        let mut note = |Done { token, status }| done.push((token, status));
        pair.reap(&mut note);
        if ticked.elapsed() >= pair.tick_interval() {
            pair.tick(&mut note);
            ticked = Instant::now();
        }
        pair.ring();
        assert!(began.elapsed() < Duration::from_secs(60), "{} of {count} are done", done.len());
        std::thread::sleep(Duration::from_micros(20));
    }
    done
}

pub fn iovec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

/// The caller keeps the list and what it names in place until the request is done.
pub fn segments(list: &[libc::iovec]) -> Segments {
    // SAFETY: every test waits for its requests before the list goes.
    unsafe { Segments::new(list) }
}

/// Memory as a guest's: mapped while the value lives.
pub struct Guest {
    pages: vublk_vfio::dma::Pages,
}

impl Guest {
    pub fn new(len: usize) -> Guest {
        Guest { pages: vublk_vfio::dma::Pages::new(len, 4096).unwrap() }
    }

    pub fn range(&self) -> HostRange {
        self.pages.range()
    }

    pub fn iovec(&self, at: usize, len: usize) -> libc::iovec {
        assert!(at + len <= self.range().len());
        libc::iovec { iov_base: (self.range().address() + at) as *mut _, iov_len: len }
    }

    pub fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.range().read(at, &mut bytes));
        bytes
    }

    pub fn fill(&self, at: usize, bytes: &[u8]) {
        assert!(self.range().write(at, bytes));
    }
}

/// Bytes that tell where they came from.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2) + 1;
    let next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

pub fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < Duration::from_secs(60), "waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
