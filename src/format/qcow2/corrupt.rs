//! Corruption that is found while the image is in use: told once, in QEMU's words, and answered with
//! an error.
//!
//! It is fatal where going on could make it worse, in an image that is open for writing: the image is
//! marked in its header, durably, before the guest has its answer, and nothing is written any more;
//! reads go on, as they do for whoever opens a marked image read-only. Otherwise the request fails
//! that met it.

use super::Qcow2;
use super::header::Incompatible;
use super::layout::{BadEntry, L1Entry, L2Entry};
use super::overlap::Kinds;
use crate::block::{Corrupted, Notice, Notices};
use crate::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// What an open image knows of its corruption.
pub struct Corruption {
    notices: Arc<Notices>,
    /// A [`Level`].
    told: AtomicU8,
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
    pub fn new(notices: Arc<Notices>) -> Corruption {
        Corruption { notices, told: AtomicU8::new(0), is_marked: AtomicBool::new(false) }
    }

    /// Nothing is to be written any more.
    pub fn is_fatal(&self) -> bool {
        self.told.load(Ordering::Acquire) == Level::Fatal as u8
    }
}

impl Qcow2 {
    /// Gives the result of a request or an operation back. Before an error, sees to it that the header says
    /// what was found.
    pub(super) async fn marked<T, E>(&self, result: Result<T, E>) -> Result<T, E> {
        if result.is_err() && self.corruption.is_fatal() {
            self.mark_corrupt().await;
        }
        result
    }

    /// Marks a corrupt image as such, durably, unless that is done.
    pub(super) async fn mark_corrupt(&self) {
        if self.corruption.is_marked.load(Ordering::SeqCst) {
            return;
        }
        let mut header = self.header.current.lock().await;
        // Version 2 cannot say it.
        if header.version >= 3 && !self.corruption.is_marked.load(Ordering::SeqCst) {
            let mut new = header.clone();
            new.incompatible |= Incompatible::CORRUPT;
            // If it fails, the header is in doubt, and whoever comes next tries again.
            if self.write_header(&mut header, new).await.is_err() {
                return;
            }
        }
        self.corruption.is_marked.store(true, Ordering::SeqCst);
    }

    /// Tells of it, unless as much was told. `place`: offset and length in the file, in bytes.
    fn tell_corrupt(&self, is_fatal: bool, place: Option<(u64, u64)>, message: String) {
        let is_fatal = is_fatal && self.is_writable;
        let level = if is_fatal { Level::Fatal } else { Level::NotFatal } as u8;
        if self.corruption.told.fetch_max(level, Ordering::SeqCst) >= level {
            return;
        }
        let name = &self.name;
        log::error!("{name}: {}", line(is_fatal, &message));
        let node = name.clone();
        let corrupted = Corrupted { node, message, place, is_fatal };
        self.corruption.notices.tell(Notice::Corrupted(corrupted));
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
pub fn bad_entry(image: &Qcow2, guest: u64, entry: L2Entry, error: BadEntry) -> Errno {
    let place = entry_place(image, guest);
    match error {
        BadEntry::Reserved => reserved(image, &place),
        BadEntry::Unaligned => {
            let offset = entry.offset();
            fatal(image, format!("Cluster allocation offset {offset:#x} unaligned ({place})"))
        }
        // With two spaces, as QEMU has it.
        BadEntry::Bitmap => fatal(image, format!("Invalid cluster entry found  ({place})")),
    }
}

/// An L2 entry that makes no sense to a writer.
pub fn bad_entry_to_write(image: &Qcow2, guest: u64, entry: L2Entry, error: BadEntry) -> Errno {
    let place = entry_place(image, guest);
    match error {
        BadEntry::Reserved => reserved(image, &place),
        BadEntry::Unaligned => {
            let what = match entry.reads_zero() && !image.geometry.extended_l2 {
                true => "Preallocated zero cluster",
                false => "Data cluster",
            };
            let (offset, guest) = (entry.offset(), hex(guest));
            fatal(image, format!("{what} offset {offset:#x} unaligned (guest offset: {guest})"))
        }
        BadEntry::Bitmap => fatal(image, format!("Invalid cluster entry found ({place})")),
    }
}

/// A newer program may know what they mean.
fn reserved(image: &Qcow2, place: &str) -> Errno {
    not_fatal(image, format!("Cluster entry with reserved bits ({place})"))
}

fn entry_place(image: &Qcow2, guest: u64) -> String {
    let geometry = &image.geometry;
    let table = image.l1.get(geometry.l1_index(guest)).l2_table();
    format!("L2 offset: {table:#x}, L2 index: {}", hex(geometry.l2_index(guest)))
}

/// An L1 entry that names no place where an L2 table can be.
pub fn bad_l1(image: &Qcow2, guest: u64, entry: L1Entry) -> Errno {
    let index = hex(image.geometry.l1_index(guest));
    let table = entry.l2_table();
    match entry.has_reserved_bits() {
        true => not_fatal(image, format!("L1 entry with reserved bits (L1 index: {index})")),
        false => fatal(image, format!("L2 table offset {table:#x} unaligned (L1 index: {index})")),
    }
}

/// A table that is said to be where no file is.
pub fn outside(image: &Qcow2, what: &str, at: u64) -> Errno {
    fatal(image, format!("{what} offset {at:#x} past the end of the file"))
}

/// Guest data that is said to be where no file is.
pub fn data_outside(image: &Qcow2, what: &str, at: u64) -> Errno {
    not_fatal(image, format!("{what} offset {at:#x} past the end of the file"))
}

/// An entry of the refcount table that names no place where a block can be.
pub fn bad_refcount_table(image: &Qcow2, index: usize, entry: u64) -> Errno {
    fatal(image, unaligned_refcount_block(index, entry))
}

/// The text for an entry of the refcount table that names no place where a block can be.
pub fn unaligned_refcount_block(index: usize, entry: u64) -> String {
    format!("Refblock offset {entry:#x} unaligned (reftable index: {})", hex(index as u64))
}

/// A reference to a cluster that counts none.
pub fn bad_refcount(image: &Qcow2, cluster: u64) -> Errno {
    let offset = cluster << image.geometry.cluster_bits;
    not_fatal(image, format!("Cluster {offset:#x} is in use, but its refcount is 0"))
}

/// Something that would be written over metadata: `len` bytes at `offset` of the file.
pub fn overlaps(image: &Qcow2, offset: u64, len: u64, kind: Kinds) -> Errno {
    let message = format!("Preventing invalid write on metadata (overlaps with {})", kind.name());
    image.tell_corrupt(true, Some((offset, len)), message);
    Errno::EIO
}

/// A cluster that counts no references, but that an entry names: it would belong to two.
pub fn in_use(image: &Qcow2, cluster: u64) -> Errno {
    let size = image.geometry.cluster_size();
    let offset = cluster << image.geometry.cluster_bits;
    let message = format!("Preventing invalid allocation of cluster {offset:#x}, which is in use");
    image.tell_corrupt(true, Some((offset, size)), message);
    Errno::EIO
}

/// As C prints it: nothing before a zero.
fn hex(n: u64) -> String {
    if n == 0 { "0".to_owned() } else { format!("{n:#x}") }
}

fn fatal(image: &Qcow2, message: String) -> Errno {
    image.tell_corrupt(true, None, message);
    Errno::EIO
}

fn not_fatal(image: &Qcow2, message: String) -> Errno {
    image.tell_corrupt(false, None, message);
    Errno::EIO
}
