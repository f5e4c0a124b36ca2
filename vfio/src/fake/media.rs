//! A namespace of the fake controller, and what I/O commands do to it.

use crate::spec::command::{DEALLOCATE, RANGE};
use crate::spec::{Command, IoOpcode, Status};

/// What the bytes of a namespace are kept in.
#[derive(Clone, Debug)]
pub enum MediaKind {
    Memory(Vec<u8>),
    /// Nothing: writes are forgotten and reads leave memory alone. For measuring the driver.
    Null,
}

/// A namespace.
#[derive(Clone, Debug)]
pub struct Media {
    pub kind: MediaKind,
    pub blocks: u64,
    pub block_shift: u32,
    /// Bytes with each block.
    pub metadata: u16,
    /// Command set.
    pub set: u8,
    pub flushes: u64,
}

impl Media {
    /// A disk of zeroes, `len` bytes long.
    pub fn new(len: u64, block_shift: u32) -> Media {
        let kind = MediaKind::Memory(vec![0; len as usize]);
        let blocks = len >> block_shift;
        Media { kind, blocks, block_shift, metadata: 0, set: 0, flushes: 0 }
    }

    pub fn null(len: u64, block_shift: u32) -> Media {
        Media { kind: MediaKind::Null, ..Media::new(0, block_shift) }
            .with_blocks(len >> block_shift)
    }

    pub fn with_blocks(mut self, blocks: u64) -> Media {
        self.set_blocks(blocks);
        self
    }

    pub fn set_blocks(&mut self, blocks: u64) {
        self.blocks = blocks;
        if let MediaKind::Memory(bytes) = &mut self.kind {
            bytes.resize((blocks << self.block_shift) as usize, 0);
        }
    }

    /// The bytes that a command with a range is about.
    pub fn range(&self, command: &Command) -> Result<(usize, usize), Status> {
        let (lba, blocks) = (command.lba(), u64::from(command.blocks()));
        match lba.checked_add(blocks) {
            Some(end) if end <= self.blocks => {
                let shift = self.block_shift;
                Ok(((lba << shift) as usize, (blocks << shift) as usize))
            }
            _ => Err(Status::OUT_OF_RANGE),
        }
    }

    pub fn part(&mut self, at: usize, len: usize) -> Option<&mut [u8]> {
        match &mut self.kind {
            MediaKind::Memory(bytes) => bytes.get_mut(at..at.checked_add(len)?),
            MediaKind::Null => None,
        }
    }

    /// Does a command that moves no data.
    pub fn run(&mut self, command: &Command) -> Status {
        if command.opcode() == IoOpcode::Flush as u8 {
            self.flushes += 1;
            return Status::SUCCESS;
        }
        if command.opcode() != IoOpcode::WriteZeroes as u8 {
            return Status::INVALID_OPCODE;
        }
        match self.range(command) {
            Ok((at, len)) => {
                let _ = command.dword(12) & DEALLOCATE;
                if let Some(part) = self.part(at, len) {
                    part.fill(0);
                }
                Status::SUCCESS
            }
            Err(status) => status,
        }
    }

    /// Deallocates what Dataset Management's `ranges` name. Those blocks then read as zeroes.
    pub fn deallocate(&mut self, ranges: &[u8]) -> Status {
        for range in ranges.chunks_exact(RANGE) {
            let number = |at: usize, len: usize| {
                range[at..at + len].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte))
            };
            let (blocks, lba) = (number(4, 4), number(8, 8));
            let Some(end) = lba.checked_add(blocks).filter(|&end| end <= self.blocks) else {
                return Status::OUT_OF_RANGE;
            };
            let shift = self.block_shift;
            let (at, len) = ((lba << shift) as usize, ((end - lba) << shift) as usize);
            if let Some(part) = self.part(at, len) {
                part.fill(0);
            }
        }
        Status::SUCCESS
    }
}
