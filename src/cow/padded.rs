//! Reads from files that may be shorter than what is asked for.

use crate::block::Node;
use crate::io::{IoResult, IoVec};

/// Reads from a node; what lies past its end reads as zeroes.
pub async fn read_padded(node: &Node, at: u64, into: &IoVec<'_>) -> IoResult {
    let there = into.len().min(node.len().saturating_sub(at));
    if there == into.len() {
        return node.read(at, into).await;
    }
    into.slice(there, into.len() - there).zero();
    match there {
        // Nothing of it is inside.
        0 => Ok(()),
        _ => node.read(at, &into.slice(0, there)).await,
    }
}
