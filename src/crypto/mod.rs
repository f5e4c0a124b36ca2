//! Ciphers, hashes and key derivation for encrypted disks, and the secrets that open them.
//!
//! AES, the common hashes, PBKDF2 and random bytes come from AWS-LC ([`library`]), the rare ciphers from RustCrypto
//! ([`blocks`]). Nothing here knows an image format: formats say which cipher, mode and iv generator a disk has
//! ([`sectors`]), and how their keys are kept.

pub mod blocks;
pub mod cipher;
pub mod hash;
pub mod ivgen;
pub mod library;
pub mod memory;
pub mod object;
pub mod secrets;
pub mod sectors;
pub mod split;

pub use cipher::{CipherAlg, CipherMode, HashAlg};
pub use ivgen::IvGen;
pub use memory::Hidden;
pub use sectors::{DiskCipher, SectorCipher};
