//! Freeing the memory of cached tables that have not been used for a while.

use super::mapping::ImageMapping;
use super::space::Space;
use crate::io::periodic;
use std::sync::Arc;
use std::time::Duration;

/// Gives back at every interval what was not used since the last one, as long as the image is open.
pub(super) fn clean_every(interval: Duration, mapping: &ImageMapping, space: &Space) {
    let cache = Arc::downgrade(&mapping.tables().cache);
    let clean_space = space.cleaner();
    periodic::every(interval, move || {
        let Some(cache) = cache.upgrade() else { return false };
        cache.give_back_unused();
        clean_space();
        true
    });
}
