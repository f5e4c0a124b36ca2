//! Requests of the slow path, as futures.
//!
//! They go over the worker's own connection or, where the server allows fewer than there are workers, over that of
//! another.

use super::link::Link;
use super::requests::{Answer, Ask, Memory, Owner};
use super::shared::{Claim, Host, Remote, Shared};
use crate::io::sync::{Mutex, Waiters};
use crate::io::{self, Errno, Held, Io, IoResult, IoVec};
use crate::nbd::CommandFlags;
use crate::nbd::request::{CMD_READ, CMD_WRITE};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const PAUSE: Duration = Duration::from_micros(50);

enum Route {
    Here(Rc<Link>),
    There(Host),
}

/// How this worker's requests reach the server. Made with the first.
async fn find(shared: &Arc<Shared>) -> IoResult<Route> {
    let io = io::current();
    loop {
        if let Some(link) = shared.links.get(&io) {
            return Ok(Route::Here(link));
        }
        if let Some(host) = shared.host().await {
            return Ok(Route::There(host));
        }
        match shared.links.get_or_make(async |io| make(io, shared).await).await {
            Ok(link) => return Ok(Route::Here(link)),
            // Somebody else was faster.
            Err(Errno(libc::EBUSY)) => {}
            Err(errno) => return Err(errno),
        }
    }
}

async fn make(io: &Rc<Io>, shared: &Arc<Shared>) -> IoResult<Rc<Link>> {
    const BUSY: Errno = Errno(libc::EBUSY);
    let connection = match shared.claim().ok_or(BUSY)? {
        Claim::There(connection) => Some(connection),
        Claim::ToMake => match shared.target.connect(io::Deadline::NEVER).await {
            Ok(connection) if connection.is_as_good_as(&shared.agreed) => Some(connection),
            // Servers have limits that they do not tell.
            _ if shared.has_enough() => return Err(BUSY),
            _ => None,
        },
    };
    let is_there = connection.is_some();
    let link = Link::attach(io, shared, connection)?;
    if !is_there {
        link.begin_waiting(io);
    }
    Ok(link)
}

/// Reads `into.len()` bytes from `offset` on.
pub async fn read(shared: &Arc<Shared>, offset: u64, into: &IoVec<'_>) -> IoResult {
    let held = into.hold_to_fill()?;
    run_held(shared, CMD_READ, CommandFlags::empty(), offset, &held).await?;
    held.filled(into.len());
    Ok(())
}

/// Writes all of `from` at `offset`.
pub async fn write(
    shared: &Arc<Shared>,
    offset: u64,
    from: &IoVec<'_>,
    flags: CommandFlags,
) -> IoResult {
    run_held(shared, CMD_WRITE, flags, offset, &from.hold_to_send()?).await
}

async fn run_held(
    shared: &Arc<Shared>,
    command: u16,
    flags: CommandFlags,
    offset: u64,
    held: &Held<'_>,
) -> IoResult {
    // SAFETY: `held` keeps the list and its memory as long as this future is not dropped, and `Running` sees to it
    // that nothing uses them when it is.
    let memory = Some(unsafe { Memory::new(held.list().into()) });
    let ask = Ask { command, flags, offset, len: held.list().len(), memory };
    run(shared, ask).await.map(|_| ())
}

/// Runs a request. Its memory stays until then.
pub async fn run(shared: &Arc<Shared>, ask: Ask) -> IoResult<Answer> {
    loop {
        match find(shared).await? {
            Route::Here(link) => return here(link, ask).await,
            Route::There(host) => {
                if let Some(result) = there(&host, ask).await {
                    return result;
                }
            }
        }
    }
}

async fn here(link: Rc<Link>, ask: Ask) -> IoResult<Answer> {
    struct Running {
        io: Rc<Io>,
        link: Rc<Link>,
        slot: Option<u32>,
    }
    impl Drop for Running {
        fn drop(&mut self) {
            if let Some(slot) = self.slot {
                self.link.abandon(&self.io, slot);
            }
        }
    }
    let io = io::current();
    let slot = link.submit(&io, ask, Owner::Task(None));
    let mut running = Running { io, link, slot: Some(slot) };
    let result = poll_fn(|cx| running.link.poll_task(slot, cx)).await;
    running.slot = None;
    result
}

#[derive(Default)]
struct Reply {
    /// Of nothing: it was not sent.
    result: Option<Option<IoResult<Answer>>>,
    waiting: Waiters,
}

/// None: the other worker has let go of its connection.
async fn there(host: &Host, ask: Ask) -> Option<IoResult<Answer>> {
    /// A request that is waited for to its end even if nobody wants to know.
    struct Running(Arc<Mutex<Reply>>);
    impl Drop for Running {
        fn drop(&mut self) {
            while self.0.lock().result.is_none() {
                std::thread::sleep(PAUSE);
            }
        }
    }
    let reply = Arc::new(Mutex::new(Reply::default()));
    let clone = reply.clone();
    let done = Box::new(move |result| {
        let waiting = {
            let mut reply = clone.lock();
            reply.result = Some(result);
            reply.waiting.take()
        };
        waiting.wake();
    });
    host.send(Remote::new(ask, done));
    let running = Running(reply);
    running.0.wait_for(|reply| reply.result.ok_or(&mut reply.waiting)).await
}
