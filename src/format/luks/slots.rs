//! Key slots of LUKS1: the disk's key is found with a passphrase, put under another one, and destroyed.
//!
//! The rules held here: an erased slot's key material is overwritten before the header forgets where it was, and new key
//! material is durable before the header says that a slot is active. A header that asks for more iterations than
//! [`MOST_ITERATIONS`] is refused, however many slots share them.

use super::header::{DIGEST, Header, Slot};
use crate::block::{Error, Node, WriteFlags};
use crate::crypto::{HashAlg, Hidden, library, split};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec, offload};
use std::time::Duration;
use zeroize::Zeroize;

/// Iterations of PBKDF2 that one unlocking may take, over all slots and digests: half a minute or so.
const MOST_ITERATIONS: u64 = 50_000_000;
/// What everybody makes at least.
const LEAST_ITERATIONS: u32 = 1000;
/// How often erased key material is overwritten with random bytes.
const ERASURES: usize = 4;

/// Where a header is: a node, and the byte that it begins at.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    pub node: &'a Node,
    pub at: u64,
}

impl Place<'_> {
    pub async fn read(&self, at: u64, len: usize) -> Result<AlignedBuf, Error> {
        let failed = |errno: Errno| Error::os("Unable to read encryption header", errno);
        let mut bytes = AlignedBuf::new(len, 4096).ok_or_else(|| failed(Errno::ENOMEM))?;
        let end = self.at.checked_add(at).and_then(|at| at.checked_add(len as u64));
        if end.is_none_or(|end| end > self.node.len()) {
            return Err(Error::new("the image ends inside its encryption header"));
        }
        self.node.read(self.at + at, &bytes.io_vec()).await.map_err(failed)?;
        Ok(bytes)
    }

    /// The header.
    pub async fn header(&self) -> Result<Header, Error> {
        let bytes = self.read(0, super::header::LEN).await?;
        let bytes = bytes[..].try_into().map_err(|_| Error::new("Volume is not in LUKS format"))?;
        Header::parse(bytes)
    }

    pub async fn write(&self, at: u64, bytes: &[u8]) -> IoResult {
        self.node.write(self.at + at, &IoVec::from_ref(bytes), WriteFlags::GROW).await
    }

    pub async fn write_header(&self, header: &Header) -> Result<(), Error> {
        let failed = |errno: Errno| Error::os("Unable to write encryption header", errno);
        self.write(0, &header.encode()).await.map_err(failed)?;
        self.node.flush().await.map_err(failed)
    }
}

/// The disk's key, and the slot that the passphrase opens; none if it opens none.
///
/// # Errors
/// I/O failed, or the header asks for too much.
pub async fn unlock(
    place: Place<'_>,
    header: &Header,
    passphrase: &Hidden,
) -> Result<Option<(Hidden, usize)>, Error> {
    bounded(header)?;
    for n in (0..header.slots.len()).filter(|&n| header.slots[n].is_active) {
        if let Some(key) = unlock_slot(place, header, n, passphrase).await? {
            return Ok(Some((key, n)));
        }
    }
    Ok(None)
}

fn bounded(header: &Header) -> Result<(), Error> {
    let active = header.slots.iter().filter(|slot| slot.is_active);
    let all: u64 =
        active.map(|slot| u64::from(slot.iterations) + u64::from(header.digest_iterations)).sum();
    if all > MOST_ITERATIONS {
        return Err(Error::new(format!(
            "LUKS header: {all} iterations to unlock it, more than {MOST_ITERATIONS}"
        )));
    }
    Ok(())
}

/// The disk's key, if the passphrase opens this slot.
pub async fn unlock_slot(
    place: Place<'_>,
    header: &Header,
    n: usize,
    passphrase: &Hidden,
) -> Result<Option<Hidden>, Error> {
    let range = header.material(n);
    let mut material = place.read(range.start, (range.end - range.start) as usize).await?;
    let (header, slot, passphrase) = (header.clone(), header.slots[n].clone(), passphrase.clone());
    let cipher = header.disk_cipher()?;
    offload(move || {
        let slot_key = derived(&header, &slot, &passphrase);
        let cipher = cipher.with_key(&slot_key).map_err(Error::new)?;
        cipher.decrypt_bytes(0, &mut material);
        let len = header.key_len as usize * slot.stripes as usize;
        let key = split::merge(header.hash, &material[..len], slot.stripes as usize);
        material.zeroize();
        Ok(library::equal(&digest(&header, &key), &header.digest).then_some(key))
    })
    .await
}

/// The key that a passphrase becomes for a slot.
fn derived(header: &Header, slot: &Slot, passphrase: &[u8]) -> Hidden {
    let mut key = Hidden::zeroed(header.key_len as usize);
    header.hash.pbkdf2(passphrase, &slot.salt, slot.iterations, &mut key);
    key
}

fn digest(header: &Header, key: &[u8]) -> [u8; DIGEST] {
    let mut digest = [0; DIGEST];
    header.hash.pbkdf2(key, &header.digest_salt, header.digest_iterations, &mut digest);
    digest
}

/// Iterations that take about `time` with this hash and a key of so many bytes, on the calling thread.
pub fn iterations_in(hash: HashAlg, key_len: usize, time: Duration) -> u32 {
    let mut key = Hidden::zeroed(key_len);
    let enough = (time / 8).clamp(Duration::from_millis(2), Duration::from_millis(100));
    let mut count = 1u32 << 10;
    loop {
        let began = library::thread_time();
        hash.pbkdf2(b"passphrase", &[0; 32], count, &mut key);
        let took = library::thread_time() - began;
        if took >= enough || count >= 1 << 26 {
            let all = f64::from(count) * time.as_secs_f64() / took.as_secs_f64().max(1e-9);
            // Float to integer goes to the nearest that there is.
            return (all as u32).clamp(LEAST_ITERATIONS, (MOST_ITERATIONS / 2) as u32);
        }
        count *= 2;
    }
}

/// Sets the digest of the disk's key, which takes an eighth of the time of a slot.
pub async fn set_digest(header: &mut Header, key: &Hidden, time: Duration) {
    let (mut new, key) = (header.clone(), key.clone());
    *header = offload(move || {
        library::random(&mut new.digest_salt);
        new.digest_iterations = iterations_in(new.hash, DIGEST, time / 8);
        new.digest = digest(&new, &key);
        new
    })
    .await;
}

/// Puts the disk's key under a passphrase, into a slot that is not active: key material first, and then the header.
pub async fn fill(
    place: Place<'_>,
    header: &mut Header,
    n: usize,
    (key, passphrase): (&Hidden, &Hidden),
    time: Duration,
) -> Result<(), Error> {
    let (mut new, key, passphrase) = (header.clone(), key.clone(), passphrase.clone());
    let cipher = new.disk_cipher()?;
    let len = (new.material(n).end - new.material(n).start) as usize;
    let (new, material) = offload(move || {
        let slot = &mut new.slots[n];
        library::random(&mut slot.salt);
        slot.iterations = iterations_in(new.hash, new.key_len as usize, time);
        slot.is_active = true;
        let slot = new.slots[n].clone();
        let slot_key = derived(&new, &slot, &passphrase);
        let mut material = Hidden::zeroed(len);
        let stripes = split::split(new.hash, &key, slot.stripes as usize);
        material[..stripes.len()].copy_from_slice(&stripes);
        let cipher = cipher.with_key(&slot_key).map_err(Error::new)?;
        cipher.encrypt_bytes(0, &mut material);
        Ok::<_, Error>((new, material))
    })
    .await?;
    let failed = |errno: Errno| Error::os("Unable to write key material", errno);
    place.write(new.material(n).start, &material).await.map_err(failed)?;
    place.node.flush().await.map_err(failed)?;
    place.write_header(&new).await?;
    *header = new;
    Ok(())
}

/// Destroys a slot: its key material is overwritten, and then the header says so.
pub async fn erase(place: Place<'_>, header: &mut Header, n: usize) -> Result<(), Error> {
    let failed = |errno: Errno| Error::os("Unable to overwrite key material", errno);
    let range = header.material(n);
    let mut bytes = vec![0; (range.end - range.start) as usize];
    for _ in 0..ERASURES {
        library::random(&mut bytes);
        place.write(range.start, &bytes).await.map_err(failed)?;
        place.node.flush().await.map_err(failed)?;
    }
    let mut new = header.clone();
    let slot = &mut new.slots[n];
    (slot.is_active, slot.iterations, slot.salt) = (false, 0, [0; 32]);
    place.write_header(&new).await?;
    *header = new;
    Ok(())
}
