//! The engine: workers over io_uring, or threads where there is none, and what runs on them.
//!
//! * [`worker`]: a thread, its ring, and the handle that others hold; `turn`: what the thread does.
//! * [`turn_share`]: how much of a turn each may have; `tag`: what a completion is of.
//! * [`source`]: what brings requests to it; `spin`: how long it waits awake.
//! * [`ring`]: the trait of what carries operations; [`uring`]: io_uring, with `message`; `spare`: rings made
//!   ahead; `clock`: what time it is there.
//! * [`threads`]: the same with blocking system calls; `polls`: epoll for rings that lack the kernel's.
//! * [`sim`]: a simulated ring with a seed and a clock of its own, for tests; [`driven`]: workers that their
//!   makers run.
//! * [`device`]: what brings completions without the ring: a device that the worker polls itself.
//! * [`socket`]: connecting, sending and receiving.
//! * [`op`]: the operation; `slots`: those in flight, and their owners.
//! * [`task`], [`timer`], [`offload`]: the slow path: futures, sleeping, work that blocks; `pool`: the
//!   threads for that.
//! * [`epoch`]: which queues are on the fast path, known without locks.
//! * [`budget`]: how much memory requests may take.
//! * [`iovec`]: scatter lists over memory that a guest may share; `buffer`: memory of our own; `lending`, `lent`:
//!   why the kernel never has memory that somebody else has taken back.
//! * [`descriptors`]: how many there may be, and those that are set aside.
//! * [`per_worker`]: state of which each worker has its own.
//! * [`pages`]: memory that is given back in parts; [`periodic`]: what is done now and then.
//! * [`shared_mapping`]: memory that another process may take away again.
//! * [`sync`]: the one mutex, which counts; [`atomics`]: what pieces without locks are made of. `unwind`: what a panic means.
//!
//! The engine knows nothing of disks, graphs or transports.

pub mod atomics;
pub mod budget;
mod buffer;
mod clock;
pub mod descriptors;
pub mod device;
pub mod driven;
pub mod epoch;
pub mod errno;
pub mod iovec;
mod lending;
mod lent;
mod message;
pub mod offload;
pub mod op;
pub mod pages;
pub mod per_worker;
pub mod periodic;
mod polls;
mod pool;
pub mod ring;
pub mod shared_mapping;
pub mod sim;
mod slots;
pub mod socket;
pub mod source;
mod spare;
mod spin;
pub mod sync;
mod tag;
pub mod task;
pub mod threads;
pub mod timer;
mod turn;
pub mod turn_share;
mod unwind;
pub mod uring;
pub mod worker;

pub use budget::{Budget, Permit};
pub use buffer::AlignedBuf;
pub use epoch::InFlight;
pub use errno::{Errno, IoResult};
pub use iovec::{IoVec, is_aligned};
pub use lending::Held;
pub use lent::Lent;
pub use offload::{Blocking, offload};
pub use op::{Durable, Op, Segments, Started, Token};
pub use per_worker::{PerWorker, WorkerState};
pub use shared_mapping::SharedMapping;
pub use socket::Socket;
pub use source::{Polled, Source, SourceId};
pub use spare::{make_last_rings, may_make_rings};
pub use timer::{Deadline, in_time, sleep};
pub use turn::Local;
pub use worker::{
    Io, Worker, WorkerOptions, current, may_block, process_cpu_ns, run_local, run_on, thread_cpu_ns,
};

use std::os::fd::RawFd;

/// Runs an operation of which there is nothing to tell but that it is done.
///
/// # Safety
/// As of [`Io::start`], also if the future is forgotten.
async unsafe fn run(fd: RawFd, op: Op) -> IoResult {
    // SAFETY: the caller's promise.
    unsafe { current().run(fd, op, Deadline::NEVER) }.await.map(|_| ())
}

/// Reads `into.len()` bytes from `offset` on; what is past the end of the file is zeroes.
pub async fn read(fd: RawFd, offset: u64, into: &IoVec<'_>) -> IoResult {
    let held = into.hold_to_fill()?;
    // SAFETY: `held` keeps the list and its memory.
    unsafe { run(fd, Op::Read { offset, segments: held.list().into() }) }.await?;
    held.filled(into.len());
    Ok(())
}

/// Writes all of `from` at `offset`.
pub async fn write(fd: RawFd, offset: u64, from: &IoVec<'_>, durable: Durable) -> IoResult {
    let held = from.hold_to_send()?;
    // SAFETY: as for `read`.
    unsafe { run(fd, Op::Write { offset, segments: held.list().into(), durable }) }.await
}

/// fdatasync.
pub async fn fsync(fd: RawFd) -> IoResult {
    // SAFETY: names no memory.
    unsafe { run(fd, Op::Fsync) }.await
}

/// fallocate with `mode`.
pub async fn fallocate(fd: RawFd, mode: i32, offset: u64, len: u64) -> IoResult {
    // SAFETY: names no memory.
    unsafe { run(fd, Op::Fallocate { mode, offset, len }) }.await
}
