//! Simulated stream sockets: two ends in memory, and listeners to connect to.
//!
//! The ring decides when an operation takes effect; a seeded part of what could move does. What one end
//! has sent the other can receive at once; it is the delays of operations that order things.

use super::NEXT_FD;
use crate::io::sync::Mutex;
use crate::io::{Errno, IoResult, IoVec, Op};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a connection is like.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Bytes that are in flight in one direction at most.
    pub capacity: usize,
    /// How often a send or receive finds that the connection has been reset, from 0 to 1.
    pub reset: f64,
}

struct Connection {
    link: Link,
    /// Of the side that sends, and of the side that has accepted.
    sides: [Side; 2],
    is_accepted: bool,
    is_reset: bool,
}

#[derive(Default)]
struct Side {
    /// What it has sent, and the other one has not received.
    sent: VecDeque<u8>,
    /// It sends and receives no more.
    is_shut: bool,
}

type Place = (Arc<Mutex<Connection>>, usize);

static ENDS: Mutex<BTreeMap<RawFd, Place>> = Mutex::new(BTreeMap::new());
static LISTENERS: Mutex<BTreeMap<u64, (Link, VecDeque<End>)>> = Mutex::new(BTreeMap::new());

/// One end of a connection, with a descriptor that is valid on every simulated ring of the process.
pub struct End {
    fd: RawFd,
    connection: Arc<Mutex<Connection>>,
    side: usize,
}

/// Two ends that are connected.
pub fn pair(link: Link) -> (End, End) {
    let connection =
        Connection { link, sides: Default::default(), is_accepted: true, is_reset: false };
    let connection = Arc::new(Mutex::new(connection));
    (End::new(connection.clone(), 0), End::new(connection, 1))
}

/// Takes connections for [`crate::io::socket::Address::Simulated`].
pub struct Listener(u64);

impl Listener {
    pub fn new(link: Link) -> Listener {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        LISTENERS.lock().insert(number, (link, VecDeque::new()));
        Listener(number)
    }

    pub fn number(&self) -> u64 {
        self.0
    }

    /// The next connection, if there is one. Before that its other side waits to be connected.
    pub fn accept(&self) -> Option<End> {
        let end = LISTENERS.lock().get_mut(&self.0)?.1.pop_front()?;
        end.connection.lock().is_accepted = true;
        Some(end)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let left = LISTENERS.lock().remove(&self.0);
        for end in left.into_iter().flat_map(|(_, ends)| ends) {
            end.connection.lock().is_reset = true;
        }
    }
}

/// Begins to connect to a listener; the socket is writable when that has accepted it.
pub fn connect(listener: u64) -> IoResult<End> {
    let mut listeners = LISTENERS.lock();
    let Some((link, waiting)) = listeners.get_mut(&listener) else {
        return Err(Errno(libc::ECONNREFUSED));
    };
    let (ours, theirs) = pair(*link);
    ours.connection.lock().is_accepted = false;
    waiting.push_back(theirs);
    Ok(ours)
}

impl End {
    fn new(connection: Arc<Mutex<Connection>>, side: usize) -> End {
        let fd = NEXT_FD.fetch_add(1, Ordering::Relaxed);
        ENDS.lock().insert(fd, (connection.clone(), side));
        End { fd, connection, side }
    }

    /// Ends both directions.
    pub fn shut_down(&self) {
        self.connection.lock().sides[self.side].is_shut = true;
    }
}

impl AsRawFd for End {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

impl Drop for End {
    fn drop(&mut self) {
        ENDS.lock().remove(&self.fd);
        self.shut_down();
    }
}

/// What an operation comes to now: none if it waits. `is_new`: it is asked for the first time. A part of
/// what could move does, as often as `short` says.
pub(super) fn execute(
    fd: RawFd,
    op: Op,
    is_new: bool,
    short: f64,
    rng: &mut fastrand::Rng,
) -> Option<IoResult<u32>> {
    let place = ENDS.lock().get(&fd).cloned();
    let Some((connection, side)) = place else { return Some(Err(Errno(libc::EBADF))) };
    let mut connection = connection.lock();
    let polls = matches!(op, Op::Poll { .. });
    connection.is_reset |= is_new && !polls && rng.f64() < connection.link.reset;
    if let Op::Poll { events, .. } = op {
        let found = connection.events(side) & (events | (libc::POLLHUP | libc::POLLERR) as u32);
        return (found != 0).then_some(Ok(found));
    }
    if connection.is_reset {
        return Some(Err(Errno(libc::ECONNRESET)));
    }
    match op {
        Op::Send { segments } => {
            if connection.sides.iter().any(|side| side.is_shut) {
                return Some(Err(Errno(libc::EPIPE)));
            }
            let room = connection.room(side);
            // SAFETY: the code that pushed the operation keeps list and memory in place until its completion.
            let from = unsafe { IoVec::from_raw(segments.as_slice()) };
            let count = part(from.len().min(room as u64), short, rng)?;
            let mut bytes = vec![0; count as usize];
            from.copy_to(&mut bytes);
            connection.sides[side].sent.extend(bytes);
            Some(Ok(count))
        }
        Op::Receive { segments } => {
            let has_ended = connection.sides.iter().any(|side| side.is_shut);
            let sent = &mut connection.sides[1 - side].sent;
            if sent.is_empty() {
                return has_ended.then_some(Ok(0));
            }
            // SAFETY: as above.
            let into = unsafe { IoVec::from_raw(segments.as_slice()) };
            let count = part(into.len().min(sent.len() as u64), short, rng).unwrap_or(0);
            let bytes: Vec<u8> = sent.drain(..count as usize).collect();
            into.copy_from(&bytes);
            Some(Ok(count))
        }
        _ => Some(Err(Errno(libc::EINVAL))),
    }
}

/// As much of `most` bytes as moves; none if that is zero.
fn part(most: u64, short: f64, rng: &mut fastrand::Rng) -> Option<u32> {
    let is_short = most > 1 && rng.f64() < short;
    let count = if is_short { rng.u64(1..most) } else { most };
    (count > 0).then_some(count as u32)
}

impl Connection {
    /// Bytes that a side may send.
    fn room(&self, side: usize) -> usize {
        let room = self.link.capacity.saturating_sub(self.sides[side].sent.len());
        if self.is_accepted { room } else { 0 }
    }

    /// The events that a side has now, as poll(2) names them.
    fn events(&self, side: usize) -> u32 {
        if self.is_reset {
            return (libc::POLLIN | libc::POLLOUT | libc::POLLERR | libc::POLLHUP) as u32;
        }
        let has_ended = self.sides.iter().any(|side| side.is_shut);
        let mut events = 0;
        if has_ended || !self.sides[1 - side].sent.is_empty() {
            events |= libc::POLLIN;
        }
        if has_ended || self.room(side) > 0 {
            events |= libc::POLLOUT;
        }
        events as u32
    }
}
