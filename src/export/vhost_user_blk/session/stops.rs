//! Pausing and stopping the rings of a connection: requests in flight end, and none starts.

use super::super::config::F_LOG_ALL;
use super::super::queue::{AtStop, Queue, Stopped};
use super::rings::Kick;
use super::{Session, refuse};
use crate::export::core::failure::{Failure, Operation};
use crate::export::core::watch::linger;
use crate::io::driven::{receive, receive_within};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use vhost::vhost_user::Result;

/// How long a ring may take to stop before the log says that it is still waited for.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// How often it is looked whether a ring that is to stop is to be given up.
const STOP_LOOK: Duration = Duration::from_millis(100);

impl Session {
    /// Stops rings, all at once, and waits until nothing of them is in flight.
    ///
    /// # Errors
    /// Something in flight does not end. Those rings are left to themselves, and the connection is
    /// closed.
    pub(super) fn stop_rings(
        &mut self,
        indices: impl Iterator<Item = usize>,
        held: AtStop,
    ) -> Result<()> {
        let mut stopping = Vec::new();
        for index in indices {
            let Some((worker, source)) = self.rings[index].running.take() else { continue };
            let (sender, receiver) = mpsc::channel();
            self.workers[worker].send(move |local| {
                if let Some(queue) = local.source::<Queue>(source) {
                    queue.stop(sender, held);
                }
            });
            stopping.push((index, (worker, source), receiver));
        }
        let mut result = Ok(());
        for (index, queue, receiver) in stopping {
            let waited = self.wait_for(&format!("queue {index}"), &receiver);
            let Some(stopped) = waited else {
                let device = self.device.clone();
                linger(&self.disk, receiver, move || device.remove_queue(queue));
                result = self.give_up(&format!("queue {index}"));
                continue;
            };
            // None: the queue is gone, as its worker is.
            let stopped =
                stopped.unwrap_or(Stopped { base: self.rings[index].base, held: Vec::new() });
            self.rings[index].base = stopped.base;
            // Where requests are tracked they are found there.
            if self.inflight.is_none() {
                self.rings[index].held = stopped.held;
            }
            // Until the queue is gone: the last to hold a guest's memory unmaps it, which takes long
            // and must not be the worker, whose other disks would wait.
            while receive(&receiver).is_ok() {}
            self.device.remove_queue(queue);
        }
        result
    }

    /// Makes durable what was written so far. Writes that began under another rule end before the flush that
    /// covers them.
    ///
    /// # Errors
    /// It does not end. It is left to itself, and the connection is closed.
    pub(super) fn flush(&self) -> Result<()> {
        let (device, workers) = (self.device.clone(), self.workers.clone());
        let flushed =
            self.workers[0].spawn(move || async move { device.flush_at_rest(&workers).await });
        let Some(result) = self.wait_for("a flush", &flushed) else {
            linger(&self.disk, flushed, || {});
            return self.give_up("a flush");
        };
        if let Some(Err(errno)) = result {
            let operation = Operation::Flush;
            self.disk.log_failure(&Failure { operation, offset: 0, len: 0, errno }, false);
        }
        Ok(())
    }

    /// Makes the image hand over what it keeps in the front end's memory, which goes. If I/O may still land, or this
    /// does not end, the next session does it.
    pub(super) fn let_journal_go(&self) {
        if self.disk.lingering.any() {
            return;
        }
        let Some(detached) = self.device.detach_journal(&self.workers[0]) else { return };
        let what = "handing over what the guest has written";
        if self.wait_for(what, &detached).is_none() {
            linger(&self.disk, detached, || {});
            // The session ends, or is notified when its next ring starts.
            let _ = self.give_up::<()>(what);
        }
    }

    /// Closes the connection because of I/O that does not end.
    pub(super) fn give_up<T>(&self, what: &str) -> Result<T> {
        if let Some(cut_off) = &self.cut_off {
            cut_off.cut("I/O in flight does not end");
        }
        refuse(format!("{what}: I/O in flight does not end"))
    }

    /// The word of what is ending its I/O, which is `Some(None)` if it has ended without one; none if it is
    /// given up on.
    pub(super) fn wait_for<T>(
        &self,
        what: &str,
        receiver: &mpsc::Receiver<T>,
    ) -> Option<Option<T>> {
        let timeout = self.disk.options.failures.io_timeout;
        // The queue's own watch tells a little later than the deadline, so that this is for those that it cannot
        // tell: a worker that hangs itself.
        let most = if timeout.is_zero() { Duration::MAX } else { 2 * timeout };
        let began = Instant::now();
        let mut next_warning = STOP_PATIENCE;
        loop {
            match receive_within(receiver, STOP_LOOK) {
                Ok(word) => return Some(Some(word)),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let waited = began.elapsed();
                    if self.hung.load(Ordering::SeqCst) || waited > most {
                        return None;
                    }
                    if waited >= next_warning {
                        next_warning += STOP_PATIENCE;
                        log::warn!(
                            export = &*self.disk.name;
                            "{what}: I/O in flight has not ended for {} s",
                            waited.as_secs()
                        );
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => return Some(None),
            }
        }
    }

    /// Whether the guest has moved to another host, as it looks after GET_VRING_BASE: no ring is left that a
    /// kick descriptor started, the front end has set a log, and VHOST_F_LOG_ALL is on. That is how the
    /// source's end of a migration looks. A guest that is merely stopped keeps its disk, and so does one whose
    /// front end dies.
    pub(super) fn has_moved(&self) -> bool {
        // Not while I/O of an earlier connection may still land.
        let logs = self.log.is_some() && self.has(F_LOG_ALL) && !self.disk.lingering.any();
        logs && self.rings.iter().all(|ring| matches!(ring.kick, Kick::Unset))
    }

    /// Stops every ring. The end of each session.
    pub fn stop_all(&mut self) {
        self.ended = true;
        // Whatever does not end, the session does.
        let _ = self.stop_rings(0..self.rings.len(), self.at_stop());
        self.let_journal_go();
    }

    /// Whether requests that are held when a ring stops may stay held: where they are tracked, the owner that starts
    /// the ring again, here or in a daemon after this one, finds them there. Otherwise nothing would ever complete
    /// them.
    fn may_leave_held(&self) -> bool {
        // While pages are logged a stop may be the end of a migration: what is held here is not known
        // at the other end.
        self.inflight.is_some() && !self.has(F_LOG_ALL)
    }

    /// What becomes of held requests when a ring stops for good, as far as we know.
    pub(super) fn at_stop(&self) -> AtStop {
        if self.may_leave_held() { AtStop::Leave } else { AtStop::Fail }
    }
}
