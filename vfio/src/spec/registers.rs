//! Controller properties (section 3.1.3) and doorbells (PCIe, section 3.1.2).

use std::time::Duration;

/// Controller Capabilities (3.1.3.1), 64 bits.
pub const CAP: usize = 0x00;
/// Version (3.1.3.2).
pub const VS: usize = 0x08;
/// Controller Configuration (3.1.3.5).
pub const CC: usize = 0x14;
/// Controller Status (3.1.3.6).
pub const CSTS: usize = 0x1c;
/// Admin Queue Attributes (3.1.3.8).
pub const AQA: usize = 0x24;
/// Admin Submission Queue Base Address (3.1.3.9), 64 bits.
pub const ASQ: usize = 0x28;
/// Admin Completion Queue Base Address (3.1.3.10), 64 bits.
pub const ACQ: usize = 0x30;
/// Controller Ready Timeouts (3.1.3.20).
pub const CRTO: usize = 0x68;
/// The first doorbell.
pub const DOORBELLS: usize = 0x1000;

/// Where the doorbells of queue `id` are: submission queue tail, completion queue head. `stride` is
/// CAP.DSTRD.
pub fn doorbells(id: u16, stride: u32) -> (usize, usize) {
    let step = 4 << stride;
    let pair = DOORBELLS + 2 * usize::from(id) * step;
    (pair, pair + step)
}

/// What CAP says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// The most entries of an I/O queue.
    pub fn max_entries(self) -> u32 {
        (self.0 as u32 & 0xffff) + 1
    }

    /// How long becoming ready or not ready may take (CAP.TO, half seconds).
    pub fn timeout(self) -> Duration {
        Duration::from_millis(500 * (self.0 >> 24 & 0xff))
    }

    /// Whether [`CRTO`] says it better (CAP.CRMS.CRWMS).
    pub fn has_ready_timeouts(self) -> bool {
        self.0 >> 59 & 1 != 0
    }

    pub fn doorbell_stride(self) -> u32 {
        (self.0 >> 32 & 0xf) as u32
    }

    /// Whether the NVM command set can be had (CAP.CSS).
    pub fn has_nvm_commands(self) -> bool {
        self.0 >> 37 & 1 != 0
    }

    /// Whether several command sets can be had, and Identify tells which (CAP.CSS bit 6).
    pub fn has_command_sets(self) -> bool {
        self.0 >> 43 & 1 != 0
    }

    /// The smallest and largest page sizes, as powers of two of bytes.
    pub fn page_shifts(self) -> (u32, u32) {
        (12 + (self.0 >> 48 & 0xf) as u32, 12 + (self.0 >> 52 & 0xf) as u32)
    }
}

/// CC.EN.
pub const ENABLE: u32 = 1;
/// CC.SHN: normal shutdown.
pub const SHUTDOWN: u32 = 1 << 14;
pub const SHUTDOWN_MASK: u32 = 3 << 14;

/// The configuration that enables a controller: pages of 2^`page_shift` bytes, submission queue entries
/// of 64 and completion queue entries of 16 bytes. `all_sets`: every command set that it has (CC.CSS =
/// 110b), without which namespaces of others than NVM are not shown at all.
pub fn enabled(page_shift: u32, all_sets: bool) -> u32 {
    let sets = if all_sets { 6 } else { 0 };
    ENABLE | sets << 4 | (page_shift - 12) << 7 | 6 << 16 | 4 << 20
}

/// CSTS.RDY.
pub const READY: u32 = 1;
/// CSTS.CFS: controller fatal status.
pub const FATAL: u32 = 1 << 1;
/// CSTS.SHST.
pub const SHUTDOWN_STATUS_MASK: u32 = 3 << 2;
pub const SHUTDOWN_COMPLETE: u32 = 2 << 2;
/// What a register reads as when the device is gone.
pub const GONE: u32 = u32::MAX;
