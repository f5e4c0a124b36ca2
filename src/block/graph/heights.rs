//! The height of each node above the bottom of the graph.
//!
//! Each change of an edge updates the node above it and all its ancestors, so that limits hold for whole graphs and
//! walks over them know their order.

use crate::block::depth::{CHAIN_LIMIT, DEPTH_LIMIT};

/// What is below a node. Each number is that of the way down which has the most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Height {
    /// Edges. A node has more of them than any node below it.
    pub edges: usize,
    /// Edges to backing files.
    backing: usize,
    /// All other edges.
    inner: usize,
}

impl Height {
    /// The height of a node that stands on these: their own heights, and whether each is its backing file.
    pub fn over(children: impl Iterator<Item = (Height, bool)>) -> Height {
        children.fold(Height::default(), |most, (child, is_backing)| Height {
            edges: most.edges.max(child.edges + 1),
            backing: most.backing.max(child.backing + usize::from(is_backing)),
            inner: most.inner.max(child.inner + usize::from(!is_backing)),
        })
    }

    /// The error in a node of this height, if there is one.
    pub fn excess(&self) -> Option<String> {
        if self.backing >= CHAIN_LIMIT {
            return Some(format!("has more than {CHAIN_LIMIT} images in its backing chain"));
        }
        (self.inner >= DEPTH_LIMIT).then(|| format!("is more than {DEPTH_LIMIT} nodes deep"))
    }
}
