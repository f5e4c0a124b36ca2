//! The ciphers, modes and hashes that images name.

/// A block cipher with the length of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CipherAlg {
    Aes128,
    Aes192,
    Aes256,
    Cast5,
    Serpent128,
    Serpent192,
    Serpent256,
    Twofish128,
    Twofish192,
    Twofish256,
    Sm4,
}

impl CipherAlg {
    pub const ALL: [CipherAlg; 11] = [
        Self::Aes128,
        Self::Aes192,
        Self::Aes256,
        Self::Cast5,
        Self::Serpent128,
        Self::Serpent192,
        Self::Serpent256,
        Self::Twofish128,
        Self::Twofish192,
        Self::Twofish256,
        Self::Sm4,
    ];

    /// As options have it.
    pub fn name(self) -> &'static str {
        match self {
            CipherAlg::Aes128 => "aes-128",
            CipherAlg::Aes192 => "aes-192",
            CipherAlg::Aes256 => "aes-256",
            CipherAlg::Cast5 => "cast5-128",
            CipherAlg::Serpent128 => "serpent-128",
            CipherAlg::Serpent192 => "serpent-192",
            CipherAlg::Serpent256 => "serpent-256",
            CipherAlg::Twofish128 => "twofish-128",
            CipherAlg::Twofish192 => "twofish-192",
            CipherAlg::Twofish256 => "twofish-256",
            CipherAlg::Sm4 => "sm4",
        }
    }

    pub fn parse(name: &str) -> Option<CipherAlg> {
        Self::ALL.into_iter().find(|alg| alg.name() == name)
    }

    /// As LUKS headers have it, with any length of key.
    pub fn family(self) -> &'static str {
        self.name().split('-').next().unwrap_or_default()
    }

    /// Bytes of the key, of one of both in XTS.
    pub fn key_len(self) -> usize {
        match self {
            CipherAlg::Aes192 | CipherAlg::Serpent192 | CipherAlg::Twofish192 => 24,
            CipherAlg::Aes256 | CipherAlg::Serpent256 | CipherAlg::Twofish256 => 32,
            _ => 16,
        }
    }

    /// Bytes of a block.
    pub fn block_len(self) -> usize {
        if self == CipherAlg::Cast5 { 8 } else { 16 }
    }

    /// The cipher of a family with a key of so many bytes in this mode.
    pub fn of_family(family: &str, mode: CipherMode, key_len: usize) -> Option<CipherAlg> {
        let one = if mode == CipherMode::Xts { key_len / 2 } else { key_len };
        Self::ALL.into_iter().find(|alg| {
            alg.family() == family && alg.key_len() == one && mode.key_len(*alg) == key_len
        })
    }
}

/// How blocks of a sector are chained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CipherMode {
    Ecb,
    Cbc,
    Xts,
    Ctr,
}

impl CipherMode {
    pub const ALL: [CipherMode; 4] = [Self::Ecb, Self::Cbc, Self::Xts, Self::Ctr];

    pub fn name(self) -> &'static str {
        match self {
            CipherMode::Ecb => "ecb",
            CipherMode::Cbc => "cbc",
            CipherMode::Xts => "xts",
            CipherMode::Ctr => "ctr",
        }
    }

    pub fn parse(name: &str) -> Option<CipherMode> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// Bytes of the whole key: XTS has two.
    pub fn key_len(self, alg: CipherAlg) -> usize {
        alg.key_len() * if self == CipherMode::Xts { 2 } else { 1 }
    }
}

/// A hash that images name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashAlg {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

impl HashAlg {
    pub const ALL: [HashAlg; 7] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
    ];

    /// As options and LUKS headers have it.
    pub fn name(self) -> &'static str {
        match self {
            HashAlg::Md5 => "md5",
            HashAlg::Sha1 => "sha1",
            HashAlg::Sha224 => "sha224",
            HashAlg::Sha256 => "sha256",
            HashAlg::Sha384 => "sha384",
            HashAlg::Sha512 => "sha512",
            HashAlg::Ripemd160 => "ripemd160",
        }
    }

    pub fn parse(name: &str) -> Option<HashAlg> {
        Self::ALL.into_iter().find(|alg| alg.name() == name)
    }

    /// Bytes of a hash.
    pub fn digest_len(self) -> usize {
        match self {
            HashAlg::Md5 => 16,
            HashAlg::Sha1 | HashAlg::Ripemd160 => 20,
            HashAlg::Sha224 => 28,
            HashAlg::Sha256 => 32,
            HashAlg::Sha384 => 48,
            HashAlg::Sha512 => 64,
        }
    }
}
