//! Health reports of a drive that a driver controls itself, for monitoring.

use std::sync::Arc;

/// A drive below a node.
pub trait Drive: Send + Sync {
    /// Names it among all of this process: its address.
    fn name(&self) -> String;

    /// What it has said last, if anything; has it asked again if that is old. Never waits for the drive.
    fn health(&self) -> Option<DriveHealth>;
}

/// A drive's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DriveHealth {
    /// Bits of what needs attention, as NVMe has them: spare low, temperature, unreliable, read-only,
    /// cache's backup.
    pub warnings: u8,
    pub celsius: i32,
    /// Percent of the expected life; may be over 100.
    pub used_percent: u8,
    /// Percent that is left, and what it should not fall below.
    pub spare_percent: u8,
    pub spare_threshold_percent: u8,
    /// Bytes, since the drive was made.
    pub bytes_read: u128,
    pub bytes_written: u128,
    pub media_errors: u128,
    pub unsafe_shutdowns: u128,
    /// Errors that its log has counted.
    pub logged_errors: u128,
}

impl super::Node {
    /// The drives below the node.
    pub fn drives(&self) -> Vec<Arc<dyn Drive>> {
        self.ask_all(|node| node.driver().drive())
    }
}
