//! The end of a queue: the report to its stopper, and the release of the guest's memory.

use std::rc::Rc;
use std::sync::{Arc, mpsc};

use vublk::export::vhost_user_blk::queue::{AtStop, Queue, Stopped};
use vublk::io;

use super::LIMIT;
use super::lone_queue::Lone;

/// A queue that tells, when it ends, what its stopper has heard by then.
struct Watched {
    queue: Queue,
    stopper: mpsc::Receiver<Stopped>,
    seen: mpsc::Sender<[Result<Stopped, mpsc::TryRecvError>; 2]>,
}

impl io::Source for Watched {
    fn poll(&mut self, io: &Rc<io::Io>, me: io::SourceId) -> io::Polled {
        let polled = self.queue.poll(io, me);
        if polled == io::Polled::Ended {
            let _ = self.seen.send([self.stopper.try_recv(), self.stopper.try_recv()]);
        }
        polled
    }
    fn has_work(&self) -> bool {
        self.queue.has_work()
    }
    fn complete(&mut self, io: &Rc<io::Io>, tag: u32, result: io::IoResult) {
        self.queue.complete(io, tag, result);
    }
    fn publish(&mut self) {
        self.queue.publish();
    }
    fn arm(&mut self) -> bool {
        self.queue.arm()
    }
    fn disarm(&mut self) {
        self.queue.disarm();
    }
}

#[test]
fn the_stopper_of_a_queue_can_wait_until_the_queue_lets_go_of_the_memory() {
    // Otherwise the worker may hold the last reference to the guest's memory and unmap it. That takes long, and the
    // other disks of the worker would wait.
    let worker = io::Worker::start("worker", io::WorkerOptions::default()).unwrap();
    let opened = worker.block_on(|| async { crate::disks::open("driver=null-co").await.node });
    let lone = Lone::new(1 << 20, 16);
    let (start, memory) = (lone.start(opened), lone.memory);
    let (seen, receiver) = mpsc::channel();
    worker.send(move |local| {
        let (sender, stopper) = mpsc::channel();
        let mut queue = Queue::new(start);
        queue.stop(sender, AtStop::Fail);
        local.attach(Box::new(Watched { queue, stopper, seen }), None);
    });
    let empty = Err(mpsc::TryRecvError::Empty);
    assert_eq!(
        receiver.recv_timeout(LIMIT).unwrap(),
        [Ok(Stopped::default()), empty],
        "it still holds the memory"
    );
    // The end of the channel is the end of the queue.
    assert!(receiver.recv_timeout(LIMIT).is_err());
    assert_eq!(Arc::strong_count(&memory), 1);
}
