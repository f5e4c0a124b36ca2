//! The drivers `file` and `host_device` on real file systems and block devices, beside real QEMU.
//!
//! Needs root: loop devices and small file systems are made and taken away again.

mod create;
mod devices;
pub mod durability;
mod locks;
mod open;
mod transfers;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use vublk::block::{
    Attachment, Error, Extent, Graph, Node, Perm, Perms, Precision, WriteFlags, ZeroFlags,
};
use vublk::io::{AlignedBuf, IoResult, IoVec, Worker, WorkerOptions};

/// A graph, and a worker that its nodes are used from.
pub struct Bench {
    pub graph: Graph,
    pub worker: Worker,
}

/// A node and the permission to write to it.
pub struct Disk {
    pub node: Arc<Node>,
    _attachment: Attachment,
}

impl Bench {
    pub fn new() -> Bench {
        let options = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
        let worker = Worker::start("test", options).unwrap();
        Bench { graph: Graph::new(vublk::drivers::registry()), worker }
    }

    /// Opens a node from keyval options, without any permission on it.
    pub fn node(&self, options: &str) -> Result<Arc<Node>, Error> {
        let map = vublk::options::keyval::parse(options, Some("driver"))?.options.crumple()?;
        self.graph.open_on(&self.worker, map)
    }

    /// Takes the permissions of one who reads and writes, and lets nobody else write.
    pub fn write_to(&self, node: Arc<Node>) -> Result<Disk, Error> {
        let held = Perm::CONSISTENT_READ | Perm::WRITE;
        let shared = Perm::all() - Perm::WRITE - Perm::RESIZE;
        let perms = Perms { held, shared };
        let attachment = self.graph.attach(&node, "the test", perms, None)?;
        Ok(Disk { node, _attachment: attachment })
    }

    /// Opens a node and takes the permission to write to it.
    pub fn disk(&self, options: &str) -> Result<Disk, Error> {
        self.node(&format!("{options},node-name=disk")).and_then(|node| self.write_to(node))
    }

    /// Runs a future on the worker.
    pub fn run<T, F>(&self, make: impl FnOnce() -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        self.worker.block_on(make)
    }

    pub fn read(&self, disk: &Disk, at: u64, len: usize) -> IoResult<Vec<u8>> {
        let node = disk.node.clone();
        self.run(move || async move { read(&node, at, len).await })
    }

    pub fn write(&self, disk: &Disk, at: u64, bytes: Vec<u8>, flags: WriteFlags) -> IoResult {
        let node = disk.node.clone();
        self.run(move || async move { node.write(at, &IoVec::from_ref(&bytes), flags).await })
    }

    pub fn zero(&self, disk: &Disk, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        let node = disk.node.clone();
        self.run(move || async move { node.zero(at, len, flags).await })
    }

    pub fn discard(&self, disk: &Disk, at: u64, len: u64) -> IoResult {
        let node = disk.node.clone();
        self.run(move || async move { node.discard(at, len).await })
    }

    pub fn flush(&self, disk: &Disk) -> IoResult {
        let node = disk.node.clone();
        self.run(move || async move { node.flush().await })
    }

    /// The status of the whole disk, piece by piece.
    pub fn map(&self, disk: &Disk, precision: Precision) -> Vec<(u64, Extent)> {
        let node = disk.node.clone();
        self.run(move || async move {
            let mut at = 0;
            let mut all = Vec::new();
            while at < node.len() {
                let extent = node.status(at, node.len() - at, precision).await.unwrap();
                assert!(extent.len > 0 && extent.len <= node.len() - at);
                all.push((at, extent));
                at += extent.len;
            }
            all
        })
    }

    /// Sets a disk's length through the driver's own operation.
    pub fn resize(&self, disk: &Disk, len: u64, shrink: bool) -> Result<(), Error> {
        let node = disk.node.clone();
        self.run(move || async move { node.driver().image().unwrap().resize(len, shrink).await })
    }
}

pub async fn read(node: &Node, at: u64, len: usize) -> IoResult<Vec<u8>> {
    // What is not read must not look like zeroes.
    let mut bytes = AlignedBuf::new(len, 4096).unwrap();
    bytes.fill(0xee);
    node.read(at, &bytes.io_vec()).await?;
    Ok(bytes[..len].to_vec())
}

/// A directory on the file system that the project is built on.
pub fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A directory in memory.
pub fn on_tmpfs() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// A file of `len` bytes without data.
pub fn sparse(dir: &Path, name: &str, len: u64) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(len).unwrap();
    path
}

/// Bytes that are different everywhere, and nowhere zero.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 + 1).collect()
}

/// Runs a program that must succeed, and gives back what it printed.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e} (tests/setup.sh installs what is missing)"));
    assert!(
        output.status.success(),
        "{program} {}: {} {}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A loop device over a file.
pub struct Loop(pub String);

impl Loop {
    pub fn new(backing: &Path, options: &[&str]) -> Loop {
        let backing = backing.to_str().unwrap();
        let arguments = [&["--find", "--show"], options, &[backing]].concat();
        // Needs root, and loop devices in the kernel.
        Loop(tool("losetup", &arguments))
    }

    pub fn size(&self) -> u64 {
        tool("blockdev", &["--getsize64", &self.0]).parse().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// A mounted file system.
pub struct Mount(pub PathBuf);

impl Mount {
    pub fn new(at: &Path, arguments: &[&str]) -> Mount {
        std::fs::create_dir_all(at).unwrap();
        tool("mount", &[arguments, &[at.to_str().unwrap()]].concat());
        Mount(at.to_owned())
    }

    /// A tmpfs that holds no more than `size` bytes.
    pub fn small(at: &Path, size: u64) -> Mount {
        Mount::new(at, &["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
