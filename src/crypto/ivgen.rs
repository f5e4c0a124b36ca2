//! Initialisation vectors of sectors: which bytes a sector's number becomes.

use super::blocks::Blocks;
use super::{CipherAlg, HashAlg};

/// How the number of a sector becomes an initialisation vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvGen {
    /// The number's low 32 bits, the least significant byte first.
    Plain,
    /// All 64 bits.
    Plain64,
    /// All 64 bits, enciphered with a hash of the disk's key.
    Essiv,
}

impl IvGen {
    pub const ALL: [IvGen; 3] = [Self::Plain, Self::Plain64, Self::Essiv];

    pub fn name(self) -> &'static str {
        match self {
            IvGen::Plain => "plain",
            IvGen::Plain64 => "plain64",
            IvGen::Essiv => "essiv",
        }
    }

    pub fn parse(name: &str) -> Option<IvGen> {
        Self::ALL.into_iter().find(|one| one.name() == name)
    }
}

/// A generator with its key.
pub(super) enum Ivs {
    Plain,
    Plain64,
    Essiv(Blocks),
}

impl Ivs {
    /// `hash` is what essiv makes its key with.
    ///
    /// # Errors
    /// One line: essiv without a hash, or with one that the cipher cannot take.
    pub fn new(
        kind: IvGen,
        cipher: CipherAlg,
        hash: Option<HashAlg>,
        key: &[u8],
    ) -> Result<Ivs, String> {
        Ok(match kind {
            IvGen::Plain => Ivs::Plain,
            IvGen::Plain64 => Ivs::Plain64,
            IvGen::Essiv => {
                let hash = hash.ok_or("the iv generator essiv needs a hash")?;
                let cipher = essiv_cipher(cipher, hash)?;
                let salt = zeroize::Zeroizing::new(hash.digest(key));
                Ivs::Essiv(Blocks::new(cipher, &salt[..cipher.key_len()])?)
            }
        })
    }

    pub fn of(&self, sector: u64) -> [u8; 16] {
        let mut iv = [0; 16];
        match self {
            Ivs::Plain => iv[..4].copy_from_slice(&(sector as u32).to_le_bytes()),
            Ivs::Plain64 | Ivs::Essiv(_) => iv[..8].copy_from_slice(&sector.to_le_bytes()),
        }
        if let Ivs::Essiv(blocks) = self {
            blocks.encrypt(&mut iv[..blocks.block_len()]);
        }
        iv
    }
}

/// Of the cipher's family, the one whose key is as long as the hash.
pub fn essiv_cipher(cipher: CipherAlg, hash: HashAlg) -> Result<CipherAlg, String> {
    let mut of_family = CipherAlg::ALL.into_iter().filter(|alg| alg.family() == cipher.family());
    of_family.rfind(|alg| alg.key_len() == hash.digest_len()).ok_or_else(|| {
        format!("No {} cipher with key size {} available", cipher.family(), hash.digest_len())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_forgets_the_high_half_and_plain64_does_not() {
        let sector = 0x1_0203_0405;
        let ivs = |kind| Ivs::new(kind, CipherAlg::Aes256, None, &[0; 32]).unwrap().of(sector);
        assert_eq!(ivs(IvGen::Plain)[..6], [5, 4, 3, 2, 0, 0]);
        assert_eq!(ivs(IvGen::Plain64)[..6], [5, 4, 3, 2, 1, 0]);
    }

    #[test]
    fn essiv_is_the_number_under_the_hash_of_the_key() {
        let ivs =
            Ivs::new(IvGen::Essiv, CipherAlg::Aes128, Some(HashAlg::Sha256), &[1; 16]).unwrap();
        let mut wanted = [0; 16];
        wanted[0] = 7;
        let salt = HashAlg::Sha256.digest(&[1; 16]);
        Blocks::new(CipherAlg::Aes256, &salt[..32]).unwrap().encrypt(&mut wanted);
        assert_eq!(ivs.of(7), wanted);
        let error = essiv_cipher(CipherAlg::Aes256, HashAlg::Sha512).unwrap_err();
        assert_eq!(error, "No aes cipher with key size 64 available");
    }
}
