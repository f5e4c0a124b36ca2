//! Front ends, one after the other: how one is met, heard, and let go.

use super::super::channel::Channel;
use super::super::handler::{self, Handler};
use super::super::session::Session;
use super::{Shared, lock};
use crate::block::Error;
use crate::export::core::cut_off::CutOff;
use crate::export::core::door::{Door, wait_readable};
use crate::export::core::hand_over;
use crate::io::descriptors::{self, Reserve};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vhost::vhost_user::Error as VhostError;

/// Descriptors of a connection besides those of its queues: its stream and a copy of it.
const OF_CONNECTION: usize = 2;

/// Descriptors that a connection has only for moments once its queues have theirs, and its socket for notices.
const IN_PASSING: usize = 2;

/// Descriptors of a queue: for kicks, for calls, and for errors.
const OF_QUEUE: usize = 3;

impl Shared {
    /// The door closes with the last front end.
    pub(super) fn serve(&self, mut door: Door, ended: impl FnOnce()) {
        while let Some((stream, reserve)) =
            door.next(&self.disk.name, self.descriptors_to_reserve(), self.stop.as_raw_fd())
        {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            self.serve_one(stream, reserve, door.listener());
        }
        if !self.stopping.load(Ordering::SeqCst) {
            ended();
        }
    }

    /// How many descriptors must be left for a front end to be let in. Most front ends use fewer queues than
    /// they are offered, so what the queues may need is no more than a quarter of all.
    fn descriptors_to_reserve(&self) -> usize {
        let queues = usize::from(self.device.options.num_queues) * OF_QUEUE;
        OF_CONNECTION + IN_PASSING + queues.min(descriptors::limit() / 4)
    }

    fn serve_one(&self, stream: UnixStream, mut reserve: Reserve, others: Option<RawFd>) {
        let session = Session::new(self.device.clone(), self.workers.clone(), self.first_worker);
        let session = Arc::new(std::sync::Mutex::new(session));
        let mut handler = match self.begin(stream, &session) {
            Ok(handler) => handler,
            Err(error) => {
                let why = descriptors::explain(&error);
                return log::error!(export = &*self.disk.name; "a front end is not served: {why}");
            }
        };
        log::info!(export = &*self.disk.name; "front end connected");
        if let Some(metrics) = &self.disk.metrics {
            metrics.connections.fetch_add(1, Ordering::Relaxed);
            metrics.connected.store(true, Ordering::Relaxed);
        }
        let mut channel = Channel::new(&self.disk.name, &self.notices, others);
        let end = self.hear(&session, &mut handler, &mut channel, &mut reserve);
        lock(&session).stop_all();
        self.current.lock().front_end = None;
        if let Some(metrics) = &self.disk.metrics {
            metrics.connected.store(false, Ordering::Relaxed);
        }
        // Memory and descriptors are given back before the log says that the front end has gone.
        drop((channel, handler, session, reserve));
        match end {
            Err(error) if !self.stopping.load(Ordering::SeqCst) => {
                log::warn!(export = &*self.disk.name; "connection ended: {error}")
            }
            _ => log::info!(export = &*self.disk.name; "front end disconnected"),
        }
    }

    /// Makes a connection the one that is served.
    ///
    /// # Errors
    /// There are no descriptors left.
    fn begin(
        &self,
        stream: UnixStream,
        session: &Arc<std::sync::Mutex<Session>>,
    ) -> std::io::Result<Handler> {
        stream.set_nonblocking(false)?;
        let copy = Arc::new(stream.try_clone()?);
        let handler = handler::new(stream, session.clone())?;
        let theirs = copy.clone();
        let cut_off = CutOff::new(self.disk.name.clone(), move || {
            let _ = theirs.shutdown(Shutdown::Both);
        });
        lock(session).set_cut_off(cut_off);
        self.current.lock().front_end = Some((copy, session.clone()));
        Ok(handler)
    }

    /// Does what the front end says until it goes, or until the export ends.
    ///
    /// # Errors
    /// It has said something wrong, or what it wants cannot be done.
    fn hear(
        &self,
        session: &std::sync::Mutex<Session>,
        handler: &mut Handler,
        channel: &mut Channel,
        reserve: &mut Reserve,
    ) -> Result<(), VhostError> {
        let mut wait = hand_over::Wait::default();
        while !self.stopping.load(Ordering::SeqCst) {
            if !self.take_disk(session, &mut wait, handler.as_raw_fd())? {
                continue;
            }
            let running = lock(session).is_running();
            let next = channel.wait(handler.as_raw_fd(), running);
            next.check()?;
            match handler.handle_request() {
                Ok(()) => {}
                Err(VhostError::Disconnected) => return Ok(()),
                Err(VhostError::SocketRetry(_)) => continue,
                Err(error) => return Err(next.explain(error)),
            }
            let mut session = lock(session);
            channel.accept(session.has_channel());
            reserve.set_used(OF_CONNECTION + session.descriptors());
            if session.is_running() {
                reserve.settle(IN_PASSING);
            }
            let moved = session.take_moved();
            drop(session);
            if moved {
                self.disk.hand_over.give_up(&self.disk.name, &self.workers[0]);
            }
        }
        Ok(())
    }

    /// Makes the disk ours if a ring waits for it. True when there is nothing to do but to hear what
    /// the front end says.
    fn take_disk(
        &self,
        session: &std::sync::Mutex<Session>,
        wait: &mut hand_over::Wait,
        stream: RawFd,
    ) -> Result<bool, VhostError> {
        if !lock(session).waits_for_disk() {
            wait.end();
            return Ok(true);
        }
        // Others may ask the session meanwhile, so it is not locked.
        if let Err(error) = self.disk.hand_over.take(&self.workers[0]) {
            let refused = |error: Error| std::io::Error::other(error.to_string());
            wait.go_on(&self.disk.name, error)
                .map_err(|e| VhostError::ReqHandlerError(refused(e)))?;
            let fds = [stream, self.stop.as_raw_fd()];
            return Ok(wait_readable(&fds, Some(hand_over::RETRY)) == Some(0));
        }
        if self.disk.take_size() {
            self.notices.resized();
        }
        lock(session).start_waiting()?;
        Ok(true)
    }

    /// The I/O of earlier connections has ended: the rings of this one may begin.
    pub(super) fn go_on(&self) {
        log::info!(export = &*self.disk.name; "I/O of an earlier connection has ended");
        let front_end = self.current.lock().front_end.as_ref().map(|(_, session)| session.clone());
        if let Some(session) = front_end
            && let Err(error) = lock(&session).start_waiting()
        {
            log::warn!(export = &*self.disk.name; "connection closed: {error}");
            if let Some((stream, _)) = &self.current.lock().front_end {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }
}
