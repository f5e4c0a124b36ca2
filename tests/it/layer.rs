//! `layer`: the smallest test format with a backing file.
//!
//! Its clusters are where they are in its file; it keeps in memory which of them exist.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vublk::block::registry::{DriverEntry, Kind};
use vublk::block::*;
use vublk::io::{self, Errno, InFlight, IoResult, IoVec};
use vublk::options::{NodeRef, NodeRefOrNull};

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File, Role::Backing],
    growth: Growth::Own(&[]),
    ..DriverEntry::new("layer", Kind::Format, |opening, mut options| {
        Box::pin(async move {
            let file: NodeRef = options.take_as("file")?.expect("a test gives a file");
            let backing: Option<NodeRefOrNull> = options.take_as("backing")?;
            let file = opening.child(Role::File, file, Perms::NONE).await?;
            let backing = opening.backing(backing, None, &file).await?;
            let node = file.node();
            let below = node.traits();
            let cluster = CLUSTER.max(below.request_align as u64).max(below.zero_align as u64);
            let traits = Traits {
                request_align: cluster as u32,
                buffer_align: below.buffer_align,
                max_transfer: below.max_transfer - below.max_transfer % cluster as u32,
                max_segments: below.max_segments,
                zero_align: cluster as u32,
                max_zero: 2 * cluster,
                discard_align: cluster as u32,
                abilities: Abilities::ZERO | (below.abilities & Abilities::READ_ONLY),
                ..Traits::default()
            };
            let clusters = (0..node.len().div_ceil(cluster)).map(|_| AtomicU8::new(NONE));
            let (clusters, len) = (clusters.collect(), node.len());
            let children = [file].into_iter().chain(backing).collect();
            let writing = Mutex::default();
            let layer = Layer { children, traits, cluster, len, clusters, writing };
            Ok(Box::new(layer) as Box<dyn Driver>)
        })
    })
};

/// Bytes, at least.
pub const CLUSTER: u64 = 4096;

const NONE: u8 = 0;
const DATA: u8 = 1;
const ZERO: u8 = 2;

struct Layer {
    children: Vec<Child>,
    traits: Traits,
    cluster: u64,
    len: u64,
    clusters: Box<[AtomicU8]>,
    /// Writes that have not marked their clusters yet, and the number of the next one.
    writing: Mutex<(Vec<u64>, u64)>,
}

/// A write that is listed, until it is dropped.
struct Writing<'a>(&'a Layer, u64);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.writing.lock().unwrap().0.retain(|&number| number != self.1);
    }
}

impl Layer {
    fn begin_write(&self) -> Writing<'_> {
        let mut writing = self.writing.lock().unwrap();
        let number = writing.1;
        writing.0.push(number);
        writing.1 += 1;
        Writing(self, number)
    }

    /// Waits for the writes that have begun. What is in the file of a zero cluster may be anything older: one of them
    /// must not show it.
    async fn older_writes(&self) {
        let now = self.writing.lock().unwrap().1;
        while self.writing.lock().unwrap().0.iter().any(|&number| number < now) {
            io::sleep(Duration::from_micros(20)).await;
        }
    }

    fn file(&self) -> Arc<Node> {
        self.children[0].node()
    }

    /// What the clusters from `at` on are, and for how many of `want` bytes.
    fn run(&self, at: u64, want: u64) -> (u8, u64) {
        let what = |n: u64| self.clusters[n as usize].load(Ordering::SeqCst);
        let first = what(at / self.cluster);
        let mut end = (at / self.cluster + 1) * self.cluster;
        while end < at + want && what(end / self.cluster) == first {
            end += self.cluster;
        }
        (first, want.min(end - at))
    }

    fn mark(&self, at: u64, len: u64, what: u8) {
        for n in at / self.cluster..(at + len).div_ceil(self.cluster) {
            self.clusters[n as usize].store(what, Ordering::SeqCst);
        }
    }

    /// What there is to read of a range in a node; zeroes behind it.
    async fn read_from(node: &Node, at: u64, into: &IoVec<'_>) -> IoResult {
        let len = into.len().min(node.len().saturating_sub(at));
        into.slice(len, into.len() - len).zero();
        if len == 0 { Ok(()) } else { node.read(at, &into.slice(0, len)).await }
    }
}

impl Driver for Layer {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        self.traits
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn children(&self) -> &[Child] {
        &self.children
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        match (self.run(at, want), access) {
            ((DATA, len), Access::Read) => {
                self.children[0].fast(inflight).map(inflight, at, len, access)
            }
            ((DATA, len), Access::Write) if len == want => {
                self.children[0].fast(inflight).map(inflight, at, len, access)
            }
            ((ZERO, len), Access::Read) => Mapping { len, target: Target::Zero },
            ((NONE, len), Access::Read) => match self.children.get(1) {
                None => Mapping { len, target: Target::Zero },
                Some(backing) if backing.fast(inflight).len() >= at + len => {
                    backing.fast(inflight).map(inflight, at, len, access)
                }
                _ => Mapping::slow(want),
            },
            _ => Mapping::slow(want),
        }
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let mut done = 0;
            while done < into.len() {
                let (what, n) = self.run(at + done, into.len() - done);
                let part = into.slice(done, n);
                match (what, self.children.get(1)) {
                    (DATA, _) => Self::read_from(&self.file(), at + done, &part).await?,
                    (NONE, Some(backing)) => {
                        Self::read_from(&backing.node(), at + done, &part).await?
                    }
                    _ => part.zero(),
                }
                done += n;
            }
            Ok(())
        })
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        _: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            let _writing = self.begin_write();
            let file = self.file();
            let len = from.len().min(file.len() - at);
            file.event(Event::WriteAio).await;
            file.write(at, &from.slice(0, len), WriteFlags::empty()).await?;
            self.mark(at, len, DATA);
            Ok(())
        })
    }

    fn zero<'a>(&'a self, at: u64, len: u64, _: ZeroFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(async move {
            self.older_writes().await;
            self.mark(at, len, ZERO);
            Ok(())
        })
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move { self.file().flush().await })
    }

    fn status(&self, at: u64, len: u64, _: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        let (what, len) = self.run(at, len);
        let status = match what {
            DATA => Status::DATA | Status::ALLOCATED,
            ZERO => Status::ZERO | Status::ALLOCATED,
            _ if self.children.len() == 1 => Status::ZERO,
            _ => Status::DATA,
        };
        Box::pin(std::future::ready(Ok(Extent { len, status, place: None })))
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl Image for Layer {
    fn resize(&self, _: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(std::future::ready(Err(Error::new("a layer has one length"))))
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    fn info(&self) -> ImageInfo {
        ImageInfo { cluster_size: Some(4 * self.cluster), ..ImageInfo::default() }
    }
}
