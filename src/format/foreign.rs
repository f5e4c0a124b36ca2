//! Formats without a driver here, recognised by their first bytes.
//!
//! They are known so that a guess does not take a container for the raw disk inside it.
//!
//! The rule: what QEMU 7.2 takes for one of these is one of these here; where its tests are narrower
//! than the format (a version, a kind), ours take the whole format. Not known is LUKS version 2,
//! which QEMU takes for raw, too: guests make such disks.

use crate::block::registry::Foreign;

/// All of them.
pub static FOREIGN: &[Foreign] = &[
    // LUKS on-disk format, version 1.
    Foreign { name: "luks", probe: |head, _| magic(head, 0, b"LUKS\xba\xbe\0\x01") },
];

/// The score for a magic number at an offset, in bytes.
fn magic(head: &[u8], at: usize, wanted: &[u8]) -> u32 {
    let found = head.get(at..).is_some_and(|head| head.starts_with(wanted));
    if found { 100 } else { 0 }
}
