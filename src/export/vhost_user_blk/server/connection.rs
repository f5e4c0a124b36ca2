//! Connections of front ends, one after another: setup, messages, and teardown.

use super::super::channel::Channel;
use super::super::handler::{self, Handler};
use super::super::session::Session;
use super::Shared;
use crate::block::Error;
use crate::export::core::cut_off::CutOff;
use crate::export::core::hand_over::{Taking, Transitions};
use crate::export::core::listener::Listener;
use crate::io::descriptors::{self, Reserve};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vhost::vhost_user::Error as VhostError;

/// Descriptors of a connection besides those of its queues: its stream and a copy of it.
const OF_CONNECTION: usize = 2;

/// Descriptors that a connection has only for moments once its queues have theirs, and its socket for notices.
const IN_PASSING: usize = 2;

/// Descriptors of a queue: for kicks, for calls, and for errors.
const OF_QUEUE: usize = 3;

impl Shared {
    /// Serves front ends one after another until no more can come.
    pub(super) fn serve(&self, mut listener: Listener, ended: impl FnOnce()) {
        while let Some((stream, reserve)) =
            listener.next(&self.disk.name, self.descriptors_to_reserve(), self.stop.as_raw_fd())
        {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            self.serve_one(stream, reserve, listener.socket());
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
        // The `vhost` crate asks for the lock. Nobody else takes it.
        let session = Arc::new(Mutex::new(session));
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
        let mut channel = Channel::new(&self.disk.name, &self.server_events, others);
        let server_events = self.server_events.clone();
        let mut transitions =
            Transitions::new(&self.disk, &self.workers[0], move || server_events.wake());
        let end =
            self.poll_events(&session, &mut handler, &mut channel, &mut reserve, &mut transitions);
        transitions.finish();
        lock(&session).stop_all();
        *self.front_end.lock() = None;
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
    fn begin(&self, stream: UnixStream, session: &Arc<Mutex<Session>>) -> std::io::Result<Handler> {
        stream.set_nonblocking(false)?;
        let copy = Arc::new(stream.try_clone()?);
        let handler = handler::new(stream, session.clone())?;
        let clone = copy.clone();
        let cut_off = CutOff::new(self.disk.name.clone(), move || {
            let _ = clone.shutdown(Shutdown::Both);
        });
        lock(session).set_cut_off(cut_off);
        *self.front_end.lock() = Some(copy);
        Ok(handler)
    }

    /// Handles messages of the front end until it disconnects or the export ends.
    ///
    /// # Errors
    /// A message is invalid, or its request cannot be carried out.
    fn poll_events(
        &self,
        session: &Mutex<Session>,
        handler: &mut Handler,
        channel: &mut Channel,
        reserve: &mut Reserve,
        transitions: &mut Transitions,
    ) -> Result<(), VhostError> {
        while !self.stopping.load(Ordering::SeqCst) {
            let again = self.start_waiting(session, transitions)?;
            let running = lock(session).is_running();
            let Some(next) = channel.wait(handler.as_raw_fd(), running, again) else { continue };
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
            if session.take_moved() {
                transitions.give_up();
            }
        }
        Ok(())
    }

    /// Starts rings that were kept back, if they can start now, and makes the disk ours if they need it. Returns
    /// when to look again if nothing wakes the thread before.
    fn start_waiting(
        &self,
        session: &Mutex<Session>,
        transitions: &mut Transitions,
    ) -> Result<Option<Duration>, VhostError> {
        let refused =
            |error: Error| VhostError::ReqHandlerError(std::io::Error::other(error.to_string()));
        let mut session = lock(session);
        let again = match transitions.poll(session.waits_for_disk()).map_err(refused)? {
            Taking::Waits(again) => again,
            Taking::Taken => {
                if self.disk.take_size() {
                    self.server_events.resized();
                }
                None
            }
        };
        session.start_waiting()?;
        Ok(again)
    }
}

fn lock(session: &Mutex<Session>) -> MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}
