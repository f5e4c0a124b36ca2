//! The entries of the snapshot table.

use crate::block::SnapshotInfo;
use crate::format::qcow2::layout;
use crate::options::bytes::{self, until_nul};

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// The most extra data that is kept, in bytes; QEMU refuses more.
const MAX_EXTRA: u32 = 1024;
/// Bytes of extra data that we know.
const KNOWN_EXTRA: usize = 24;
/// Instructions were not counted.
const NO_ICOUNT: u64 = u64::MAX;
/// The most bytes of one entry.
pub const MAX_ENTRY: usize = FIXED + MAX_EXTRA as usize + 2 * u16::MAX as usize + 8;

/// An internal snapshot, as the table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub l1_table_offset: u64,
    /// Entries.
    pub l1_size: u32,
    /// Unique, but not a file name or a number by any rule.
    pub id: Vec<u8>,
    pub name: Vec<u8>,
    /// When it was taken, since 1970.
    pub seconds: u32,
    pub nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock: u64,
    pub vm_state_size: u32,
    /// From the 64-bit size of the VM state on; what we do not know is kept.
    pub extra: Vec<u8>,
}

impl Snapshot {
    /// Reads the entry at the start of `bytes`, and how long it is. None if it does not end there or
    /// has more extra data than anybody keeps.
    pub fn parse(bytes: &[u8]) -> Option<(Snapshot, usize)> {
        let fixed = bytes.get(..FIXED)?;
        let be = |at: usize, n: usize| fixed[at..at + n].iter().fold(0, |v, &b| v << 8 | b as u64);
        let (id_len, name_len, extra_len) = (be(12, 2) as usize, be(14, 2) as usize, be(36, 4));
        if extra_len > MAX_EXTRA as u64 {
            return None;
        }
        let id_at = FIXED + extra_len as usize;
        let name_at = id_at + id_len;
        let end = name_at + name_len;
        let snapshot = Snapshot {
            l1_table_offset: be(0, 8),
            l1_size: be(8, 4) as u32,
            id: until_nul(bytes.get(id_at..name_at)?).to_vec(),
            name: until_nul(bytes.get(name_at..end)?).to_vec(),
            seconds: be(16, 4) as u32,
            nanoseconds: be(20, 4) as u32,
            vm_clock: be(24, 8),
            vm_state_size: be(32, 4) as u32,
            extra: bytes.get(FIXED..id_at)?.to_vec(),
        };
        Some((snapshot, end.next_multiple_of(8)))
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED + self.extra.len());
        out.extend(self.l1_table_offset.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend((self.id.len() as u16).to_be_bytes());
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend(self.seconds.to_be_bytes());
        out.extend(self.nanoseconds.to_be_bytes());
        out.extend(self.vm_clock.to_be_bytes());
        out.extend(self.vm_state_size.to_be_bytes());
        out.extend((self.extra.len() as u32).to_be_bytes());
        out.extend(&self.extra);
        out.extend(&self.id);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    /// Whether the entry has what version 3 wants of it: a 64-bit VM state size and the disk's size.
    pub fn is_complete(&self) -> bool {
        self.extra.len() >= 16
    }

    /// Whether version 2 can have it, in an image whose disk has `disk_size` bytes.
    pub fn fits_version_2(&self, disk_size: u64) -> bool {
        u32::try_from(self.vm_state_size()).is_ok()
            && self.disk_size().is_none_or(|size| size == disk_size)
    }

    /// Bytes of the disk when it was taken, if that is recorded.
    pub fn disk_size(&self) -> Option<u64> {
        Some(u64::from_be_bytes(*self.extra.get(8..)?.first_chunk()?))
    }

    /// Bytes.
    pub fn vm_state_size(&self) -> u64 {
        match self.extra.first_chunk() {
            Some(size) => u64::from_be_bytes(*size),
            None => self.vm_state_size as u64,
        }
    }

    /// Extra data: the size of the VM state and of the disk, in bytes, and what the guest had
    /// executed.
    pub fn extra(vm_state_size: u64, disk_size: u64, icount: Option<u64>) -> Vec<u8> {
        let words = [vm_state_size, disk_size, icount.unwrap_or(NO_ICOUNT)];
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    /// Fills in what the entry does not record, of an image whose disk has `disk_size` bytes.
    pub fn complete(&mut self, disk_size: u64) {
        if self.extra.len() < KNOWN_EXTRA {
            let disk_size = self.disk_size().unwrap_or(disk_size);
            self.extra = Snapshot::extra(self.vm_state_size(), disk_size, self.icount());
        }
    }

    fn icount(&self) -> Option<u64> {
        let word = u64::from_be_bytes(*self.extra.get(16..)?.first_chunk()?);
        (word != NO_ICOUNT).then_some(word)
    }

    pub fn info(&self) -> SnapshotInfo {
        let text = bytes::text_of;
        SnapshotInfo {
            id: text(&self.id),
            name: text(&self.name),
            vm_state_size: self.vm_state_size(),
            date_sec: self.seconds,
            date_nsec: self.nanoseconds,
            vm_clock_nsec: self.vm_clock,
            icount: self.icount(),
        }
    }

    /// Whether the L1 table is one that could be read.
    pub fn has_sane_l1_size(&self) -> bool {
        self.l1_size as u64 * 8 <= layout::MAX_L1_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_comes_out_as_it_went_in() {
        let snapshot = Snapshot {
            l1_table_offset: 0x30000,
            l1_size: 7,
            id: b"1".into(),
            name: b"before".into(),
            seconds: 1,
            nanoseconds: 2,
            vm_clock: 3,
            vm_state_size: 4,
            extra: [&5u64.to_be_bytes()[..], &6u64.to_be_bytes(), b"unknown"].concat(),
        };
        let bytes = snapshot.encode();
        assert_eq!(Snapshot::parse(&bytes), Some((snapshot.clone(), bytes.len())));
        assert_eq!((snapshot.vm_state_size(), snapshot.disk_size()), (5, Some(6)));
        for cut in 0..70 {
            assert_eq!(Snapshot::parse(&bytes[..cut]), None, "{cut}");
        }
    }
}
