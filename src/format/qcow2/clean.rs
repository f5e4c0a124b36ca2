//! What is kept of tables and was not used for a while is given back.

use super::Qcow2;
use crate::io::periodic;
use std::sync::Arc;
use std::time::Duration;

impl Qcow2 {
    /// Gives back every so often what was not used since the time before, as long as the image is open.
    pub(super) fn clean_every(&self, interval: Duration) {
        let l2 = Arc::downgrade(&self.l2);
        let counts = self.counts.as_ref().map(Arc::downgrade);
        periodic::every(interval, move || {
            let Some(l2) = l2.upgrade() else { return false };
            l2.give_back_unused();
            // Whoever has them uses them.
            if let Some(counts) = counts.as_ref().and_then(|counts| counts.upgrade())
                && let Some(mut counts) = counts.try_lock()
            {
                counts.forget_unused();
            }
            true
        });
    }
}
