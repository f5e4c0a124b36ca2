//! Protocols, which access storage itself: one module and one list entry each.

pub mod file;
pub mod nbd;
pub mod null;
pub mod nvme;
pub mod sim;

use crate::block::DriverEntry;

/// All protocols.
pub static LIST: &[&DriverEntry] =
    &[&file::FILE, &file::HOST_DEVICE, &null::CO, &null::AIO, &nbd::ENTRY, &nvme::ENTRY];
