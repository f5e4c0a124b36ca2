//! Corruption found while the image is in use: reported once, in QEMU's words, and an error from then on.
//!
//! It is fatal where going on could make it worse, in an image that is open for writing: the image is marked in its
//! header, durably, before the guest has its answer, and nothing is written any more; reads continue, as they do in
//! a marked image that is opened read-only. Otherwise only the request that found it fails.

use super::header::Incompatible;
use super::layout::{BadEntry, L1Entry, L2Entry};
use super::metadata::Metadata;
use super::overlap::Kinds;
use crate::block::{Corrupted, Notice, Notices};
use crate::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// What an open image knows of its corruption.
pub struct Corruption {
    /// The node's name, for what is logged and told.
    name: String,
    /// The image is open for writing.
    is_writable: bool,
    notices: Arc<Notices>,
    /// A [`Level`].
    reported: AtomicU8,
    /// The header says so, or is not to.
    is_marked: AtomicBool,
}

/// What was told.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    NotFatal = 1,
    Fatal,
}

impl Corruption {
    pub fn new(name: &str, is_writable: bool, notices: Arc<Notices>) -> Corruption {
        Corruption {
            name: name.to_owned(),
            is_writable,
            notices,
            reported: AtomicU8::new(0),
            is_marked: AtomicBool::new(false),
        }
    }

    /// The node's name, for what is logged.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Nothing is to be written any more.
    pub fn is_fatal(&self) -> bool {
        self.reported.load(Ordering::Acquire) == Level::Fatal as u8
    }

    fn fatal(&self, message: String) -> Errno {
        self.report(true, None, message)
    }

    fn not_fatal(&self, message: String) -> Errno {
        self.report(false, None, message)
    }

    /// Tells of it, unless as much was told. `place`: offset and length in the file, in bytes.
    fn report(&self, is_fatal: bool, place: Option<(u64, u64)>, message: String) -> Errno {
        let is_fatal = is_fatal && self.is_writable;
        let level = if is_fatal { Level::Fatal } else { Level::NotFatal } as u8;
        if self.reported.fetch_max(level, Ordering::SeqCst) < level {
            let name = &self.name;
            log::error!("{name}: {}", line(is_fatal, &message));
            let node = name.clone();
            let corrupted = Corrupted { node, message, place, is_fatal };
            self.notices.notify(Notice::Corrupted(corrupted));
        }
        Errno::EIO
    }
}

impl Metadata<'_> {
    /// Marks a corrupt image as such, durably, unless that is done.
    pub async fn mark_corrupt(self) {
        let is_marked = &self.corruption.is_marked;
        if is_marked.load(Ordering::SeqCst) {
            return;
        }
        let mut header = self.lock_header().await;
        // Version 2 cannot say it.
        if header.version >= 3 && !is_marked.load(Ordering::SeqCst) {
            let mut new = header.clone();
            new.incompatible |= Incompatible::CORRUPT;
            // If it fails, the header is in doubt, and the next task tries again.
            if header.write(new).await.is_err() {
                return;
            }
        }
        is_marked.store(true, Ordering::SeqCst);
    }
}

/// How it is told.
pub fn line(is_fatal: bool, message: &str) -> String {
    match is_fatal {
        true => format!(
            "qcow2: Marking image as corrupt: {message}; further corruption events will be \
             suppressed"
        ),
        false => format!(
            "qcow2: Image is corrupt: {message}; further non-fatal corruption events will be \
             suppressed"
        ),
    }
}

/// An L2 entry that makes no sense to a reader.
pub fn bad_entry(image: Metadata<'_>, guest: u64, entry: L2Entry, error: BadEntry) -> Errno {
    let place = entry_place(image, guest);
    match error {
        BadEntry::Reserved => reserved(image, &place),
        BadEntry::Unaligned => {
            let offset = entry.offset();
            image
                .corruption
                .fatal(format!("Cluster allocation offset {offset:#x} unaligned ({place})"))
        }
        // With two spaces, as QEMU has it.
        BadEntry::Bitmap => {
            image.corruption.fatal(format!("Invalid cluster entry found  ({place})"))
        }
    }
}

/// An L2 entry that makes no sense to a writer.
pub fn bad_entry_to_write(
    image: Metadata<'_>,
    guest: u64,
    entry: L2Entry,
    error: BadEntry,
) -> Errno {
    let place = entry_place(image, guest);
    match error {
        BadEntry::Reserved => reserved(image, &place),
        BadEntry::Unaligned => {
            let what = match entry.reads_zero() && !image.geometry.extended_l2 {
                true => "Preallocated zero cluster",
                false => "Data cluster",
            };
            let (offset, guest) = (entry.offset(), hex(guest));
            image
                .corruption
                .fatal(format!("{what} offset {offset:#x} unaligned (guest offset: {guest})"))
        }
        BadEntry::Bitmap => {
            image.corruption.fatal(format!("Invalid cluster entry found ({place})"))
        }
    }
}

/// A newer program may know what they mean.
fn reserved(image: Metadata<'_>, place: &str) -> Errno {
    image.corruption.not_fatal(format!("Cluster entry with reserved bits ({place})"))
}

fn entry_place(image: Metadata<'_>, guest: u64) -> String {
    let geometry = image.geometry;
    let table = image.mapping.l1_of(guest).l2_table();
    format!("L2 offset: {table:#x}, L2 index: {}", hex(geometry.l2_index(guest)))
}

/// An L1 entry that names no place where an L2 table can be.
pub fn bad_l1(image: Metadata<'_>, guest: u64, entry: L1Entry) -> Errno {
    let index = hex(image.geometry.l1_index(guest));
    let table = entry.l2_table();
    match entry.has_reserved_bits() {
        true => {
            image.corruption.not_fatal(format!("L1 entry with reserved bits (L1 index: {index})"))
        }
        false => image
            .corruption
            .fatal(format!("L2 table offset {table:#x} unaligned (L1 index: {index})")),
    }
}

/// A table that is said to be where no file is.
pub fn outside(image: Metadata<'_>, what: &str, at: u64) -> Errno {
    image.corruption.fatal(format!("{what} offset {at:#x} past the end of the file"))
}

/// Guest data that is said to be where no file is.
pub fn data_outside(image: Metadata<'_>, what: &str, at: u64) -> Errno {
    image.corruption.not_fatal(format!("{what} offset {at:#x} past the end of the file"))
}

/// An entry of the refcount table that names no place where a block can be.
pub fn bad_refcount_table(image: Metadata<'_>, index: usize, entry: u64) -> Errno {
    image.corruption.fatal(unaligned_refcount_block(index, entry))
}

/// The text for an entry of the refcount table that names no place where a block can be.
pub fn unaligned_refcount_block(index: usize, entry: u64) -> String {
    format!("Refblock offset {entry:#x} unaligned (reftable index: {})", hex(index as u64))
}

/// A reference to a cluster that counts none.
pub fn bad_refcount(image: Metadata<'_>, cluster: u64) -> Errno {
    let offset = cluster << image.geometry.cluster_bits;
    image.corruption.not_fatal(format!("Cluster {offset:#x} is in use, but its refcount is 0"))
}

/// Something that would be written over metadata: `len` bytes at `offset` of the file.
pub fn overlaps(image: Metadata<'_>, offset: u64, len: u64, kind: Kinds) -> Errno {
    let message = format!("Preventing invalid write on metadata (overlaps with {})", kind.name());
    image.corruption.report(true, Some((offset, len)), message)
}

/// A cluster that counts no references, but that an entry names: it would belong to two.
pub fn in_use(image: Metadata<'_>, cluster: u64) -> Errno {
    let size = image.geometry.cluster_size();
    let offset = cluster << image.geometry.cluster_bits;
    let message = format!("Preventing invalid allocation of cluster {offset:#x}, which is in use");
    image.corruption.report(true, Some((offset, size)), message)
}

/// As C prints it: nothing before a zero.
fn hex(n: u64) -> String {
    if n == 0 { "0".to_owned() } else { format!("{n:#x}") }
}
