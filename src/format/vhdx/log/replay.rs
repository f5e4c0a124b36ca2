//! Which entries of the log count, and their replay ([MS-VHDX] 2.3.3).
//!
//! The active sequence is the newest run of whole entries, one behind the other, whose last entry names one of them as
//! the oldest that counts. A log without one is empty: what a crash left of an entry has not taken effect yet.

use super::SECTOR;
use super::entry::{Change, Head};
use crate::block::{Error, Node, WriteFlags, ZeroFlags};
use crate::cow::{lengthen, read_padded};
use crate::format::vhdx::header::{self, Header};
use crate::format::vhdx::regions::Region;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use uuid::Uuid;

/// Sectors that are looked through for headers at once.
const AT_ONCE: u64 = 256;
/// Entries that are not whole may lie across each other. So many bytes of entries are read for each byte of the log,
/// and no more.
const MOST_READ: u64 = 4;
/// Bytes that a file is made long at most because a log says so: more than any image has.
const MOST_FILE: u64 = 1 << 47;

/// The entries that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// Where the oldest begins, in bytes from the beginning of the log.
    first: u64,
    entries: u64,
    /// The newest one's.
    flushed: u64,
    last: u64,
}

/// The ring that entries lie in.
struct Ring<'a> {
    file: &'a Node,
    log: Region,
    guid: Uuid,
    /// Bytes of entries that may still be read.
    budget: u64,
}

/// Entries that follow each other.
struct Run {
    /// Where each begins.
    starts: Vec<u64>,
    /// All of them, in bytes.
    len: u64,
    newest: Option<Head>,
}

impl Run {
    /// The part that counts, if this is an active sequence.
    fn active(&self) -> Option<Active> {
        let newest = self.newest?;
        let oldest = self.starts.iter().position(|&start| start == newest.tail)?;
        Some(Active {
            first: newest.tail,
            entries: (self.starts.len() - oldest) as u64,
            flushed: newest.flushed,
            last: newest.last,
        })
    }
}

impl Ring<'_> {
    /// Reads from an offset in the log on, from its end to its beginning.
    async fn read(&self, at: u64, len: u64) -> Result<AlignedBuf, Error> {
        let read = async || -> IoResult<AlignedBuf> {
            let mut bytes = AlignedBuf::for_overwriting(len as usize, 4096).ok_or(Errno::ENOMEM)?;
            let until = len.min(self.log.len - at);
            let all = bytes.io_vec();
            read_padded(self.file, self.log.offset + at, &all.slice(0, until)).await?;
            read_padded(self.file, self.log.offset, &all.slice(until, len - until)).await?;
            drop(all);
            Ok(bytes)
        };
        read().await.map_err(|errno| Error::os("Could not read VHDX log", errno))
    }

    /// The whole entry at an offset in the log, if there is one of at most `room` bytes.
    async fn entry(&mut self, at: u64, room: u64) -> Result<Option<(Head, Vec<Change>)>, Error> {
        let bytes = self.read(at, SECTOR).await?;
        let head = Head::parse(&bytes, self.guid, self.log.len).filter(|head| head.len <= room);
        let Some(head) = head else { return Ok(None) };
        self.budget = self
            .budget
            .checked_sub(head.len)
            .ok_or_else(|| Error::new("VHDX log: too many entries are not whole"))?;
        let bytes = self.read(at, head.len).await?;
        Ok(head.changes(&bytes).map(|changes| (head, changes)))
    }

    /// The entries from an offset in the log on.
    async fn run(&mut self, start: u64) -> Result<Run, Error> {
        let mut run = Run { starts: Vec::new(), len: 0, newest: None };
        while run.len < self.log.len {
            let at = (start + run.len) % self.log.len;
            let Some((head, _)) = self.entry(at, self.log.len - run.len).await? else { break };
            if run
                .newest
                .is_some_and(|newest| newest.sequence.checked_add(1) != Some(head.sequence))
            {
                break;
            }
            run.starts.push(at);
            run.len += head.len;
            run.newest = Some(head);
        }
        Ok(run)
    }

    /// The next place from an offset in the log on that looks like an entry.
    async fn candidate(&self, mut at: u64) -> Result<Option<u64>, Error> {
        while at < self.log.len {
            let len = (self.log.len - at).min(AT_ONCE * SECTOR);
            let bytes = self.read(at, len).await?;
            let mut sectors = bytes.chunks_exact(SECTOR as usize);
            let looks = |sector: &[u8]| Head::parse(sector, self.guid, self.log.len).is_some();
            if let Some(n) = sectors.position(looks) {
                return Ok(Some(at + n as u64 * SECTOR));
            }
            at += len;
        }
        Ok(None)
    }
}

fn ring<'a>(file: &'a Node, header: &Header) -> Ring<'a> {
    let budget = header.log.len.saturating_mul(MOST_READ);
    Ring { file, log: header.log, guid: header.log_guid, budget }
}

/// The entries that count, if there are any.
///
/// # Errors
/// I/O failed, or entries overlap without end.
pub async fn active(file: &Node, header: &Header) -> Result<Option<Active>, Error> {
    if header.log_guid.is_nil() {
        return Ok(None);
    }
    let mut ring = ring(file, header);
    let mut newest: Option<(u64, Active)> = None;
    let mut at = 0;
    while let Some(start) = ring.candidate(at).await? {
        let run = ring.run(start).await?;
        if let (Some(head), Some(active)) = (run.newest, run.active())
            && newest.is_none_or(|(sequence, _)| head.sequence > sequence)
        {
            newest = Some((head.sequence, active));
        }
        at = start + run.len.max(SECTOR);
    }
    Ok(newest.map(|(_, active)| active))
}

/// Brings what the entries say to its places, durably. To be done again in whole if it fails.
///
/// # Errors
/// I/O failed, or the entries cannot be meant for this file; then nothing has changed.
pub async fn replay(file: &Node, header: &Header, active: &Active) -> Result<(), Error> {
    let &Active { flushed, last, .. } = active;
    let len = file.driver().len();
    if len < flushed {
        return Err(Error::new(format!(
            "VHDX log: the file has {len:#x} bytes and had {flushed:#x}: it was truncated"
        )));
    }
    if last > MOST_FILE {
        return Err(Error::new(format!("VHDX log: the file is said to have {last:#x} bytes")));
    }
    let end = last.max(len);
    let failed = |errno| Error::os("Could not replay VHDX log", errno);
    // All of them are looked at before one is followed.
    for is_followed in [false, true] {
        let mut ring = ring(file, header);
        let mut at = active.first;
        for _ in 0..active.entries {
            let entry = ring.entry(at, header.log.len).await?;
            let (head, changes) = entry.ok_or_else(|| Error::new("VHDX log: it has changed"))?;
            for change in &changes {
                match is_followed {
                    true => follow(file, change).await.map_err(failed)?,
                    false => check_place(header, change, end)?,
                }
            }
            at = (at + head.len) % header.log.len;
        }
        if !is_followed && last > len {
            lengthen(file, last).await.map_err(failed)?;
        }
    }
    file.flush().await.map_err(failed)
}

/// Whether a change is inside a file that ends at `end`, and beside what is not written through the log.
fn check_place(header: &Header, change: &Change, end: u64) -> Result<(), Error> {
    let (at, len) = change.place();
    let headers = Region { offset: 0, len: header::PLACES[1] + header::LEN as u64 };
    let is_inside = at.checked_add(len).is_some_and(|change_end| change_end <= end);
    match is_inside && !headers.meets(at, len) && !header.log.meets(at, len) {
        true => Ok(()),
        false => Err(Error::new(format!(
            "VHDX log: an entry changes {len:#x} bytes at {at:#x}, which is no place for metadata"
        ))),
    }
}

async fn follow(file: &Node, change: &Change) -> IoResult {
    match change {
        Change::Zero { len: 0, .. } => Ok(()),
        Change::Zero { at, len } => file.zero(*at, *len, ZeroFlags::UNMAP).await,
        Change::Data { at, sector } => {
            file.write(*at, &IoVec::from_ref(&sector[..]), WriteFlags::empty()).await
        }
    }
}
