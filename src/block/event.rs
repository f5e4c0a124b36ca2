//! Events that formats and nodes announce to a debugging filter below them (blkdebug).
//!
//! The filter may make the announced operation fail, or delay it.
//!
//! A format raises one with [`Node::event`] on its file's node before the I/O that the event names;
//! a node raises those of its own requests on itself. The filter hears what is raised on its own node, and
//! nothing of what is above or below, as in QEMU. As long as no debugging filter is open in the process, an
//! event is one look at a flag which nobody writes. The fast path raises none: below a format, a debugging
//! filter has no fast path.

use super::{LocalFuture, Node};
use crate::io::IoResult;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::{self, StrDeserializer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// What is about to happen. The names are those of QEMU's `BlkdebugEvent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    L1Update,
    L1GrowAllocTable,
    L1GrowWriteTable,
    L1GrowActivateTable,
    L2Load,
    L2Update,
    L2UpdateCompressed,
    L2AllocCowRead,
    L2AllocWrite,
    /// A guest's read reaches the file.
    ReadAio,
    ReadBackingAio,
    ReadCompressed,
    /// A guest's write reaches the file.
    WriteAio,
    WriteCompressed,
    VmstateLoad,
    VmstateSave,
    CowRead,
    CowWrite,
    ReftableLoad,
    ReftableGrow,
    ReftableUpdate,
    RefblockLoad,
    RefblockUpdate,
    RefblockUpdatePart,
    RefblockAlloc,
    RefblockAllocHookup,
    RefblockAllocWrite,
    RefblockAllocWriteBlocks,
    RefblockAllocWriteTable,
    RefblockAllocSwitchTable,
    ClusterAlloc,
    ClusterAllocBytes,
    ClusterFree,
    /// A flush hands over what the driver still has in memory.
    FlushToOs,
    /// A flush is passed to the storage.
    FlushToDisk,
    /// A node reads the block that an unaligned write begins in; and has read it.
    PwritevRmwHead,
    PwritevRmwAfterHead,
    /// The same of the block that it ends in.
    PwritevRmwTail,
    PwritevRmwAfterTail,
    /// A node writes.
    Pwritev,
    /// A node zeroes.
    PwritevZero,
    /// A node has written or zeroed.
    PwritevDone,
    EmptyImagePrepare,
    L1ShrinkWriteTable,
    L1ShrinkFreeL2Clusters,
    /// What was read from a backing file is written to the overlay.
    CorWrite,
    ClusterAllocSpace,
    /// Nothing: rules for it hold from the beginning.
    None,
}

impl Event {
    /// The event of this name.
    pub fn parse(name: &str) -> Option<Event> {
        let name: StrDeserializer<'_, value::Error> = name.into_deserializer();
        Event::deserialize(name).ok()
    }
}

/// Called with the tag when a request stops at a breakpoint.
pub type OnStop = Box<dyn Fn(&str) + Send + Sync>;

/// What hears events: a driver's ability, [`Driver::debugger`](super::Driver::debugger).
pub trait Debugger: Send + Sync {
    /// An event of a request. It continues when the future is done.
    fn raised(&self, event: Event) -> LocalFuture<'_, ()>;

    /// Something was written since the last flush, and the node it was written to is about to make it durable; an
    /// error is that of the flush.
    fn flushing(&self) -> LocalFuture<'_, IoResult>;

    /// The next request that raises `event` stops there, and is called `tag`.
    fn break_at(&self, event: Event, tag: &str, stopped: OnStop);

    /// Removes the breakpoints called `tag`, whether there were any, and lets requests that have stopped at such
    /// continue.
    fn remove_breaks(&self, tag: &str) -> bool;

    /// Lets a request called `tag` continue; whether there was one.
    fn resume(&self, tag: &str) -> bool;

    /// Whether a request called `tag` has stopped.
    fn has_stopped(&self, tag: &str) -> bool;
}

static DEBUGGERS: AtomicUsize = AtomicUsize::new(0);

/// Held by each debugger as long as it wants to hear events.
pub struct Hearing(());

impl Hearing {
    #[expect(clippy::new_without_default, reason = "making one has an effect")]
    pub fn new() -> Hearing {
        DEBUGGERS.fetch_add(1, Ordering::Relaxed);
        Hearing(())
    }
}

impl Drop for Hearing {
    fn drop(&mut self) {
        DEBUGGERS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether anybody wants to hear events.
pub fn has_listeners() -> bool {
    DEBUGGERS.load(Ordering::Relaxed) != 0
}

/// Whether something was written to a node since its last flush; known only while anybody hears events.
#[derive(Default)]
pub(super) struct Unflushed(AtomicBool);

impl Unflushed {
    fn note(&self) {
        if has_listeners() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// A request that changes a node. When it has ended, whether it worked or not, a flush has something to do.
pub(super) struct Writing<'a>(&'a Unflushed);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.note();
    }
}

impl Node {
    /// Tells a debugging filter, if this node is one, what is about to be done; waits as long as it wants.
    pub async fn event(&self, event: Event) {
        if has_listeners() {
            self.raise(event).await;
        }
    }

    /// As [`Node::event`], of rounding a request out to whole blocks. A node does that for the one below it, whose
    /// blocks they are, and a filter there is notified of it.
    pub(super) async fn rounding_event(&self, event: Option<Event>) {
        if let Some(event) = event
            && has_listeners()
        {
            let below = match self.driver().debugger() {
                Some(_) => None,
                None => debugged_below(self),
            };
            below.as_deref().unwrap_or(self).raise(event).await;
        }
    }

    /// Tells the filter below the node.
    async fn event_below(&self, event: Event) {
        if let Some(below) = self.primary() {
            below.raise(event).await;
        }
    }

    /// To be held by a request that changes the node, until it has ended.
    pub(super) fn writing(&self) -> Writing<'_> {
        Writing(self.unflushed())
    }

    /// A flush with its events. Those of the storage are raised, and a debugger makes it fail, only if there is
    /// something to make durable.
    pub(super) async fn flush_announced(&self) -> IoResult {
        self.event_below(Event::FlushToOs).await;
        if !self.unflushed().0.swap(false, Ordering::Relaxed) {
            return self.driver().flush().await;
        }
        self.event_below(Event::FlushToDisk).await;
        let result = self.flush_needed().await;
        if result.is_err() {
            self.unflushed().note();
        }
        result
    }

    async fn flush_needed(&self) -> IoResult {
        if let Some(debugger) = self.driver().debugger() {
            debugger.flushing().await?;
        }
        self.driver().flush().await
    }

    /// Boxed, so that the futures of code that raises events stay small.
    fn raise(&self, event: Event) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            if let Some(debugger) = self.driver().debugger() {
                debugger.raised(event).await;
            }
        })
    }

    /// The first node with a debugger from this one downwards.
    pub fn debugged(self: &Arc<Node>) -> Option<Arc<Node>> {
        match self.driver().debugger() {
            Some(_) => Some(self.clone()),
            None => debugged_below(self),
        }
    }
}

fn debugged_below(node: &Node) -> Option<Arc<Node>> {
    let mut below = node.primary();
    while let Some(node) = below {
        if node.driver().debugger().is_some() {
            return Some(node);
        }
        below = node.primary();
    }
    None
}
