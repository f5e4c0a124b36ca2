//! The filters, each over files beside the real programs and over simulated disks.

mod blkdebug;
mod copy_on_read;
mod preallocate;
