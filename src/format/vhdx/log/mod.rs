//! The log of an image ([MS-VHDX] 2.3): a ring of entries that hold new contents of metadata, sector by sector.
//!
//! | file | it holds |
//! |---|---|
//! | `entry` | one entry, read and written |
//! | `replay` | which entries count, and their replay |
//! | `append` | changes of metadata that go through the log |

pub mod append;
mod entry;
pub mod replay;

/// Bytes of the unit that log and metadata are counted in here.
pub const SECTOR: u64 = 4096;
