//! Hand-over: the daemon that owns the disk while its guest migrates, and the moments when that changes.
//!
//! Two daemons have the image open: the one that the guest leaves, and the one that it comes to,
//! whose image is opened inactive (`--incoming`, `active=off`). The rules, all of them:
//!
//! * **No request runs on an inactive disk.** Everything else continues: the front end's messages, other disks, the
//!   monitor.
//! * **The disk is activated when the first request could come.** Its locks are tried again and again for
//!   [`PATIENCE`], with a line in the log after [`REPORT_AFTER`]; then the connection ends, and the next one may try
//!   again. Once the locks are held the image is read again (another daemon may have resized it), the front end is
//!   notified of a new size, and requests are served.
//! * **The disk is given up when the transport sees that the guest has gone.** Everything is flushed first; an
//!   image that cannot be flushed is not given up. Exports beside this one that use the same image
//!   keep it.
//! * **A front end that starts again takes the disk back**, by the second rule: the migration
//!   has failed, or the guest has come home.
//! * **One at a time**: the disk is taken once it has been given up, and given up once it has been taken. The thread
//!   of the connection ([`Transitions`]) is notified when that is done, and handles its front end's messages until
//!   then.

use super::disk::Disk;
use crate::block::{Activity, Error};
use crate::io::driven::receive;
use crate::io::{Errno, Worker};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long the locks of other processes are waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// When the log reports it.
const REPORT_AFTER: Duration = Duration::from_secs(1);
/// From one attempt to the next.
const RETRY: Duration = Duration::from_millis(10);

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

    /// Whether requests may run.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::SeqCst)
    }
}

/// What one connection does about whose the disk is. Of the connection's thread.
pub struct Transitions<'a> {
    disk: &'a Disk,
    worker: &'a Worker,
    wake: Arc<dyn Fn() + Send + Sync>,
    under_way: Option<(Transition, Receiver<Result<(), Error>>)>,
    /// When the first of the failed attempts to take the disk began.
    waits_since: Option<Instant>,
    /// The next attempt comes no earlier.
    next: Option<Instant>,
    is_reported: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Transition {
    Take,
    GiveUp,
}

/// How far the disk is from being ours.
#[derive(Debug, PartialEq, Eq)]
pub enum Taking {
    /// It is ours since now.
    Taken,
    /// To be looked at again when the thread is woken, or after this time.
    Waits(Option<Duration>),
}

impl<'a> Transitions<'a> {
    /// `wake` has the thread look at it again; it does not wait.
    pub fn new(
        disk: &'a Disk,
        worker: &'a Worker,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Transitions<'a> {
        let (under_way, waits_since, next) = (None, None, None);
        Transitions {
            disk,
            worker,
            wake: Arc::new(wake),
            under_way,
            waits_since,
            next,
            is_reported: false,
        }
    }

    /// Gives the disk up, unless it is given up already. No ring runs, and none starts from now on.
    pub fn give_up(&mut self) {
        let hand_over = &self.disk.hand_over;
        let follows = hand_over.activity.get().is_some();
        if follows && hand_over.active.swap(false, Ordering::SeqCst) {
            self.begin(Transition::GiveUp);
        }
    }

    /// Looks at what is under way. Makes the disk ours if it `is_wanted`.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn poll(&mut self, is_wanted: bool) -> Result<Taking, Error> {
        if let Some((transition, result)) = &self.under_way {
            let transition = *transition;
            let result = match result.try_recv() {
                Err(TryRecvError::Empty) => return Ok(Taking::Waits(None)),
                Err(TryRecvError::Disconnected) => Err(Error::new("the worker has ended")),
                Ok(result) => result,
            };
            self.under_way = None;
            self.end(transition, result)?;
            if transition == Transition::Take && self.disk.hand_over.is_active() {
                return Ok(Taking::Taken);
            }
        }
        if !is_wanted {
            (self.waits_since, self.next, self.is_reported) = (None, None, false);
            return Ok(Taking::Waits(None));
        }
        let left =
            self.next.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()));
        if !left.is_zero() {
            return Ok(Taking::Waits(Some(RETRY)));
        }
        self.begin(Transition::Take);
        Ok(Taking::Waits(None))
    }

    /// Waits until nothing is under way. At the end of the connection.
    pub fn finish(&mut self) {
        if let Some((transition, result)) = self.under_way.take()
            && let Ok(result) = receive(&result)
        {
            // What cannot be had is not wanted any more.
            let _ = self.end(transition, result);
        }
    }

    fn begin(&mut self, transition: Transition) {
        let (activity, wake) = (self.disk.hand_over.activity.get().cloned(), self.wake.clone());
        let (sender, result) = mpsc::channel();
        self.worker.send(move |local| {
            local.io().spawn(async move {
                let result = match (activity, transition) {
                    (None, _) => Ok(()),
                    (Some(activity), Transition::Take) => activity.activate().await,
                    (Some(activity), Transition::GiveUp) => activity.inactivate().await,
                };
                let _ = sender.send(result);
                wake();
            });
        });
        self.under_way = Some((transition, result));
    }

    fn end(&mut self, transition: Transition, result: Result<(), Error>) -> Result<(), Error> {
        let Disk { name, hand_over, .. } = self.disk;
        match (transition, result) {
            (Transition::Take, Ok(())) => hand_over.active.store(true, Ordering::SeqCst),
            (Transition::Take, Err(error)) => return self.wait_on(error),
            (Transition::GiveUp, Ok(())) => {
                log::info!(export = &**name; "the guest has moved: the disk is given up");
            }
            (Transition::GiveUp, Err(error)) => {
                hand_over.active.store(true, Ordering::SeqCst);
                log::error!(export = &**name; "the guest has moved, but the disk is kept: {error}");
            }
        }
        Ok(())
    }

    /// An attempt to take the disk failed: whether there is another.
    fn wait_on(&mut self, error: Error) -> Result<(), Error> {
        let now = Instant::now();
        let waited = now - *self.waits_since.get_or_insert(now);
        if error.errno() != Some(Errno(libc::EAGAIN)) || waited >= PATIENCE {
            return Err(error);
        }
        if waited >= REPORT_AFTER && !self.is_reported {
            self.is_reported = true;
            let export = &*self.disk.name;
            log::warn!(export; "no ring starts while another process has the disk: {error}");
        }
        self.next = Some(now + RETRY);
        Ok(())
    }
}
