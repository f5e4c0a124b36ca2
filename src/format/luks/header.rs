//! The header of LUKS1 (LUKS1 On-Disk Format 1.2.3, chapter 4): read, checked and written.

use crate::block::{Error, SECTOR};
use crate::crypto::{CipherAlg, CipherMode, DiskCipher, HashAlg, IvGen};
use std::ops::Range;

/// Bytes of the header.
pub const LEN: usize = 592;
pub const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
pub const SLOTS: usize = 8;
/// Stripes that a key is split into: the only number that anybody writes.
pub const STRIPES: u32 = 4000;
/// Where the first key material is, and what all of it and the disk are aligned to, in bytes.
pub const ALIGN: u64 = 4096;
/// Longest key, in bytes.
const LONGEST_KEY: u32 = 512;
/// Bytes of the digest of the key.
pub const DIGEST: usize = 20;

const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;

/// A key slot: a copy of the disk's key under a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    pub is_active: bool,
    pub iterations: u32,
    pub salt: [u8; 32],
    /// Where the key material is, in sectors of 512 bytes.
    pub offset: u32,
    pub stripes: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The cipher's family.
    pub cipher: String,
    /// Mode, iv generator and its hash: `cbc-essiv:sha256`.
    pub mode: String,
    pub hash: HashAlg,
    /// Where the disk begins, in sectors of 512 bytes; 0 of a header apart from its disk.
    pub payload: u32,
    pub key_len: u32,
    pub digest: [u8; DIGEST],
    pub digest_salt: [u8; 32],
    pub digest_iterations: u32,
    pub uuid: String,
    pub slots: [Slot; SLOTS],
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|n| bytes[at + n])
}

/// A text that ends with a zero byte.
fn text(bytes: &[u8], range: Range<usize>, what: &str) -> Result<String, Error> {
    let field = &bytes[range];
    let end = field.iter().position(|&byte| byte == 0);
    let end = end.ok_or_else(|| bad(format!("{what} has no end")))?;
    let text = std::str::from_utf8(&field[..end]).ok().filter(|text| text.is_ascii());
    text.map(str::to_owned).ok_or_else(|| bad(format!("{what} is no text")))
}

fn bad(what: String) -> Error {
    Error::new(format!("LUKS header: {what}"))
}

/// Bytes of key material on the disk: stripes of a key, in whole sectors.
pub fn material_len(key_len: u32, stripes: u32) -> u64 {
    (u64::from(key_len) * u64::from(stripes)).next_multiple_of(SECTOR)
}

impl Header {
    pub fn is_one(bytes: &[u8]) -> bool {
        bytes.len() >= 8 && &bytes[..6] == MAGIC && bytes[6..8] == [0, 1]
    }

    /// # Errors
    /// One line: what is no header of this version, or not a sound one.
    pub fn parse(bytes: &[u8; LEN]) -> Result<Header, Error> {
        if &bytes[..6] != MAGIC {
            return Err(Error::new("Volume is not in LUKS format"));
        }
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if version != 1 {
            return Err(Error::new(format!("LUKS version {version} is not supported")));
        }
        let hash = text(bytes, 72..104, "hash")?;
        let slots = std::array::from_fn(|n| &bytes[208 + 48 * n..][..48]);
        if let Some(n) = slots.iter().position(|slot| ![ACTIVE, INACTIVE].contains(&be32(slot, 0)))
        {
            let state = be32(slots[n], 0);
            return Err(bad(format!("key slot {n} is neither active nor inactive (0x{state:x})")));
        }
        let header = Header {
            cipher: text(bytes, 8..40, "cipher")?,
            mode: text(bytes, 40..72, "cipher mode")?,
            hash: HashAlg::parse(&hash)
                .ok_or_else(|| Error::new(format!("Hash algorithm '{hash}' is not supported")))?,
            payload: be32(bytes, 104),
            key_len: be32(bytes, 108),
            digest: array(bytes, 112),
            digest_salt: array(bytes, 132),
            digest_iterations: be32(bytes, 164),
            uuid: text(bytes, 168..208, "UUID")?,
            slots: slots.map(|slot| Slot {
                is_active: be32(slot, 0) == ACTIVE,
                iterations: be32(slot, 4),
                salt: array(slot, 8),
                offset: be32(slot, 40),
                stripes: be32(slot, 44),
            }),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), Error> {
        if self.key_len == 0 || self.key_len > LONGEST_KEY {
            return Err(bad(format!("a key of {} bytes", self.key_len)));
        }
        if self.digest_iterations == 0 {
            return Err(bad("the digest has no iterations".into()));
        }
        for (n, slot) in self.slots.iter().enumerate() {
            if slot.stripes != STRIPES {
                let stripes = slot.stripes;
                return Err(bad(format!("key slot {n} has {stripes} stripes, not {STRIPES}")));
            }
            if slot.is_active && slot.iterations == 0 {
                return Err(bad(format!("key slot {n} is active and has no iterations")));
            }
            let Range { start, end } = self.material(n);
            if start < LEN as u64 {
                return Err(bad(format!("key slot {n} overlaps the header")));
            }
            if self.payload != 0 && end > self.payload_offset() {
                return Err(bad(format!("key slot {n} overlaps the disk")));
            }
            let other = (0..n).find(|&other| {
                let other = self.material(other);
                other.start < end && start < other.end
            });
            if let Some(other) = other {
                return Err(bad(format!("key slots {other} and {n} overlap")));
            }
        }
        self.disk_cipher().map(drop)
    }

    /// Bytes of the file that a slot's key material takes.
    pub fn material(&self, slot: usize) -> Range<u64> {
        let Slot { offset, stripes, .. } = self.slots[slot];
        let start = u64::from(offset) * SECTOR;
        start..start + material_len(self.key_len, stripes)
    }

    /// Where the disk begins, in bytes.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.payload) * SECTOR
    }

    /// How disk and key material are enciphered.
    ///
    /// # Errors
    /// One line: by what there is not here.
    pub fn disk_cipher(&self) -> Result<DiskCipher, Error> {
        let (mode, ivs) = self.mode.split_once('-').unwrap_or((&self.mode, ""));
        let (ivgen, iv_hash) = match ivs.split_once(':') {
            Some((ivgen, hash)) => (ivgen, Some(hash)),
            None => (ivs, None),
        };
        let unsupported =
            |what: &str, name: &str| Error::new(format!("{what} '{name}' is not supported"));
        let mode = CipherMode::parse(mode).ok_or_else(|| unsupported("Cipher mode", mode))?;
        let ivgen = match (mode, ivgen) {
            (CipherMode::Ecb, "") => IvGen::Plain,
            _ => IvGen::parse(ivgen).ok_or_else(|| unsupported("IV generator", ivgen))?,
        };
        let iv_hash = iv_hash
            .map(|name| HashAlg::parse(name).ok_or_else(|| unsupported("Hash algorithm", name)));
        let family = CipherAlg::ALL.iter().any(|alg| alg.family() == self.cipher);
        if !family {
            return Err(unsupported("Algorithm", &self.cipher));
        }
        let alg =
            CipherAlg::of_family(&self.cipher, mode, self.key_len as usize).ok_or_else(|| {
                let (cipher, len) = (&self.cipher, self.key_len);
                Error::new(format!("Algorithm '{cipher}' with key size {len} bytes not supported"))
            })?;
        Ok(DiskCipher { alg, mode, ivgen, iv_hash: iv_hash.transpose()?, sector: 512 })
    }

    pub fn encode(&self) -> [u8; LEN] {
        let mut out = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(6, &1u16.to_be_bytes());
        for (at, text) in [(8, &*self.cipher), (40, &self.mode), (72, self.hash.name())] {
            put(at, &text.as_bytes()[..text.len().min(31)]);
        }
        put(104, &self.payload.to_be_bytes());
        put(108, &self.key_len.to_be_bytes());
        put(112, &self.digest);
        put(132, &self.digest_salt);
        put(164, &self.digest_iterations.to_be_bytes());
        put(168, &self.uuid.as_bytes()[..self.uuid.len().min(39)]);
        for (n, slot) in self.slots.iter().enumerate() {
            let at = 208 + 48 * n;
            put(at, &(if slot.is_active { ACTIVE } else { INACTIVE }).to_be_bytes());
            put(at + 4, &slot.iterations.to_be_bytes());
            put(at + 8, &slot.salt);
            put(at + 40, &slot.offset.to_be_bytes());
            put(at + 44, &slot.stripes.to_be_bytes());
        }
        out
    }

    /// A header without keys, for a disk that follows its key material.
    pub fn new(cipher: &DiskCipher, hash: HashAlg) -> Header {
        let key_len = cipher.key_len() as u32;
        let step = material_len(key_len, STRIPES).next_multiple_of(ALIGN);
        let offset = |n: usize| ((ALIGN + n as u64 * step) / SECTOR) as u32;
        let iv_hash = cipher.iv_hash.filter(|_| cipher.ivgen == IvGen::Essiv);
        let iv_hash = iv_hash.map(|hash| format!(":{}", hash.name())).unwrap_or_default();
        Header {
            cipher: cipher.alg.family().to_owned(),
            mode: format!("{}-{}{iv_hash}", cipher.mode.name(), cipher.ivgen.name()),
            hash,
            payload: offset(SLOTS),
            key_len,
            digest: [0; DIGEST],
            digest_salt: [0; 32],
            digest_iterations: 0,
            uuid: uuid::Uuid::new_v4().to_string(),
            slots: std::array::from_fn(|n| Slot {
                is_active: false,
                iterations: 0,
                salt: [0; 32],
                offset: offset(n),
                stripes: STRIPES,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let cipher = DiskCipher {
            alg: CipherAlg::Aes256,
            mode: CipherMode::Xts,
            ivgen: IvGen::Plain64,
            iv_hash: None,
            sector: 512,
        };
        Header { digest_iterations: 1000, ..Header::new(&cipher, HashAlg::Sha256) }
    }

    #[test]
    fn a_header_is_read_as_it_was_written_and_laid_out_as_qemus() {
        let header = header();
        let read = Header::parse(&header.encode()).unwrap();
        assert_eq!(read, header);
        assert_eq!(read.payload_offset(), 2068480);
        assert_eq!(read.material(1).start, 262144);
        assert_eq!(read.mode, "xts-plain64");
    }

    #[test]
    fn what_is_unsound_is_refused_in_one_line() {
        type Change = fn(&mut Header);
        let cases: [(Change, &str); 9] = [
            (|h| h.slots[3].offset = h.slots[2].offset, "LUKS header: key slots 2 and 3 overlap"),
            (|h| h.slots[0].offset = 1, "LUKS header: key slot 0 overlaps the header"),
            (|h| h.payload -= 8, "LUKS header: key slot 7 overlaps the disk"),
            (|h| h.slots[5].stripes = 1, "LUKS header: key slot 5 has 1 stripes, not 4000"),
            (|h| h.key_len = 0, "LUKS header: a key of 0 bytes"),
            (|h| h.key_len = 40, "Algorithm 'aes' with key size 40 bytes not supported"),
            (|h| h.cipher = "rot".into(), "Algorithm 'rot' is not supported"),
            (|h| h.mode = "cbc-benbi".into(), "IV generator 'benbi' is not supported"),
            (|h| h.digest_iterations = 0, "LUKS header: the digest has no iterations"),
        ];
        for (change, wanted) in cases {
            let mut header = header();
            change(&mut header);
            let error = Header::parse(&header.encode()).unwrap_err().to_string();
            assert_eq!(error, wanted);
        }
        let mut bytes = header().encode();
        bytes[8..40].fill(b'a');
        assert_eq!(
            Header::parse(&bytes).unwrap_err().to_string(),
            "LUKS header: cipher has no end"
        );
        bytes = header().encode();
        bytes[7] = 3;
        let error = Header::parse(&bytes).unwrap_err().to_string();
        assert_eq!(error, "LUKS version 3 is not supported");
    }
}
