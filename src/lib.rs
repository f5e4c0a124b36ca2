//! vublk: a userspace storage backend for virtual machines.
//!
//! A request goes from a guest's virtqueue through a graph of block nodes down to a file:
//!
//! ```text
//! guest RAM ─ virtqueues ─▶ export ─▶ block (format nodes ▶ filters ▶ protocol nodes) ─▶ io_uring
//! ```
//!
//! * [`io`]: the engine: workers, rings, tasks.
//! * [`block`]: the contract between disks' users and their implementations.
//! * [`cow`]: the layer for formats that map clusters through tables.
//! * [`crypto`]: ciphers and secrets for formats that are encrypted.
//! * [`format`], [`filter`], [`protocol`]: the implementations; [`drivers`] joins them to one registry.
//! * [`copy`]: the copy engine: the contents of disks to another disk.
//! * [`job`]: long work on disks in the background.
//! * [`export`]: transports on one core: vhost-user-blk.
//! * [`service`]: what one process serves; [`cli`]: the command lines that say so, [`monitor`]: QMP.
//! * [`metrics`]: figures of a service for monitoring.
//! * [`tools`]: the work of the image tools, without their command lines.
//! * [`sandbox`]: what the process gives up when it has started.
//! * [`nbd`]: the NBD protocol as bytes, for both sides.
//! * [`options`]: every source of options as one tree, and the typed interface to it.
//!
//! Arrows go one way: `cli → monitor → service → export → block → io`, `service → job → copy`, `cli → tools → copy → block`,
//! `format → cow → block`, `filter, protocol → block, io`. A test reads the `use` lines and holds this.

// The standard macros panic where they cannot print; `tools::output` has others.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod block;
pub mod cli;
pub mod copy;
pub mod cow;
pub mod crypto;
pub mod drivers;
pub mod export;
pub mod filter;
pub mod format;
pub mod io;
pub mod job;
pub mod metrics;
pub mod monitor;
pub mod nbd;
pub mod options;
pub mod protocol;
pub mod sandbox;
pub mod service;
pub mod tools;
