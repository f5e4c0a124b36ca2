//! The integration tests: one binary, one module per subject, most driving the built `vublk`.

mod backing;
mod bitmaps;
mod cli;
mod conformance;
mod copying;
mod crash;
mod disks;
mod docs;
mod failing;
mod fast_path;
mod file;
mod filter;
mod flat;
mod formats;
mod guest;
mod layer;
mod luks;
mod metrics;
mod model;
mod monitor;
mod namespace;
mod nbd;
mod nbd_client;
mod node;
mod nvme;
mod nvme_fake;
mod package;
mod qcow;
mod qcow2;
mod qcow2_format;
mod threads;
mod tools;
mod vhost_user;

// Under the name by which it is known where these files are part of another program.
use monitor::client;
