//! What a handshake needs of an export, and what it hands over to it.

use super::contexts::Context;
use super::server::Ticket;
use crate::io::Socket;
use crate::nbd::option::BlockSizes;
use crate::nbd::{ExportFlags, Headers};
use std::sync::Arc;

/// An export that clients can ask for.
pub(super) trait Offer: Send + Sync {
    fn name(&self) -> &str;

    /// For people. May be empty.
    fn description(&self) -> &str;

    /// In bytes.
    fn size(&self) -> u64;

    /// What it can do whatever is agreed on.
    fn flags(&self) -> ExportFlags;

    /// What its node likes to have.
    fn block_sizes(&self) -> BlockSizes;

    /// What block status can tell of it.
    fn contexts(&self) -> &[Context];

    /// Serves a client from now on.
    fn adopt(self: Arc<Self>, client: Client);
}

/// A client whose handshake is done.
pub(super) struct Client {
    pub socket: Arc<Socket>,
    pub headers: Headers,
    /// The numbers of contexts that block status is to tell of, in the order of [`Offer::contexts`].
    pub contexts: Vec<u32>,
    /// Its place among the connections of the server.
    pub ticket: Ticket,
}
