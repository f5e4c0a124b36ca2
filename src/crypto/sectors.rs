//! The cipher of a disk: sectors by their numbers, in place or from one memory to another.
//!
//! Sectors are ciphered by the thread that moves them, in memory that the guest may share: no Rust reference to it is
//! made. Contexts of the library serve one thread at a time, so there are several, and a thread takes the one that it
//! finds free, beginning with its own.

use super::blocks::Modes;
use super::ivgen::Ivs;
use super::library::{Context, Way};
use super::{CipherAlg, CipherMode, HashAlg, IvGen};
use crate::io::IoVec;
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Bytes that the numbers of sectors count, whatever the sectors' length.
pub const UNIT: u64 = 512;
/// The longest sector that there is.
const LONGEST: usize = 4096;
/// Threads that cipher at a time without waiting for each other.
const CONTEXTS: usize = 16;

/// How a disk is enciphered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskCipher {
    pub alg: CipherAlg,
    pub mode: CipherMode,
    pub ivgen: IvGen,
    /// What essiv makes its key with.
    pub iv_hash: Option<HashAlg>,
    /// Bytes that have one initialisation vector: a power of two from 512 to 4096.
    pub sector: usize,
}

/// A disk's cipher with its key.
pub struct SectorCipher {
    engine: Engine,
    ivs: Ivs,
    sector: usize,
}

enum Engine {
    /// To encrypt, and to decrypt.
    Library(Box<[[Mutex<Context>; 2]]>),
    Modes(Box<Modes>),
}

impl DiskCipher {
    /// Bytes of the key.
    pub fn key_len(&self) -> usize {
        self.mode.key_len(self.alg)
    }

    /// # Errors
    /// One line: cipher, mode and generator do not go together, or the key has another length.
    pub fn with_key(&self, key: &[u8]) -> Result<SectorCipher, String> {
        if key.len() != self.key_len() {
            return Err(format!("a key of {} bytes is not one for {}", key.len(), self.alg.name()));
        }
        let ivs = Ivs::new(self.ivgen, self.alg, self.iv_hash, key)?;
        let pair = || {
            let context = |way| Context::new(self.alg, self.mode, way, key).map(Mutex::new);
            Some([context(Way::Encrypt)?, context(Way::Decrypt)?])
        };
        let engine = match (0..CONTEXTS).map(|_| pair()).collect::<Option<_>>() {
            Some(contexts) => Engine::Library(contexts),
            None => Engine::Modes(Box::new(Modes::new(self.alg, self.mode, key)?)),
        };
        Ok(SectorCipher { engine, ivs, sector: self.sector })
    }
}

impl SectorCipher {
    /// Bytes of a sector: requests are multiples of it, and so are the segments of lists.
    pub fn sector_len(&self) -> usize {
        self.sector
    }

    /// Deciphers in place. The first byte is byte `at` of the disk.
    ///
    /// # Panics
    /// A segment is not whole sectors.
    pub fn decrypt(&self, at: u64, list: &IoVec<'_>) {
        list.check_fillable();
        let mut at = at;
        for segment in list.as_raw() {
            let (base, len) = (segment.iov_base.cast::<u8>(), segment.iov_len);
            // SAFETY: the list keeps the segment mapped, and may be filled.
            unsafe { self.run(Way::Decrypt, at, base, base, len) };
            at += len as u64;
        }
    }

    /// Enciphers what a list holds into `to`, as long as the list.
    ///
    /// # Panics
    /// A segment is not whole sectors, or `to` is shorter.
    pub fn encrypt(&self, at: u64, from: &IoVec<'_>, to: &mut [u8]) {
        let (mut at, mut to) = (at, to);
        for segment in from.as_raw() {
            let len = segment.iov_len;
            let (part, rest) = to.split_at_mut(len);
            // SAFETY: the list keeps the segment mapped, and `part` is as long.
            unsafe { self.run(Way::Encrypt, at, segment.iov_base.cast(), part.as_mut_ptr(), len) };
            (at, to) = (at + len as u64, rest);
        }
    }

    /// Enciphers in place.
    pub fn encrypt_bytes(&self, at: u64, bytes: &mut [u8]) {
        let base = bytes.as_mut_ptr();
        // SAFETY: the bytes are borrowed alone.
        unsafe { self.run(Way::Encrypt, at, base, base, bytes.len()) };
    }

    /// Deciphers in place.
    pub fn decrypt_bytes(&self, at: u64, bytes: &mut [u8]) {
        let base = bytes.as_mut_ptr();
        // SAFETY: the bytes are borrowed alone.
        unsafe { self.run(Way::Decrypt, at, base, base, bytes.len()) };
    }

    /// # Safety
    /// `from` is readable and `to` writable for `len` bytes. Others may change the bytes meanwhile.
    unsafe fn run(&self, way: Way, at: u64, from: *const u8, to: *mut u8, len: usize) {
        assert!(len.is_multiple_of(self.sector), "{len} bytes are not whole sectors");
        let mut context = match &self.engine {
            Engine::Library(contexts) => Some(free(contexts, way)),
            Engine::Modes(_) => None,
        };
        for skip in (0..len).step_by(self.sector) {
            let iv = self.ivs.of((at + skip as u64) / UNIT);
            let (from, to) = (from.wrapping_add(skip), to.wrapping_add(skip));
            match (&mut context, &self.engine) {
                // SAFETY: the caller's promise.
                (Some(context), _) => unsafe { context.sector(&iv, from, to, self.sector) },
                (None, Engine::Modes(modes)) => {
                    let mut copy = [0; LONGEST];
                    let copy = &mut copy[..self.sector];
                    // SAFETY: the caller's promise; the copy is this frame's own.
                    unsafe { std::ptr::copy(from, copy.as_mut_ptr(), self.sector) };
                    modes.sector(way, iv, copy);
                    // SAFETY: as before.
                    unsafe { std::ptr::copy(copy.as_ptr(), to, self.sector) };
                }
                (None, Engine::Library(_)) => {}
            }
        }
    }
}

/// A context that no other thread uses, or after a wait for it the calling thread's own.
fn free(contexts: &[[Mutex<Context>; 2]], way: Way) -> MutexGuard<'_, Context> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: Cell<usize> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed));
    }
    let of = |n: usize| &contexts[n % contexts.len()][usize::from(way == Way::Decrypt)];
    let own = OWN.with(Cell::get);
    for n in own..own + contexts.len() {
        match of(n).try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(error)) => return error.into_inner(),
            Err(TryLockError::WouldBlock) => {}
        }
    }
    of(own).lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cipher(alg: CipherAlg, sector: usize) -> SectorCipher {
        let disk =
            DiskCipher { alg, mode: CipherMode::Xts, ivgen: IvGen::Plain64, iv_hash: None, sector };
        let key: Vec<u8> = (0..disk.key_len() as u8).collect();
        disk.with_key(&key).unwrap()
    }

    #[test]
    fn every_sector_is_ciphered_by_its_own_number_wherever_a_request_begins() {
        for alg in [CipherAlg::Aes256, CipherAlg::Aes128, CipherAlg::Twofish256] {
            for sector in [512, 4096] {
                let cipher = cipher(alg, sector);
                let plain = vec![9; 4 * sector];
                let mut whole = vec![0; plain.len()];
                cipher.encrypt(8192, &IoVec::from_ref(&plain), &mut whole);
                let mut parts = plain.clone();
                for n in 0..4 {
                    let at = 8192 + (n * sector) as u64;
                    cipher.encrypt_bytes(at, &mut parts[n * sector..][..sector]);
                }
                assert!(parts == whole);
                assert_ne!(whole[..sector], whole[sector..2 * sector]);
                let second = IoVec::from_mut(&mut whole[sector..]);
                cipher.decrypt(8192 + sector as u64, &second);
                assert!(whole[sector..] == plain[sector..]);
                cipher.decrypt_bytes(8192, &mut whole[..sector]);
                assert!(whole == plain);
            }
        }
    }
}
