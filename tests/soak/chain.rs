//! The soak of a warm image: four queues write over a chain of three qcow2 images, large enough that
//! their tables do not fit into the caches, and know what every block holds. Blocks side by side belong
//! to different queues, so that all four allocate in the same clusters. Half the requests after a while
//! find their clusters allocated, and the rest do not: allocators have been seen to hand out live tables
//! only then. In the end every block is read, the daemon ends, and vublk and QEMU check every image.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vublk_testkit::request::{Range, Request, Shape};
use vublk_testkit::{Disk, MemoryLayout, Options, Queue, Server};

const QUEUES: u64 = 4;
const BLOCK: u64 = 4096;
const DEPTH: usize = 16;
const MIB: u64 = 1 << 20;

/// What a queue knows of its blocks: how often each was written, 0 for what the chain below has, and
/// `ZERO` for zeroes.
struct Owner {
    queue: u64,
    versions: Vec<u32>,
    /// Blocks in flight, by token.
    flying: Vec<(u64, usize, Act)>,
    random: fastrand::Rng,
    done: u64,
}

const ZERO: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq)]
enum Act {
    Read,
    Write(u32),
    Zero,
}

/// The contents of a block: every eighth byte counts, so that a torn or misplaced one shows.
fn contents(block: u64, version: u32) -> Vec<u8> {
    if version == ZERO {
        return vec![0; BLOCK as usize];
    }
    let word =
        (block << 24 | u64::from(version & 0xff_ffff)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    word.to_le_bytes().repeat(BLOCK as usize / 8)
}

impl Owner {
    fn new(queue: u64, blocks: u64, seed: u64) -> Owner {
        Owner {
            queue,
            versions: vec![0; (blocks / QUEUES) as usize],
            flying: Vec::new(),
            random: fastrand::Rng::with_seed(seed ^ queue),
            done: 0,
        }
    }

    fn block(&self, index: usize) -> u64 {
        index as u64 * QUEUES + self.queue
    }

    fn send(&mut self, queue: &mut Queue, index: usize, act: Act) {
        let block = self.block(index);
        let sector = block * BLOCK / 512;
        let range = |flags| vec![Range { sector, sectors: (BLOCK / 512) as u32, flags }];
        let request = match act {
            Act::Read => Request::In { sector, len: BLOCK as usize },
            Act::Write(version) => Request::Out { sector, data: contents(block, version) },
            Act::Zero => Request::WriteZeroes(range(self.random.u32(0..2))),
        };
        let token = queue.submit(&request, &Shape::default()).expect("room in the ring");
        self.flying.push((token, index, act));
    }

    /// Waits for one completion, and holds it against what is known.
    fn take(&mut self, queue: &mut Queue) {
        let completion = queue.wait().expect("the disk answers");
        let at = self.flying.iter().position(|&(token, ..)| token == completion.token);
        let (_, index, act) = self.flying.swap_remove(at.expect("it was sent"));
        let block = self.block(index);
        assert_eq!(completion.status, 0, "block {block}: a request failed");
        self.done += 1;
        match act {
            Act::Write(version) => self.versions[index] = version,
            Act::Zero => self.versions[index] = ZERO,
            Act::Read => {
                let wanted = contents(block, self.versions[index]);
                assert!(
                    completion.data == wanted,
                    "block {block} should have version {}, and has {:x?}",
                    self.versions[index],
                    &completion.data[..16]
                );
            }
        }
    }

    /// Random requests until the time is over; then all of it is read.
    fn work(&mut self, queue: &mut Queue, until: Instant) {
        while Instant::now() < until {
            let index = self.random.usize(0..self.versions.len());
            if self.flying.iter().all(|&(_, busy, _)| busy != index) {
                let next = match self.versions[index] {
                    ZERO => 1,
                    version => version + 1,
                };
                let act = match self.random.u8(0..16) {
                    0..9 => Act::Write(next),
                    9 => Act::Zero,
                    _ => Act::Read,
                };
                self.send(queue, index, act);
            }
            if self.flying.len() == DEPTH {
                self.take(queue);
            }
        }
        for index in 0..self.versions.len() {
            while self.flying.len() == DEPTH || self.flying.iter().any(|f| f.1 == index) {
                self.take(queue);
            }
            self.send(queue, index, Act::Read);
        }
        while !self.flying.is_empty() {
            self.take(queue);
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program).args(arguments).output().expect(program);
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {arguments:?}: {text}");
    text.into_owned()
}

/// Three images over each other; the lowest holds version 0 of each block.
fn chain(dir: &Path, size: u64) -> String {
    let path = |name: &str| dir.join(name).to_str().expect("a path in UTF-8").to_owned();
    let data = path("data");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&data).unwrap());
    for block in 0..size / BLOCK {
        file.write_all(&contents(block, 0)).unwrap();
    }
    file.into_inner().unwrap();
    let size = size.to_string();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &data, &path("base")]);
    std::fs::remove_file(data).unwrap();
    for (name, below, options) in [
        ("middle", "base", "cluster_size=64k"),
        ("top", "middle", "cluster_size=16k,extended_l2=on"),
    ] {
        let (name, below) = (path(name), path(below));
        let create = ["create", "-q", "-f", "qcow2", "-o", options, "-F", "qcow2", "-b"];
        run("qemu-img", &[&create[..], &[below.as_str(), name.as_str(), &size]].concat());
    }
    path("top")
}

/// Serves the chain with caches that are too small for its tables, and works on it for `time`.
pub fn soak(dir: &TempDir, size: u64, time: Duration, seed: u64) {
    let top = chain(dir.path(), size);
    let socket = dir.path().join("chain.sock");
    let daemon = |option: &str, value: String| [format!("--{option}"), value];
    let pid = dir.path().join("pid");
    let arguments: Vec<String> = ["daemon".to_owned()]
        .into_iter()
        .chain((0..2).flat_map(|n| daemon("object", format!("iothread,id=io{n}"))))
        .chain(daemon(
            "blockdev",
            format!(
                "driver=qcow2,node-name=top,discard=unmap,l2-cache-size=65536,l2-cache-entry-size=4096,\
                 backing.driver=qcow2,backing.l2-cache-size=65536,backing.file.driver=file,\
                 backing.file.filename={},file.driver=file,file.filename={top},file.discard=unmap",
                dir.path().join("middle").display()
            ),
        ))
        .chain(daemon(
            "export",
            format!(
                "type=vhost-user-blk,id=e,node-name=top,writable=on,num-queues={QUEUES},\
                 addr.type=unix,addr.path={},iothread.0=io0,iothread.1=io1",
                socket.display()
            ),
        ))
        .chain(daemon("pidfile", pid.display().to_string()))
        .collect();
    let mut server = Server::start(env!("CARGO_BIN_EXE_vublk").as_ref(), &arguments).unwrap();
    server.wait_pidfile(&pid, Duration::from_secs(60)).unwrap();
    let options = Options {
        num_queues: QUEUES as usize,
        queue_size: 128,
        layout: MemoryLayout::single(16 << 20),
        ..Options::default()
    };
    let mut disk = Disk::open(&socket, &options).unwrap();
    let until = Instant::now() + time;
    let done: u64 = std::thread::scope(|scope| {
        let workers: Vec<_> = disk
            .queues
            .iter_mut()
            .zip(0..)
            .map(|(queue, number)| {
                scope.spawn(move || {
                    let mut owner = Owner::new(number, size / BLOCK, seed);
                    owner.work(queue, until);
                    owner.done
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("no block was wrong")).sum()
    });
    disk.flush().unwrap();
    drop(disk);
    server.signal(libc::SIGTERM).unwrap();
    let status = server.wait_exit(Duration::from_secs(60)).unwrap();
    assert!(status.success(), "{status}: {}", server.stderr());
    for name in ["base", "middle", "top"] {
        let image = dir.path().join(name);
        let image = image.to_str().expect("a path in UTF-8");
        for program in ["qemu-img", env!("CARGO_BIN_EXE_vublk")] {
            // Leaks, too, are mistakes: it was closed.
            let said = run(program, &["check", "-f", "qcow2", image]);
            assert!(said.contains("No errors were found"), "{name}: {said}");
        }
    }
    println!("{done} requests on a chain of {} MiB, 4 queues, every block verified", size / MIB);
}
