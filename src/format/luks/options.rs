//! What is asked for of a new encrypted image, and the options that say so, with or without `encrypt.` before them.

use crate::block::Error;
use crate::crypto::{CipherAlg, CipherMode, DiskCipher, HashAlg, IvGen, ivgen};
use crate::options::{Map, Value};
use std::time::Duration;

/// How long a key slot takes to open, if nothing else is said.
const DEFAULT_TIME: Duration = Duration::from_millis(2000);

/// How a new image is enciphered.
#[derive(Clone)]
pub struct Wanted {
    /// The name of the passphrase's secret.
    pub key_secret: String,
    pub cipher: DiskCipher,
    pub hash: HashAlg,
    pub time: Duration,
}

/// Reads a name by its table, in QEMU's words.
fn one_of<T>(
    options: &Map,
    key: &str,
    default: T,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T, Error> {
    match options.get(key).and_then(Value::as_str) {
        None => Ok(default),
        Some(name) => parse(name).ok_or_else(|| {
            let key = key.rsplit('.').next().unwrap_or(key);
            Error::new(format!("Parameter '{key}' does not accept value '{name}'"))
        }),
    }
}

/// The time that `iter-time` gives, in milliseconds.
///
/// # Errors
/// In QEMU's words.
pub fn time(options: &Map, key: &str) -> Result<Duration, Error> {
    match options.get(key) {
        Some(Value::Int(0)) => Err(Error::new("Iteration time must be greater than zero")),
        Some(Value::Int(ms)) => Ok(Duration::from_millis(u64::try_from(*ms).unwrap_or(u64::MAX))),
        _ => Ok(DEFAULT_TIME),
    }
}

impl Wanted {
    /// `prefix` is what stands before each option's name.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn of_options(options: &Map, prefix: &str) -> Result<Wanted, Error> {
        let key = |name: &str| format!("{prefix}{name}");
        let secret = options.get(&key("key-secret")).and_then(Value::as_str);
        let secret = secret.ok_or_else(|| {
            Error::new(format!("Parameter '{prefix}key-secret' is required for cipher"))
        })?;
        let alg = one_of(options, &key("cipher-alg"), CipherAlg::Aes256, CipherAlg::parse)?;
        let mode = one_of(options, &key("cipher-mode"), CipherMode::Xts, CipherMode::parse)?;
        let generator = one_of(options, &key("ivgen-alg"), IvGen::Plain64, IvGen::parse)?;
        let parse = |name: &str| HashAlg::parse(name).map(Some);
        let mut iv_hash = one_of(options, &key("ivgen-hash-alg"), None, parse)?;
        let hash = one_of(options, &key("hash-alg"), HashAlg::Sha256, HashAlg::parse)?;
        if generator == IvGen::Essiv {
            iv_hash = iv_hash.or(Some(HashAlg::Sha256));
            ivgen::essiv_cipher(alg, iv_hash.unwrap_or(HashAlg::Sha256)).map_err(Error::new)?;
        }
        if mode == CipherMode::Xts && alg.block_len() != 16 {
            return Err(Error::new(format!("Unsupported cipher mode {}", mode.name())));
        }
        Ok(Wanted {
            key_secret: secret.to_owned(),
            cipher: DiskCipher { alg, mode, ivgen: generator, iv_hash, sector: 512 },
            hash,
            time: time(options, &key("iter-time"))?,
        })
    }
}
