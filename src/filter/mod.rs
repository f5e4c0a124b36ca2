//! Filters: what changes how requests go, not what they say. One module and one entry in the list
//! each.

use crate::block::{DriverEntry, Node, WriteFlags};
use crate::io::{IoResult, IoVec};

pub mod blkdebug;
pub mod compress;
pub mod copy_on_read;
pub mod preallocate;

/// All filters.
pub static LIST: &[&DriverEntry] =
    &[&blkdebug::ENTRY, &compress::ENTRY, &copy_on_read::ENTRY, &preallocate::ENTRY];

/// Passes a read on. One that was rounded out to the alignment may end beyond the node's end; there
/// are zeroes.
async fn read_below(node: &Node, at: u64, into: &IoVec<'_>) -> IoResult {
    let len = into.len().min(node.len().saturating_sub(at));
    if len == into.len() {
        return node.read(at, into).await;
    }
    into.slice(len, into.len() - len).zero();
    node.read(at, &into.slice(0, len)).await
}

/// Passes a write on, but for what was rounded out beyond the node's end.
async fn write_below(node: &Node, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
    let len = from.len().min(node.len().saturating_sub(at));
    if len == from.len() || flags.contains(WriteFlags::GROW) {
        return node.write(at, from, flags).await;
    }
    node.write(at, &from.slice(0, len), flags).await
}
