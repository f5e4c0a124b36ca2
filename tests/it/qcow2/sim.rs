//! Images on simulated disks: made by qemu-img, written by us, checked by qemu-img again.

use crate::disks::{REGISTRY, unique};
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::Command;
use std::sync::Arc;
use vublk::block::*;
use vublk::options::keyval;
use vublk::protocol::sim::{SimDisk, SimOptions, Tries, WriteLog};

/// Stands, in options to create an image, for an external data file.
pub const DATA: &str = "data_file=D";

/// Of a short run: every subset of up to ten pending writes, and a few of more.
pub const EVERY: Tries = Tries { every: 10, most: 4 };

/// The states that were judged, so that what many crashes leave is judged once.
#[derive(Default)]
pub struct Judged {
    states: HashSet<(usize, u64)>,
    /// The last prefix, how many crashes there were after it, and the most after any.
    prefix: usize,
    crashes: usize,
    most: usize,
}

impl Judged {
    /// Whether this state of both disks is new, among those of which the same is `known`.
    pub fn is_new(&mut self, prefix: usize, known: usize, state: &[u8], data: &[u8]) -> bool {
        self.crashes = if self.prefix == prefix { self.crashes + 1 } else { 1 };
        self.prefix = prefix;
        self.most = self.most.max(self.crashes);
        let mut hasher = DefaultHasher::new();
        (state, data).hash(&mut hasher);
        self.states.insert((known, hasher.finish()))
    }
}

/// Makes short runs, each of its own seed, in which every subset is tried: until hundreds of states
/// were judged, and at least six writes were pending at once.
pub fn try_every(seed: u64, mut run: impl FnMut(u64) -> Judged) {
    let (mut states, mut most) = (0, 0);
    for n in 0..100 {
        let judged = run(seed.wrapping_add(n));
        states += judged.states.len();
        most = most.max(judged.most);
        println!("{states} states, at most {most} crashes after one change");
        if states >= 200 && most >= 1 << 6 {
            return;
        }
    }
    panic!("in 100 runs, {states} states, and never more than {most} crashes after one change");
}

/// The bytes of a new image.
pub fn image(len: u64, create: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let data = format!("data_file={}", dir.path().join("data").display());
    let create = &*create.replace(DATA, &data);
    let path = dir.path().join("image");
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-u", "-f", "qcow2"]);
    if !create.is_empty() {
        command.args(["-o", create]);
    }
    let made = command.arg(&path).arg(len.to_string()).output().unwrap();
    assert!(made.status.success(), "{create}: {}", String::from_utf8_lossy(&made.stderr));
    std::fs::read(path).unwrap()
}

/// A published disk that holds `bytes`, and grows as far as `most`; the options of its node. `shape`
/// changes what the disk is like.
pub fn disk(bytes: &[u8], most: u64, shape: impl FnOnce(&mut SimOptions)) -> (SimDisk, String) {
    let (disk, name) = published(bytes, most, shape);
    (disk, format!("driver=sim,disk={name}"))
}

/// The same, and the name by which it is published.
fn published(bytes: &[u8], most: u64, shape: impl FnOnce(&mut SimOptions)) -> (SimDisk, String) {
    let mut options = SimOptions::new((bytes.len() as u64).next_multiple_of(512));
    options.max_len = most;
    shape(&mut options);
    let (disk, name) = (SimDisk::holding(options, bytes), unique());
    disk.publish(&name);
    (disk, name)
}

/// A disk that can be opened as long as this is held.
pub struct Passing(SimDisk, String);

impl std::ops::Deref for Passing {
    type Target = SimDisk;

    fn deref(&self) -> &SimDisk {
        &self.0
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        SimDisk::withdraw(&self.1);
    }
}

/// As [`disk`], for one of thousands.
pub fn passing(bytes: &[u8], most: u64, shape: impl FnOnce(&mut SimOptions)) -> (Passing, String) {
    let (disk, name) = published(bytes, most, shape);
    let options = format!("driver=sim,disk={name}");
    (Passing(disk, name), options)
}

/// The disk of an image, and that of its data, if they are two.
pub struct Disks {
    pub image: SimDisk,
    pub data: Option<SimDisk>,
}

impl Disks {
    /// How many changes there were.
    pub fn changes(&self) -> usize {
        let of = |disk: &SimDisk| disk.log().changes().len();
        of(&self.image) + self.data.as_ref().map_or(0, of)
    }

    /// Calls `see` with what is left after each crash: of how many changes, and the bytes of both.
    pub fn crashes(&self, seed: u64, tries: Tries, mut see: impl FnMut(usize, &[u8], &[u8])) {
        let image = self.image.log();
        let data = self.data.as_ref().map(SimDisk::log).unwrap_or_default();
        for [a, b] in WriteLog::crashes_of_two([&image, &data], seed, tries) {
            see(a.prefix + b.prefix, &image.image(&a), &data.image(&b));
        }
    }
}

/// `options` with every key below `child`.
pub fn below(child: &str, options: &str) -> String {
    options.split(',').map(|option| format!(",{child}.{option}")).collect()
}

/// An open image that is closed properly.
pub struct Image {
    graph: Graph,
    pub node: Arc<Node>,
    attachment: Attachment,
}

impl Image {
    pub async fn open(options: &str) -> Image {
        let graph = Graph::new(&REGISTRY);
        let map = keyval::parse(&format!("{options},node-name=top"), None).unwrap().options;
        let node = graph.open(map).await.unwrap_or_else(|error| panic!("{options}: {error}"));
        let held = Perm::CONSISTENT_READ | Perm::WRITE;
        let perms = Perms { held, shared: Perm::all() };
        let attachment = graph.attach(&node, "a test", perms, None).unwrap();
        Image { graph, node, attachment }
    }

    /// Sets the disk's length, as `block_resize` does.
    pub async fn resize(&self, len: u64) -> Result<(), Error> {
        self.graph.resize(&self.node, len).await
    }

    pub async fn close(self) {
        let Image { graph, node, attachment } = self;
        drop(attachment);
        drop(node);
        graph.close().await;
    }
}

/// What qemu-img's check says of an image's bytes: nothing, or what is wrong. Leaks are only wrong
/// if `leaks` says so.
pub fn check(bytes: &[u8], leaks: bool) -> Result<(), String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let mut options = format!("driver=qcow2,file.filename={}", file.path().display());
    if has_data_file(bytes) {
        options += ",data-file.driver=null-co,data-file.size=1G";
    }
    let output = Command::new("qemu-img").args(["check", "--image-opts", &options]).output();
    let output = output.unwrap();
    match output.status.code() {
        Some(0) => Ok(()),
        Some(3) if !leaks => Ok(()),
        _ => {
            let out = String::from_utf8_lossy(&output.stdout);
            Err(format!("{out}{}", String::from_utf8_lossy(&output.stderr)))
        }
    }
}

/// Whether an image's bytes say that its data is elsewhere.
fn has_data_file(bytes: &[u8]) -> bool {
    let field =
        |range: std::ops::Range<usize>| bytes[range].iter().fold(0, |n, &b| n << 8 | b as u64);
    field(4..8) >= 3 && field(72..80) & 1 << 2 != 0
}
