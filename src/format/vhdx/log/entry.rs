//! An entry of the log: a header, descriptors, and a sector with the new contents for each descriptor of data.
//!
//! Signatures, checksum and sequence numbers all have to be right: an entry that a crash has torn is none.

use super::SECTOR;
use crate::format::vhdx::bytes::{guid_at, is_sealed, put, seal, u32_at, u64_at};
use uuid::Uuid;

/// Bytes of an entry that are looked at at most: those that programs write have a few sectors.
pub const MOST_LEN: u64 = 16 << 20;

const SIGNATURE: &[u8; 4] = b"loge";
const ZERO: &[u8; 4] = b"zero";
const DATA: &[u8; 4] = b"desc";
const DATA_SECTOR: &[u8; 4] = b"data";

const HEAD_LEN: u64 = 64;
const DESCRIPTOR_LEN: u64 = 32;
/// A sector's first and last bytes are in its descriptor, to make room for numbers in the sector.
const LEADING: usize = 8;
const TRAILING: usize = 4;

/// The fields of an entry's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the whole entry.
    pub len: u64,
    /// Where the oldest entry is that still counts, in bytes from the beginning of the log.
    pub tail: u64,
    pub sequence: u64,
    descriptors: u64,
    /// The file has at least so many bytes, durably.
    pub flushed: u64,
    /// Everything that was allocated lies within so many bytes.
    pub last: u64,
}

/// What an entry changes in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Zero { at: u64, len: u64 },
    Data { at: u64, sector: Box<[u8; SECTOR as usize]> },
}

impl Change {
    /// The bytes of the file that are changed.
    pub fn place(&self) -> (u64, u64) {
        match self {
            Change::Zero { at, len } => (*at, *len),
            Change::Data { at, .. } => (*at, SECTOR),
        }
    }
}

impl Head {
    /// The header of an entry of the log `guid`, which has `log_len` bytes, if there is one. `bytes` begins with it.
    pub fn parse(bytes: &[u8], guid: Uuid, log_len: u64) -> Option<Head> {
        if !bytes.starts_with(SIGNATURE) || guid_at(bytes, 32) != guid {
            return None;
        }
        let head = Head {
            len: u32_at(bytes, 8).into(),
            tail: u32_at(bytes, 12).into(),
            sequence: u64_at(bytes, 16),
            descriptors: u32_at(bytes, 24).into(),
            flushed: u64_at(bytes, 48),
            last: u64_at(bytes, 56),
        };
        let is_sane = head.len >= SECTOR
            && head.len.is_multiple_of(SECTOR)
            && head.len <= log_len.min(MOST_LEN)
            && head.tail < log_len
            && head.tail.is_multiple_of(SECTOR)
            && head.sequence > 0
            && head.first_sector() <= head.len;
        is_sane.then_some(head)
    }

    /// Where the sectors of data begin, in bytes of the entry.
    fn first_sector(&self) -> u64 {
        (HEAD_LEN + self.descriptors * DESCRIPTOR_LEN).next_multiple_of(SECTOR)
    }

    /// What an entry with this header changes, if it is whole. `bytes` is all of it.
    pub fn changes(&self, bytes: &[u8]) -> Option<Vec<Change>> {
        if bytes.len() as u64 != self.len || !is_sealed(bytes, SIGNATURE) {
            return None;
        }
        let (descriptors, sectors) = bytes.split_at(self.first_sector() as usize);
        let mut sectors = sectors.chunks_exact(SECTOR as usize);
        let mut changes = Vec::new();
        let descriptors = descriptors[HEAD_LEN as usize..].chunks_exact(DESCRIPTOR_LEN as usize);
        for descriptor in descriptors.take(self.descriptors as usize) {
            let (at, sequence) = (u64_at(descriptor, 16), u64_at(descriptor, 24));
            if sequence != self.sequence || !at.is_multiple_of(SECTOR) {
                return None;
            }
            if descriptor.starts_with(ZERO) {
                let len = u64_at(descriptor, 8);
                if !len.is_multiple_of(SECTOR) {
                    return None;
                }
                changes.push(Change::Zero { at, len });
                continue;
            }
            if !descriptor.starts_with(DATA) {
                return None;
            }
            let sector = self.sector(descriptor, sectors.next()?)?;
            changes.push(Change::Data { at, sector });
        }
        Some(changes)
    }

    /// The new contents that a descriptor and a sector of data say.
    fn sector(&self, descriptor: &[u8], stored: &[u8]) -> Option<Box<[u8; SECTOR as usize]>> {
        let end = SECTOR as usize - TRAILING;
        let sequence = u64::from(u32_at(stored, 4)) << 32 | u64::from(u32_at(stored, end));
        if !stored.starts_with(DATA_SECTOR) || sequence != self.sequence {
            return None;
        }
        let mut sector = Box::new([0; SECTOR as usize]);
        sector.copy_from_slice(stored);
        sector[..LEADING].copy_from_slice(&descriptor[8..16]);
        sector[end..].copy_from_slice(&descriptor[4..8]);
        Some(sector)
    }
}

/// What the header of a new entry says.
pub struct NewEntry {
    pub guid: Uuid,
    pub sequence: u64,
    pub tail: u64,
    pub flushed: u64,
    pub last: u64,
}

impl NewEntry {
    /// The entry that puts `data`, whole sectors, to `at` in the file.
    pub fn encode(&self, at: u64, data: &[u8]) -> Vec<u8> {
        let count = data.len() as u64 / SECTOR;
        let first = (HEAD_LEN + count * DESCRIPTOR_LEN).next_multiple_of(SECTOR);
        let len = first + count * SECTOR;
        let mut bytes = vec![0; len as usize];
        put(&mut bytes, 8, &(len as u32).to_le_bytes());
        put(&mut bytes, 12, &(self.tail as u32).to_le_bytes());
        put(&mut bytes, 16, &self.sequence.to_le_bytes());
        put(&mut bytes, 24, &(count as u32).to_le_bytes());
        put(&mut bytes, 32, &self.guid.to_bytes_le());
        put(&mut bytes, 48, &self.flushed.to_le_bytes());
        put(&mut bytes, 56, &self.last.to_le_bytes());
        let end = SECTOR as usize - TRAILING;
        for (n, sector) in data.chunks_exact(SECTOR as usize).enumerate() {
            let descriptor = (HEAD_LEN + n as u64 * DESCRIPTOR_LEN) as usize;
            put(&mut bytes, descriptor, DATA);
            put(&mut bytes, descriptor + 4, &sector[end..]);
            put(&mut bytes, descriptor + 8, &sector[..LEADING]);
            put(&mut bytes, descriptor + 16, &(at + n as u64 * SECTOR).to_le_bytes());
            put(&mut bytes, descriptor + 24, &self.sequence.to_le_bytes());
            let stored = (first + n as u64 * SECTOR) as usize;
            put(&mut bytes, stored + LEADING, &sector[LEADING..end]);
            put(&mut bytes, stored, DATA_SECTOR);
            put(&mut bytes, stored + 4, &((self.sequence >> 32) as u32).to_le_bytes());
            put(&mut bytes, stored + end, &(self.sequence as u32).to_le_bytes());
        }
        seal(&mut bytes, SIGNATURE);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_what_was_put_into_it_and_a_torn_one_says_nothing() {
        let new = NewEntry {
            guid: Uuid::new_v4(),
            sequence: 7 << 32 | 5,
            tail: 8192,
            flushed: 1 << 20,
            last: 2 << 20,
        };
        let data: Vec<u8> = (0..3 * SECTOR).map(|n| (n / 7) as u8).collect();
        let bytes = new.encode(3 << 20, &data);
        let head = Head::parse(&bytes, new.guid, 1 << 20).unwrap();
        assert_eq!((head.tail, head.sequence, head.len), (8192, 7 << 32 | 5, 4 * SECTOR));
        let changes = head.changes(&bytes).unwrap();
        for (n, change) in changes.iter().enumerate() {
            let Change::Data { at, sector } = change else { panic!("{change:?}") };
            assert_eq!(*at, (3 << 20) + n as u64 * SECTOR);
            assert!(sector[..] == data[n * SECTOR as usize..][..SECTOR as usize]);
        }
        assert_eq!(changes.len(), 3);
        for torn in [70, 100, SECTOR as usize + 1, bytes.len() - 1] {
            let mut bytes = bytes.clone();
            bytes[torn] ^= 1;
            assert_eq!(head.changes(&bytes), None, "{torn}");
        }
        // An older sector whose entry's checksum was not looked at.
        let mut bytes = bytes.clone();
        bytes[SECTOR as usize + 4] ^= 1;
        seal(&mut bytes, SIGNATURE);
        assert_eq!(head.changes(&bytes), None);
        assert_eq!(Head::parse(&bytes, Uuid::nil(), 1 << 20), None);
        assert_eq!(Head::parse(&bytes, new.guid, SECTOR), None);
    }
}
