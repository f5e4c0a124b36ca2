//! Hand-over: the daemon that owns the disk while its guest migrates, and the moments when that changes.
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
//! * **One at a time**: the disk is taken once it has been given up, and given up once it has been taken. The
//!   thread of the connection ([`Turns`]) is told when that is done, and hears its front end until then.

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
/// When the log tells of it.
const TELL_AFTER: Duration = Duration::from_secs(1);
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
pub struct Turns<'a> {
    disk: &'a Disk,
    worker: &'a Worker,
    wake: Arc<dyn Fn() + Send + Sync>,
    under_way: Option<(Turn, Receiver<Result<(), Error>>)>,
    /// When the first of the attempts in vain to take the disk began.
    waits_since: Option<Instant>,
    /// The next attempt comes no earlier.
    next: Option<Instant>,
    told: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
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

impl<'a> Turns<'a> {
    /// `wake` has the thread look at it again; it does not wait.
    pub fn new(
        disk: &'a Disk,
        worker: &'a Worker,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Turns<'a> {
        let (under_way, waits_since, next) = (None, None, None);
        Turns { disk, worker, wake: Arc::new(wake), under_way, waits_since, next, told: false }
    }

    /// Gives the disk up, unless it is given up already. No ring runs, and none starts from now on.
    pub fn give_up(&mut self) {
        let hand_over = &self.disk.hand_over;
        let follows = hand_over.activity.get().is_some();
        if follows && hand_over.active.swap(false, Ordering::SeqCst) {
            self.begin(Turn::GiveUp);
        }
    }

    /// Looks at what is under way. Makes the disk ours if it `is_wanted`.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn look(&mut self, is_wanted: bool) -> Result<Taking, Error> {
        if let Some((turn, result)) = &self.under_way {
            let turn = *turn;
            let result = match result.try_recv() {
                Err(TryRecvError::Empty) => return Ok(Taking::Waits(None)),
                Err(TryRecvError::Disconnected) => Err(Error::new("the worker has ended")),
                Ok(result) => result,
            };
            self.under_way = None;
            self.end(turn, result)?;
            if turn == Turn::Take && self.disk.hand_over.is_active() {
                return Ok(Taking::Taken);
            }
        }
        if !is_wanted {
            (self.waits_since, self.next, self.told) = (None, None, false);
            return Ok(Taking::Waits(None));
        }
        let left =
            self.next.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()));
        if !left.is_zero() {
            return Ok(Taking::Waits(Some(RETRY)));
        }
        self.begin(Turn::Take);
        Ok(Taking::Waits(None))
    }

    /// Waits until nothing is under way. At the end of the connection.
    pub fn finish(&mut self) {
        if let Some((turn, result)) = self.under_way.take()
            && let Ok(result) = receive(&result)
        {
            // What cannot be had is not wanted any more.
            let _ = self.end(turn, result);
        }
    }

    fn begin(&mut self, turn: Turn) {
        let (activity, wake) = (self.disk.hand_over.activity.get().cloned(), self.wake.clone());
        let (sender, result) = mpsc::channel();
        self.worker.send(move |local| {
            local.io().spawn(async move {
                let result = match (activity, turn) {
                    (None, _) => Ok(()),
                    (Some(activity), Turn::Take) => activity.activate().await,
                    (Some(activity), Turn::GiveUp) => activity.inactivate().await,
                };
                let _ = sender.send(result);
                wake();
            });
        });
        self.under_way = Some((turn, result));
    }

    fn end(&mut self, turn: Turn, result: Result<(), Error>) -> Result<(), Error> {
        let Disk { name, hand_over, .. } = self.disk;
        match (turn, result) {
            (Turn::Take, Ok(())) => hand_over.active.store(true, Ordering::SeqCst),
            (Turn::Take, Err(error)) => return self.wait_on(error),
            (Turn::GiveUp, Ok(())) => {
                log::info!(export = &**name; "the guest has moved: the disk is given up");
            }
            (Turn::GiveUp, Err(error)) => {
                hand_over.active.store(true, Ordering::SeqCst);
                log::error!(export = &**name; "the guest has moved, but the disk is kept: {error}");
            }
        }
        Ok(())
    }

    /// An attempt to take the disk was in vain: whether there is another.
    fn wait_on(&mut self, error: Error) -> Result<(), Error> {
        let now = Instant::now();
        let waited = now - *self.waits_since.get_or_insert(now);
        if error.errno() != Some(Errno(libc::EAGAIN)) || waited >= PATIENCE {
            return Err(error);
        }
        if waited >= TELL_AFTER && !self.told {
            self.told = true;
            let export = &*self.disk.name;
            log::warn!(export; "no ring starts while another process has the disk: {error}");
        }
        self.next = Some(now + RETRY);
        Ok(())
    }
}
