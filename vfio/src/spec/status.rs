//! Status codes: their names, and their errno values (section 4.2.3; NVM, section 3.1.2.3).

use std::fmt;

/// What a command ended with: the Status Field of its completion without the phase, 15 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub u16);

impl Status {
    pub const SUCCESS: Status = Status(0);
    pub const INVALID_OPCODE: Status = Status(0x01);
    pub const INVALID_FIELD: Status = Status(0x02);
    pub const ID_CONFLICT: Status = Status(0x03);
    pub const TRANSFER_ERROR: Status = Status(0x04);
    pub const INTERNAL: Status = Status(0x06);
    pub const ABORTED: Status = Status(0x07);
    pub const QUEUE_DELETED: Status = Status(0x08);
    pub const INVALID_NAMESPACE: Status = Status(0x0b);
    pub const INVALID_SEGMENT: Status = Status(0x0d);
    pub const INVALID_DATA_LENGTH: Status = Status(0x0f);
    pub const INVALID_DESCRIPTOR: Status = Status(0x11);
    pub const INVALID_PRP: Status = Status(0x13);
    pub const INTERRUPTED: Status = Status(0x21);
    pub const OUT_OF_RANGE: Status = Status(0x80);
    pub const CAPACITY: Status = Status(0x81);
    pub const NOT_READY: Status = Status(0x82);
    pub const INVALID_QUEUE_ID: Status = Status(0x101);
    pub const INVALID_QUEUE_SIZE: Status = Status(0x102);
    pub const EVENT_LIMIT: Status = Status(0x105);
    pub const INVALID_LOG: Status = Status(0x109);
    pub const INVALID_QUEUE: Status = Status(0x10c);
    pub const WRITE_FAULT: Status = Status(0x280);
    pub const READ_ERROR: Status = Status(0x281);
    /// Not of the specification (vendor specific, 7C0h is its range): the driver gave up, because
    /// the controller is gone or was reset too often while it had the command.
    pub const GONE: Status = Status(0x7ff);

    /// Do Not Retry.
    pub const DNR: u16 = 1 << 14;

    pub fn is_ok(self) -> bool {
        self.code() == 0
    }

    /// Status code type and status code, as they are printed: `type << 8 | code`.
    pub fn code(self) -> u16 {
        self.0 & 0x7ff
    }

    /// Whether the same command is to be given again: the controller says that it may, and what was in
    /// its way passes.
    pub fn is_transient(self) -> bool {
        // Of the path related type 3 those that the host handles: asymmetric access in transition.
        let passes =
            matches!(self.code(), 0x07 | 0x08 | 0x1d | 0x21 | 0x82 | 0x303 | 0x360 | 0x370);
        self.0 & Status::DNR == 0 && passes
    }

    /// A positive errno value; zero for success.
    pub fn errno(self) -> i32 {
        match self.code() {
            0x00 => 0,
            0x01 => libc::EOPNOTSUPP,
            0x02 | 0x0b | 0x0d..=0x0f | 0x11..=0x13 => libc::EINVAL,
            0x15 | 0x16 | 0x286 => libc::EACCES,
            0x20 | 0x182 => libc::EROFS,
            0x81 => libc::ENOSPC,
            0x83 => libc::EBADE,
            0x282..=0x284 => libc::EILSEQ,
            0x7ff => libc::ENODEV,
            _ => libc::EIO,
        }
    }

    fn name(self) -> &'static str {
        match self.code() {
            0x00 => "success",
            0x01 => "invalid command opcode",
            0x02 => "invalid field in command",
            0x03 => "command ID conflict",
            0x04 => "data transfer error",
            0x05 => "aborted due to power loss notification",
            0x06 => "internal error",
            0x07 => "abort requested",
            0x08 => "aborted due to submission queue deletion",
            0x0b => "invalid namespace or format",
            0x0d => "invalid SGL segment descriptor",
            0x0e => "invalid number of SGL descriptors",
            0x0f => "invalid data SGL length",
            0x11 => "invalid SGL descriptor type",
            0x13 => "invalid PRP offset",
            0x15 => "operation denied",
            0x1d => "sanitize in progress",
            0x20 => "namespace is write protected",
            0x21 => "command interrupted",
            0x80 => "LBA out of range",
            0x81 => "capacity exceeded",
            0x82 => "namespace not ready",
            0x83 => "reservation conflict",
            0x84 => "format in progress",
            0x101 => "invalid queue identifier",
            0x102 => "invalid queue size",
            0x103 => "abort command limit exceeded",
            0x105 => "asynchronous event request limit exceeded",
            0x109 => "invalid log page",
            0x10c => "invalid queue deletion",
            0x180 => "conflicting attributes",
            0x182 => "attempted write to read-only range",
            0x183 => "command size limit exceeded",
            0x280 => "write fault",
            0x281 => "unrecovered read error",
            0x282 => "end-to-end guard check error",
            0x283 => "end-to-end application tag check error",
            0x284 => "end-to-end reference tag check error",
            0x285 => "compare failure",
            0x286 => "access denied",
            0x287 => "deallocated or unwritten logical block",
            0x7ff => "the controller is gone",
            _ => "",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            "" => write!(f, "status {:#x}", self.code()),
            name => write!(f, "{name} ({:#x})", self.code()),
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Status({self})")
    }
}
