//! The view of a service for observers.
//!
//! It is apart from the service itself, so that observers delay nothing and keep nothing alive.

use crate::block::{Drive, DriveHealth};
use crate::export::core::ExportMetrics;
use crate::io::sync::Mutex;
use std::collections::HashSet;
use std::sync::{Arc, Weak};

/// The exports that can be watched, and the drives below them.
#[derive(Default)]
pub struct Observed {
    exports: Mutex<Vec<Weak<ExportMetrics>>>,
    drives: Mutex<Vec<Weak<dyn Drive>>>,
}

impl Observed {
    /// One more, until it ends.
    pub(super) fn add(&self, export: Arc<ExportMetrics>) {
        let mut exports = self.exports.lock();
        exports.retain(|export| export.strong_count() > 0);
        exports.push(Arc::downgrade(&export));
    }

    /// What an export stands on, until it is closed.
    pub(super) fn add_drives(&self, found: Vec<Arc<dyn Drive>>) {
        let mut drives = self.drives.lock();
        drives.retain(|drive| drive.strong_count() > 0);
        for drive in found {
            // Has it asked, so that there is something to tell when somebody looks.
            drive.health();
            let drive = Arc::downgrade(&drive);
            if !drives.iter().any(|known| known.ptr_eq(&drive)) {
                drives.push(drive);
            }
        }
    }

    /// The drives that have told of their health.
    pub fn drives(&self) -> Vec<(String, DriveHealth)> {
        // Not under the lock: this may release the last reference to a drive, which takes time.
        let drives: Vec<_> = self.drives.lock().iter().filter_map(Weak::upgrade).collect();
        drives.iter().filter_map(|drive| Some((drive.name(), drive.health()?))).collect()
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
