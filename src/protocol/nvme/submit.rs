//! Requests of the slow path, as futures over a queue pair.
//!
//! The queue pair is the worker's own or, where the controller grants fewer than there are workers, another worker's.

use super::entry::from_driver;
use super::shared::Shared;
use super::worker_queue::{Host, Remote, WorkerQueue, result};
use crate::io::sync::{Mutex, Waiters};
use crate::io::{self, Errno, Held, Io, IoResult, IoVec};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use vublk_vfio::spec::Status;
use vublk_vfio::{Request, Segments};

const PAUSE: Duration = Duration::from_micros(50);

enum Route {
    Here(Rc<WorkerQueue>),
    There(Host),
}

/// How this worker's requests reach the controller. Made with the first.
async fn find(shared: &Arc<Shared>) -> IoResult<Route> {
    match shared.worker_queues().get_or_make(async |io| make(io, shared).await).await {
        Ok(worker_queue) => Ok(Route::Here(worker_queue)),
        Err(errno @ Errno(libc::EBUSY)) => shared.host().map(Route::There).ok_or(errno),
        Err(errno) => Err(errno),
    }
}

async fn make(io: &Rc<Io>, shared: &Arc<Shared>) -> IoResult<Rc<WorkerQueue>> {
    let controller = shared.controller().map_err(|_| Errno(libc::ENODEV))?;
    match io::offload(move || controller.queue_pair()).await {
        Ok(pair) => Ok(WorkerQueue::attach(io, shared, pair)),
        Err(error) if error.errno() == libc::EBUSY => Err(Errno(libc::EBUSY)),
        Err(error) => {
            let error = from_driver(error);
            log::error!("{error}");
            Err(error.errno().unwrap_or(Errno::EIO))
        }
    }
}

/// Runs a request that fills `into`. `make` makes it of the memory and a token.
pub async fn read(
    shared: &Arc<Shared>,
    into: &IoVec<'_>,
    make: impl FnOnce(Segments, u64) -> Request,
) -> IoResult {
    let held = into.hold_to_fill()?;
    run(shared, &held, make).await?;
    held.filled(into.len());
    Ok(())
}

/// As [`read`], but the request only reads the memory.
pub async fn write(
    shared: &Arc<Shared>,
    from: &IoVec<'_>,
    make: impl FnOnce(Segments, u64) -> Request,
) -> IoResult {
    run(shared, &from.hold_to_send()?, make).await
}

async fn run(
    shared: &Arc<Shared>,
    held: &Held<'_>,
    make: impl FnOnce(Segments, u64) -> Request,
) -> IoResult {
    // SAFETY: `held` keeps the list and its memory as long as this future is not dropped, and `Running` waits
    // for the request's end when it is.
    let segments = unsafe { Segments::new(held.list().as_raw()) };
    run_without_data(shared, move |token| make(segments, token)).await
}

/// Runs a request that names no memory.
pub async fn run_without_data(shared: &Arc<Shared>, make: impl FnOnce(u64) -> Request) -> IoResult {
    let status = match find(shared).await? {
        Route::Here(worker_queue) => here(worker_queue, make).await,
        Route::There(host) => there(&host, make).await?,
    };
    result(status)
}

async fn here(worker_queue: Rc<WorkerQueue>, make: impl FnOnce(u64) -> Request) -> Status {
    /// A request that is waited for to its end even if nobody wants to know.
    struct Running {
        io: Rc<Io>,
        worker_queue: Rc<WorkerQueue>,
        slot: Option<u32>,
    }
    impl Drop for Running {
        fn drop(&mut self) {
            if let Some(slot) = self.slot {
                self.worker_queue.drain_task(&self.io, slot);
            }
        }
    }
    let io = io::current();
    let slot = worker_queue.submit_task(&io, make);
    let mut running = Running { io, worker_queue, slot: Some(slot) };
    let status = poll_fn(|cx| running.worker_queue.poll_task(slot, cx)).await;
    running.slot = None;
    status
}

#[derive(Default)]
struct Answer {
    status: Option<Status>,
    waiting: Waiters,
}

async fn there(host: &Host, make: impl FnOnce(u64) -> Request) -> IoResult<Status> {
    struct Running(Arc<Mutex<Answer>>);
    impl Drop for Running {
        fn drop(&mut self) {
            while self.0.lock().status.is_none() {
                std::thread::sleep(PAUSE);
            }
        }
    }
    let answer = Arc::new(Mutex::new(Answer::default()));
    let clone = answer.clone();
    let done = Box::new(move |status| {
        let waiting = {
            let mut answer = clone.lock();
            answer.status = Some(status);
            answer.waiting.take()
        };
        waiting.wake();
    });
    // The token is the other worker's to choose.
    if host.requests.send(Remote::new(make(0), done)).is_err() {
        return Err(Errno(libc::ENODEV));
    }
    host.waker.wake();
    let running = Running(answer);
    Ok(running.0.wait_for(|answer| answer.status.ok_or(&mut answer.waiting)).await)
}
