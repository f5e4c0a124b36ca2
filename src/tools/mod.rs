//! The work of the image tools, without their command lines.
//!
//! It opens images as people name them, walks what is allocated, and compares. Copies are made by [`crate::copy`].
//!
//! * [`image`]: an image that a tool has open; `naming`: from what the user wrote to options of nodes.
//! * [`cache`]: the cache modes (`-t`, `-T`) and what they mean.
//! * [`bench`]: how long requests take.
//! * [`compare`]: whether two disks have the same contents.
//! * [`chain`]: images by layers.
//! * [`nvme`]: this machine's NVMe controllers, and their users.
//! * [`progress`]: progress of long work; [`output`]: printing.

pub mod bench;
pub mod cache;
pub mod chain;
pub mod compare;
pub mod image;
pub mod naming;
pub mod nvme;
pub mod output;
pub mod progress;

pub use cache::Cache;
pub use image::{Images, Opened, Wanted};
pub use progress::Progress;
