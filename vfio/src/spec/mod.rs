//! Layouts and numbers of registers, commands and data structures; no behaviour.
//!
//! Sections are of the NVM Express Base Specification 2.0; "NVM" marks the NVM Command Set
//! Specification 1.0, "PCIe" the NVMe over PCIe Transport Specification 1.0.

#![forbid(unsafe_code)]

pub mod command;
pub mod identify;
pub mod log;
pub mod registers;
pub mod status;

pub use command::{AdminOpcode, Command, Completion, IoOpcode, feature, log_page};
pub use log::{ErrorEntry, Health};
pub use status::Status;

/// The little-endian number at `at`; zero where the bytes end before.
fn le(bytes: &[u8], at: usize, len: usize) -> u64 {
    let bytes = bytes.get(at..at + len).unwrap_or_default();
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Text that is padded with spaces; what is not printable becomes a dot.
fn text(bytes: &[u8], at: usize, len: usize) -> String {
    let bytes = bytes.get(at..at + len).unwrap_or_default();
    let text: String = bytes
        .iter()
        .map(|&byte| if byte.is_ascii_graphic() || byte == b' ' { byte as char } else { '.' })
        .collect();
    text.trim_end_matches([' ', '.']).to_owned()
}
