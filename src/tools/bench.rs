//! A benchmark of sequential requests, many at a time.

use super::Opened;
use crate::block::WriteFlags;
use crate::io::sync::{Mutex, Waiters};
use crate::io::{AlignedBuf, Errno, IoResult, current};
use std::cell::Cell;
use std::rc::Rc;

/// The parameters of a benchmark.
#[derive(Clone, Debug)]
pub struct Bench {
    /// Requests in all, and in parallel; the latter is not 0.
    pub count: u32,
    pub depth: u32,
    /// Bytes in a request.
    pub size: u64,
    /// Bytes from one request to the next; none for the size.
    pub step: Option<u64>,
    /// Of the first request, in bytes.
    pub offset: u64,
    pub write: bool,
    pub pattern: u8,
    /// Flush whenever the number of requests left is a multiple of this; 0 for never.
    pub flush_interval: u32,
    /// Before a flush, wait for what is in flight.
    pub drain: bool,
}

/// What the requests in parallel share.
struct State {
    asked: Bench,
    image: Rc<Opened>,
    /// Requests that are not started yet.
    left: Cell<u32>,
    offset: Cell<u64>,
    in_flight: Cell<u32>,
    result: Cell<IoResult>,
    /// Tasks that still send requests.
    running: Cell<u32>,
    waiting: Mutex<Waiters>,
}

/// Runs a benchmark to its end, or to the first request that fails.
pub async fn run(image: &Rc<Opened>, asked: &Bench) -> IoResult {
    let running = asked.depth.min(asked.count);
    let state = Rc::new(State {
        left: Cell::new(asked.count),
        offset: Cell::new(asked.offset),
        asked: asked.clone(),
        image: image.clone(),
        in_flight: Cell::new(0),
        result: Cell::new(Ok(())),
        running: Cell::new(running),
        waiting: Mutex::default(),
    });
    for _ in 0..running {
        let state = state.clone();
        current().spawn(async move {
            if let Err(errno) = state.send_requests().await {
                state.left.set(0);
                state.result.set(Err(errno));
            }
            state.running.set(state.running.get() - 1);
            state.wake();
        });
    }
    state.wait(|state| state.running.get() == 0).await;
    state.result.get()
}

impl State {
    /// One request after the other, until there are none left.
    async fn send_requests(&self) -> IoResult {
        let size = usize::try_from(self.asked.size).map_err(|_| Errno::ENOMEM)?;
        let mut buffer = AlignedBuf::new(size, 4096).ok_or(Errno::ENOMEM)?;
        buffer.fill(self.asked.pattern);
        loop {
            let left = self.left.get();
            if left == 0 {
                return Ok(());
            }
            self.left.set(left - 1);
            let offset = self.next_offset();
            self.in_flight.set(self.in_flight.get() + 1);
            let result = match self.asked.write {
                true => self.image.write(offset, &buffer.source(), WriteFlags::empty()).await,
                false => self.image.read(offset, &buffer.io_vec()).await,
            };
            self.in_flight.set(self.in_flight.get() - 1);
            self.wake();
            result?;
            let interval = self.asked.flush_interval;
            if interval > 0 && left.is_multiple_of(interval) && left < self.asked.count {
                if self.asked.drain {
                    self.wait(|state| state.in_flight.get() == 0).await;
                }
                self.image.node().flush().await?;
            }
        }
    }

    /// Where the next request goes: on from the last, and from the start again behind the end.
    fn next_offset(&self) -> u64 {
        let Bench { size, step, .. } = self.asked;
        let (at, len) = (self.offset.get(), self.image.len());
        let mut next = at.saturating_add(step.unwrap_or(size));
        if next.saturating_add(size) > len {
            next = if len > size { next % (len - size) } else { 0 };
        }
        self.offset.set(next);
        at
    }

    async fn wait(&self, until: impl Fn(&State) -> bool) {
        self.waiting.wait_until(|| until(self)).await;
    }

    fn wake(&self) {
        self.waiting.wake_all();
    }
}
