//! The order in which an image's metadata and data reach the disk, stated once.
//!
//! A host crash may keep any subset of what was written since the last flush, torn at 512 bytes; a
//! killed process loses only what was not handed to the kernel. Whatever is left, no structure may
//! be corrupt (clusters may leak), and each sector of the disk holds what was last flushed or
//! something written since.
//!
//! * **Reserve**: clusters are taken out of the refcounts many at a time, and the refcounts are
//!   *durable* before the first of them is used ([`super::space`]). What a crash leaves of a
//!   reservation is leaked. What was reserved past the end of the file reads as zeroes, durably.
//! * **Leaked**: a kill leaves counted what was reserved, what was taken for requests under way, and what waited to be freed:
//!   one reservation, and the clusters of one flush. The header has a mark while the image is written ([`super::unclosed`]),
//!   so the next one that writes takes all of that back, however often it happens ([`super::space`]), but for what memory
//!   that outlives the process names: what the kernel has is *durable* before a count is lowered. Version 2 has no mark:
//!   there as much is leaked each time where no memory outlives the process, until a check gives it back.
//! * **Allocate**: the guest's data, and every byte that was copied or zeroed around it, is written;
//!   if the cluster does not already read, durably, as the disk did there (zeroes in fresh
//!   clusters), it is made *durable*; then the L2 entry is written; then the entry is shown to
//!   readers, and only then the guest is answered. Where there is memory that outlives the process, the
//!   entry is kept there, shown and answered first, and the rest follows ([`super::journal`]). So is an entry that
//!   shows more of a cluster that is the guest's already; one flush covers what all of them show.
//! * **Compressed**: the references to every host cluster that the stream touches are durable, and so
//!   is the stream, before the L2 entry ([`super::space`]).
//! * **Tables**: a new L2 table or refcount block is durable before the entry that names it. A table
//!   that moves is copied, made durable, named by one write of a sector, durable, and freed.
//! * **Free**: the entry that dropped the reference is durable before the refcount is lowered, and
//!   nothing that may still have I/O under way is reused or discarded ([`super::space`]). All that one flush covers is
//!   lowered together, and written before any of it is discarded.
//! * **Lazy refcounts**, if asked for: the dirty bit is durable before the first reservation, and
//!   reservations then need not be, unless the file becomes longer for them: a repair cannot make up for
//!   a table past the end of the file. An image's own lazy bit alone does not make them so: reserving
//!   many at once costs next to nothing, and leaves nothing to repair.
//! * **Snapshots**: while references are counted again, the dirty bit says that they may be wrong.
//!   *Made*: the refcounts of all that the disk refers to are raised and durable, then the COPIED
//!   flags are cleared, and these, the copy of the L1 table and the new snapshot table are durable
//!   before one write of the header names the table. *Deleted*: one write of the header names the
//!   table without it, durably, then refcounts are lowered, then flags are set where one reference is
//!   left. *Applied*: refcounts raised, durable; a new L1 table, durable; one write of the header names
//!   it, with the disk's size; then the references of the old one are given back. (Version 2 has no
//!   dirty bit: after a crash meanwhile flags and refcounts do not agree, as if by QEMU, until a
//!   repair; no data depends on it.)
//! * **Resizing**: what the disk's new length relies on is durable before the header that tells it
//!   ([`super::resize`]).
//! * **External data file**: it is flushed before the L2 entry that names what was copied to it.
//!
//! In memory: a change of the mapping of guest clusters holds their range ([`Ranges`](crate::cow::Ranges)), so
//! that allocations, zeroes and discards of one cluster take turns, and bits of subclusters are merged. A
//! request on the slow path that uses a host cluster is counted ([`Visits`](crate::cow::Visits)) until its I/O
//! has ended; one on the fast path has announced itself ([`crate::io::epoch`]).
