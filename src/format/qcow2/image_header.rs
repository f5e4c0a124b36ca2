//! The header of an open image in memory, and whether the disk agrees with it.
//!
//! Every request that changes the mapping reads whether the disk has it. That changes only when a write of the header
//! fails.

use super::header::Header;
use super::header_cluster::{failed, read_cluster, write_durably};
use super::header_steps::{Sector, Step, steps};
use super::metadata::Metadata;
use super::unclosed::differ_in_mark;
use crate::block::{Error, WriteFlags};
use crate::cow::{Lock, LockGuard};
use crate::io::sync::Mutex;
use crate::io::{IoResult, IoVec};
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, Ordering};

/// The header of an open image. It is changed in turns ([`Metadata::lock_header`]).
pub struct ImageHeader {
    /// Held while the header changes.
    current: Lock<Header>,
    /// A copy of what `current` guards, for readers.
    shown: Mutex<Header>,
    state: HeaderState,
    /// While the header is in doubt: the whole sector to be written, if not only its fields change.
    switch: Mutex<Option<Sector>>,
}

/// The turn to change the header of an open image.
pub struct HeaderLock<'a> {
    image: Metadata<'a>,
    current: LockGuard<'a, Header>,
}

impl ImageHeader {
    pub fn new(header: Header) -> ImageHeader {
        ImageHeader {
            shown: Mutex::new(header.clone()),
            current: Lock::new(header),
            state: HeaderState::default(),
            switch: Mutex::default(),
        }
    }

    /// The header as it is on disk, but for what is being written.
    pub fn now(&self) -> Header {
        self.shown.lock().clone()
    }
}

impl<'a> Metadata<'a> {
    /// Waits for the turn to change the header.
    pub async fn lock_header(self) -> HeaderLock<'a> {
        HeaderLock { image: self, current: self.header.current.lock().await }
    }

    /// Writes the header if something changes in it, durably if more than its mark does.
    pub async fn change_header(self, change: impl FnOnce(&mut Header)) -> IoResult {
        let mut header = self.lock_header().await;
        let mut new = header.clone();
        change(&mut new);
        let is_in_doubt = self.header.state.get() == OnDisk::InDoubt;
        if new == *header && !is_in_doubt {
            return Ok(());
        }
        let is_durable = is_in_doubt || !differ_in_mark(&new, &header);
        header.write_fields(new, is_durable).await
    }

    /// Sees to it that the disk has the header that is in memory.
    pub async fn settle_header(self) -> IoResult {
        if self.header.state.get() != OnDisk::InDoubt {
            return Ok(());
        }
        let mut header = self.lock_header().await;
        // The task that held the lock may have written it.
        if self.header.state.get() != OnDisk::InDoubt {
            return Ok(());
        }
        let same = header.clone();
        header.write(same).await
    }
}

impl HeaderLock<'_> {
    /// Changes the header, durably, also what follows its fields.
    ///
    /// # Errors
    /// There is no room for the change, or I/O failed: then a header between the two may hold, in
    /// memory as on the disk.
    pub async fn write_cluster(&mut self, new: Header) -> Result<(), Error> {
        if self.image.header.state.get() == OnDisk::InDoubt {
            let same = self.current.clone();
            self.write(same).await.map_err(failed)?;
        }
        let file = self.image.file();
        let disk = read_cluster(&file, &self.current).await.map_err(failed)?;
        for Step { header, rest, switch } in steps(&self.current, &disk, new)? {
            write_durably(&file, &rest).await.map_err(failed)?;
            *self.image.header.switch.lock() = Some(switch);
            self.write(header).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Writes changed fields of the header, durably.
    ///
    /// When it fails the disk may have it or not: it holds in memory, and [`Metadata::settle_header`]
    /// writes it again.
    pub async fn write(&mut self, new: Header) -> IoResult {
        self.write_fields(new, true).await
    }

    /// As [`HeaderTurn::write`]. What changes the mark alone needs not be durable.
    async fn write_fields(&mut self, new: Header, is_durable: bool) -> IoResult {
        let own = self.image.header;
        let mut fields = new.fields();
        own.state.set(OnDisk::InDoubt);
        self.show(new);
        let file = self.image.file();
        let switch = own.switch.lock().clone();
        match switch {
            Some((0, mut sector)) => {
                sector[..fields.len()].copy_from_slice(&fields);
                fields = sector;
            }
            // It is the only one that changes, so the fields are right with it and without it.
            Some(other) => write_durably(&file, &[other]).await?,
            None => {}
        }
        match is_durable {
            true => write_durably(&file, &[(0, fields)]).await?,
            false => file.write(0, &IoVec::from_ref(&fields), WriteFlags::empty()).await?,
        }
        *own.switch.lock() = None;
        own.state.set(OnDisk::Same);
        Ok(())
    }

    /// Takes the header of an image that another process has written.
    pub fn replace(&mut self, new: Header) {
        *self.image.header.shown.lock() = new.clone();
        *self.current = new;
    }

    /// Makes this the header in memory, without writing it.
    pub fn show(&mut self, new: Header) {
        // Readers of a noted place ask the copy whether it still holds.
        *self.image.header.shown.lock() = new.clone();
        self.image.note_header(&new);
        *self.current = new;
    }
}

impl Deref for HeaderLock<'_> {
    type Target = Header;
    fn deref(&self) -> &Header {
        &self.current
    }
}

/// What the disk has of the header that is in memory.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnDisk {
    /// The same header.
    Same,
    /// This header or the previous one: it is written again before anything relies on it.
    InDoubt,
}

/// An [`OnDisk`] that threads share.
struct HeaderState(AtomicU8);

impl Default for HeaderState {
    fn default() -> HeaderState {
        HeaderState(AtomicU8::new(OnDisk::Same as u8))
    }
}

impl HeaderState {
    fn get(&self) -> OnDisk {
        match self.0.load(Ordering::SeqCst) {
            n if n == OnDisk::Same as u8 => OnDisk::Same,
            _ => OnDisk::InDoubt,
        }
    }

    fn set(&self, state: OnDisk) {
        self.0.store(state as u8, Ordering::SeqCst);
    }
}
