//! The features of a driver's images besides reading and writing.
//!
//! The driver's entry states them, so that they are known before an image is open. Each open driver must answer
//! accordingly: the conformance suite compares the two.

use super::{Error, Preallocation};

bitflags::bitflags! {
    /// What an image keeps or has done beside its disk.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u32 {
        /// It stores data compressed ([`Driver::compress`](super::Driver::compress)).
        const COMPRESSION = 1;
        /// It has internal snapshots ([`Image::snapshots`](super::Image::snapshots)).
        const SNAPSHOTS = 1 << 1;
        /// It keeps dirty bitmaps ([`Driver::bitmap_store`](super::Driver::bitmap_store)).
        const BITMAPS = 1 << 2;
        /// Its records can be checked ([`Image::check`](super::Image::check)).
        const CHECKS = 1 << 3;
        /// It keeps the state of a machine ([`Image::read_machine`](super::Image::read_machine)).
        const MACHINE_STATE = 1 << 4;
        /// What a check finds can be repaired.
        const REPAIRS = 1 << 5;
    }
}

impl Features {
    /// What people call them.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let names = [
            (Features::COMPRESSION, "compressed data"),
            (Features::SNAPSHOTS, "internal snapshots"),
            (Features::BITMAPS, "persistent bitmaps"),
            (Features::CHECKS, "checks"),
            (Features::REPAIRS, "repairs"),
            (Features::MACHINE_STATE, "state of a virtual machine"),
        ];
        names.into_iter().filter(move |&(feature, _)| self.contains(feature)).map(|(_, name)| name)
    }
}

/// How a disk gets another length ([`Image`](super::Image)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// Not at all.
    Never,
    /// As the node below does.
    Below,
    /// New space can be allocated in these ways, whether the disk grows or is new.
    Own(&'static [Preallocation]),
}

impl Growth {
    /// # Errors
    /// In QEMU's words: new space cannot be allocated so.
    pub fn check(self, mode: Preallocation) -> Result<(), Error> {
        match self {
            Growth::Own(modes) if !modes.contains(&mode) => Err(mode.unsupported()),
            _ => Ok(()),
        }
    }
}
