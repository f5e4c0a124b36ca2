//! The back-end channel, which reports changes of the configuration space to the front end.
//!
//! A resize thereby reaches a running guest (vhost-user text, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG).
//!
//! The front end gives a socket for it. The `vhost` crate takes that and can send other messages
//! only, so each message is looked at before the crate reads it ([`super::peek`]), and the socket is kept in a
//! descriptor of our own.
//!
//! The rule held here: a notice never waits for the front end. It goes out in a quiet moment, because
//! front ends such as QEMU 7.2 answer a notice by asking for the configuration even while they wait
//! for the answer to another question; and while a ring runs, because what comes before may be passed
//! over (a guest of QEMU 7.2 once missed a resize that fell into a reconnect).

use super::peek::{HEADER_LEN, Next};
use crate::export::core::server_events::ServerEvents;
use crate::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Milliseconds without a message after which the front end is taken to wait for no answer.
const QUIET: libc::c_int = 20;

/// How long another front end waits before the log says so. One that connects again may be quicker than
/// the end of its first connection.
const PATIENCE: Duration = Duration::from_secs(1);

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, protocol version 1, no answer wanted, nothing follows.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The way to one front end. Of its connection's thread.
pub struct Channel<'a> {
    /// For the log.
    name: &'a str,
    server_events: &'a ServerEvents,
    socket: Option<OwnedFd>,
    /// What comes with the message that is next.
    offered: Option<OwnedFd>,
    /// The listening socket that other front ends come to, until one has been told of.
    others: Option<RawFd>,
    /// When one was seen to have come.
    came: Option<Instant>,
}

impl<'a> Channel<'a> {
    /// `others`: the socket that front ends come to, if they come to one of ours.
    pub fn new(
        name: &'a str,
        server_events: &'a ServerEvents,
        others: Option<RawFd>,
    ) -> Channel<'a> {
        Channel { name, server_events, socket: None, offered: None, others, came: None }
    }

    /// Sleeps until the front end has sent something or has gone; tells it meanwhile what it is to be
    /// told, if a ring is `running`. What it has sent is left to be read, and looked at. None if there may be
    /// something else to look at: the thread was woken, or `most` has passed.
    pub fn wait(&mut self, stream: RawFd, running: bool, most: Option<Duration>) -> Option<Next> {
        let most = most.map_or(-1, |most| most.as_millis() as libc::c_int);
        loop {
            let due = running && self.socket.is_some() && self.server_events.is_due();
            // The kernel passes over a negative number. The listener stays readable until the next front
            // end is served.
            let others = if self.came.is_none() { self.others.unwrap_or(-1) } else { -1 };
            let fds = [stream, self.server_events.descriptor(), others];
            let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
            let count = polled.len() as libc::nfds_t;
            let timeouts = [if due { QUIET } else { self.patience() }, most];
            // A negative number is no limit.
            let timeout = timeouts.into_iter().filter(|time| *time >= 0).min().unwrap_or(-1);
            // SAFETY: the array lives through the call, and its length is given.
            let ready = unsafe { libc::poll(polled.as_mut_ptr(), count, timeout) };
            if ready < 0 && Errno::last().0 != libc::EINTR || polled[0].revents != 0 {
                break;
            }
            if polled[2].revents != 0 {
                self.came = Some(Instant::now());
            }
            if self.patience() == 0 {
                (self.others, self.came) = (None, None);
                log::warn!(
                    export = self.name;
                    "another front end has connected: it waits until this one disconnects"
                );
            }
            if polled[1].revents != 0 {
                self.server_events.seen();
                return None;
            }
            if ready == 0 && due {
                self.notify();
            } else if ready == 0 && most >= 0 {
                return None;
            }
        }
        let mut next = Next::peek(stream);
        self.offered = next.channel.take();
        Some(next)
    }

    /// Milliseconds until another front end has waited for long; -1 if there is none.
    fn patience(&self) -> libc::c_int {
        let left = self.came.map(|came| PATIENCE.saturating_sub(came.elapsed()));
        left.map_or(-1, |left| left.as_micros().div_ceil(1000) as libc::c_int)
    }

    /// The message that came last was right: what came with it is used from now on, unless the front end
    /// has no `channel` any more.
    pub fn accept(&mut self, channel: bool) {
        if let Some(socket) = self.offered.take() {
            self.socket = Some(socket);
        }
        if !channel {
            self.socket = None;
        }
    }

    fn notify(&mut self) {
        let Some(socket) = &self.socket else { return };
        self.server_events.take();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message is a local of the length given.
        let sent = unsafe {
            libc::send(socket.as_raw_fd(), CONFIG_CHANGE.as_ptr().cast(), HEADER_LEN, flags)
        };
        if sent == HEADER_LEN as isize {
            return;
        }
        let errno = if sent < 0 { Errno::last() } else { Errno(libc::EMSGSIZE) };
        log::warn!(export = self.name; "the front end was not told of the disk's new size: {errno}");
        // What has taken a part of a message, or takes none, is of no more use.
        if errno.0 != libc::EAGAIN {
            self.socket = None;
        }
    }
}
