//! The atomics of the lock-free parts.
//!
//! The models in `tests/models` compile those parts with the atomics of a model checker instead, so they import them
//! from here.

pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
