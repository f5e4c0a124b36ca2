//! The product's small concurrent parts, compiled with the atomics and locks of a model checker.
//!
//! The files are the product's own. What they import from `crate::io` comes from here: loom's primitives for the
//! pieces of `cow`, because loom knows weak memory orders, and shuttle's for the epochs, because those are statics.
//! The tests in `tests/` say what must hold in every interleaving.

// The models use a part of each file, and each checker has its own copy of the list of waiting tasks.
#![allow(dead_code, clippy::duplicate_mod)]

pub mod cow;
pub mod fixture;
pub mod io;
pub mod shuttled;
