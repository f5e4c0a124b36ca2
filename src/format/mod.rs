//! Formats, which interpret the bytes of a file: one module and one list entry each.

use crate::block::DriverEntry;

pub mod bochs;
mod children;
mod chunks;
pub mod cloop;
mod deflate;
pub mod dmg;
pub mod luks;
pub mod parallels;
mod parent_name;
pub mod qcow;
pub mod qcow2;
pub mod qed;
pub mod raw;
mod read_only;
pub mod vdi;
pub mod vhdx;
pub mod vmdk;
pub mod vpc;

/// All formats.
pub static LIST: &[&DriverEntry] = &[
    &bochs::ENTRY,
    &cloop::ENTRY,
    &dmg::ENTRY,
    &luks::ENTRY,
    &parallels::ENTRY,
    &qcow::ENTRY,
    &qcow2::ENTRY,
    &qed::ENTRY,
    &raw::ENTRY,
    &vdi::ENTRY,
    &vhdx::ENTRY,
    &vmdk::ENTRY,
    &vpc::ENTRY,
];
