//! The integration tests: one binary, one module per subject, all driving the built `vublk` from
//! outside.

mod disks;
mod fast_road;
mod guest;
mod node;
