//! Messages over a connection, as a leaf sends and receives them.

use super::*;

/// Sends messages from one end of a connection to the other, as a leaf does that has one.
struct Messages {
    ends: [Socket; 2],
    /// Kept for the memory that the lists name: a header and data, of either end.
    _memory: AlignedBuf,
    lists: [[libc::iovec; 2]; 2],
    /// Bytes in flight, and messages that have arrived.
    on_the_way: u64,
    arrived: u64,
    /// Operations in flight.
    pending: u64,
    at_warm: Option<(u64, u64)>,
    done: mpsc::Sender<Found>,
}

/// Of a message.
const HEADER: usize = 28;

const SEND: u32 = 0;
const RECEIVE: u32 = 1;

impl Messages {
    fn new(done: mpsc::Sender<Found>) -> Messages {
        let (a, b) = UnixStream::pair().unwrap();
        let ends = [a, b].map(|end| Socket::try_from(OwnedFd::from(end)).unwrap());
        let mut memory = AlignedBuf::new(2 * BLOCK, BLOCK).unwrap();
        let (a, b) = memory.split_at_mut(BLOCK);
        let lists = [a, b].map(|part| {
            let (header, data) = part.split_at_mut(HEADER);
            [IoVec::from_mut(header).as_raw()[0], IoVec::from_mut(data).as_raw()[0]]
        });
        let (_memory, on_the_way, arrived, pending) = (memory, 0, 0, 0);
        Messages { ends, _memory, lists, on_the_way, arrived, pending, at_warm: None, done }
    }

    fn start(&mut self, io: &Io, me: SourceId, tag: u32) {
        let segments = Segments::new(&self.lists[tag as usize], BLOCK as u64);
        let op = if tag == SEND { Op::Send { segments } } else { Op::Receive { segments } };
        let (fd, token) = (self.ends[tag as usize].as_raw_fd(), Token { source: me, tag });
        let deadline = Deadline::after(Duration::from_secs(60));
        // SAFETY: lists and memory stay in place until the source ends, with nothing in flight.
        let started = unsafe { io.start_until(fd, op, token, deadline) };
        assert_eq!(started, Started::Pending);
        self.pending += 1;
    }
}

impl Source for Messages {
    fn poll(&mut self, io: &Rc<Io>, me: SourceId) -> Polled {
        if self.pending > 0 {
            return Polled::Idle;
        }
        if self.on_the_way == 0 {
            if self.arrived == WARM {
                self.at_warm = Some(Load::counters());
            }
            if self.arrived == WARM + COUNTED {
                let (allocations, locks) = Load::counters();
                let (warm_allocations, warm_locks) = self.at_warm.unwrap();
                let _ = self.done.send(Found {
                    allocations: allocations - warm_allocations,
                    locks: locks - warm_locks,
                    pending: self.arrived,
                });
                return Polled::Ended;
            }
            self.arrived += 1;
            self.on_the_way = BLOCK as u64;
            self.start(io, me, SEND);
        }
        self.start(io, me, RECEIVE);
        Polled::Busy
    }

    fn has_work(&self) -> bool {
        self.pending == 0
    }

    fn complete(&mut self, _: &Rc<Io>, _: u32, _: IoResult) {
        unreachable!("it hears of counts");
    }

    fn counted(&mut self, _: &Rc<Io>, tag: u32, result: IoResult<u32>) {
        self.pending -= 1;
        let count = u64::from(result.unwrap());
        match tag {
            SEND => assert_eq!(count, BLOCK as u64),
            _ => self.on_the_way -= count,
        }
    }

    fn publish(&mut self) {}

    fn arm(&mut self) -> bool {
        self.pending > 0
    }

    fn disarm(&mut self) {}

    fn is_idle(&self) -> bool {
        self.pending > 0
    }
}

#[test]
fn messages_over_a_connection_allocate_nothing_and_lock_nothing() {
    let worker = Worker::start("counted", WorkerOptions::default()).unwrap();
    let (sender, receiver) = mpsc::channel();
    worker.send(move |local| {
        local.io().attach_device(Box::new(Messages::new(sender)), None);
    });
    let found = receiver.recv_timeout(Duration::from_secs(60)).expect("the load ends");
    assert_eq!((found.allocations, found.locks), (0, 0));
}
