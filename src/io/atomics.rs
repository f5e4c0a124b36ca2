//! The atomics of the pieces that work without a lock. The models in `tests/models` compile those pieces with the
//! atomics of a model checker instead, so they import them from here.

pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
