//! Filters: what changes how requests go, not what they say. One module and one entry in the list
//! each.

use crate::block::DriverEntry;

pub mod blkdebug;
pub mod compress;
pub mod copy_on_read;
pub mod preallocate;

/// All filters.
pub static LIST: &[&DriverEntry] =
    &[&blkdebug::ENTRY, &compress::ENTRY, &copy_on_read::ENTRY, &preallocate::ENTRY];
