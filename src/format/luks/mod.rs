//! LUKS: a disk under a cipher, whose key lies in slots in front of it, each under a passphrase (LUKS1 On-Disk Format).
//!
//! | file | it holds |
//! |---|---|
//! | `header` | the header of LUKS1, read and written |
//! | `slots` | key slots: opened, filled, destroyed |
//! | `options` | what is asked for of a new image |
//! | `create` | new images |
//! | `amend` | changes of key slots |
//! | `info` | what an image says of itself |
//!
//! Requests are whole sectors. The bytes of a read are deciphered where they were read to; those of a write are
//! enciphered into a buffer, because the guest's memory is the guest's. Both happen on the worker that moves them.

mod amend;
mod create;
pub mod header;
mod info;
pub mod options;
pub mod slots;

use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::crypto::{SectorCipher, secrets};
use crate::io::sync::Mutex;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use crate::options::{Map, NodeRef};
use header::Header;
use serde::Deserialize;
use slots::Place;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    options: &[
        OptionHelp { name: "file", value: "node", help: "The node that holds the image" },
        OptionHelp { name: "key-secret", value: "str", help: "The secret with the passphrase" },
    ],
    create: Some(&create::CREATE),
    growth: Growth::Own(create::MODES),
    probe: Some(Probe::Bytes(|head, _| if Header::is_one(head) { 100 } else { 0 })),
    ..DriverEntry::new("luks", Kind::Format, |opening, options| Box::pin(open(opening, options)))
};

/// Longest transfer, in bytes: what a write is enciphered into.
const MOST: u32 = 1 << 20;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
    key_secret: Option<String>,
}

struct Luks {
    file: [Child; 1],
    /// As it is on the disk.
    header: Mutex<Header>,
    /// Where the disk begins in the file, in bytes.
    payload: u64,
    /// None of an image that is only asked what it is.
    cipher: Option<SectorCipher>,
    key_secret: Option<String>,
    is_writable: bool,
}

async fn open(opening: &mut Opening, options: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(options)?;
    let during = Perms::format(Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() });
    let file = opening.child(Role::File, options.file, during).await?;
    let node = file.node();
    let place = Place { node: &node, at: 0 };
    let header = place.header().await?;
    let payload = header.payload_offset();
    if payload > node.len() {
        return Err(Error::new(format!(
            "LUKS header: the disk begins at byte {payload}, behind the end of the file"
        )));
    }
    let cipher = match (&options.key_secret, opening.policy().for_info) {
        (_, true) => None,
        (Some(secret), false) => Some(unlocked(place, &header, secret).await?),
        (None, false) => {
            return Err(Error::new("Parameter 'key-secret' is required for cipher"));
        }
    };
    Ok(Box::new(Luks {
        header: Mutex::new(header),
        payload,
        cipher,
        key_secret: options.key_secret,
        is_writable: opening.is_writable_over(&node),
        file: [file],
    }))
}

/// The disk's cipher, for a passphrase.
///
/// # Errors
/// In QEMU's words: there is no such secret, or it opens no slot.
pub async fn unlocked(
    place: Place<'_>,
    header: &Header,
    secret: &str,
) -> Result<SectorCipher, Error> {
    let passphrase = secrets::passphrase(secret).map_err(Error::new)?;
    let found = slots::unlock(place, header, &passphrase).await?;
    let (key, _) =
        found.ok_or_else(|| Error::new("Invalid password, cannot unlock any keyslot"))?;
    header.disk_cipher()?.with_key(&key).map_err(Error::new)
}

impl Luks {
    fn node(&self) -> std::sync::Arc<Node> {
        self.file[0].node()
    }

    fn cipher(&self) -> IoResult<&SectorCipher> {
        self.cipher.as_ref().ok_or(Errno::EPERM)
    }

    async fn read_sectors(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let cipher = self.cipher()?;
        pass_through::read_inside(&self.node(), self.payload + at, into).await?;
        cipher.decrypt(at, into);
        Ok(())
    }

    /// What was rounded out beyond the end of the disk is left out.
    async fn write_sectors(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        let len = from.len().min(self.len().saturating_sub(at));
        let mut bytes = AlignedBuf::for_overwriting(len as usize, 4096).ok_or(Errno::ENOMEM)?;
        self.cipher()?.encrypt(at, &from.slice(0, len), &mut bytes);
        self.node().write(self.payload + at, &bytes.source(), flags).await
    }

    async fn set_len(&self, len: u64, how: Length) -> Result<(), Error> {
        let all = len.checked_add(self.payload).filter(|&all| i64::try_from(all).is_ok());
        let all = all.ok_or_else(|| Error::new("The requested file size is too large"))?;
        match how {
            Length::Exact { shrink } => self.node().resize(all, shrink).await,
            Length::AtLeast(preallocation) => self.node().grow(all, preallocation).await,
        }
    }
}

/// How a new length is meant.
enum Length {
    Exact { shrink: bool },
    AtLeast(Preallocation),
}

impl HandOver for Luks {}

impl Driver for Luks {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        let below = self.node().traits();
        let sector = SECTOR as u32;
        Traits {
            request_align: below.request_align.max(sector),
            // Every segment is whole sectors, and each sector in one piece.
            buffer_align: below.buffer_align.max(sector),
            max_transfer: below.max_transfer.min(MOST),
            max_segments: below.max_segments,
            zero_align: below.request_align.max(sector),
            discard_align: below.request_align.max(sector),
            optimal_io: below.optimal_io,
            abilities: match self.is_writable {
                true => below.abilities & Abilities::FUA,
                false => Abilities::READ_ONLY,
            },
            ..Traits::default()
        }
    }

    fn scratch(&self) -> Scratch {
        Scratch { copies_writes: true, ..Scratch::default() }
    }

    fn len(&self) -> u64 {
        let rest = self.node().len().saturating_sub(self.payload);
        rest - rest % SECTOR
    }

    fn children(&self) -> &[Child] {
        &self.file
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(self.read_sectors(at, into))
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(self.write_sectors(at, from, flags))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move { self.node().flush().await })
    }

    /// Of bytes under a cipher nothing is known before they are read.
    fn status(&self, _: u64, len: u64, _: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        let status = Status::DATA | Status::ALLOCATED;
        Box::pin(std::future::ready(Ok(Extent { len, status, place: None })))
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }

    fn own_options(&self) -> Map {
        let mut own = Map::new();
        if let Some(secret) = &self.key_secret {
            own.insert("key-secret", secret.as_str());
        }
        own
    }
}

impl Image for Luks {
    fn resize(&self, len: u64, shrink: bool) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.set_len(len, Length::Exact { shrink }))
    }

    fn grow(&self, len: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.set_len(len, Length::AtLeast(preallocation)))
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        allocated_in(self.node())
    }

    fn amend(&self, changes: Map) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let node = self.node();
            let mut header = self.header.lock().clone();
            let place = Place { node: &node, at: 0 };
            let amended =
                amend::amend(place, &mut header, self.key_secret.as_deref(), &changes).await;
            // Also as far as it came.
            *self.header.lock() = header;
            amended
        })
    }

    fn info(&self) -> ImageInfo {
        let specific = info::specific(&self.header.lock(), self.payload);
        ImageInfo { is_encrypted: true, specific: Some(specific), ..ImageInfo::default() }
    }
}
