//! Limits on the depth of a graph and the length of a backing chain.

use super::{Error, Role};

/// The greatest depth of a graph, not counting backing files, so that what a node does can recurse into the nodes
/// below it. Work on a chain of backing files does not recurse.
pub const DEPTH_LIMIT: usize = 64;
/// Most images in a backing chain.
pub const CHAIN_LIMIT: usize = 1000;

/// How far down a graph a node is opened.
#[derive(Clone, Copy)]
pub struct Depth {
    nodes: usize,
    /// Of the backing chain, so far.
    pub images: usize,
}

impl Depth {
    pub const TOP: Depth = Depth { nodes: 1, images: 1 };

    pub fn below(self, role: Role) -> Depth {
        match role.is_backing() {
            false => Depth { nodes: self.nodes + 1, ..self },
            true => Depth { images: self.images + 1, ..self },
        }
    }

    /// # Errors
    /// It is too far down.
    pub fn check(self) -> Result<(), Error> {
        if self.images > CHAIN_LIMIT {
            return Err(Error::new(format!("more than {CHAIN_LIMIT} images in the backing chain")));
        }
        match self.nodes > DEPTH_LIMIT {
            true => Err(Error::new(format!("more than {DEPTH_LIMIT} nodes deep"))),
            false => Ok(()),
        }
    }
}
