//! Which daemon has the disk while its guest moves to another host, and when that changes.
//!
//! Two daemons have the image open: the one that the guest leaves, and the one that it comes to,
//! whose image is opened inactive (`--incoming`, `active=off`). The rules, all of them:
//!
//! * **No request runs on an inactive disk.** Everything else goes on: the front end's messages, other disks,
//!   the monitor.
//! * **The disk is activated when the first request could come.** Its locks are tried again and again
//!   for [`PATIENCE`], with a line in the log after [`TELL_AFTER`]; then the connection ends, and the
//!   next one may try again. Once the locks are held the image is read again (another daemon may
//!   have resized it), the front end is told of a new size, and requests are served.
//! * **The disk is given up when the transport sees that the guest has gone.** Everything is flushed first; an
//!   image that cannot be flushed is not given up. Exports beside this one that use the same image
//!   keep it.
//! * **A front end that starts again takes the disk back**, by the second rule: the migration
//!   has failed, or the guest has come home.

use crate::block::{Activity, Error};
use crate::io::{Errno, Worker};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long the locks of other processes are waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// When the log tells of it.
const TELL_AFTER: Duration = Duration::from_secs(1);
/// From one attempt to the next.
pub const RETRY: Duration = Duration::from_millis(10);

/// Whose the disk of an export is.
pub struct HandOver {
    active: AtomicBool,
    /// None: the disk is ours, and stays so.
    activity: OnceLock<Activity>,
}

impl Default for HandOver {
    fn default() -> HandOver {
        HandOver { active: AtomicBool::new(true), activity: OnceLock::new() }
    }
}

impl HandOver {
    /// The disk comes and goes by the export's hold on its node. Before the export is started.
    pub fn follow(&self, activity: Activity) {
        self.active.store(activity.is_active(), Ordering::SeqCst);
        let _ = self.activity.set(activity);
    }

    /// Whether rings may run.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::SeqCst)
    }

    /// Tries once to make the disk ours. Not to be called on a worker.
    pub fn take(&self, worker: &Worker) -> Result<(), Error> {
        if let Some(activity) = self.activity.get().cloned() {
            worker.block_on(move || async move { activity.activate().await })?;
        }
        self.active.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Gives the disk up. No ring runs, and none starts meanwhile. Not to be called on a worker.
    pub fn give_up(&self, name: &str, worker: &Worker) {
        let Some(activity) = self.activity.get().cloned() else { return };
        if !self.active.swap(false, Ordering::SeqCst) {
            return;
        }
        let given = worker.block_on(move || async move { activity.inactivate().await });
        match given {
            Ok(()) => log::info!(export = name; "the guest has moved: the disk is given up"),
            Err(error) => {
                self.active.store(true, Ordering::SeqCst);
                log::error!(export = name; "the guest has moved, but the disk is kept: {error}");
            }
        }
    }
}

/// The wait of one connection for its disk.
#[derive(Default)]
pub struct Wait {
    began: Option<Instant>,
    told: bool,
}

impl Wait {
    /// It is over.
    pub fn end(&mut self) {
        *self = Wait::default();
    }

    /// An attempt has failed: whether to try again.
    pub fn go_on(&mut self, name: &str, error: Error) -> Result<(), Error> {
        let waited = self.began.get_or_insert_with(Instant::now).elapsed();
        if error.errno() != Some(Errno(libc::EAGAIN)) || waited >= PATIENCE {
            return Err(error);
        }
        if waited >= TELL_AFTER && !self.told {
            self.told = true;
            log::warn!(export = name; "no ring starts while another process has the disk: {error}");
        }
        Ok(())
    }
}
