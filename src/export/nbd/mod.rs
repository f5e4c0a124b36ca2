//! Disks for clients over NBD.
//!
//! * [`server`]: the listening sockets of the process, and its exports by name. [`address`]: where it listens.
//! * `handshake`: what is agreed on with a client before its requests. `offer`: what that needs of an export.
//! * `export`: a disk that is offered. `lanes`: its requests in flight, and their pause.
//! * `connection`: the requests of one client. `work`: what is done about each. `replies`: how they are answered.
//! * `contexts`: what block status tells of. `options`: how an export is configured.
//!
//! A connection is a task on one of the export's workers, and each of its requests is another. Data and replies go
//! through the worker's ring, so that no thread waits for a client. What a client makes us keep is bounded: requests
//! in flight by number and by bytes, options by length and by time.

pub mod address;
mod connection;
mod contexts;
mod export;
mod handshake;
mod lanes;
mod offer;
mod options;
mod replies;
pub mod server;
mod work;

pub use options::Options;
pub use server::{Server, ServerOptions};

use super::ExportEntry;

/// The type's place in the list of exports.
pub const ENTRY: ExportEntry =
    ExportEntry { name: "nbd", parse: options::parse, has_error_policies: false };
