//! Gives back the memory of cached tables that were not used for a while.

use super::Qcow2;
use crate::io::periodic;
use std::sync::Arc;
use std::time::Duration;

impl Qcow2 {
    /// Gives back at every interval what was not used since the last one, as long as the image is open.
    pub(super) fn clean_every(&self, interval: Duration) {
        let cache = Arc::downgrade(&self.mapping.tables().cache);
        let clean_space = self.space.cleaner();
        periodic::every(interval, move || {
            let Some(cache) = cache.upgrade() else { return false };
            cache.give_back_unused();
            clean_space();
            true
        });
    }
}
