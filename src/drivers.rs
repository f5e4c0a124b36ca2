//! The drivers of this program: the lists of formats, filters and protocols, joined.

use crate::block::{Creation, DriverEntry, Error, Kind, Registry};
use crate::options::Map;
use crate::{filter, format, protocol};
use std::sync::LazyLock;

/// All drivers.
pub fn registry() -> &'static Registry {
    static REGISTRY: LazyLock<Registry> =
        LazyLock::new(|| Registry::new(&[format::LIST, filter::LIST, protocol::LIST]));
    &REGISTRY
}

/// The names of the image formats, in their order.
pub fn formats() -> impl Iterator<Item = &'static str> {
    let is_format = |entry: &&DriverEntry| entry.kind == Kind::Format;
    registry().iter().filter(is_format).map(|entry| entry.name)
}

/// A new image of `format` (`-f`) at `name`, with the options of `-o` as text and the size, if it
/// was given by itself; checked, but not made yet.
pub fn creation(
    format: &str,
    name: &str,
    options: Map,
    size: Option<u64>,
) -> Result<Creation, Error> {
    let file = registry().new_file(name)?;
    Creation::new(registry(), format, (name, file), options, size)
}
