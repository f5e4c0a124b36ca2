//! The secrets of the process by their names.
//!
//! `--object secret` and `object-add` make them, and options of images name them.
//!
//! They belong to the process, as QEMU's objects do: every graph that it opens finds them. Disks ask for one when they
//! are opened or amended, and keep keys, not names: a secret can be deleted while its disk is open.

use super::Hidden;
use crate::io::sync::Mutex;
use std::collections::BTreeMap;

static ALL: Mutex<BTreeMap<String, Hidden>> = Mutex::new(BTreeMap::new());

/// Adds a secret. False, and nothing is added, if there is one of that name.
pub fn add(id: &str, secret: Hidden) -> bool {
    let mut all = ALL.lock();
    if all.contains_key(id) {
        return false;
    }
    all.insert(id.to_owned(), secret);
    true
}

/// Forgets a secret. Whether there was one.
pub fn remove(id: &str) -> bool {
    ALL.lock().remove(id).is_some()
}

pub fn exists(id: &str) -> bool {
    ALL.lock().contains_key(id)
}

/// A copy of a secret.
///
/// # Errors
/// In QEMU's words: there is none of that name.
pub fn find(id: &str) -> Result<Hidden, String> {
    ALL.lock().get(id).cloned().ok_or_else(|| format!("No secret with id '{}'", id.escape_debug()))
}

/// A copy of a secret that is to be a passphrase.
///
/// # Errors
/// In QEMU's words: there is none of that name, or it is no text.
pub fn passphrase(id: &str) -> Result<Hidden, String> {
    let found = find(id)?;
    match std::str::from_utf8(&found) {
        Ok(_) => Ok(found),
        Err(_) => Err(format!("Data from secret {} is not valid UTF-8", id.escape_debug())),
    }
}
