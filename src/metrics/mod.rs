//! Metrics in Prometheus's text format over HTTP.
//!
//! | file | it holds |
//! |---|---|
//! | `address` | where it is offered |
//! | `server` | the thread that answers |
//! | `http` | one request and its answer |
//! | `text` | the page |
//! | `parse` | reading such a page again |
//!
//! The rule held here: watching costs the guests nothing. One thread of its own reads the counters that
//! the workers write; it takes no lock that a request, a front end or a monitor waits for, and what
//! clients can make it keep is bounded.

mod address;
mod http;
mod parse;
mod server;
mod text;

pub use address::Address;
pub use parse::{Sample, parse};
pub use server::Server;
