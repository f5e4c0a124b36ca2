//! The saved state of a virtual machine, which is stored behind the end of the disk.
//!
//! L1 entries that no byte of the disk uses map it (specification, "Snapshots": `vm_state_size`).

use super::Qcow2;
use crate::block::Event;
use crate::cow::{read_range, write_range};
use crate::io::{Errno, IoResult, IoVec};

impl Qcow2 {
    /// The guest offset at which the state begins: behind the last L2 table that the disk needs.
    pub(super) fn state_start(&self) -> u64 {
        let tables = self.geometry.l1_entries_for(self.size());
        tables.saturating_mul(self.geometry.l2_coverage())
    }

    /// The guest offset of a range of the state.
    fn state_place(&self, at: u64, len: u64) -> IoResult<u64> {
        let start = self.state_start().checked_add(at).ok_or(Errno(libc::EFBIG))?;
        let end = start.checked_add(len).filter(|&end| i64::try_from(end).is_ok());
        end.map(|_| start).ok_or(Errno(libc::EFBIG))
    }

    pub(super) async fn read_vmstate(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let place = self.state_place(at, into.len())?;
        self.event(Event::VmstateLoad).await;
        read_range(self, place, into).await
    }

    pub(super) async fn write_vmstate(&self, at: u64, from: &IoVec<'_>) -> IoResult {
        let place = self.state_place(at, from.len())?;
        if !self.settings.is_writable {
            return Err(Errno::EPERM);
        }
        self.event(Event::VmstateSave).await;
        self.prepare_writing().await?;
        self.grow_l1(self.geometry.l1_entries_for(place + from.len())).await?;
        write_range(self, place, from).await
    }
}
