//! Changes of metadata that go through the log.
//!
//! A change is written to the log first, and flushed; only then it is written in its place. The flush of one change makes
//! the one before durable in its place, so the log holds two changes that count, and never gets full. The log
//! counts when a header names its GUID, which is written behind the first entry.

use super::SECTOR;
use super::entry::NewEntry;
use crate::block::{Node, WriteFlags};
use crate::cow::{file, read_padded};
use crate::format::vhdx::regions::Region;
use crate::format::vhdx::{Vhdx, header};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use uuid::Uuid;

/// Bytes that are changed by one entry at most.
const MOST: u64 = 64 << 10;

/// Where the log ends. Its holder may write metadata.
pub struct LogEnd {
    log: Region,
    /// What entries are marked with; nil: the log does not count.
    guid: Uuid,
    sequence: u64,
    /// Where the next entry begins, in bytes from the beginning of the log.
    next: u64,
    /// Where the newest entry begins, if what it says may not be durable in its place.
    newest: Option<u64>,
    /// Bytes that the file has, durably.
    durable_len: u64,
}

impl LogEnd {
    pub fn new(log: Region) -> LogEnd {
        let guid = Uuid::nil();
        LogEnd { log, guid, sequence: 0, next: 0, newest: None, durable_len: 0 }
    }

    /// Writes to the ring, from its end to its beginning.
    async fn write(&self, file: &Node, bytes: &[u8]) -> IoResult {
        let until = (self.log.len - self.next).min(bytes.len() as u64);
        let (first, second) = bytes.split_at(until as usize);
        let flags = WriteFlags::empty();
        file.write(self.log.offset + self.next, &IoVec::from_ref(first), flags).await?;
        match second.is_empty() {
            true => Ok(()),
            false => file.write(self.log.offset, &IoVec::from_ref(second), flags).await,
        }
    }
}

impl Vhdx {
    /// Writes metadata at `at` in the file. When it returns, a crash of the host leaves the old bytes or the new ones,
    /// and after a flush the new ones.
    pub(in crate::format::vhdx) async fn write_logged(&self, at: u64, bytes: &[u8]) -> IoResult {
        let mut log = self.log.lock().await;
        let mut done = 0;
        while done < bytes.len() {
            let from = at + done as u64;
            let until = (from / SECTOR * SECTOR + MOST).min(at + bytes.len() as u64);
            let part = &bytes[done..][..(until - from) as usize];
            self.append(&mut log, from, part).await?;
            done += part.len();
        }
        Ok(())
    }

    /// One entry of the log, and the change itself.
    async fn append(&self, log: &mut LogEnd, at: u64, bytes: &[u8]) -> IoResult {
        let file = file(self);
        let start = at / SECTOR * SECTOR;
        let end = (at + bytes.len() as u64).next_multiple_of(SECTOR);
        let mut data = AlignedBuf::new((end - start) as usize, 4096).ok_or(Errno::ENOMEM)?;
        // Others write here only while they have the log.
        read_padded(&file, start, &data.io_vec()).await?;
        data[(at - start) as usize..][..bytes.len()].copy_from_slice(bytes);

        if log.guid.is_nil() {
            *log = LogEnd {
                guid: Uuid::new_v4(),
                durable_len: log.durable_len,
                ..LogEnd::new(log.log)
            };
        }
        let len = self.file_len();
        let entry = NewEntry {
            guid: log.guid,
            sequence: log.sequence + 1,
            tail: log.newest.unwrap_or(log.next),
            flushed: log.durable_len,
            last: len,
        };
        let entry = entry.encode(start, &data);
        if entry.len() as u64 * 4 > log.log.len {
            return Err(Errno::ENOSPC);
        }
        log.write(&file, &entry).await?;
        file.flush().await?;
        log.durable_len = len;
        log.sequence += 1;
        log.newest = Some(log.next);
        log.next = (log.next + entry.len() as u64) % log.log.len;

        let guid = log.guid;
        let mut state = self.header.lock().await;
        if state.header.log_guid != guid {
            state.write(&file, |header| header.log_guid = guid).await?;
        }
        drop(state);
        file.write(at, &IoVec::from_ref(bytes), WriteFlags::empty()).await
    }

    /// Says that the log does not count. Everything that went through it is durable in its place.
    pub(in crate::format::vhdx) async fn end_log(&self) -> IoResult {
        let mut log = self.log.lock().await;
        if log.guid.is_nil() {
            return Ok(());
        }
        let mut state = self.header.lock().await;
        // Both headers: neither names entries that are older than the table.
        for _ in header::PLACES {
            state.write(&file(self), |header| header.log_guid = Uuid::nil()).await?;
        }
        log.guid = Uuid::nil();
        Ok(())
    }

    /// Notes that the file has so many bytes, durably.
    pub(in crate::format::vhdx) async fn note_durable(&self, len: u64) {
        self.log.lock().await.durable_len = len;
    }
}
