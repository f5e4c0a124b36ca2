//! AWS-LC: its ciphers, hashes, key derivation and random bytes behind safe calls.
//!
//! The rule held here: keys go in once, when a [`Context`] is made, and what the library keeps of them is wiped when the
//! context goes and left out of core files.

use super::memory::hide;
use super::{CipherAlg, CipherMode, HashAlg};
use aws_lc_sys as lib;
use std::ptr::{NonNull, null, null_mut};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Encrypt,
    Decrypt,
}

/// A cipher in one mode and one direction with its key. One thread uses it at a time.
pub struct Context {
    raw: NonNull<lib::EVP_CIPHER_CTX>,
    way: Way,
}

// SAFETY: the library's contexts belong to no thread, and this one to its owner alone.
unsafe impl Send for Context {}

/// The library's cipher, if it has one of that kind.
fn named(alg: CipherAlg, mode: CipherMode) -> Option<*const lib::EVP_CIPHER> {
    use CipherAlg::{Aes128, Aes192, Aes256};
    use CipherMode::{Cbc, Ctr, Ecb, Xts};
    // SAFETY: these give the addresses of constants.
    let found = unsafe {
        match (alg, mode) {
            (Aes128, Ecb) => lib::EVP_aes_128_ecb(),
            (Aes192, Ecb) => lib::EVP_aes_192_ecb(),
            (Aes256, Ecb) => lib::EVP_aes_256_ecb(),
            (Aes128, Cbc) => lib::EVP_aes_128_cbc(),
            (Aes192, Cbc) => lib::EVP_aes_192_cbc(),
            (Aes256, Cbc) => lib::EVP_aes_256_cbc(),
            (Aes128, Ctr) => lib::EVP_aes_128_ctr(),
            (Aes192, Ctr) => lib::EVP_aes_192_ctr(),
            (Aes256, Ctr) => lib::EVP_aes_256_ctr(),
            (Aes256, Xts) => lib::EVP_aes_256_xts(),
            _ => return None,
        }
    };
    Some(found)
}

impl Context {
    /// None where the library has no such cipher, or refuses the key.
    pub fn new(alg: CipherAlg, mode: CipherMode, way: Way, key: &[u8]) -> Option<Context> {
        let cipher = named(alg, mode)?;
        let wanted = alg.key_len() * if mode == CipherMode::Xts { 2 } else { 1 };
        if key.len() != wanted {
            return None;
        }
        // SAFETY: no argument; null when memory is short.
        let raw = NonNull::new(unsafe { lib::EVP_CIPHER_CTX_new() })?;
        let context = Context { raw, way };
        // SAFETY: the context is new, and the key has the length that the cipher takes.
        unsafe {
            let enc = i32::from(way == Way::Encrypt);
            if lib::EVP_CipherInit_ex(raw.as_ptr(), cipher, null_mut(), key.as_ptr(), null(), enc)
                != 1
            {
                return None;
            }
            lib::EVP_CIPHER_CTX_set_padding(raw.as_ptr(), 0);
            let state = raw.as_ref().cipher_data;
            if !state.is_null() {
                // More than any cipher here keeps: the key's schedules, twice.
                hide(state.cast_const().cast(), 1024);
            }
        }
        Some(context)
    }

    /// Ciphers `len` bytes, whole blocks of one sector, from `from` to `to`, which may be the same place.
    ///
    /// # Safety
    /// `from` is readable and `to` writable for `len` bytes. Others may change the bytes meanwhile.
    #[inline]
    pub unsafe fn sector(&mut self, iv: &[u8; 16], from: *const u8, to: *mut u8, len: usize) {
        let enc = i32::from(self.way == Way::Encrypt);
        // SAFETY: the context was initialised with cipher and key; the caller promises the memory.
        let done = unsafe {
            lib::EVP_CipherInit_ex(self.raw.as_ptr(), null(), null_mut(), null(), iv.as_ptr(), enc)
                == 1
                && lib::EVP_Cipher(self.raw.as_ptr(), to, from, len) >= 0
        };
        // The one failure there is: a length that is not whole blocks, which callers never pass.
        assert!(done, "a sector of {len} bytes was not ciphered");
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by EVP_CIPHER_CTX_new, and freed once; wipes what it had.
        unsafe { lib::EVP_CIPHER_CTX_free(self.raw.as_ptr()) }
    }
}

fn digest_of(alg: HashAlg) -> Option<*const lib::EVP_MD> {
    // SAFETY: these give the addresses of constants.
    unsafe {
        Some(match alg {
            HashAlg::Md5 => lib::EVP_md5(),
            HashAlg::Sha1 => lib::EVP_sha1(),
            HashAlg::Sha224 => lib::EVP_sha224(),
            HashAlg::Sha256 => lib::EVP_sha256(),
            HashAlg::Sha384 => lib::EVP_sha384(),
            HashAlg::Sha512 => lib::EVP_sha512(),
            HashAlg::Ripemd160 => return None,
        })
    }
}

/// The hash of `data`, into the first bytes of `out`; false for a hash that the library does not have.
pub(super) fn digest(alg: HashAlg, data: &[u8], out: &mut [u8; 64]) -> bool {
    let Some(md) = digest_of(alg) else { return false };
    let mut len = 0;
    // SAFETY: `out` has room for the longest hash there is.
    let done = unsafe {
        lib::EVP_Digest(
            data.as_ptr().cast(),
            data.len(),
            out.as_mut_ptr(),
            &mut len,
            md,
            null_mut(),
        )
    };
    assert_eq!(done, 1, "a hash failed: memory is short");
    true
}

/// PBKDF2 with HMAC (RFC 8018, 5.2), into `out`; false for a hash that the library does not have.
pub(super) fn pbkdf2(
    alg: HashAlg,
    (password, salt): (&[u8], &[u8]),
    iterations: u32,
    out: &mut [u8],
) -> bool {
    let Some(md) = digest_of(alg) else { return false };
    // SAFETY: all memory is as long as is said.
    let done = unsafe {
        lib::PKCS5_PBKDF2_HMAC(
            password.as_ptr().cast(),
            password.len(),
            salt.as_ptr(),
            salt.len(),
            iterations,
            md,
            out.len(),
            out.as_mut_ptr(),
        )
    };
    assert_eq!(done, 1, "deriving a key failed: memory is short");
    true
}

/// The processor time of the calling thread: how long its work takes when nobody else is there.
pub fn thread_time() -> std::time::Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the structure, which is this frame's own.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    std::time::Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Fills `out` with random bytes that nobody can guess.
pub fn random(out: &mut [u8]) {
    // SAFETY: `out` is as long as is said.
    let done = unsafe { lib::RAND_bytes(out.as_mut_ptr(), out.len()) };
    assert_eq!(done, 1, "the system gives no random bytes");
}

/// Whether both are the same, in a time that does not tell where they differ.
pub fn equal(a: &[u8], b: &[u8]) -> bool {
    // SAFETY: both are at least as long as is said.
    a.len() == b.len()
        && unsafe { lib::CRYPTO_memcmp(a.as_ptr().cast(), b.as_ptr().cast(), a.len()) == 0 }
}
