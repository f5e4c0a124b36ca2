//! The driver side of vhost-user-blk, in process and without a virtual machine, for tests and load.
//!
//! | module | holds |
//! |---|---|
//! | [`spec`] | numbers and layouts of the virtio and vhost-user specifications |
//! | [`memory`] | "guest" memory: memfd regions shared with the server, and an allocator in them |
//! | [`frontend`] | the vhost-user conversation: negotiation, memory, queue start and stop, config |
//! | [`message`] | vhost-user messages by hand, for what a well-behaved front end never sends |
//! | [`ring`] | the driver side of a split virtqueue, with raw access for malformed chains |
//! | [`request`] | block requests and the ways to cut them into descriptors |
//! | [`blk`] | a disk: connection, queues, and requests that are sent, waited for and checked |
//! | [`dirty_log`] | the log of pages that the device has written, for live migration |
//! | [`process`] | server processes: started, awaited, measured, ended |
//! | [`seccomp`] | a host without io_uring |
//! | [`nbd`] | an NBD server, good or hostile |
//!
//! A test that wants a working disk starts with [`blk::Disk::open`]; one that wants to break the
//! protocol starts with [`frontend::Connection`] and [`ring::DriverRing`]. Every wait has a bound.

pub mod blk;
pub mod dirty_log;
mod error;
pub mod frontend;
pub mod memory;
pub mod message;
pub mod nbd;
pub mod process;
pub mod request;
pub mod ring;
pub mod seccomp;
pub mod spec;
mod watchdog;

pub use blk::{Disk, Options, Queue};
pub use dirty_log::DirtyLog;
pub use error::{Error, Result};
pub use frontend::Connection;
pub use memory::{Memory, MemoryLayout};
pub use process::Server;
pub use request::{Cut, Placement, Request, Segment, Shape};
