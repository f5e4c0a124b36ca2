//! The work of the image tools, without their command lines: opening images as people name them,
//! walking what is allocated, comparing, copying.
//!
//! * [`image`]: an image that a tool has open; `naming`: from what the user wrote to options of nodes.
//! * [`cache`]: the cache modes (`-t`, `-T`) and what they mean.
//! * `zeroes`: which sectors are zero.
//! * [`bench`]: how long requests take.
//! * [`compare`]: whether two disks have the same contents; [`copy`]: the copy engine.
//! * [`rebase`]: other backing files under an image; `chain`: images by layers.
//! * [`nvme`]: this machine's NVMe controllers, and who has them.
//! * [`progress`]: how far long work has come; [`output`]: where that is told.

pub mod bench;
pub mod cache;
pub mod chain;
pub mod compare;
pub mod copy;
pub mod image;
pub mod naming;
pub mod nvme;
pub mod output;
pub mod progress;
pub mod rebase;
mod zeroes;

pub use cache::Cache;
pub use image::{Images, Opened, Wanted};
pub use progress::Progress;
