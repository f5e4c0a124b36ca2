//! The soak of a warm image: four queues write over a chain of three qcow2 images.
//!
//! The images are large enough that their tables do not fit into the caches, and the queues know what every block
//! holds. Adjacent blocks belong to different queues, so that all four allocate in the same clusters; behind them are
//! units of whole clusters, which are discarded too, so that clusters are freed and used again. Half of everything is
//! written first, and then the daemon is restarted: allocators have been seen to hand out live tables only when most
//! clusters were allocated. In the end every block is read, the daemon ends, and vublk and QEMU check every image.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vublk_testkit::request::{Range, Request, Shape};
use vublk_testkit::{Disk, MemoryLayout, Options, Queue, Server};

const QUEUES: u64 = 4;
const BLOCK: u64 = 4096;
/// Some of the top image's clusters.
const UNIT: u64 = 64 << 10;
/// What the lowest image and the one above it have in turns.
const CHUNK: u64 = 256 << 10;
const DEPTH: usize = 16;
const MIB: u64 = 1 << 20;

/// What a queue knows of its blocks, and behind them of its units: how often each was written, 0 for what
/// the chain below has, and `ZERO` for zeroes.
struct Owner {
    queue: u64,
    versions: Vec<u32>,
    /// How many of them are blocks.
    blocks: usize,
    /// Requests in flight: their tokens, and what they are for.
    flying: Vec<(u64, usize, Act)>,
    random: fastrand::Rng,
    done: u64,
}

const ZERO: u32 = u32::MAX;
/// In the place of an index: a request for no block.
const NONE: usize = usize::MAX;

#[derive(Clone, Copy, PartialEq)]
enum Act {
    Read,
    Write(u32),
    Zero,
    Flush,
}

/// The contents of a block: every eighth byte counts, so that a torn or misplaced one shows.
fn contents(block: u64, version: u32) -> Vec<u8> {
    match (version, pattern(block)) {
        (ZERO, _) => vec![0; BLOCK as usize],
        (0, Some(byte)) => vec![byte; BLOCK as usize],
        _ => {
            let word = block << 24 | u64::from(version & 0xff_ffff);
            let word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            word.to_le_bytes().repeat(BLOCK as usize / 8)
        }
    }
}

/// What the middle image has: every second chunk, full of one byte.
fn pattern(block: u64) -> Option<u8> {
    let chunk = block * BLOCK / CHUNK;
    (chunk % 2 == 1).then_some(chunk.wrapping_mul(37) as u8 | 1)
}

impl Owner {
    /// Of a disk of this many bytes, the last quarter of which are units.
    fn new(queue: u64, size: u64, seed: u64) -> Owner {
        let units = (size / 4 / UNIT / QUEUES) as usize;
        let blocks = ((size / QUEUES - units as u64 * UNIT) / BLOCK) as usize;
        Owner {
            queue,
            versions: vec![0; blocks + units],
            blocks,
            flying: Vec::new(),
            random: fastrand::Rng::with_seed(seed ^ queue),
            done: 0,
        }
    }

    /// Where a block or unit is, and its length, in blocks.
    fn place(&self, index: usize) -> (u64, u64) {
        let of = |n: usize| n as u64 * QUEUES + self.queue;
        match index.checked_sub(self.blocks) {
            None => (of(index), 1),
            Some(unit) => (self.blocks as u64 * QUEUES + of(unit) * (UNIT / BLOCK), UNIT / BLOCK),
        }
    }

    fn contents(&self, index: usize, version: u32) -> Vec<u8> {
        let (first, count) = self.place(index);
        (first..first + count).flat_map(|block| contents(block, version)).collect()
    }

    /// Sends a request; before that, takes a completion if there is no room for it.
    fn send(&mut self, queue: &mut Queue, index: usize, act: Act) {
        if self.flying.len() == DEPTH {
            self.take(queue);
        }
        let (block, count) = if index == NONE { (0, 0) } else { self.place(index) };
        let (sector, len) = (block * BLOCK / 512, count * BLOCK);
        let range = |flags| vec![Range { sector, sectors: (len / 512) as u32, flags }];
        let request = match act {
            Act::Read => Request::In { sector, len: len as usize },
            Act::Write(version) => Request::Out { sector, data: self.contents(index, version) },
            Act::Zero if count > 1 && self.random.bool() => Request::Discard(range(0)),
            Act::Zero => Request::WriteZeroes(range(self.random.u32(0..2))),
            Act::Flush => Request::Flush,
        };
        let token = queue.submit(&request, &Shape::default()).expect("room in the ring");
        self.flying.push((token, index, act));
    }

    /// Waits for one completion, and holds it against what is known.
    fn take(&mut self, queue: &mut Queue) {
        let completion = queue.wait().expect("the disk answers");
        let at = self.flying.iter().position(|&(token, ..)| token == completion.token);
        let (_, index, act) = self.flying.swap_remove(at.expect("it was sent"));
        assert_eq!(completion.status, 0, "{index} of queue {}: a request failed", self.queue);
        self.done += 1;
        match act {
            Act::Write(version) => self.versions[index] = version,
            Act::Zero => self.versions[index] = ZERO,
            Act::Flush => {}
            Act::Read => {
                let (version, (block, _)) = (self.versions[index], self.place(index));
                let is_right = completion.data == self.contents(index, version);
                let found = &completion.data[..16];
                assert!(is_right, "block {block}: version {version} expected, {found:x?} found");
            }
        }
    }

    fn take_all(&mut self, queue: &mut Queue) {
        while !self.flying.is_empty() {
            self.take(queue);
        }
    }

    /// Writes half of all, as the dice fall.
    fn warm(&mut self, queue: &mut Queue) {
        for index in 0..self.versions.len() {
            if self.random.bool() {
                self.send(queue, index, Act::Write(1));
            }
        }
        self.take_all(queue);
    }

    /// Random requests until the time is over.
    fn work(&mut self, queue: &mut Queue, until: Instant) {
        while Instant::now() < until {
            let index = match self.random.u8(0..8) {
                0 => self.random.usize(self.blocks..self.versions.len()),
                _ => self.random.usize(0..self.blocks),
            };
            if self.flying.iter().any(|&(_, busy, _)| busy == index) {
                self.take(queue);
                continue;
            }
            let next = match self.versions[index] {
                ZERO => 1,
                version => version + 1,
            };
            let act = match self.random.u8(0..16) {
                0..8 => Act::Write(next),
                8 | 9 => Act::Zero,
                _ => Act::Read,
            };
            self.send(queue, index, act);
            if self.random.u8(..) == 0 {
                self.send(queue, NONE, Act::Flush);
            }
        }
        self.take_all(queue);
    }

    fn verify(&mut self, queue: &mut Queue) {
        for index in 0..self.versions.len() {
            self.send(queue, index, Act::Read);
        }
        self.take_all(queue);
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program).args(arguments).output().expect(program);
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {arguments:?}: {text}");
    text.into_owned()
}

/// Three images over each other; the lower two hold version 0 of each block.
fn chain(dir: &Path, size: u64) -> String {
    let path = |name: &str| dir.join(name).to_str().expect("a path in UTF-8").to_owned();
    let data = path("data");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&data).unwrap());
    for block in 0..size / BLOCK {
        // Where the middle image shows, what must not.
        file.write_all(&contents(block, u32::from(pattern(block).is_some()) << 20)).unwrap();
    }
    file.into_inner().unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &data, &path("base")]);
    std::fs::remove_file(data).unwrap();
    for (name, below, options) in [
        ("middle", "base", "cluster_size=64k"),
        ("top", "middle", "cluster_size=16k,extended_l2=on"),
    ] {
        let (name, below, size) = (path(name), path(below), size.to_string());
        let create = ["create", "-q", "-f", "qcow2", "-o", options, "-F", "qcow2", "-b"];
        run("qemu-img", &[&create[..], &[below.as_str(), name.as_str(), &size]].concat());
    }
    let chunks = (0..size).step_by(CHUNK as usize);
    let writes = chunks.filter_map(|at| Some((at, pattern(at / BLOCK)?)));
    let writes: Vec<_> =
        writes.map(|(at, byte)| format!("write -q -P {byte} {at} {CHUNK}")).collect();
    for some in writes.chunks(500) {
        let commands = some.iter().flat_map(|write| ["-c", write]);
        run(
            "qemu-io",
            &[&["-f", "qcow2", &*path("middle")], &*commands.collect::<Vec<_>>()].concat(),
        );
    }
    path("top")
}

/// A daemon that serves the chain with caches that are too small for its tables.
fn serve(dir: &Path, socket: &Path) -> Server {
    let pid = dir.join("pid");
    let blockdev = format!(
        "driver=qcow2,node-name=top,discard=unmap,l2-cache-size=65536,l2-cache-entry-size=4096,\
         backing.driver=qcow2,backing.l2-cache-size=65536,backing.file.driver=file,\
         backing.file.filename={},file.driver=file,file.filename={},file.discard=unmap",
        dir.join("middle").display(),
        dir.join("top").display()
    );
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=top,writable=on,num-queues={QUEUES},\
         addr.type=unix,addr.path={},iothread.0=io0,iothread.1=io1",
        socket.display()
    );
    let pidfile = pid.display().to_string();
    let arguments = [
        ["--object", "iothread,id=io0"],
        ["--object", "iothread,id=io1"],
        ["--blockdev", &blockdev],
        ["--export", &export],
        ["--pidfile", &pidfile],
    ];
    let arguments: Vec<String> =
        ["daemon"].iter().chain(arguments.as_flattened()).map(|&word| word.to_owned()).collect();
    let mut server = Server::start(env!("CARGO_BIN_EXE_vublk").as_ref(), &arguments).unwrap();
    server.wait_pidfile(&pid, Duration::from_secs(60)).unwrap();
    server
}

/// Makes each owner do some work on a queue of its own.
fn session(dir: &Path, owners: &mut [Owner], work: impl Fn(&mut Owner, &mut Queue) + Sync) {
    let socket = dir.join("chain.sock");
    let mut server = serve(dir, &socket);
    let options = Options {
        num_queues: QUEUES as usize,
        queue_size: 128,
        layout: MemoryLayout::single(16 << 20),
        ..Options::default()
    };
    let mut disk = Disk::open(&socket, &options).unwrap();
    std::thread::scope(|scope| {
        let pairs = owners.iter_mut().zip(disk.queues.iter_mut());
        let workers: Vec<_> =
            pairs.map(|(owner, queue)| scope.spawn(|| work(owner, queue))).collect();
        workers.into_iter().for_each(|worker| worker.join().expect("no block was wrong"));
    });
    disk.flush().unwrap();
    drop(disk);
    server.signal(libc::SIGTERM).unwrap();
    let status = server.wait_exit(Duration::from_secs(60)).unwrap();
    assert!(status.success(), "{status}: {}", server.stderr());
}

/// Works on the chain for about `time`.
pub fn soak(dir: &TempDir, size: u64, time: Duration, seed: u64) {
    let dir = dir.path();
    let top = chain(dir, size);
    let mut owners: Vec<_> = (0..QUEUES).map(|queue| Owner::new(queue, size, seed)).collect();
    let half = Instant::now() + time / 2;
    session(dir, &mut owners, |owner, queue| {
        owner.warm(queue);
        owner.work(queue, half);
    });
    let end = half.max(Instant::now()) + time / 2;
    session(dir, &mut owners, |owner, queue| {
        owner.work(queue, end);
        owner.verify(queue);
    });
    for name in ["base", "middle", "top"] {
        let image = dir.join(name);
        let image = image.to_str().expect("a path in UTF-8");
        for program in ["qemu-img", env!("CARGO_BIN_EXE_vublk")] {
            // Leaks, too, are mistakes: it was closed.
            let said = run(program, &["check", "-f", "qcow2", image]);
            assert!(said.contains("No errors were found"), "{name}: {said}");
        }
    }
    let done: u64 = owners.iter().map(|owner| owner.done).sum();
    let warm = std::fs::metadata(top).unwrap().blocks() * 512;
    println!(
        "{done} requests, 4 queues, on a chain of {} MiB, {} MiB of it in the overlay; every block \
         verified",
        size / MIB,
        warm / MIB
    );
}
