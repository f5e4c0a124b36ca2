//! The header section of an image ([MS-VHDX] 2.2): what the file is, and two headers, of which one is current.
//!
//! The headers say where the log is and whether it counts. They cannot be written through the log themselves, so there
//! are two: the one that is not current is written, and becomes current when it is whole.

use super::bytes::{KIB, MIB, guid_at, is_sealed, put, seal, u16_at, u32_at, u64_at};
use super::regions::Region;
use crate::block::Error;
use uuid::Uuid;

/// The first bytes of every image.
pub const MAGIC: &[u8; 8] = b"vhdxfile";
/// Where the two headers are, and how many bytes each has.
pub const PLACES: [u64; 2] = [64 * KIB, 128 * KIB];
pub const LEN: usize = 4096;

const SIGNATURE: &[u8; 4] = b"head";
const VERSION: u16 = 1;
const LOG_VERSION: u16 = 0;

/// The current header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The later header has the higher number.
    pub sequence: u64,
    /// Changes before anything of the file does.
    pub file_write: Uuid,
    /// Changes before anything does that the guest sees.
    pub data_write: Uuid,
    /// What log entries have that count; nil if there are none.
    pub log_guid: Uuid,
    pub log: Region,
    pub log_version: u16,
}

impl Header {
    /// The header of a new image.
    pub fn new(log: Region) -> Header {
        Header {
            sequence: 0,
            file_write: Uuid::new_v4(),
            data_write: Uuid::new_v4(),
            log_guid: Uuid::nil(),
            log,
            log_version: LOG_VERSION,
        }
    }

    /// Whether a file that begins so is meant to be an image of this format.
    pub fn probe(head: &[u8]) -> bool {
        head.starts_with(MAGIC)
    }

    /// Reads one of the headers.
    ///
    /// # Errors
    /// Why it is not valid.
    fn parse(bytes: &[u8]) -> Result<Header, &'static str> {
        if !bytes.starts_with(SIGNATURE) {
            return Err("has no signature");
        }
        if !is_sealed(bytes, SIGNATURE) {
            return Err("has a wrong checksum");
        }
        if u16_at(bytes, 66) != VERSION {
            return Err("is not of version 1");
        }
        Ok(Header {
            sequence: u64_at(bytes, 8),
            file_write: guid_at(bytes, 16),
            data_write: guid_at(bytes, 32),
            log_guid: guid_at(bytes, 48),
            log_version: u16_at(bytes, 64),
            log: Region { offset: u64_at(bytes, 72), len: u32_at(bytes, 68).into() },
        })
    }

    /// The current one of the two headers, and its place in [`PLACES`].
    ///
    /// # Errors
    /// Neither is valid, they do not say which is the later one, or the log's fields make no sense.
    pub fn current(first: &[u8], second: &[u8]) -> Result<(usize, Header), Error> {
        let none = |why: String| Error::new(format!("No valid VHDX header found: {why}"));
        let current = match (Header::parse(first), Header::parse(second)) {
            (Ok(first), Ok(second)) if first.sequence > second.sequence => (0, first),
            (Ok(first), Ok(second)) if first.sequence < second.sequence => (1, second),
            (Ok(first), Ok(second)) if first == second => (0, first),
            (Ok(first), Ok(_)) => {
                let n = first.sequence;
                return Err(none(format!("both have the sequence number {n}")));
            }
            (Ok(first), Err(_)) => (0, first),
            (Err(_), Ok(second)) => (1, second),
            (Err(first), Err(second)) => {
                return Err(none(format!("the first {first}, the second {second}")));
            }
        };
        current.1.check_log()?;
        Ok(current)
    }

    fn check_log(&self) -> Result<(), Error> {
        let invalid = |what: String| Err(Error::new(format!("VHDX header: {what}")));
        let Region { offset, len } = self.log;
        if self.log_version != LOG_VERSION {
            return invalid(format!("log version {} is not supported", self.log_version));
        }
        if offset < MIB || !offset.is_multiple_of(MIB) || offset > i64::MAX as u64 / 2 {
            return invalid(format!("log offset {offset:#x} is no place for a log"));
        }
        if !len.is_multiple_of(MIB) {
            return invalid(format!("log length {len:#x} is no multiple of 1 MiB"));
        }
        Ok(())
    }

    /// The header as it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        put(&mut bytes, 8, &self.sequence.to_le_bytes());
        put(&mut bytes, 16, &self.file_write.to_bytes_le());
        put(&mut bytes, 32, &self.data_write.to_bytes_le());
        put(&mut bytes, 48, &self.log_guid.to_bytes_le());
        put(&mut bytes, 64, &LOG_VERSION.to_le_bytes());
        put(&mut bytes, 66, &VERSION.to_le_bytes());
        put(&mut bytes, 68, &(self.log.len as u32).to_le_bytes());
        put(&mut bytes, 72, &self.log.offset.to_le_bytes());
        seal(&mut bytes, SIGNATURE);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(sequence: u64) -> Header {
        Header { sequence, ..Header::new(Region { offset: MIB, len: MIB }) }
    }

    #[test]
    fn the_later_header_counts_and_a_damaged_one_does_not() {
        let (old, new) = (header(7), header(8));
        let (mut first, mut second) = (old.encode(), new.encode());
        assert_eq!(Header::current(&first, &second).unwrap(), (1, new.clone()));
        assert_eq!(Header::current(&second, &first).unwrap(), (0, new));
        second[100] = 1;
        assert_eq!(Header::current(&first, &second).unwrap(), (0, old));
        first[0] = 0;
        let error = Header::current(&first, &second).unwrap_err().to_string();
        let wanted = "No valid VHDX header found: the first has no signature, the second has a wrong checksum";
        assert_eq!(error, wanted);
    }

    #[test]
    fn two_different_headers_of_one_number_are_refused() {
        let both = [header(7).encode(), header(7).encode()];
        assert!(Header::current(&both[0], &both[1]).is_err());
        assert!(Header::current(&both[0], &both[0]).is_ok());
    }

    #[test]
    fn a_log_in_an_impossible_place_is_refused() {
        for (offset, len) in [(0, MIB), (MIB + 512, MIB), (1 << 63, MIB), (MIB, 4096)] {
            let bytes = Header { log: Region { offset, len }, ..header(1) }.encode();
            let error = Header::current(&bytes, &bytes).unwrap_err().to_string();
            assert!(error.starts_with("VHDX header: log "), "{error}");
        }
    }
}
