//! Storage whose length changes by itself, such as a device, and its signal to the graph.
//!
//! The graph follows such a node ([`Graph::open`](super::Graph::open)): when the driver tells that the storage is
//! longer or shorter, the node's users are paused, its new length is adopted, and they are notified, as if somebody
//! had resized it.

use super::Signal;
use std::sync::Arc;

/// Of a driver whose storage has a length of its own.
pub trait OwnLength: Send + Sync {
    /// The signal by which an open driver reports changes.
    fn signal(&self) -> Arc<Signal>;

    /// The length that the storage has now, in bytes: what [`Driver::len`](super::Driver::len) told
    /// last, or another.
    fn found(&self) -> u64;

    /// From now on `len` tells what `found` does. No request is in flight on the node.
    fn take(&self);
}
