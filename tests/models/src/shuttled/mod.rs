//! Epochs, with shuttle's primitives.

pub mod atomics;
#[path = "../../../../src/io/epoch.rs"]
pub mod epoch;
pub mod sync;
