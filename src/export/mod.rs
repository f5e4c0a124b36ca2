//! Exports: one folder for each transport, and the core that they share.
//!
//! A new transport is a folder, its `mod` line, and its entry in [`LIST`].

pub mod core;
pub mod nbd;
pub mod vhost_user_blk;

use self::core::Transport;
use crate::block::{Error, Graph};
use crate::options::{Map, similar};

type Parse = fn(Map, &Reading<'_>) -> Result<Box<dyn Transport>, Error>;

/// One type of export.
pub struct ExportEntry {
    /// As options and listings name it.
    pub name: &'static str,
    /// Reads the options that only this type has.
    pub parse: Parse,
    /// Requests that the storage has failed can be held or ignored, as `werror` and `rerror` say.
    pub has_error_policies: bool,
}

/// What the options of an export may refer to.
pub struct Reading<'a> {
    /// The names of those that all types have, to help with misspelt ones.
    pub common: &'a [&'a str],
    pub graph: &'a Graph,
    /// The NBD server of the process.
    pub nbd: &'a nbd::Server,
}

/// All types that can be served.
pub const LIST: &[&ExportEntry] = &[&nbd::ENTRY, &vhost_user_blk::ENTRY];

/// What qemu-storage-daemon 7.2 knows besides, so that a type that we lack is distinguished from one that nobody has.
const NOT_AVAILABLE: [&str; 2] = ["fuse", "vduse-blk"];

/// The type of this name.
///
/// # Errors
/// There is none.
pub fn by_name(name: &str) -> Result<&'static ExportEntry, Error> {
    match LIST.iter().find(|entry| entry.name == name) {
        Some(entry) => Ok(entry),
        None if NOT_AVAILABLE.contains(&name) => {
            Err(Error::new(format!("exports of type '{name}' are not available")))
        }
        None => {
            let names = LIST.iter().map(|entry| entry.name);
            let unknown = Error::new(format!("Parameter 'type' does not accept value '{name}'"));
            Err(unknown.with_advice(similar::did_you_mean(name, names)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_that_we_lack_is_reported_from_one_that_nobody_has() {
        for entry in LIST {
            assert_eq!(by_name(entry.name).map(|found| found.name).ok(), Some(entry.name));
        }
        for name in NOT_AVAILABLE {
            let error = by_name(name).err().unwrap().to_string();
            assert_eq!(error, format!("exports of type '{name}' are not available"));
        }
        let error = by_name("nbdd").err().unwrap().to_string();
        assert_eq!(error, "Parameter 'type' does not accept value 'nbdd'");
    }
}
