//! The drivers of this program: the lists of formats and protocols, joined, and what a file's name
//! means to them.

use crate::block::{Creation, Error, Registry};
use crate::options::{Map, filename};
use crate::{format, protocol};
use std::os::unix::fs::FileTypeExt;
use std::sync::LazyLock;

/// All drivers that there are.
pub fn registry() -> &'static Registry {
    static REGISTRY: LazyLock<Registry> =
        LazyLock::new(|| Registry::new(&[format::LIST, protocol::LIST]));
    &REGISTRY
}

/// The options of the protocol node that a file's name stands for: a plain file, a device, or what
/// its prefix or `json:` says.
pub fn file_options(name: &str) -> Result<Map, Error> {
    let device = |name: &str| {
        let kind = std::fs::metadata(name).ok()?.file_type();
        (kind.is_block_device() || kind.is_char_device()).then_some("host_device")
    };
    let protocol = |prefix: &str| registry().by_prefix(prefix).map(|entry| entry.name);
    Ok(filename::parse(name, device, protocol)?)
}

/// A new image of `format` (`-f`) at `name`, with the options of `-o` as text and the size, if it
/// was given by itself; checked, but not made yet.
pub fn creation(
    format: &str,
    name: &str,
    options: Map,
    size: Option<u64>,
) -> Result<Creation, Error> {
    Creation::new(registry(), format, (name, file_options(name)?), options, size)
}
