//! New images: a key of random bytes, put under the passphrase into the first slot.

use super::header::Header;
use super::options::Wanted;
use super::slots::{self, Place};
use crate::block::create::{CreateEntry, CreateOption, Creation, Made, ValueType};
use crate::block::{Error, Measurement, Preallocation, SECTOR};
use crate::crypto::{Hidden, library, secrets};
use crate::options::{Map, Value};

pub(super) static CREATE: CreateEntry = CreateEntry {
    options: &[
        CreateOption::new("size", ValueType::Size, "Virtual disk size"),
        CreateOption::new(
            "key-secret",
            ValueType::Str,
            "ID of the secret that provides the keyslot passphrase",
        ),
        CreateOption::new("cipher-alg", ValueType::Str, "Name of encryption cipher algorithm"),
        CreateOption::new("cipher-mode", ValueType::Str, "Name of encryption cipher mode"),
        CreateOption::new("ivgen-alg", ValueType::Str, "Name of IV generator algorithm"),
        CreateOption::new("ivgen-hash-alg", ValueType::Str, "Name of IV generator hash algorithm"),
        CreateOption::new("hash-alg", ValueType::Str, "Name of encryption hash algorithm"),
        CreateOption::new("iter-time", ValueType::Number, "Time to spend in PBKDF in milliseconds"),
        CreateOption::preallocation(MODES),
    ],
    create: |creation, options| Box::pin(create(creation, options)),
    measure: Some(|options, size, source| {
        let size = source.map_or(size, |node| node.len());
        Box::pin(std::future::ready(measure(&options, size)))
    }),
    amend: super::amend::OPTIONS,
    on_nodes: None,
};

/// How the disk's space can be allocated.
pub(super) const MODES: &[Preallocation] =
    &[Preallocation::Off, Preallocation::Falloc, Preallocation::Full];

/// A new disk's key, its header in the file with the first slot, and all that follows it.
///
/// # Errors
/// In QEMU's words, or I/O failed.
pub async fn format(place: Place<'_>, wanted: &Wanted) -> Result<(Header, Hidden), Error> {
    let passphrase = secrets::passphrase(&wanted.key_secret).map_err(Error::new)?;
    let mut key = Hidden::zeroed(wanted.cipher.key_len());
    library::random(&mut key);
    wanted.cipher.with_key(&key).map_err(Error::new)?;
    let mut header = Header::new(&wanted.cipher, wanted.hash);
    slots::set_digest(&mut header, &key, wanted.time).await;
    slots::fill(place, &mut header, 0, (&key, &passphrase), wanted.time).await?;
    Ok((header, key))
}

async fn create(creation: &Creation, mut options: Map) -> Result<Made, Error> {
    let wanted = Wanted::of_options(&options, "")?;
    secrets::passphrase(&wanted.key_secret).map_err(Error::new)?;
    let size = match options.get("size") {
        Some(Value::Int(size)) => u64::try_from(*size).ok(),
        _ => None,
    };
    let size = size.unwrap_or(0).checked_next_multiple_of(SECTOR);
    let payload = Header::new(&wanted.cipher, wanted.hash).payload_offset();
    let all = size.and_then(|size| size.checked_add(payload));
    let all = all.filter(|&all| i64::try_from(all).is_ok());
    let all = all.ok_or_else(|| Error::new("The requested file size is too large"))?;
    options.insert("size", Value::Int(all.into()));
    creation.create_file(options).await?;
    creation
        .with_file(async |file| format(Place { node: file, at: 0 }, &wanted).await.map(drop))
        .await?;
    // What was not written deciphers to anything.
    Ok(Made { reads_zeroes: false })
}

fn measure(options: &Map, size: u64) -> Result<Measurement, Error> {
    let wanted = Wanted::of_options(options, "")?;
    let payload = Header::new(&wanted.cipher, wanted.hash).payload_offset();
    let all = size.next_multiple_of(SECTOR).saturating_add(payload);
    Ok(Measurement { required: all, fully_allocated: all, bitmaps: None })
}
