//! Block ciphers one block at a time, and the modes over them: for what AWS-LC does not have in one piece.

use super::library::{Context, Way};
use super::{CipherAlg, CipherMode};
use cast5::Cast5;
use serpent::Serpent;
use sm4::Sm4;
use std::sync::{Mutex, PoisonError};
use twofish::Twofish;
use twofish::cipher::generic_array::GenericArray;
use twofish::cipher::{BlockDecrypt, BlockEncrypt, KeyInit};

/// A block cipher with its key.
pub enum Blocks {
    /// To encrypt, and to decrypt.
    Aes(Box<[Mutex<Context>; 2]>),
    Cast5(Box<Cast5>),
    Serpent(Box<Serpent>),
    Twofish(Box<Twofish>),
    Sm4(Box<Sm4>),
}

impl Blocks {
    /// # Errors
    /// One line: the key has another length.
    pub fn new(alg: CipherAlg, key: &[u8]) -> Result<Blocks, String> {
        let wrong = || format!("a key of {} bytes is not one for {}", key.len(), alg.name());
        if key.len() != alg.key_len() {
            return Err(wrong());
        }
        let blocks = match alg.family() {
            "aes" => {
                let context = |way| Context::new(alg, CipherMode::Ecb, way, key).map(Mutex::new);
                let both = (context(Way::Encrypt), context(Way::Decrypt));
                let (Some(to), Some(from)) = both else { return Err(wrong()) };
                Blocks::Aes(Box::new([to, from]))
            }
            "cast5" => Blocks::Cast5(hidden(Cast5::new_from_slice(key)).ok_or_else(wrong)?),
            "serpent" => Blocks::Serpent(hidden(Serpent::new_from_slice(key)).ok_or_else(wrong)?),
            "twofish" => Blocks::Twofish(hidden(Twofish::new_from_slice(key)).ok_or_else(wrong)?),
            _ => Blocks::Sm4(hidden(Sm4::new_from_slice(key)).ok_or_else(wrong)?),
        };
        Ok(blocks)
    }

    pub fn block_len(&self) -> usize {
        if matches!(self, Blocks::Cast5(_)) { 8 } else { 16 }
    }

    /// Enciphers whole blocks, each by itself.
    pub fn encrypt(&self, bytes: &mut [u8]) {
        match self {
            Blocks::Aes(contexts) => ecb(&contexts[0], bytes),
            Blocks::Cast5(c) => {
                each(bytes, 8, |b| c.encrypt_block(GenericArray::from_mut_slice(b)))
            }
            Blocks::Serpent(c) => {
                each(bytes, 16, |b| c.encrypt_block(GenericArray::from_mut_slice(b)))
            }
            Blocks::Twofish(c) => {
                each(bytes, 16, |b| c.encrypt_block(GenericArray::from_mut_slice(b)))
            }
            Blocks::Sm4(c) => each(bytes, 16, |b| c.encrypt_block(GenericArray::from_mut_slice(b))),
        }
    }

    /// Deciphers whole blocks, each by itself.
    pub fn decrypt(&self, bytes: &mut [u8]) {
        match self {
            Blocks::Aes(contexts) => ecb(&contexts[1], bytes),
            Blocks::Cast5(c) => {
                each(bytes, 8, |b| c.decrypt_block(GenericArray::from_mut_slice(b)))
            }
            Blocks::Serpent(c) => {
                each(bytes, 16, |b| c.decrypt_block(GenericArray::from_mut_slice(b)))
            }
            Blocks::Twofish(c) => {
                each(bytes, 16, |b| c.decrypt_block(GenericArray::from_mut_slice(b)))
            }
            Blocks::Sm4(c) => each(bytes, 16, |b| c.decrypt_block(GenericArray::from_mut_slice(b))),
        }
    }
}

/// A key's schedule in memory that is left out of core files; each cipher wipes its own.
fn hidden<C, E>(cipher: Result<C, E>) -> Option<Box<C>> {
    let cipher = Box::new(cipher.ok()?);
    super::memory::hide((&raw const *cipher).cast(), size_of::<C>());
    Some(cipher)
}

fn ecb(context: &Mutex<Context>, bytes: &mut [u8]) {
    let mut context = context.lock().unwrap_or_else(PoisonError::into_inner);
    let (at, len) = (bytes.as_mut_ptr(), bytes.len());
    // SAFETY: the bytes are borrowed alone.
    unsafe { context.sector(&[0; 16], at, at, len) }
}

fn each(bytes: &mut [u8], len: usize, work: impl Fn(&mut [u8])) {
    bytes.chunks_exact_mut(len).for_each(work);
}

/// A mode over a block cipher, for one disk.
pub(super) struct Modes {
    mode: CipherMode,
    data: Blocks,
    /// Of XTS: enciphers the sector's number.
    tweak: Option<Blocks>,
}

impl Modes {
    /// # Errors
    /// One line: the key has another length, or the cipher's blocks are too short for the mode.
    pub fn new(alg: CipherAlg, mode: CipherMode, key: &[u8]) -> Result<Modes, String> {
        if mode == CipherMode::Xts && alg.block_len() != 16 {
            return Err(format!("{} has no xts: its blocks are 8 bytes long", alg.name()));
        }
        let (data, tweak) = match mode {
            CipherMode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                (data, Some(Blocks::new(alg, tweak)?))
            }
            _ => (key, None),
        };
        Ok(Modes { mode, data: Blocks::new(alg, data)?, tweak })
    }

    /// Ciphers a sector, whole blocks, in its place.
    pub fn sector(&self, way: Way, iv: [u8; 16], bytes: &mut [u8]) {
        let len = self.data.block_len();
        match (self.mode, way) {
            (CipherMode::Ecb, Way::Encrypt) => self.data.encrypt(bytes),
            (CipherMode::Ecb, Way::Decrypt) => self.data.decrypt(bytes),
            (CipherMode::Cbc, Way::Encrypt) => {
                let mut last = iv;
                for block in bytes.chunks_exact_mut(len) {
                    xor(block, &last);
                    self.data.encrypt(block);
                    last[..len].copy_from_slice(block);
                }
            }
            (CipherMode::Cbc, Way::Decrypt) => {
                let mut last = iv;
                for block in bytes.chunks_exact_mut(len) {
                    let mut enciphered = [0; 16];
                    enciphered[..len].copy_from_slice(block);
                    self.data.decrypt(block);
                    xor(block, &last);
                    last = enciphered;
                }
            }
            (CipherMode::Ctr, _) => {
                let mut counter = iv;
                for block in bytes.chunks_mut(len) {
                    let mut stream = counter;
                    self.data.encrypt(&mut stream[..len]);
                    xor(block, &stream);
                    increment(&mut counter[..len]);
                }
            }
            (CipherMode::Xts, _) => self.xts(way, iv, bytes),
        }
    }

    /// IEEE 1619: both sums with the tweaks go around one run of the cipher over the whole sector.
    fn xts(&self, way: Way, mut iv: [u8; 16], bytes: &mut [u8]) {
        if let Some(tweak) = &self.tweak {
            tweak.encrypt(&mut iv);
        }
        let first = u128::from_le_bytes(iv);
        add_tweaks(first, bytes);
        match way {
            Way::Encrypt => self.data.encrypt(bytes),
            Way::Decrypt => self.data.decrypt(bytes),
        }
        add_tweaks(first, bytes);
    }
}

fn add_tweaks(mut tweak: u128, bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(16) {
        xor(block, &tweak.to_le_bytes());
        // Times x in GF(2^128).
        tweak = tweak << 1 ^ if tweak >> 127 == 1 { 0x87 } else { 0 };
    }
}

fn xor(block: &mut [u8], with: &[u8; 16]) {
    block.iter_mut().zip(with).for_each(|(byte, with)| *byte ^= with);
}

fn increment(counter: &mut [u8]) {
    for byte in counter.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len() / 2).map(|n| u8::from_str_radix(&hex[2 * n..][..2], 16).unwrap()).collect()
    }

    #[test]
    fn each_cipher_has_the_answers_that_were_published() {
        // FIPS 197 C; RFC 2144 B.1; the authors' files for Serpent (NESSIE set 1, vector 0) and Twofish
        // (ecb_ival, I=1 and 2); GB/T 32907 A.1.
        for (alg, key, plain, wanted) in [
            (
                CipherAlg::Aes192,
                "000102030405060708090a0b0c0d0e0f1011121314151617",
                "00112233445566778899aabbccddeeff",
                "dda97ca4864cdfe06eaf70a0ec0d7191",
            ),
            (
                CipherAlg::Cast5,
                "0123456712345678234567893456789a",
                "0123456789abcdef",
                "238b4fe5847e44b2",
            ),
            (
                CipherAlg::Serpent256,
                "8000000000000000000000000000000000000000000000000000000000000000",
                "00000000000000000000000000000000",
                "a223aa1288463c0e2be38ebd825616c0",
            ),
            (
                CipherAlg::Twofish128,
                "00000000000000000000000000000000",
                "00000000000000000000000000000000",
                "9f589f5cf6122c32b6bfec2f2ae8c35a",
            ),
            (
                CipherAlg::Sm4,
                "0123456789abcdeffedcba9876543210",
                "0123456789abcdeffedcba9876543210",
                "681edf34d206965e86b3e94f536e4246",
            ),
        ] {
            let blocks = Blocks::new(alg, &bytes(key)).unwrap();
            let mut block = bytes(plain);
            blocks.encrypt(&mut block);
            assert_eq!(block, bytes(wanted), "{}", alg.name());
            blocks.decrypt(&mut block);
            assert_eq!(block, bytes(plain), "{}", alg.name());
        }
    }

    #[test]
    fn xts_has_the_answers_of_ieee_1619() {
        // Vector 2: AES-128, sector 0x3333333333.
        let key = [[0x11; 16], [0x22; 16]].concat();
        let modes = Modes::new(CipherAlg::Aes128, CipherMode::Xts, &key).unwrap();
        let mut sector = [0x44; 32];
        let mut iv = [0; 16];
        iv[..5].fill(0x33);
        modes.sector(Way::Encrypt, iv, &mut sector);
        let wanted = "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0";
        assert_eq!(sector[..], bytes(wanted));
        modes.sector(Way::Decrypt, iv, &mut sector);
        assert_eq!(sector, [0x44; 32]);
    }

    #[test]
    fn what_one_mode_enciphers_it_deciphers_and_ours_agree_with_the_librarys() {
        let plain: Vec<u8> = (0..512).map(|n| (n * 7 / 5) as u8).collect();
        for alg in CipherAlg::ALL {
            for mode in CipherMode::ALL {
                let key: Vec<u8> = (0..mode.key_len(alg)).map(|n| 3 * n as u8 + 1).collect();
                let iv = std::array::from_fn(|n| 255 - (n as u8 == 14) as u8);
                let Ok(modes) = Modes::new(alg, mode, &key) else {
                    assert_eq!((alg, mode), (CipherAlg::Cast5, CipherMode::Xts));
                    continue;
                };
                let mut sector = plain.clone();
                modes.sector(Way::Encrypt, iv, &mut sector);
                assert_ne!(sector, plain);
                if let Some(mut context) = Context::new(alg, mode, Way::Encrypt, &key) {
                    let mut theirs = plain.clone();
                    let at = theirs.as_mut_ptr();
                    // SAFETY: the bytes are this test's own.
                    unsafe { context.sector(&iv, at, at, theirs.len()) };
                    assert!(theirs == sector, "{alg:?} {mode:?}");
                }
                modes.sector(Way::Decrypt, iv, &mut sector);
                assert!(sector == plain, "{alg:?} {mode:?}");
            }
        }
    }
}
