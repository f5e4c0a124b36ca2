//! Virtqueues in the guest's memory.

pub mod split;

pub use split::{Addresses, Broken, MAX_SIZE, SplitRing};
