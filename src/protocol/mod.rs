//! Protocols: what reaches the bytes themselves. One module and one entry in the list each.

use crate::block::DriverEntry;

/// All protocols.
pub static LIST: &[&DriverEntry] = &[];
