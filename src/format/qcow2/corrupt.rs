//! Corruption that is found while the image is in use: said once, in QEMU's words, and answered with
//! an error.

use super::Qcow2;
use super::layout::{BadEntry, L1Entry};
use crate::io::Errno;

/// An L2 entry that makes no sense.
pub fn bad_entry(image: &Qcow2, guest: u64, error: BadEntry) -> Errno {
    let what = match error {
        BadEntry::Reserved => "has reserved bits set",
        BadEntry::Unaligned => "names a cluster that is not aligned",
        BadEntry::Bitmap => "has an invalid subcluster bitmap",
    };
    found(image, &format!("the L2 entry of guest offset {guest:#x} {what}"))
}

/// An L1 entry that names no place where an L2 table can be.
pub fn bad_l1(image: &Qcow2, guest: u64, entry: L1Entry) -> Errno {
    let index = image.geometry.l1_index(guest);
    found(image, &format!("L2 table offset {:#x} unaligned (L1 index: {index:#x})", entry.0))
}

/// Something that is said to be where no file is.
pub fn outside(image: &Qcow2, what: &str, at: u64) -> Errno {
    found(image, &format!("{what} at {at:#x} lies past the end of the file"))
}

/// An entry of the refcount table that names no place where a block can be.
pub fn bad_refcount_table(image: &Qcow2, index: usize, entry: u64) -> Errno {
    found(image, &format!("Refblock offset {entry:#x} unaligned (reftable index: {index:#x})"))
}

/// A reference to a cluster that counts none.
pub fn bad_refcount(image: &Qcow2, cluster: u64) -> Errno {
    let offset = cluster << image.geometry.cluster_bits;
    found(image, &format!("the cluster at {offset:#x} is in use, but its refcount is 0"))
}

/// A cluster that counts no references, but holds a table.
pub fn not_free(image: &Qcow2, what: &str) -> Errno {
    found(image, &format!("Preventing invalid allocation of a cluster that holds the {what}"))
}

/// A data cluster where a table is.
pub fn overlaps(image: &Qcow2, what: &str) -> Errno {
    found(image, &format!("Preventing invalid write on metadata (overlaps with {what})"))
}

fn found(image: &Qcow2, what: &str) -> Errno {
    image.signal_corruption(what);
    Errno::EIO
}
