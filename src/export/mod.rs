//! Exports: one folder for each transport, and the core that they share.
//!
//! A new transport is a folder, its `mod` line, and its entry in [`LIST`].

pub mod core;
pub mod vhost_user_blk;

use self::core::Transport;
use crate::block::Error;
use crate::options::{Map, similar};

type Parse = fn(Map, &[&str]) -> Result<Box<dyn Transport>, Error>;

/// One type of export.
pub struct ExportEntry {
    /// As options and listings name it.
    pub name: &'static str,
    /// Reads the options that only this type has. The names of those that all types have help with misspelt ones.
    pub parse: Parse,
}

/// All types that can be served.
pub const LIST: &[&ExportEntry] = &[&vhost_user_blk::ENTRY];

/// What qemu-storage-daemon 7.2 knows besides, so that a type that we lack is distinguished from one that nobody has.
const NOT_AVAILABLE: [&str; 3] = ["nbd", "fuse", "vduse-blk"];

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
