//! The rings of a connection: their configuration and their start.

use super::super::config::{F_LOG_ALL, F_PROTOCOL_FEATURES};
use super::super::memory_loss::LossWatch;
use super::super::queue::{Queue, QueueLog, QueueStart};
use super::super::queues::Busy;
use super::super::ring::{Addresses, MAX_SIZE, Ring, SplitRing, Tracking};
use super::{Session, refuse};
use crate::block::{Error, Fence};
use crate::export::core::kept::Kept;
use crate::export::core::loss::GIVE_UP;
use crate::export::core::watch::{Watch, linger};
use crate::io::SourceId;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vhost::vhost_user::Result;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// What the front end has said of a ring.
pub(super) struct RingState {
    pub(super) size: u16,
    pub(super) at: Option<Addresses>,
    /// The guest address that its used ring is to be logged at.
    pub(super) log_used: Option<u64>,
    pub(super) base: u16,
    pub(super) kick: Kick,
    pub(super) call: Option<Arc<File>>,
    pub(super) err: Option<Arc<File>>,
    pub(super) enabled: bool,
    pub(super) running: Option<(usize, SourceId)>,
    /// Heads of requests that are held while the ring goes over to other memory, where nothing else
    /// tells of them.
    pub(super) held: Vec<u16>,
}

pub(super) enum Kick {
    /// None was set yet: the ring is not started.
    Unset,
    /// The ring is to be polled.
    Poll,
    Fd(File),
}

impl RingState {
    pub(super) fn new() -> RingState {
        RingState {
            size: 0,
            at: None,
            log_used: None,
            base: 0,
            kick: Kick::Unset,
            call: None,
            err: None,
            enabled: false,
            running: None,
            held: Vec::new(),
        }
    }
}

impl Session {
    /// Where a ring is that is to run and does not: all that it needs has been said.
    fn is_due(&self, ring: &RingState) -> Option<Addresses> {
        let protocol = self.features.unwrap_or(0) & F_PROTOCOL_FEATURES != 0;
        // Without the protocol features a ring is enabled from the start.
        let enabled = ring.enabled || !protocol;
        let started = !matches!(ring.kick, Kick::Unset);
        ring.at.filter(|_| started && enabled && ring.running.is_none())
    }

    /// Whether a ring is kept back because the disk is not ours.
    pub fn waits_for_disk(&self) -> bool {
        !self.disk.hand_over.is_active() && self.rings.iter().any(|r| self.is_due(r).is_some())
    }

    /// Starts a ring if all that it needs has been said, the disk is ours, and nothing keeps it back: I/O of an
    /// earlier connection that may still land, or a drain.
    pub(super) fn start_ring(&mut self, index: usize) -> Result<()> {
        let Some(at) = self.is_due(&self.rings[index]) else { return Ok(()) };
        if self.ended {
            return Ok(());
        }
        let may_begin = !self.disk.lingering.any() && self.disk.hand_over.is_active();
        let Some(busy) = self.device.try_begin().filter(|_| may_begin) else {
            self.is_kept_back = true;
            return Ok(());
        };
        let _busy = self.attach_journal(busy)?;
        let ring = &self.rings[index];
        let start = self.lay_out::<SplitRing>(index, at, ring.base)?;
        let kick = match &ring.kick {
            Kick::Fd(file) => Some(file.as_raw_fd()),
            _ => None,
        };
        let worker = (self.first_worker + index) % self.workers.len();
        let loss = LossWatch::new(self.cut_off.clone());
        let timeout = self.disk.options.failures.io_timeout;
        let watch = Watch::new(timeout, self.cut_off.clone(), self.hung.clone());
        // Every start scans the ring unprompted: a source is polled as it is attached. Requests are repeated only if
        // they are tracked.
        let fence = self.inflight.as_ref().map(|_| self.disk.node().fence());
        let source = self.workers[worker].call(move |local| {
            let mut queue = Queue::new(start);
            queue.watch_loss(loss);
            queue.watch_hangs(watch);
            local.attach_pinned(Box::new(queue), kick, fence.as_ref().map_or(&[], Fence::files))
        });
        let source = source.or_else(|why| {
            refuse(format!("queue {index}: the kernel does not keep the image's locks: {why}"))
        })?;
        self.rings[index].running = Some((worker, source));
        self.rings[index].held.clear();
        self.device.add_queue(&self.workers, (worker, source));
        Ok(())
    }

    /// Makes the image keep its journal in the front end's memory, if there is any. The disk is busy until then.
    ///
    /// # Errors
    /// What a killed daemon has left cannot be taken up, or that does not end. It is left to itself then, and the
    /// connection is closed.
    fn attach_journal(&self, busy: Busy) -> Result<Busy> {
        let Some(region) = self.inflight.clone() else { return Ok(busy) };
        let disk = self.disk.clone();
        let attached = self.workers[0].spawn(move || async move {
            let kept: Arc<dyn Kept> = region;
            let attached = disk.journal.attach(&disk.name, &disk.node(), &kept).await;
            let attached = match attached {
                // What I/O errors have kept from being taken up may be taken up later.
                Err(error) if error.errno().is_none() && disk.options.writable => {
                    match disk.losses.are_accepted() {
                        true => {
                            let (name, node) = (&disk.name, disk.node());
                            disk.journal.attach_and_forget(name, &node, &kept).await
                        }
                        false => Err(Error::new(format!("{error}; {GIVE_UP}"))),
                    }
                }
                attached => attached,
            };
            (attached, busy)
        });
        let what = "taking up what was written before";
        match self.wait_for(what, &attached) {
            Some(Some((Ok(()), busy))) => Ok(busy),
            Some(Some((Err(error), _))) => refuse(error.to_string()),
            Some(None) => refuse(format!("{what}: the worker has ended")),
            None => {
                linger(&self.disk, attached, || {});
                self.give_up(what)
            }
        }
    }

    /// The queue of a ring that is at these addresses, and what of it is to be begun again.
    fn lay_out<R: Ring>(
        &self,
        index: usize,
        at: Addresses,
        base: R::Index,
    ) -> Result<QueueStart<R>> {
        let state = &self.rings[index];
        let size = if state.size == 0 { MAX_SIZE } else { state.size };
        let event_index = self.has(VIRTIO_RING_F_EVENT_IDX);
        let mut ring = R::new(&self.memory, size, at, base, event_index)
            .or_else(|why| refuse(format!("queue {index}: {why}")))?;
        let inflight = match &self.inflight {
            None => None,
            Some(region) => {
                let tracker = R::Tracker::recover(region, index, size, ring.published())
                    .or_else(|why| refuse(format!("queue {index}: {why}")))?;
                // The base that the front end knows may be that of a daemon which died.
                let again = tracker.to_replay();
                ring.go_on_behind(again);
                if again > 0 {
                    log::info!(
                        export = &*self.disk.name;
                        "queue {index}: {again} requests are begun again"
                    );
                }
                Some(tracker)
            }
        };
        Ok(QueueStart {
            index,
            recorder: self.disk.metrics.as_ref().and_then(|metrics| metrics.recorder(index)),
            disk: self.disk.clone(),
            serial: self.device.options.serial.clone(),
            memory: self.memory.clone(),
            ring,
            inflight,
            log: self.log_of(index),
            size,
            held: state.held.clone(),
            call: state.call.clone(),
            err: state.err.clone(),
            // Until the device knows of it.
            paused: 1,
        })
    }

    /// What is to be marked of a ring's writes now.
    pub(super) fn log_of(&self, index: usize) -> QueueLog {
        let log = self.log.clone().filter(|_| self.has(F_LOG_ALL));
        QueueLog { log, used: self.rings[index].log_used }
    }

    /// Starts the rings that were kept back, if they can start now.
    pub fn start_waiting(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.is_kept_back) {
            return Ok(());
        }
        (0..self.rings.len()).try_for_each(|index| self.start_ring(index))
    }
}
