//! `--object secret` and `secret_keyring`: where a secret comes from and how it is wrapped.

use super::library::{Context, Way};
use super::{CipherAlg, CipherMode, Hidden, secrets};
use crate::options::{self, Map, is_identifier};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use zeroize::{Zeroize, Zeroizing};

/// The types of objects that are made here.
pub const TYPES: [&str; 2] = ["secret", "secret_keyring"];

/// Longest file that a secret is read from, in bytes.
const LONGEST_FILE: u64 = 1 << 20;

#[derive(Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Raw,
    Base64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Secret {
    id: String,
    data: Option<String>,
    file: Option<String>,
    serial: Option<i32>,
    #[serde(default)]
    format: Format,
    keyid: Option<String>,
    iv: Option<String>,
    #[serde(rename = "loaded")]
    _loaded: Option<bool>,
}

/// The options of a type, for help texts.
pub fn help(qom_type: &str) -> Option<&'static str> {
    match qom_type {
        "secret" => Some(
            "secret options:\n  data=<string>\n  file=<string>\n  format=<raw|base64>\n  \
             iv=<string>\n  keyid=<string>\n  loaded=<bool>\n",
        ),
        "secret_keyring" => Some(
            "secret_keyring options:\n  format=<raw|base64>\n  iv=<string>\n  keyid=<string>\n  \
             loaded=<bool>\n  serial=<int>\n",
        ),
        _ => None,
    }
}

/// Makes the secret that the options describe, of one of the [`TYPES`]. May wait for a file.
///
/// # Errors
/// In QEMU's words. They never hold the secret.
pub fn add(qom_type: &str, options: Map) -> Result<(), options::Error> {
    let mut given: Secret = options::from_map(options)?;
    let text = given.data.take().map(|data| Hidden::taken(data.into_bytes()));
    if !is_identifier(&given.id) {
        return Err(options::Error::message("Parameter 'id' expects an identifier"));
    }
    let secret = match qom_type {
        "secret" if given.serial.is_some() => Err("Parameter 'serial' is unexpected".to_owned()),
        "secret" => of_data_or_file(text, given.file.as_deref()),
        _ if text.is_some() => Err("Parameter 'data' is unexpected".to_owned()),
        _ if given.file.is_some() => Err("Parameter 'file' is unexpected".to_owned()),
        _ => of_keyring(given.serial),
    };
    let secret = secret.and_then(|secret| unwrapped(secret, &given));
    let secret = secret.map_err(options::Error::message)?;
    match secrets::add(&given.id, secret) {
        true => Ok(()),
        false => Err(options::Error::message(format!(
            "attempt to add duplicate property '{}' to object (type 'container')",
            given.id
        ))),
    }
}

/// Makes a secret of a file's bytes.
///
/// # Errors
/// One line: it cannot be read, or there is a secret of that name.
pub fn add_file(id: &str, file: &str) -> Result<(), String> {
    let secret = of_data_or_file(None, Some(file))?;
    match secrets::add(id, secret) {
        true => Ok(()),
        false => Err(format!("there are two secrets '{id}'")),
    }
}

fn of_data_or_file(data: Option<Hidden>, file: Option<&str>) -> Result<Hidden, String> {
    match (data, file) {
        (Some(_), Some(_)) => Err("'file' and 'data' are mutually exclusive".into()),
        (None, None) => Err("Either 'file' or 'data' must be provided".into()),
        (Some(data), None) => Ok(data),
        (None, Some(name)) => read(name).map_err(|error| {
            let why = crate::io::Errno::from(error);
            format!("Unable to read {name}: Failed to open file “{name}”: {why}")
        }),
    }
}

/// A file's bytes, all of them: a line's end at the end is part of the secret.
fn read(name: &str) -> std::io::Result<Hidden> {
    use std::io::Read;
    let mut bytes = Zeroizing::new(Vec::with_capacity(4096));
    let file = std::fs::File::open(name)?;
    file.take(LONGEST_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LONGEST_FILE {
        return Err(std::io::Error::from_raw_os_error(libc::EFBIG));
    }
    Ok(Hidden::copied(&bytes))
}

fn of_keyring(serial: Option<i32>) -> Result<Hidden, String> {
    let serial = serial.filter(|&serial| serial != 0).ok_or("Parameter 'serial' is missing")?;
    let failed = || {
        let why = crate::io::Errno::last();
        format!("Unable to read serial key {serial:08x}: {why}")
    };
    let call = |room: Option<&mut [u8]>| {
        let (at, len) =
            room.map_or((std::ptr::null_mut(), 0), |room| (room.as_mut_ptr(), room.len()));
        // SAFETY: the kernel writes at most `len` bytes to `at`.
        let found = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_READ, serial, at, len) };
        usize::try_from(found).map_err(|_| failed())
    };
    let mut key = Hidden::zeroed(call(None)?.min(LONGEST_FILE as usize));
    match call(Some(&mut key))? {
        len if len == key.len() => Ok(key),
        _ => Err(format!("the key {serial} has changed while it was read")),
    }
}

/// What the bytes stand for: base64 decoded, then decrypted with the key that `keyid` names.
fn unwrapped(bytes: Hidden, given: &Secret) -> Result<Hidden, String> {
    let bytes = if given.format == Format::Base64 { decoded(&bytes)? } else { bytes };
    match (&given.keyid, &given.iv) {
        (Some(keyid), iv) => decrypted(bytes, keyid, iv.as_deref()),
        // An iv alone says nothing, and QEMU takes it.
        (None, _) => Ok(bytes),
    }
}

fn decoded(text: &[u8]) -> Result<Hidden, String> {
    // Line breaks are where tools put them.
    let mut text: Zeroizing<Vec<u8>> = Zeroizing::new(text.to_vec());
    text.retain(|byte| !byte.is_ascii_whitespace());
    let bytes = BASE64_STANDARD.decode(&*text);
    bytes.map(Hidden::taken).map_err(|_| "Base64 data contains invalid characters".to_owned())
}

/// AES-256-CBC with the padding of PKCS #7.
fn decrypted(mut bytes: Hidden, keyid: &str, iv: Option<&str>) -> Result<Hidden, String> {
    let key = secrets::find(keyid)?;
    if key.len() != 32 {
        return Err("Key should be 32 bytes in length".into());
    }
    let iv = decoded(iv.ok_or("IV is required to decrypt secret")?.as_bytes())?;
    let iv: [u8; 16] = iv[..]
        .try_into()
        .map_err(|_| format!("IV should be 16 bytes in length not {}", iv.len()))?;
    if bytes.is_empty() || !bytes.len().is_multiple_of(16) {
        return Err(format!("Length {} must be a multiple of block size 16", bytes.len()));
    }
    let context = Context::new(CipherAlg::Aes256, CipherMode::Cbc, Way::Decrypt, &key);
    let mut context = context.ok_or("AES-256-CBC is not there")?;
    let (at, len) = (bytes.as_mut_ptr(), bytes.len());
    // SAFETY: the bytes are borrowed alone.
    unsafe { context.sector(&iv, at, at, len) };
    let padding = bytes[len - 1];
    if !(1..=16).contains(&padding) {
        bytes.zeroize();
        return Err(format!(
            "Incorrect number of padding bytes ({padding}) found on decrypted data"
        ));
    }
    Ok(Hidden::copied(&bytes[..len - usize::from(padding)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::keyval;

    fn made(text: &str) -> Result<Vec<u8>, String> {
        let options = Map::from_iter(keyval::parse(text, None).unwrap().options);
        let id = options.get("id").unwrap().as_str().unwrap().to_owned();
        add("secret", options).map_err(|error| error.to_string())?;
        Ok(secrets::find(&id).unwrap().to_vec())
    }

    #[test]
    fn a_secret_is_what_its_data_or_its_file_says() {
        assert_eq!(made("id=made-1,data=abc").unwrap(), b"abc");
        assert_eq!(made("id=made-2,data=YWJj,format=base64").unwrap(), b"abc");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "abc\n").unwrap();
        // The line's end is part of it.
        assert_eq!(made(&format!("id=made-3,file={}", path.display())).unwrap(), b"abc\n");
        assert!(secrets::remove("made-3"));
        assert!(!secrets::remove("made-3"));
    }

    #[test]
    fn a_secret_is_decrypted_with_another() {
        // printf 'letmein' | openssl enc -aes-256-cbc -a -K 00…1f -iv 000102…0f
        let key = BASE64_STANDARD.encode(std::array::from_fn::<u8, 32, _>(|n| n as u8));
        let iv = BASE64_STANDARD.encode(std::array::from_fn::<u8, 16, _>(|n| n as u8));
        made(&format!("id=wrap-key,data={key},format=base64")).unwrap();
        let wrapped = {
            let key: Vec<u8> = (0..32).collect();
            let alg = (CipherAlg::Aes256, CipherMode::Cbc);
            let mut context = Context::new(alg.0, alg.1, Way::Encrypt, &key).unwrap();
            let mut block = *b"letmein\x09\x09\x09\x09\x09\x09\x09\x09\x09";
            let at = block.as_mut_ptr();
            // SAFETY: the block is this test's own.
            unsafe { context.sector(&std::array::from_fn(|n| n as u8), at, at, 16) };
            BASE64_STANDARD.encode(block)
        };
        let text = |id: &str, iv: &str| {
            format!("id={id},data={wrapped},format=base64,keyid=wrap-key,iv={iv}")
        };
        assert_eq!(made(&text("wrapped-1", &iv)).unwrap(), b"letmein");
        let mut other = [0; 16];
        other[15] = 0xf0;
        let error = made(&text("wrapped-2", &BASE64_STANDARD.encode(other))).unwrap_err();
        assert!(error.starts_with("Incorrect number of padding bytes"), "{error}");
        let error = made(&text("wrapped-3", "AAAA")).unwrap_err();
        assert_eq!(error, "IV should be 16 bytes in length not 3");
    }

    #[test]
    fn what_is_wrong_is_said_without_the_secret() {
        for (text, wanted) in [
            ("id=wrong-1", "Either 'file' or 'data' must be provided"),
            ("id=wrong-1,data=a,file=b", "'file' and 'data' are mutually exclusive"),
            ("id=wrong-1,data=sesame*,format=base64", "Base64 data contains invalid characters"),
            ("id=wrong-1,data=sesame,keyid=none,iv=AAAA", "No secret with id 'none'"),
            ("id=wrong-1,data=sesame,serial=5", "Parameter 'serial' is unexpected"),
        ] {
            assert_eq!(made(text).unwrap_err(), wanted, "{text}");
        }
    }
}
