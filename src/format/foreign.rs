//! Formats that there is no driver for. They are known by their first bytes alone, so that nobody
//! takes a container for the disk in it because the format was guessed.
//!
//! The rule: what QEMU 7.2 takes for one of these is one of these here; where its tests are narrower
//! than the format (a version, a kind), ours take the whole format. Not known are what has no mark at
//! its start (vpc images of fixed size, whose only mark is in their last sector) and LUKS version 2,
//! which QEMU takes for raw, too: guests make such disks.

use crate::block::registry::Foreign;

/// All of them.
pub static FOREIGN: &[Foreign] = &[
    // LUKS on-disk format, version 1.
    Foreign { name: "luks", probe: |head, _| magic(head, 0, b"LUKS\xba\xbe\0\x01") },
    Foreign { name: "parallels", probe: |head, _| parallels(head) },
    Foreign { name: "vmdk", probe: |head, _| vmdk(head) },
    // The copy of the footer that images of dynamic size begin with.
    Foreign { name: "vpc", probe: |head, _| magic(head, 0, b"conectix") },
];

/// The score for a magic number at an offset, in bytes.
fn magic(head: &[u8], at: usize, wanted: &[u8]) -> u32 {
    let found = head.get(at..).is_some_and(|head| head.starts_with(wanted));
    if found { 100 } else { 0 }
}

/// Both kinds; the second is for disks of more sectors than 32 bits count.
fn parallels(head: &[u8]) -> u32 {
    magic(head, 0, b"WithoutFreeSpace").max(magic(head, 0, b"WithouFreSpacExt"))
}

/// Sparse extents (hosted, and ESX's or VMware 3's), and text descriptors of disks in several files.
fn vmdk(head: &[u8]) -> u32 {
    let extent = magic(head, 0, b"KDMV").max(magic(head, 0, b"COWD"));
    extent.max(if is_descriptor(head) { 100 } else { 0 })
}

/// Whether this is the text of a vmdk descriptor: it begins with its title, or the first line that is
/// no comment is a version.
fn is_descriptor(head: &[u8]) -> bool {
    const TITLE: &[u8] = b"# Disk DescriptorFile";
    let titled = head.get(..TITLE.len()).is_some_and(|line| line.eq_ignore_ascii_case(TITLE));
    let mut lines = head.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    let versions: [&[u8]; 3] = [b"version=1", b"version=2", b"version=3"];
    titled || first.is_some_and(|line| versions.contains(&line))
}
