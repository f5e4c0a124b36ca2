//! Log pages (section 5.16.1).

use super::{Status, le};
use std::fmt;

/// SMART / Health Information (5.16.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// Critical Warning bits.
    pub warnings: u8,
    /// Kelvin.
    pub temperature: u16,
    /// Percent.
    pub spare: u8,
    pub spare_threshold: u8,
    /// Percent of the expected life; may be over 100.
    pub used: u8,
    /// Thousands of 512 bytes.
    pub units_read: u128,
    pub units_written: u128,
    pub power_cycles: u128,
    pub power_on_hours: u128,
    pub unsafe_shutdowns: u128,
    pub media_errors: u128,
    pub error_entries: u128,
}

impl Health {
    pub const LEN: usize = 512;

    pub fn parse(data: &[u8]) -> Health {
        let wide = |at| u128::from(le(data, at, 8)) | u128::from(le(data, at + 8, 8)) << 64;
        Health {
            warnings: le(data, 0, 1) as u8,
            temperature: le(data, 1, 2) as u16,
            spare: le(data, 3, 1) as u8,
            spare_threshold: le(data, 4, 1) as u8,
            used: le(data, 5, 1) as u8,
            units_read: wide(32),
            units_written: wide(48),
            power_cycles: wide(112),
            power_on_hours: wide(128),
            unsafe_shutdowns: wide(144),
            media_errors: wide(160),
            error_entries: wide(176),
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let celsius = i32::from(self.temperature) - 273;
        write!(
            f,
            "{celsius} C, {}% used, {}% spare (of {}% at least), {} media errors, {} unsafe shutdowns, \
             warnings {:#x}",
            self.used,
            self.spare,
            self.spare_threshold,
            self.media_errors,
            self.unsafe_shutdowns,
            self.warnings
        )
    }
}

/// An entry of the Error Information log (5.16.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorEntry {
    /// Counts all errors of the controller's life, from 1 on.
    pub number: u64,
    pub queue: u16,
    pub command: u16,
    pub status: Status,
    /// The first block that the error is about.
    pub lba: u64,
    pub namespace: u32,
}

impl ErrorEntry {
    pub const LEN: usize = 64;

    /// The entries of a log page, newest first as the controller has them; places that hold none are
    /// left out.
    pub fn parse_all(data: &[u8]) -> Vec<ErrorEntry> {
        let entries = data.chunks_exact(ErrorEntry::LEN).map(|data| ErrorEntry {
            number: le(data, 0, 8),
            queue: le(data, 8, 2) as u16,
            command: le(data, 10, 2) as u16,
            // Bit 0 is the phase.
            status: Status((le(data, 12, 2) >> 1) as u16),
            lba: le(data, 16, 8),
            namespace: le(data, 24, 4) as u32,
        });
        entries.filter(|entry| entry.number > 0).collect()
    }
}

impl fmt::Display for ErrorEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ErrorEntry { number, queue, namespace, lba, status, .. } = self;
        write!(f, "error {number}: queue {queue}, namespace {namespace}, block {lba}: {status}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_is_where_the_specification_says() {
        let mut data = [0; Health::LEN];
        data[0] = 0x04;
        data[1..3].copy_from_slice(&311u16.to_le_bytes());
        data[3..6].copy_from_slice(&[97, 10, 3]);
        data[32] = 5;
        data[48] = 7;
        data[144] = 2;
        data[160] = 9;
        data[176] = 4;
        let health = Health::parse(&data);
        assert_eq!((health.units_read, health.units_written), (5, 7));
        assert_eq!(health.error_entries, 4);
        assert_eq!(
            health.to_string(),
            "38 C, 3% used, 97% spare (of 10% at least), 9 media errors, 2 unsafe shutdowns, warnings 0x4"
        );
    }

    #[test]
    fn errors_are_read_and_empty_places_are_not() {
        let mut data = [0; 4 * ErrorEntry::LEN];
        data[64] = 3;
        data[72] = 1;
        data[76..78].copy_from_slice(&(0x281u16 << 1 | 1).to_le_bytes());
        data[80] = 200;
        data[88] = 1;
        let entries = ErrorEntry::parse_all(&data);
        let lines: Vec<_> = entries.iter().map(ErrorEntry::to_string).collect();
        assert_eq!(
            lines,
            ["error 3: queue 1, namespace 1, block 200: unrecovered read error (0x281)"]
        );
        assert_eq!(ErrorEntry::parse_all(&[0xff; 100]).len(), 1, "what is cut off is left out");
    }

    #[test]
    fn whatever_a_page_holds_is_shown_in_one_line_each() {
        for byte in 0..=255 {
            for len in [0, 1, 63, 64, 511, 512, 4096] {
                let page = vec![byte; len];
                assert!(!Health::parse(&page).to_string().contains('\n'));
                for entry in ErrorEntry::parse_all(&page) {
                    assert!(!entry.to_string().contains('\n'));
                }
            }
        }
    }
}
