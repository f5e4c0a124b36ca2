//! The drivers of this program: the lists of formats and protocols, joined.

use crate::block::Registry;
use crate::{format, protocol};
use std::sync::LazyLock;

/// All drivers that there are.
pub fn registry() -> &'static Registry {
    static REGISTRY: LazyLock<Registry> =
        LazyLock::new(|| Registry::new(&[format::LIST, protocol::LIST]));
    &REGISTRY
}
