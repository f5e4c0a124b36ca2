//! Events: what a format, or a node itself, is about to do, told to a debugging filter below it
//! (blkdebug), which may make the operation fail or hold it up.
//!
//! A format raises one with [`Node::event`] on its file's node before the I/O that the event names.
//! As long as no debugging filter is open in the process, that is one look at a flag which nobody
//! writes. The fast road raises none: below a format, a debugging filter has no fast road.

use super::{LocalFuture, Node};
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::{self, StrDeserializer};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// A flush goes on to the storage.
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
    /// An event of a request. It goes on when the future is done.
    fn raised(&self, event: Event) -> LocalFuture<'_, ()>;

    /// The next request that raises `event` stops there, and is called `tag`.
    fn break_at(&self, event: Event, tag: &str, stopped: OnStop);

    /// Removes the breakpoints called `tag`, whether there were any, and lets requests that have stopped at
    /// such go on.
    fn remove_breaks(&self, tag: &str) -> bool;

    /// Lets a request called `tag` go on; whether there was one.
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
pub fn are_heard() -> bool {
    DEBUGGERS.load(Ordering::Relaxed) != 0
}

impl Node {
    /// Tells a debugging filter, this node or one below it, what is about to be done; waits as long
    /// as it wants.
    pub async fn event(&self, event: Event) {
        if are_heard() {
            self.raise(event).await;
        }
    }

    /// The events of a flush, which are of the file that the node stands on.
    pub(super) async fn flush_events(&self) {
        if are_heard()
            && let Some(file) = file_of(self)
        {
            file.raise(Event::FlushToOs).await;
            file.raise(Event::FlushToDisk).await;
        }
    }

    /// Boxed, so that the futures of those who raise events stay small.
    fn raise(&self, event: Event) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            if let Some(debugger) = self.driver().debugger() {
                return debugger.raised(event).await;
            }
            let mut below = file_of(self);
            while let Some(node) = below {
                if let Some(debugger) = node.driver().debugger() {
                    return debugger.raised(event).await;
                }
                below = file_of(&node);
            }
        })
    }

    /// The first node with a debugger from this one downwards.
    pub fn debugged(self: &Arc<Node>) -> Option<Arc<Node>> {
        let mut at = Some(self.clone());
        while let Some(node) = at {
            if node.driver().debugger().is_some() {
                return Some(node);
            }
            at = file_of(&node);
        }
        None
    }
}

fn file_of(node: &Node) -> Option<Arc<Node>> {
    let child = node.driver().children().iter().find(|child| child.role() == "file");
    child.map(|child| child.node())
}
