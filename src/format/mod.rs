//! Formats: what gives the bytes of a file a meaning. One module and one entry in the list each.

use crate::block::DriverEntry;

mod deflate;
pub mod foreign;
pub mod qcow;
pub mod qcow2;
pub mod qed;
pub mod raw;
pub mod vdi;

/// All formats.
pub static LIST: &[&DriverEntry] = &[
    &qcow::ENTRY,
    &qcow2::ENTRY,
    &qed::ENTRY,
    &raw::ENTRY,
    &vdi::ENTRY,
];
