//! Filters, which change how requests are carried out: one module and one list entry each.

use crate::block::DriverEntry;

pub mod blkdebug;
pub mod compress;
pub mod copy_on_read;
pub mod preallocate;

/// All filters.
pub static LIST: &[&DriverEntry] =
    &[&blkdebug::ENTRY, &compress::ENTRY, &copy_on_read::ENTRY, &preallocate::ENTRY];
