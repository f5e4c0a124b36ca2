//! Commands and completions as the queues store them (sections 3.3.3.1 and 3.3.3.2).

use super::Status;

/// Bytes of a submission queue entry.
pub const SQE: usize = 64;
/// Bytes of a completion queue entry.
pub const CQE: usize = 16;

/// Admin commands (section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AdminOpcode {
    /// 5.7
    DeleteSubmissionQueue = 0x00,
    /// 5.5
    CreateSubmissionQueue = 0x01,
    /// 5.16
    GetLogPage = 0x02,
    /// 5.6
    DeleteCompletionQueue = 0x04,
    /// 5.4
    CreateCompletionQueue = 0x05,
    /// 5.17
    Identify = 0x06,
    /// 5.1
    Abort = 0x08,
    /// 5.27
    SetFeatures = 0x09,
    /// 5.15
    GetFeatures = 0x0a,
    /// 5.2
    AsyncEvent = 0x0c,
}

/// I/O commands (NVM, section 3.2; flush is 7.1 of the base specification).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum IoOpcode {
    Flush = 0x00,
    Write = 0x01,
    Read = 0x02,
    Compare = 0x05,
    WriteZeroes = 0x08,
    DatasetManagement = 0x09,
}

/// Feature identifiers (5.27.1).
pub mod feature {
    /// 5.27.1.5
    pub const NUMBER_OF_QUEUES: u32 = 0x07;
    /// 5.27.1.8
    pub const ASYNC_EVENTS: u32 = 0x0b;
}

/// Log page identifiers (5.16.1).
pub mod log_page {
    /// 5.16.1.2
    pub const ERRORS: u8 = 0x01;
    /// 5.16.1.3
    pub const HEALTH: u8 = 0x02;
    /// 5.16.1.5
    pub const CHANGED_NAMESPACES: u8 = 0x04;
}

/// Force Unit Access, in the dword 12 of reads and writes.
pub const FUA: u32 = 1 << 30;
/// Deallocate, in the dword 12 of Write Zeroes.
pub const DEALLOCATE: u32 = 1 << 25;
/// Deallocate, in the dword 11 of Dataset Management.
pub const AD: u32 = 1 << 2;
/// Bytes of a range of Dataset Management (NVM, 3.2.3).
pub const RANGE: usize = 16;

/// A command: eight little-endian double words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Command(pub [u64; 8]);

impl Command {
    pub fn admin(opcode: AdminOpcode) -> Command {
        Command::new(opcode as u8, 0)
    }

    #[inline]
    pub fn new(opcode: u8, namespace: u32) -> Command {
        Command([u64::from(opcode) | u64::from(namespace) << 32, 0, 0, 0, 0, 0, 0, 0])
    }

    #[inline]
    pub fn with_id(mut self, id: u16) -> Command {
        self.0[0] = self.0[0] & !0xffff_0000 | u64::from(id) << 16;
        self
    }

    #[inline]
    pub fn with_namespace(mut self, namespace: u32) -> Command {
        self.0[0] = self.0[0] & 0xffff_ffff | u64::from(namespace) << 32;
        self
    }

    /// The first and second PRP entry.
    #[inline]
    pub fn with_data(mut self, first: u64, second: u64) -> Command {
        (self.0[3], self.0[4]) = (first, second);
        self
    }

    /// A scatter gather list instead (bits 7:6 of the flags: data only), by its first descriptor.
    #[inline]
    pub fn with_sgl(mut self, descriptor: [u64; 2]) -> Command {
        self.0[0] |= 1 << 14;
        (self.0[3], self.0[4]) = descriptor.into();
        self
    }

    /// Dword `n`, from 10 to 15.
    #[inline]
    pub fn with_dword(mut self, n: usize, value: u32) -> Command {
        let (at, shift) = (n / 2, n % 2 * 32);
        self.0[at] = self.0[at] & !(0xffff_ffff << shift) | u64::from(value) << shift;
        self
    }

    /// Where a transfer starts, and how many blocks (at least one, at most 65536) it has.
    #[inline]
    pub fn with_blocks(mut self, lba: u64, blocks: u32, dword12: u32) -> Command {
        self.0[5] = lba;
        self.0[6] = u64::from(blocks.wrapping_sub(1) & 0xffff | dword12);
        self
    }

    pub fn opcode(&self) -> u8 {
        self.0[0] as u8
    }

    pub fn id(&self) -> u16 {
        (self.0[0] >> 16) as u16
    }

    pub fn namespace(&self) -> u32 {
        (self.0[0] >> 32) as u32
    }

    /// Bits 7:6 of the flags: 0 for PRPs, 1 for a scatter gather list.
    pub fn sgl_kind(&self) -> u8 {
        (self.0[0] >> 14 & 3) as u8
    }

    pub fn dword(&self, n: usize) -> u32 {
        (self.0[n / 2] >> (n % 2 * 32)) as u32
    }

    /// The first and second PRP entry.
    pub fn data(&self) -> (u64, u64) {
        (self.0[3], self.0[4])
    }

    pub fn lba(&self) -> u64 {
        self.0[5]
    }

    pub fn blocks(&self) -> u32 {
        (self.0[6] as u32 & 0xffff) + 1
    }
}

/// A completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Dword 0: what the command says.
    pub result: u32,
    /// Submission queue entries up to this one have been fetched.
    pub head: u16,
    pub queue: u16,
    pub id: u16,
    pub phase: bool,
    pub status: Status,
}

impl Completion {
    #[inline]
    pub fn parse(dwords: [u32; 4]) -> Completion {
        Completion {
            result: dwords[0],
            head: dwords[2] as u16,
            queue: (dwords[2] >> 16) as u16,
            id: dwords[3] as u16,
            phase: dwords[3] >> 16 & 1 != 0,
            status: Status((dwords[3] >> 17) as u16),
        }
    }

    #[inline]
    pub fn dwords(&self) -> [u32; 4] {
        let status = u32::from(self.status.0) << 17 | u32::from(self.phase) << 16;
        [
            self.result,
            0,
            u32::from(self.head) | u32::from(self.queue) << 16,
            u32::from(self.id) | status,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_has_its_fields_where_the_specification_says() {
        let command = Command::new(IoOpcode::Write as u8, 0x0102_0304)
            .with_id(0xabcd)
            .with_data(0x1000, 0x2000)
            .with_blocks(0x1_0000_0007, 0x10000, FUA)
            .with_dword(13, 9);
        let mut bytes = [0; SQE];
        for (word, at) in command.0.iter().zip((0..).step_by(8)) {
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        assert_eq!(bytes[..8], [1, 0, 0xcd, 0xab, 4, 3, 2, 1]);
        assert_eq!(bytes[24..40], [0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[40..48], [7, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[48..56], [0xff, 0xff, 0, 0x40, 9, 0, 0, 0]);
        assert_eq!((command.id(), command.namespace()), (0xabcd, 0x0102_0304));
        assert_eq!((command.lba(), command.blocks()), (0x1_0000_0007, 0x10000));
    }

    #[test]
    fn a_completion_reads_as_it_was_written() {
        let status = Status(0x281 | Status::DNR);
        let completion =
            Completion { result: 7, head: 3, queue: 2, id: 0xfffe, phase: true, status };
        assert_eq!(Completion::parse(completion.dwords()), completion);
        assert_eq!(completion.dwords()[3] >> 16 & 1, 1, "the phase is bit 16 of dword 3");
    }
}
