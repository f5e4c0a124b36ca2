//! The block layer: the contract between those who use disks (exports, tools, jobs) and those who
//! implement them (formats, filters, protocols).
//!
//! * [`node`]: what users hold. Checks, aligns, splits, orders.
//! * [`driver`]: what formats and protocols implement, and what they can rely on.
//! * [`child`], [`perm`]: the edges of the graph, and what each user may do.
//! * [`overlap`]: which writes wait for which.
//! * [`error`]: one line for whoever opened the disk.
//!
//! Nothing here names a format, a protocol or a transport.

pub mod child;
pub mod driver;
pub mod error;
pub mod node;
pub mod overlap;
pub mod perm;

pub use child::Child;
pub use driver::{
    Abilities, Access, Driver, Extent, Image, Leaf, LocalFuture, Locks, Mapping, Place, Precision,
    Status, Target, Traits, Transfer, WriteFlags, ZeroFlags,
};
pub use error::Error;
pub use node::{DetectZeroes, Node, NodeOptions, SECTOR};
pub use perm::{Perm, Perms};
