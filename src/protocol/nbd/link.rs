//! A worker's connection: a source whose events are the ends of its sends and receives.
//!
//! Requests are queued as they come and sent together at the end of the turn; a receive is always under way. What
//! happens when the connection is lost is in [`super::reconnect`].

use super::connect::Connection;
use super::receive::{Receiver, Terms};
use super::requests::{Answer, Ask, Owner, Requests, Stage, USUAL};
use super::send::Sender;
use super::shared::{Host, Mail, Remote, Shared};
use crate::block::LocalFuture;
use crate::io::{self, Errno, Io, IoResult, Polled, Source, SourceId, Token, WorkerState};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver as Inbox};
use std::task::{Context, Poll, Waker};
use vmm_sys_util::eventfd::EventFd;

const SEND: u32 = 0;
const RECEIVE: u32 = 1;
/// Bytes that count as a sign of life.
const PROGRESS: u64 = 64 << 10;

pub struct Link {
    pub shared: Arc<Shared>,
    number: u64,
    pub(super) connection: RefCell<Option<Connection>>,
    pub(super) traffic: RefCell<Traffic>,
    inbox: Inbox<Remote>,
    mail: Arc<Mail>,
    /// Known from its first turn on.
    me: Cell<Option<SourceId>>,
    /// It is polled, or about to be, in this turn.
    awake: Cell<bool>,
    pub(super) is_sending: Cell<bool>,
    pub(super) is_receiving: Cell<bool>,
    /// The connection is no good any more; it goes when nothing names it in the ring.
    pub(super) is_lost: Cell<bool>,
    /// A task tries to connect.
    pub(super) is_connecting: Cell<bool>,
    /// There is no connection, and nobody has asked for one since the last attempt.
    pub(super) is_resting: Cell<bool>,
    /// Until when requests wait for a connection, on the ring's clock.
    pub(super) waits_until: Cell<u64>,
    /// Not before then is another attempt made for a request.
    pub(super) next_attempt: Cell<u64>,
    /// When the server has last done anything, or was first asked to.
    pub(super) progress: Cell<u64>,
    bytes: Cell<u64>,
    /// When the clock is looked at.
    due: Cell<Option<u64>>,
    end: RefCell<End>,
}

/// What goes over the connection.
#[derive(Default)]
pub struct Traffic {
    pub requests: Requests,
    /// To be sent, in this order.
    pub queue: VecDeque<u32>,
    pub sender: Sender,
    pub receiver: Receiver,
}

#[derive(Default)]
enum End {
    #[default]
    NotAsked,
    /// The source ends when nothing is in flight, and wakes the task that waits for it.
    Asked(Option<Waker>),
    Reached,
}

impl Link {
    /// Gives the worker a link, over this connection or one that is still to be made.
    pub fn attach(
        io: &Io,
        shared: &Arc<Shared>,
        connection: Option<Connection>,
    ) -> IoResult<Rc<Link>> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let (sender, inbox) = mpsc::channel();
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
        let mail = Arc::new(Mail { is_there: AtomicBool::new(false), event });
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let traffic = Traffic { queue: VecDeque::with_capacity(USUAL), ..Traffic::default() };
        let link = Rc::new(Link {
            shared: shared.clone(),
            number,
            connection: RefCell::new(connection),
            traffic: RefCell::new(traffic),
            inbox,
            mail: mail.clone(),
            me: Cell::new(None),
            awake: Cell::new(true),
            is_sending: Cell::new(false),
            is_receiving: Cell::new(false),
            is_lost: Cell::new(false),
            is_connecting: Cell::new(false),
            is_resting: Cell::new(false),
            waits_until: Cell::new(0),
            next_attempt: Cell::new(0),
            progress: Cell::new(io.now()),
            bytes: Cell::new(0),
            due: Cell::new(None),
            end: RefCell::default(),
        });
        let event = mail.event.as_raw_fd();
        io.attach_device(Box::new(LinkSource(link.clone())), Some(event));
        shared.add_host(Host { number, requests: sender, mail });
        Ok(link)
    }

    /// Takes a request, which is sent at the end of the turn; gives its slot.
    pub fn submit(self: &Rc<Link>, io: &Rc<Io>, ask: Ask, owner: Owner) -> u32 {
        let mut traffic = self.traffic.borrow_mut();
        if traffic.requests.is_idle() {
            self.progress.set(io.turn_time());
        }
        if self.is_resting.take() {
            self.begin_waiting(io);
        }
        let index = traffic.requests.insert(ask, owner);
        if self.connection.borrow().is_some() || self.may_wait(io) {
            traffic.queue.push_back(index);
        } else {
            self.answer(io, &mut traffic.requests, index, Err(Errno::EIO));
            drop(traffic);
            self.try_once(io);
        }
        self.wake(io);
        index
    }

    /// Has the source polled in this turn.
    #[inline]
    pub fn wake(&self, io: &Io) {
        if !self.awake.replace(true)
            && let Some(me) = self.me.get()
        {
            io.wake_source(me);
        }
    }

    /// A request has its answer.
    pub fn answer(&self, io: &Io, requests: &mut Requests, index: u32, result: IoResult<Answer>) {
        let slot = requests.get(index);
        if slot.stage == Stage::Sending {
            // The kernel may still read its memory.
            slot.stage = Stage::AnsweredEarly;
            (slot.error, slot.answer) = (result.err(), result.unwrap_or_default());
            return;
        }
        if result.is_ok() && slot.ask.is_owed() {
            // Before anybody hears of it.
            self.shared.flushes.owe();
        }
        let (_, owner) = requests.answer(index, result);
        match owner {
            Owner::Queue(token) => io.deliver(token, result.map(|_| ())),
            Owner::Task(waker) => {
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Owner::Remote(done) => done(Some(result)),
            Owner::Nobody => {}
        }
    }

    /// What a task's request has come to.
    pub fn poll_task(&self, index: u32, cx: &mut Context<'_>) -> Poll<IoResult<Answer>> {
        let requests = &mut self.traffic.borrow_mut().requests;
        let slot = requests.get(index);
        if slot.stage != Stage::Answered {
            slot.owner = Owner::Task(Some(cx.waker().clone()));
            return Poll::Pending;
        }
        let result = slot.error.map_or(Ok(slot.answer), Err);
        requests.release(index);
        Poll::Ready(result)
    }

    /// A task gives up its request, whose memory is about to go.
    pub fn abandon(&self, io: &Io, index: u32) {
        let mut traffic = self.traffic.borrow_mut();
        let (stage, token) = (traffic.requests.get(index).stage, |tag| self.token(tag));
        match stage {
            Stage::Free => return,
            Stage::Answered => return traffic.requests.release(index),
            Stage::Queued => {
                traffic.queue.retain(|&other| other != index);
                return traffic.requests.withdraw(index);
            }
            Stage::Sending | Stage::AnsweredEarly => {
                traffic.sender.is_broken = true;
                if let Some(token) = token(SEND) {
                    io.cancel_and_wait(token);
                }
            }
            Stage::Sent if traffic.receiver.fills(index) => {
                if let Some(token) = token(RECEIVE) {
                    io.cancel_and_wait(token);
                }
            }
            Stage::Sent => {}
        }
        let slot = traffic.requests.get(index);
        slot.owner = Owner::Nobody;
        slot.ask.memory = None;
    }

    fn token(&self, tag: u32) -> Option<Token> {
        self.me.get().map(|source| Token { source, tag })
    }

    /// Takes what other workers have sent. True if there was anything.
    fn take_mail(self: &Rc<Link>, io: &Rc<Io>) -> bool {
        if !self.mail.is_there.swap(false, Ordering::SeqCst) {
            return false;
        }
        while let Ok(remote) = self.inbox.try_recv() {
            if let (ask, Some(done)) = remote.into_parts() {
                self.submit(io, ask, Owner::Remote(done));
            }
        }
        true
    }

    fn is_leaving(&self) -> bool {
        matches!(*self.end.borrow(), End::Asked(_))
    }

    /// Whether nobody needs the connection any more.
    pub(super) fn is_done(&self) -> bool {
        self.is_leaving() && self.traffic.borrow().requests.is_idle()
    }

    /// Whether the source is to end, and nothing keeps it.
    fn has_ended(&self, io: &Io) -> bool {
        if !self.is_done() || self.is_lost.get() || self.is_sending.get() {
            return false;
        }
        if self.is_receiving.get() {
            if let Some(token) = self.token(RECEIVE) {
                io.cancel(token);
            }
            return false;
        }
        let mut end = self.end.borrow_mut();
        if let End::Asked(waiting) = &mut *end {
            waiting.take().into_iter().for_each(Waker::wake);
        }
        *end = End::Reached;
        true
    }

    /// Starts a send of what is queued, and a receive, if they are not under way.
    fn start(&self, io: &Rc<Io>) {
        let (Some(send), Some(receive)) = (self.token(SEND), self.token(RECEIVE)) else { return };
        let connection = self.connection.borrow();
        let Some(connection) = connection.as_ref().filter(|_| !self.is_lost.get()) else { return };
        let (fd, agreed) = (connection.socket.as_raw_fd(), connection.agreed);
        let Traffic { requests, queue, sender, receiver } = &mut *self.traffic.borrow_mut();
        if !self.is_sending.get() {
            sender.fill(requests, queue, agreed.headers);
            if let Some(segments) = sender.segments() {
                self.is_sending.set(true);
                // SAFETY: the list lies in the sender until the send has ended, and what it names stays until its
                // request is answered, which no request is that is being sent.
                unsafe { io.start(fd, io::Op::Send { segments }, send) };
            }
        }
        if !(self.is_receiving.get() || self.is_leaving() && requests.is_idle()) {
            let terms = Terms { headers: agreed.headers, context: agreed.context };
            let segments = receiver.prepare(requests, terms);
            self.is_receiving.set(true);
            // SAFETY: as for the send. Only the end of a receive ends a request that is being filled.
            unsafe { io.start(fd, io::Op::Receive { segments }, receive) };
        }
        if self.due.get().is_none() && !requests.is_idle() {
            self.look_at_clock(io, self.progress.get());
        }
    }

    fn look_at_clock(&self, io: &Io, since: u64) {
        let at = since.saturating_add(self.shared.target.io_timeout_ns());
        self.due.set(Some(at));
        io.tick_by(at);
    }

    fn has_sent(self: &Rc<Link>, io: &Rc<Io>, result: IoResult<u32>) {
        let mut traffic = self.traffic.borrow_mut();
        let Traffic { requests, sender, .. } = &mut *traffic;
        let bytes = match result {
            Ok(bytes) => u64::from(bytes),
            Err(Errno(libc::ECANCELED)) if sender.is_broken => 0,
            Err(errno) => {
                drop(traffic);
                return self.lose(io, &format!("sending: {errno}"));
            }
        };
        self.count(io, bytes);
        if !sender.sent(bytes) {
            if sender.is_broken {
                drop(traffic);
                self.lose(io, "a request was given up while it was sent");
            }
            return;
        }
        sender.is_broken = false;
        while let Some(index) = sender.next_sent() {
            let slot = requests.get(index);
            let is_early = slot.stage == Stage::AnsweredEarly;
            slot.stage = Stage::Sent;
            if is_early {
                let result = slot.error.map_or(Ok(slot.answer), Err);
                self.answer(io, requests, index, result);
            }
        }
    }

    fn has_received(self: &Rc<Link>, io: &Rc<Io>, result: IoResult<u32>) {
        let bytes = match result {
            Ok(0) => return self.lose(io, "the server has closed the connection"),
            Ok(bytes) => u64::from(bytes),
            // By a request that was given up, or at the end.
            Err(Errno(libc::ECANCELED)) => 0,
            Err(errno) => return self.lose(io, &format!("receiving: {errno}")),
        };
        self.count(io, bytes);
        let terms = match &*self.connection.borrow() {
            Some(Connection { agreed, .. }) => {
                Terms { headers: agreed.headers, context: agreed.context }
            }
            None => return,
        };
        let mut traffic = self.traffic.borrow_mut();
        let Traffic { requests, receiver, .. } = &mut *traffic;
        let taken = receiver.take(bytes, requests, terms, &mut |requests, index, result| {
            self.progress.set(io.turn_time());
            self.answer(io, requests, index, result);
        });
        drop(traffic);
        if let Err(malformed) = taken {
            self.lose(io, &malformed.to_string());
        }
    }

    /// Bytes have moved.
    fn count(&self, io: &Io, bytes: u64) {
        let sum = self.bytes.get() + bytes;
        if sum >= PROGRESS {
            self.progress.set(io.turn_time());
        }
        self.bytes.set(if sum >= PROGRESS { 0 } else { sum });
    }

    /// Has the ring let go of the connection.
    pub(super) fn cancel_all(&self, io: &Io) {
        [SEND, RECEIVE].into_iter().filter_map(|tag| self.token(tag)).for_each(|t| io.cancel(t));
    }
}

struct LinkSource(Rc<Link>);

impl Source for LinkSource {
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled {
        let link = &self.0;
        link.me.set(Some(me));
        let any = link.take_mail(io);
        if link.has_ended(io) {
            return Polled::Ended;
        }
        if any { Polled::Busy } else { Polled::Idle }
    }

    fn has_work(&self) -> bool {
        self.0.mail.is_there.load(Ordering::Relaxed)
    }

    fn complete(&mut self, _: &Rc<Io>, _: u32, _: IoResult) {}

    fn counted(&mut self, io: &Rc<Io>, tag: u32, result: IoResult<u32>) {
        let link = &self.0;
        let flag = if tag == SEND { &link.is_sending } else { &link.is_receiving };
        flag.set(false);
        match (link.is_lost.get(), tag) {
            (true, _) => link.let_go(io),
            (_, SEND) => link.has_sent(io, result),
            _ => link.has_received(io, result),
        }
    }

    fn publish(&mut self) {
        self.0.start(&io::current());
    }

    fn arm(&mut self) -> bool {
        // What was told before is not news.
        let _ = self.0.mail.event.read();
        let armed = !self.0.mail.is_there.load(Ordering::SeqCst);
        self.0.awake.set(!armed);
        armed
    }

    fn disarm(&mut self) {
        self.0.awake.set(true);
    }

    fn tick(&mut self, io: &Rc<Io>, now: u64) -> bool {
        let link = &self.0;
        let Some(due) = link.due.get() else { return false };
        if now < due {
            io.tick_by(due);
            return false;
        }
        link.due.set(None);
        if link.connection.borrow().is_none() || link.traffic.borrow().requests.is_idle() {
            return false;
        }
        let timeout = link.shared.target.io_timeout_ns();
        if link.progress.get().saturating_add(timeout) > now {
            link.look_at_clock(io, link.progress.get());
            return false;
        }
        link.lose(io, &format!("no answer for {} seconds", timeout / 1_000_000_000));
        true
    }

    fn is_detachable(&self) -> bool {
        self.0.traffic.borrow().requests.is_idle()
    }
}

impl WorkerState for Link {
    /// Waits for what is in flight, and gives the connection back.
    fn leave(self: Rc<Link>) -> LocalFuture<'static, ()> {
        self.shared.remove_host(self.number);
        *self.end.borrow_mut() = End::Asked(None);
        // Whatever was sent here before is answered.
        self.mail.is_there.store(true, Ordering::SeqCst);
        self.wake(&io::current());
        Box::pin(async move {
            poll_fn(|cx| match &mut *self.end.borrow_mut() {
                End::Asked(waiting) => {
                    *waiting = Some(cx.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            })
            .await;
            let connection = self.connection.borrow_mut().take();
            let is_clean = self.traffic.borrow().receiver.is_between_replies();
            let (kept, ended) = if is_clean { (connection, None) } else { (None, connection) };
            drop(ended);
            self.shared.give_back(kept).await;
        })
    }
}
