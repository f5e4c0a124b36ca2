//! qcow2: the format of QEMU, versions 2 and 3, as `docs/interop/qcow2` specifies it.
//!
//! * [`layout`]: sizes, indices, table entries, refcounts, limits.
//! * [`header`], [`extensions`]: the first cluster.

pub mod extensions;
pub mod header;
pub mod layout;
