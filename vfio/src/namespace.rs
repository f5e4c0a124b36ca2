//! A namespace: a disk of a controller, and the commands on it.

#![forbid(unsafe_code)]

use crate::dma::Segments;
use crate::queue_pair::{Direction, Request};
use crate::spec::command::{AD, DEALLOCATE, FUA};
use crate::spec::identify::NamespaceIdentity;
use crate::spec::{Command, IoOpcode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An open namespace. Ranges of its requests are in bytes, multiples of the block size.
#[derive(Clone, Debug)]
pub struct Namespace {
    id: u32,
    identity: NamespaceIdentity,
    limits: Limits,
    /// Blocks; changes when the namespace does.
    blocks: Arc<AtomicU64>,
}

/// The most bytes of one command; zero where there is no such command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub transfer: u32,
    pub zero: u64,
    pub discard: u64,
}

impl Namespace {
    pub(crate) fn new(
        id: u32,
        identity: NamespaceIdentity,
        limits: Limits,
        blocks: Arc<AtomicU64>,
    ) -> Namespace {
        Namespace { id, identity, limits, blocks }
    }

    pub fn id(&self) -> u32 {
        self.id
    }

    pub fn identity(&self) -> &NamespaceIdentity {
        &self.identity
    }

    /// 512 or 4096 bytes.
    pub fn block_size(&self) -> u32 {
        1 << self.identity.block_shift
    }

    /// Bytes. Follows the namespace when the controller says that it has changed.
    pub fn len(&self) -> u64 {
        self.blocks.load(Ordering::Acquire) << self.identity.block_shift
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    #[inline]
    fn transfer(&self, opcode: IoOpcode, at: u64, len: u32, dword12: u32) -> Command {
        let shift = self.identity.block_shift;
        Command::new(opcode as u8, self.id).with_blocks(at >> shift, len >> shift, dword12)
    }

    /// Reads `len` bytes, at most [`Limits::transfer`].
    #[inline]
    pub fn read(&self, at: u64, len: u32, into: Segments, token: u64) -> Request {
        let command = self.transfer(IoOpcode::Read, at, len, 0);
        Request { command, segments: into, len, direction: Direction::FromDevice, token }
    }

    /// Writes `len` bytes, at most [`Limits::transfer`]. `durable`: on stable storage when it is done.
    #[inline]
    pub fn write(&self, at: u64, len: u32, from: Segments, durable: bool, token: u64) -> Request {
        let command = self.transfer(IoOpcode::Write, at, len, if durable { FUA } else { 0 });
        Request { command, segments: from, len, direction: Direction::ToDevice, token }
    }

    /// Makes everything written before durable.
    pub fn flush(&self, token: u64) -> Request {
        Request::without_data(Command::new(IoOpcode::Flush as u8, self.id), token)
    }

    /// Makes `len` bytes, at most [`Limits::zero`], read as zeroes.
    pub fn zero(&self, at: u64, len: u64, unmap: bool, durable: bool, token: u64) -> Request {
        let shift = self.identity.block_shift;
        let mut flags = if durable { FUA } else { 0 };
        if unmap && self.identity.zeroes_deallocate {
            flags |= DEALLOCATE;
        }
        let command = Command::new(IoOpcode::WriteZeroes as u8, self.id).with_blocks(
            at >> shift,
            (len >> shift) as u32,
            flags,
        );
        Request::without_data(command, token)
    }

    /// The range of a discard of `len` bytes, at most [`Limits::discard`], as the controller reads it:
    /// what `ranges` of [`Namespace::discard`] holds.
    pub fn discard_range(&self, at: u64, len: u64) -> [u64; 2] {
        let shift = self.identity.block_shift;
        [(len >> shift) << 32, at >> shift]
    }

    /// Deallocates the `count` (at most 256) ranges in `ranges`.
    pub fn discard(&self, ranges: Segments, count: u32, token: u64) -> Request {
        let command = Command::new(IoOpcode::DatasetManagement as u8, self.id)
            .with_dword(10, count.wrapping_sub(1) & 0xff)
            .with_dword(11, AD);
        let len = count * crate::spec::command::RANGE as u32;
        Request { command, segments: ranges, len, direction: Direction::ToDevice, token }
    }
}
