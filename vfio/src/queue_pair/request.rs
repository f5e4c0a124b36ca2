//! Requests to a queue pair, and their completions.

#![forbid(unsafe_code)]

use crate::dma::Segments;
use crate::spec::{Command, Status};

/// Which way the data of a command goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    None,
    ToDevice,
    FromDevice,
}

/// What is asked of a controller: made by [`Namespace`](crate::Namespace).
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub(crate) command: Command,
    pub(crate) segments: Segments,
    /// Bytes of data.
    pub(crate) len: u32,
    pub(crate) direction: Direction,
    pub(crate) token: u64,
}

impl Request {
    /// The same request, with another token.
    pub fn with_token(self, token: u64) -> Request {
        Request { token, ..self }
    }

    pub(crate) fn without_data(command: Command, token: u64) -> Request {
        Request { command, segments: Segments::NONE, len: 0, direction: Direction::None, token }
    }
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// As the request had it.
    pub token: u64,
    pub status: Status,
}
