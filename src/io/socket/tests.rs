//! Sockets over each kind of ring, and simulated ones over the simulated ring.

use super::simulated::{Link, Listener, pair};
use super::*;
use crate::io::ring::Ring;
use crate::io::sim::{Disorder, SimRing};
use crate::io::threads::Threads;
use crate::io::uring::Uring;
use crate::io::{self, Io, Polled, Source, SourceId, Token, run_on};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;

const NEVER: Deadline = Deadline::NEVER;
const BYTES: usize = 300_000;

type Test = Pin<Box<dyn Future<Output = ()>>>;

fn sim(seed: u64) -> Box<dyn Ring> {
    Box::new(SimRing::new(Disorder::wild(seed)).unwrap())
}

/// Every ring that works on real descriptors.
fn rings() -> Vec<Box<dyn Ring>> {
    let threads: Box<dyn Ring> = Box::new(Threads::new().unwrap());
    let mut rings = vec![threads, sim(1)];
    // Where io_uring is refused, the others are tried.
    rings.extend(Uring::new().ok().map(|ring| Box::new(ring) as Box<dyn Ring>));
    rings
}

fn everywhere(test: impl Fn() -> Test) {
    for ring in rings() {
        run_on(ring, test());
    }
}

fn socket(fd: impl Into<OwnedFd>) -> Socket {
    Socket::try_from(fd.into()).unwrap()
}

fn unix_pair() -> (Socket, Socket) {
    let (a, b) = UnixStream::pair().unwrap();
    (socket(a), socket(b))
}

fn tcp_pair() -> (Socket, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (socket(a), socket(listener.accept().unwrap().0))
}

fn simulated_pair(reset: f64) -> (Socket, Socket) {
    let (a, b) = pair(Link { capacity: 5000, reset });
    (a.into(), b.into())
}

/// The bytes as a list of several segments, the first of them empty.
fn list(bytes: &mut [u8]) -> IoVec<'_> {
    let (a, rest) = bytes.split_at_mut(bytes.len() / 5);
    let (b, c) = rest.split_at_mut(rest.len() / 3);
    IoVec::concat(&[
        &IoVec::from_mut(&mut []),
        &IoVec::from_mut(a),
        &IoVec::from_mut(b),
        &IoVec::from_mut(c),
    ])
}

fn pattern() -> Vec<u8> {
    (0..BYTES).map(|n| (n ^ n >> 8) as u8).collect()
}

/// Sends it all, in lists of one and of several segments; gives how often a part was sent.
async fn send_all(socket: &Socket, mut bytes: Vec<u8>) -> IoResult<usize> {
    let (mut at, mut sends) = (0, 0);
    while at < bytes.len() {
        let rest = &mut bytes[at..];
        let from = if sends % 2 == 0 { list(rest) } else { IoVec::from_mut(rest) };
        at += socket.send(&from, NEVER).await? as usize;
        sends += 1;
    }
    Ok(sends)
}

/// Receives until the other side ends.
async fn receive_all(socket: &Socket) -> IoResult<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 70_000];
    for round in 0.. {
        let into = if round % 2 == 0 { list(&mut buffer) } else { IoVec::from_mut(&mut buffer) };
        match socket.receive(&into, NEVER).await? {
            0 => break,
            count => all.extend_from_slice(&buffer[..count as usize]),
        }
    }
    Ok(all)
}

/// Sends and receives it all; gives how often a part was sent.
async fn all_arrives((a, b): (Socket, Socket)) -> usize {
    let (sent, received) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    received.set(usize::MAX);
    let (clone, back) = (sent.clone(), received.clone());
    io::current().spawn(async move {
        clone.set(send_all(&a, pattern()).await.unwrap());
        a.shut_down();
        back.set(a.receive(&IoVec::from_mut(&mut [0; 1]), NEVER).await.unwrap() as usize);
    });
    assert!(receive_all(&b).await.unwrap() == pattern(), "the bytes are others");
    while received.get() == usize::MAX {
        sleep(Duration::from_millis(1)).await;
    }
    sent.get()
}

#[test]
fn what_one_side_sends_in_parts_the_other_receives() {
    everywhere(|| Box::pin(async { assert!(all_arrives(unix_pair()).await > 0) }));
    everywhere(|| Box::pin(async { assert!(all_arrives(tcp_pair()).await > 0) }));
    for seed in 0..20 {
        let sends = run_on(sim(seed), async { all_arrives(simulated_pair(0.0)).await });
        assert!(sends > BYTES / 5000);
    }
}

/// Polls a future once.
async fn begin<T>(mut future: Pin<&mut impl Future<Output = T>>) {
    poll_fn(|cx| {
        assert!(future.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
}

/// What waits ends at its deadline or with its future, and takes nothing with it.
async fn nothing_is_lost((a, b): (Socket, Socket)) {
    let mut buffer = [0; 64];
    let soon = || Deadline::after(Duration::from_millis(5));
    let late = a.receive(&IoVec::from_mut(&mut buffer), soon()).await;
    assert_eq!(late, Err(Errno(libc::ETIMEDOUT)));
    assert_eq!(a.poll(libc::POLLIN as u32, soon()).await, Err(Errno(libc::ETIMEDOUT)));
    {
        let into = IoVec::from_mut(&mut buffer);
        let mut dropped = pin!(a.receive(&into, NEVER));
        begin(dropped.as_mut()).await;
        // It may have been asked for already, or wait in the ring.
        sleep(Duration::from_millis(1)).await;
        begin(dropped.as_mut()).await;
    }
    assert_eq!(send_all(&b, b"after all".to_vec()).await.map(|_| ()), Ok(()));
    let mut got = Vec::new();
    while got.len() < 9 {
        let n = a.receive(&IoVec::from_mut(&mut buffer), NEVER).await.unwrap();
        got.extend_from_slice(&buffer[..n as usize]);
    }
    assert_eq!(got, b"after all");
    // A send waits for room, and is ended by its deadline too.
    let large = vec![7; 1 << 20];
    let mut sent = Ok(0);
    while sent.is_ok() {
        sent = a.send(&IoVec::from_ref(&large), soon()).await;
    }
    assert_eq!(sent, Err(Errno(libc::ETIMEDOUT)));
    let ready = b.poll((libc::POLLIN | libc::POLLOUT) as u32, NEVER).await.unwrap();
    assert_eq!(ready, (libc::POLLIN | libc::POLLOUT) as u32);
}

#[test]
fn deadlines_and_dropped_futures_end_what_waits_and_lose_nothing() {
    everywhere(|| Box::pin(async { nothing_is_lost(unix_pair()).await }));
    everywhere(|| Box::pin(async { nothing_is_lost(tcp_pair()).await }));
    for seed in 0..20 {
        run_on(sim(seed), async { nothing_is_lost(simulated_pair(0.0)).await });
    }
}

#[test]
fn a_peer_that_is_gone_is_an_error_and_no_signal() {
    everywhere(|| {
        Box::pin(async {
            let (a, b) = unix_pair();
            drop(b);
            let bytes = [1; 10];
            assert_eq!(a.send(&IoVec::from_ref(&bytes), NEVER).await, Err(Errno(libc::EPIPE)));
            let (a, b) = tcp_pair();
            // What b has not received when it closes resets the connection.
            a.send(&IoVec::from_ref(&bytes), NEVER).await.unwrap();
            b.poll(libc::POLLIN as u32, NEVER).await.unwrap();
            drop(b);
            let reset = a.receive(&IoVec::from_mut(&mut [0; 10]), NEVER).await;
            assert_eq!(reset, Err(Errno(libc::ECONNRESET)));
        })
    });
}

#[test]
fn a_connection_is_made_or_refused_or_too_late() {
    everywhere(|| {
        Box::pin(async {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = Address::Tcp(listener.local_addr().unwrap());
            let a = Socket::connect(&address, NEVER).await.unwrap();
            let b = socket(listener.accept().unwrap().0);
            all_arrives((a, b)).await;
            drop(listener);
            let refused = Socket::connect(&address, NEVER).await;
            assert_eq!(refused.err(), Some(Errno(libc::ECONNREFUSED)));

            let dir = tempfile::tempdir().unwrap();
            let address = Address::Unix(dir.path().join("s"));
            let missing = Socket::connect(&address, NEVER).await;
            assert_eq!(missing.err(), Some(Errno(libc::ENOENT)));
            let long = Address::Unix(dir.path().join("s".repeat(200)));
            let refused = Socket::connect(&long, NEVER).await;
            assert_eq!(refused.err(), Some(Errno(libc::ENAMETOOLONG)));
            let listener = UnixListener::bind(dir.path().join("s")).unwrap();
            // SAFETY: names no memory. It shortens the queue.
            assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 1) }, 0);
            let mut waiting = Vec::new();
            let late = loop {
                match Socket::connect(&address, Deadline::after(Duration::from_millis(30))).await {
                    Ok(socket) => waiting.push(socket),
                    Err(errno) => break errno,
                }
            };
            assert_eq!(late, Errno(libc::ETIMEDOUT), "its queue is full");
            let first = socket(listener.accept().unwrap().0);
            all_arrives((waiting.remove(0), first)).await;
            assert!(Socket::connect(&address, NEVER).await.is_ok(), "there is room again");
        })
    });
}

#[test]
fn simulated_listeners_accept_refuse_or_say_nothing() {
    run_on(sim(3), async {
        let listener = Listener::new(Link { capacity: 100, reset: 0.0 });
        let address = Address::Simulated(listener.number());
        let late = Socket::connect(&address, Deadline::after(Duration::from_secs(3600))).await;
        assert_eq!(late.err(), Some(Errno(libc::ETIMEDOUT)), "an hour that takes no time");
        assert!(listener.accept().is_some(), "what is gone again");
        let accepted = Rc::new(RefCell::new(None));
        let clone = accepted.clone();
        let number = address.clone();
        io::current().spawn(async move {
            sleep(Duration::from_millis(1)).await;
            *clone.borrow_mut() = listener.accept();
        });
        let a = Socket::connect(&number, NEVER).await.unwrap();
        let b = accepted.take().unwrap();
        all_arrives((a, b.into())).await;
        let refused = Socket::connect(&address, NEVER).await;
        assert_eq!(refused.err(), Some(Errno(libc::ECONNREFUSED)));
    });
}

#[test]
fn simulated_resets_come_as_the_seed_says() {
    let until_reset = |seed| {
        run_on(sim(seed), async {
            let (a, b) = simulated_pair(0.05);
            io::current().spawn(async move {
                // Until the reset.
                let _ = send_all(&a, pattern()).await;
            });
            let mut received = 0;
            let mut buffer = [0; 1000];
            loop {
                match b.receive(&IoVec::from_mut(&mut buffer), NEVER).await {
                    Ok(0) => return (received, 0),
                    Ok(count) => received += count,
                    Err(errno) => {
                        assert_eq!(errno, Errno(libc::ECONNRESET));
                        return (received, io::current().now());
                    }
                }
            }
        })
    };
    assert_eq!(until_reset(1).0, until_reset(1).0);
    assert!((2..10).any(|seed| until_reset(seed).0 != until_reset(1).0));
}

/// What a leaf does: starts operations with tokens, and is notified of their ends.
struct Started {
    a: Socket,
    b: Socket,
    _buffer: Box<[u8]>,
    list: Vec<libc::iovec>,
    has_begun: bool,
    received: Received,
}

/// The ends of operations, in order.
type Received = Rc<RefCell<Vec<(u32, IoResult<u32>)>>>;

const FIRST: u32 = 1;
const LATE: u32 = 2;
const SEND: u32 = 3;
const SECOND: u32 = 4;

impl Started {
    fn start(&self, io: &Io, me: SourceId, tag: u32, deadline: Deadline) {
        let segments = io::Segments::new(&self.list, 100);
        let (fd, op) = match tag {
            SEND => (self.b.as_raw_fd(), Op::Send { segments }),
            _ => (self.a.as_raw_fd(), Op::Receive { segments }),
        };
        let token = Token { source: me, tag };
        // SAFETY: list and buffer stay in place until the worker ends, which waits for their operations.
        let started = unsafe { io.start_until(fd, op, token, deadline) };
        assert_eq!(started, io::Started::Pending);
    }
}

impl Source for Started {
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled {
        if !std::mem::replace(&mut self.has_begun, true) {
            self.start(io, me, FIRST, NEVER);
            self.start(io, me, LATE, Deadline::after(Duration::from_millis(2)));
            return Polled::Busy;
        }
        let received = self.received.borrow().len();
        match self.received.borrow().last() {
            // The deadline ends one of two; a request ends the other.
            Some((LATE, _)) if received == 1 => io.cancel(Token { source: me, tag: FIRST }),
            Some((FIRST, _)) => {
                self.start(io, me, SEND, NEVER);
                self.start(io, me, SECOND, NEVER);
            }
            _ if received == 4 => return Polled::Ended,
            _ => return Polled::Idle,
        }
        self.received.borrow_mut().push((0, Ok(0)));
        Polled::Busy
    }

    fn has_work(&self) -> bool {
        false
    }

    fn complete(&mut self, _: &Rc<Io>, _: u32, _: IoResult) {
        unreachable!("counts are reported");
    }

    fn counted(&mut self, _: &Rc<Io>, tag: u32, result: IoResult<u32>) {
        let mut received = self.received.borrow_mut();
        received.retain(|(tag, _)| *tag != 0);
        received.push((tag, result));
    }

    fn publish(&mut self) {}

    fn arm(&mut self) -> bool {
        true
    }

    fn disarm(&mut self) {}

    fn is_idle(&self) -> bool {
        true
    }
}

#[test]
fn a_source_starts_operations_that_end_by_deadline_by_request_or_done() {
    let started = |ring: Box<dyn Ring>, (a, b): (Socket, Socket)| {
        let mut buffer = vec![3u8; 100].into_boxed_slice();
        let at = buffer.as_mut_ptr();
        let list = vec![io::iovec::iovec(at, 60), io::iovec::iovec(at.wrapping_add(60), 40)];
        let received = Received::default();
        let clone = received.clone();
        run_on(ring, async move {
            let received = clone.clone();
            let source = Started { a, b, _buffer: buffer, list, has_begun: false, received };
            io::current().attach_device(Box::new(source), None);
            while clone.borrow().iter().filter(|(tag, _)| *tag != 0).count() < 4 {
                sleep(Duration::from_millis(1)).await;
            }
        });
        let mut received = received.take();
        received.retain(|(tag, _)| *tag != 0);
        assert_eq!(
            received[..2],
            [(LATE, Err(Errno(libc::ETIMEDOUT))), (FIRST, Err(Errno(libc::ECANCELED)))]
        );
        received[2..].sort_by_key(|(tag, _)| *tag);
        (received[2], received[3])
    };
    for ring in rings() {
        assert_eq!(started(ring, unix_pair()), ((SEND, Ok(100)), (SECOND, Ok(100))));
    }
    for seed in 0..20 {
        let (sent, received) = started(sim(seed), simulated_pair(0.0));
        // A part of what was sent, which was a part.
        assert!(received.1.unwrap() <= sent.1.unwrap() && sent.1.unwrap() <= 100);
    }
}
