//! When a connection is lost: what becomes of its requests, and how there is another one.
//!
//! Requests without an answer, and those that come, wait for `reconnect-delay`, and are sent again; after that they
//! fail, and each that comes has one more attempt made, at most one a second. A write that the server did, and whose
//! answer was lost, is done twice; nobody was told of the first time, so nobody relies on what lay there between.
//! What was answered and may be lost is the next flush's to tell ([`super::flushes`]).

use super::connect::Connection;
use super::handshake::Fault;
use super::link::{Link, Traffic};
use super::requests::{Owner, Stage};
use crate::block::Error;
use crate::io::{self, Deadline, Errno, Io};
use std::rc::Rc;
use std::time::Duration;

/// Between the first two attempts, and the most between any.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// An attempt for which nobody waits has at least so long.
const ATTEMPT: Duration = Duration::from_secs(5);

impl Link {
    /// The connection is no good any more, for this reason.
    pub(super) fn lose(self: &Rc<Link>, io: &Rc<Io>, why: &str) {
        if self.is_lost.replace(true) {
            return;
        }
        let has_cost = self.shared.flushes.lose();
        let cost = match has_cost {
            true => "; the next flush fails, for what was written since the last may be lost",
            false => "",
        };
        // Where nothing waits, requests fail by this.
        let level = match self.shared.target.options.reconnect_delay.is_zero() {
            true => log::Level::Error,
            false => log::Level::Warn,
        };
        log::log!(level, "{}: {}{cost}", self.shared.target.name(), why.escape_debug());
        if let Some(connection) = &*self.connection.borrow() {
            connection.socket.shut_down();
        }
        self.cancel_all(io);
        self.let_go(io);
    }

    /// There is no connection: requests wait for one from now on.
    pub(super) fn begin_waiting(self: &Rc<Link>, io: &Rc<Io>) {
        let delay = self.shared.target.options.reconnect_delay;
        self.waits_until.set(io.now().saturating_add(delay.as_nanos() as u64));
        self.begin_connecting(io);
    }

    /// Goes on once nothing in the ring names the lost connection.
    pub(super) fn let_go(self: &Rc<Link>, io: &Rc<Io>) {
        if self.is_sending.get() || self.is_receiving.get() {
            return;
        }
        self.is_lost.set(false);
        drop(self.connection.borrow_mut().take());
        {
            let Traffic { requests, queue, sender, receiver } = &mut *self.traffic.borrow_mut();
            sender.clear();
            receiver.clear();
            let mut again = Vec::new();
            for index in requests.waiting() {
                let slot = requests.get(index);
                match slot.stage {
                    Stage::AnsweredEarly => {
                        let result = slot.error.map_or(Ok(slot.answer), Err);
                        slot.stage = Stage::Sent;
                        self.answer(io, requests, index, result);
                    }
                    Stage::Queued => {}
                    _ if matches!(slot.owner, Owner::Nobody) => requests.withdraw(index),
                    _ => {
                        slot.begin_again();
                        again.push(index);
                    }
                }
            }
            again.into_iter().rev().for_each(|index| queue.push_front(index));
        }
        self.begin_waiting(io);
        if !self.may_wait(io) {
            self.fail_all(io);
        }
        self.wake(io);
    }

    /// Whether requests wait for a connection.
    pub(super) fn may_wait(&self, io: &Io) -> bool {
        self.is_lost.get() || io.now() < self.waits_until.get()
    }

    fn fail_all(&self, io: &Io) {
        let Traffic { requests, queue, .. } = &mut *self.traffic.borrow_mut();
        queue.clear();
        for index in requests.waiting() {
            self.answer(io, requests, index, Err(Errno::EIO));
        }
        self.wake(io);
    }

    /// Makes an attempt for a request that has failed, unless one was made just now.
    pub(super) fn try_once(self: &Rc<Link>, io: &Rc<Io>) {
        if io.now() >= self.next_attempt.get() {
            self.begin_connecting(io);
        }
    }

    fn begin_connecting(self: &Rc<Link>, io: &Rc<Io>) {
        if self.is_connecting.replace(true) {
            return;
        }
        let link = self.clone();
        io.spawn(async move {
            link.connect_again().await;
            link.is_connecting.set(false);
        });
    }

    async fn connect_again(&self) {
        let io = io::current();
        let mut pause = FIRST_PAUSE;
        while !self.is_done() {
            let left = Duration::from_nanos(self.waits_until.get().saturating_sub(io.now()));
            let deadline = Deadline::after(if left.is_zero() { ATTEMPT } else { left });
            let name = || self.shared.target.name();
            let error = match self.shared.target.connect(deadline).await {
                Ok(connection) if connection.is_as_good_as(&self.shared.agreed) => {
                    log::warn!("{}: connected again", name());
                    self.progress.set(io.now());
                    *self.connection.borrow_mut() = Some(connection);
                    return self.wake(&io);
                }
                Ok(connection) => {
                    Connection::end(connection).await;
                    Error::new("the export is not what it was: it is shorter, or can do less")
                }
                Err(Fault::Lost(error) | Fault::Refused(error)) => error,
            };
            if self.traffic.borrow().requests.is_idle() {
                // A task that never ends would keep its worker from ending.
                self.is_resting.set(true);
                return;
            }
            if io.now() >= self.waits_until.get() {
                let next = io.now().saturating_add(LAST_PAUSE.as_nanos() as u64);
                self.next_attempt.set(next);
                if !left.is_zero() {
                    log::error!("{}: requests fail from now on: {error}", name());
                }
                return self.fail_all(&io);
            }
            let left = self.waits_until.get().saturating_sub(io.now());
            io::sleep(pause.min(Duration::from_nanos(left))).await;
            pause = (2 * pause).min(LAST_PAUSE);
        }
    }
}
