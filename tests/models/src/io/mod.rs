//! The imports of those parts from `io`, made of loom's primitives.

pub mod atomics;
#[path = "../../../../src/io/errno.rs"]
mod errno;
pub mod pages;
pub mod sync;
pub mod task;

pub use errno::{Errno, IoResult};
