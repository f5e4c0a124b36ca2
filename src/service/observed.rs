//! What those who watch a service can see of it. Apart from the service itself, so that they hold up
//! nobody and nothing, and keep nothing alive.

use crate::export::vhost_user_blk::ExportMetrics;
use crate::io::sync::Mutex;
use std::collections::HashSet;
use std::sync::{Arc, Weak};

/// The exports that can be watched.
#[derive(Default)]
pub struct Observed {
    exports: Mutex<Vec<Weak<ExportMetrics>>>,
}

impl Observed {
    /// One more, until it ends.
    pub(super) fn add(&self, export: Arc<ExportMetrics>) {
        let mut exports = self.exports.lock();
        exports.retain(|export| export.strong_count() > 0);
        exports.push(Arc::downgrade(&export));
    }

    /// Those that have not ended, oldest first. Of those that bear a name one after the other there is
    /// the last only.
    pub fn exports(&self) -> Vec<Arc<ExportMetrics>> {
        let mut found: Vec<_> = self.exports.lock().iter().filter_map(Weak::upgrade).collect();
        let mut seen = HashSet::new();
        found.reverse();
        found.retain(|export| seen.insert(export.name.clone()));
        found.reverse();
        found
    }
}
