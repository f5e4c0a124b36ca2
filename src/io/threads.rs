//! A ring of threads, for hosts without io_uring.
//!
//! Old kernels lack it, and the system call filter of some containers refuses it. This ring costs more per request;
//! nothing else is different.
//!
//! Operations block in threads that all workers share; a file that stalls holds up no other
//! ([`super::pool`]). Descriptors are waited for with epoll, sockets that have nothing to give or no room too.

use super::errno::Errno;
use super::op::Op;
use super::polls::{Polls, calls};
use super::pool::{Job, Limits, Pool};
use super::ring::{Completion, Ring, Wait};
use super::sync::Mutex;
use super::tag;
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// Turns of a busy worker between two looks at what it polls.
const LOOK_TURNS: u32 = 16;

/// Operations that are in the kernel at a time: of one file as many as QEMU has of all.
static POOL: Pool<Operation> = Pool::new("io", Limits { each: 64, all: 256 });

/// The ring. Of one worker, as the kernel's is.
pub struct Threads {
    queued: Vec<(u64, RawFd, Op)>,
    polls: Polls,
    ready: VecDeque<Completion>,
    done: Arc<Done>,
    turns: u32,
    began: Instant,
}

/// Where the threads leave what is done.
struct Done {
    list: Mutex<Vec<Completion>>,
    /// The list is not empty.
    any: AtomicBool,
    /// The worker sleeps, or is about to.
    asleep: AtomicBool,
    wake: EventFd,
}

/// One operation on its way through a thread.
struct Operation {
    user_data: u64,
    fd: RawFd,
    op: Op,
    done: Arc<Done>,
}

// SAFETY: the code that pushed the operation keeps the list, and the memory that it names, in place until the
// completion, on whatever thread the operation runs.
unsafe impl Send for Operation {}

impl Job for Operation {
    fn owner(&self) -> u64 {
        self.fd as u64
    }

    fn run(self) {
        let Operation { user_data, fd, op, done } = self;
        let result = match op {
            // SAFETY: the completion has not been given out yet, so list and memory are in place.
            Op::Read { segments, offset } => unsafe {
                calls::read(fd, segments.as_slice(), offset)
            },
            // SAFETY: as above.
            Op::Write { segments, offset, durable } => unsafe {
                calls::write(fd, segments.as_slice(), offset, durable)
            },
            Op::Fsync => calls::sync(fd),
            Op::Fallocate { mode, offset, len } => calls::allocate(fd, mode, offset, len),
            // Never handed to a thread.
            Op::Send { .. } | Op::Receive { .. } | Op::Poll { .. } | Op::Cancel(_) => {
                Err(Errno(libc::EINVAL))
            }
        };
        // One transfer moves less than 2 GiB.
        let result = result.map_or_else(|errno| -errno.0, |count| count as i32);
        done.notify(Completion { user_data, result, more: false });
    }
}

impl Done {
    fn notify(&self, completion: Completion) {
        self.list.lock().push(completion);
        self.any.store(true, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            // The counter of an eventfd that nobody reads cannot overflow in any lifetime.
            let _ = self.wake.write(1);
        }
    }
}

impl Threads {
    /// # Errors
    /// Out of descriptors.
    pub fn new() -> std::io::Result<Threads> {
        let done = Done {
            list: Mutex::default(),
            any: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?,
        };
        let mut polls = Polls::new()?;
        let (user_data, fd) = (tag::pack(tag::NONE, 0, 0), &done.wake);
        // SAFETY: names no memory.
        let failed = unsafe { polls.start(user_data, fd.as_raw_fd(), Op::POLL_MANY) };
        if let Some(Completion { result, .. }) = failed {
            return Err(std::io::Error::from_raw_os_error(-result));
        }
        Ok(Threads {
            queued: Vec::new(),
            polls,
            ready: VecDeque::new(),
            done: Arc::new(done),
            turns: 0,
            began: Instant::now(),
        })
    }

    fn start_queued(&mut self) {
        let Threads { queued, polls, ready, done, .. } = self;
        queued.retain(|&(user_data, fd, op)| match op {
            Op::Cancel(cancelled) => {
                ready.extend(polls.cancel(user_data, cancelled));
                false
            }
            op if op.waits() => {
                // SAFETY: the promise of the code that pushed the operation.
                ready.extend(unsafe { polls.start(user_data, fd, op) });
                false
            }
            _ => true,
        });
        if !queued.is_empty() {
            let operation =
                |(user_data, fd, op)| Operation { user_data, fd, op, done: done.clone() };
            POOL.submit(queued.drain(..).map(operation));
        }
    }
}

impl Ring for Threads {
    unsafe fn push(&mut self, user_data: u64, fd: RawFd, op: Op) {
        self.queued.push((user_data, fd, op));
    }

    fn must_enter(&self) -> bool {
        !self.queued.is_empty()
    }

    fn has_completions(&mut self) -> bool {
        !self.ready.is_empty() || self.done.any.load(Ordering::Relaxed)
    }

    fn enter(&mut self, wait: Wait) {
        self.start_queued();
        let time = match wait {
            Wait::No => return,
            Wait::For(time) => Some(time),
            Wait::Forever => None,
        };
        // Earlier completions are reported first: they may be what is waited for.
        self.polls.poll(&mut self.ready);
        self.done.asleep.store(true, Ordering::SeqCst);
        if self.ready.is_empty() && !self.done.any.load(Ordering::SeqCst) {
            self.polls.sleep(time);
            self.polls.poll(&mut self.ready);
        }
        self.done.asleep.store(false, Ordering::Relaxed);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.turns = self.turns.wrapping_add(1);
        if self.turns.is_multiple_of(LOOK_TURNS) {
            self.polls.poll(&mut self.ready);
        }
        let room = (out.capacity() - out.len()).min(self.ready.len());
        out.extend(self.ready.drain(..room));
        if self.done.any.load(Ordering::Relaxed) {
            self.done.any.store(false, Ordering::SeqCst);
            let mut list = self.done.list.lock();
            let room = (out.capacity() - out.len()).min(list.len());
            out.extend(list.drain(..room));
            if !list.is_empty() {
                self.done.any.store(true, Ordering::SeqCst);
            }
        }
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{self, IoVec, run_on};
    use std::time::Duration;

    #[test]
    fn operations_sleeps_and_work_elsewhere_end_and_wake_the_worker() {
        run_on(Box::new(Threads::new().unwrap()), async {
            let file = tempfile::tempfile().unwrap();
            let (fd, from) = (file.as_raw_fd(), vec![7; 10_000]);
            io::fallocate(fd, 0, 0, 4096).await.unwrap();
            io::write(fd, 5, &IoVec::from_ref(&from), io::Durable::Yes).await.unwrap();
            io::fsync(fd).await.unwrap();
            let mut into = vec![1; 12_000];
            let (a, b) = into.split_at_mut(777);
            let list = IoVec::concat(&[&IoVec::from_mut(a), &IoVec::from_mut(b)]);
            io::read(fd, 5, &list).await.unwrap();
            assert_eq!(into[..10_000], from);
            assert!(into[10_000..].iter().all(|&byte| byte == 0), "past the end are zeroes");
            io::sleep(Duration::from_millis(1)).await;
            assert_eq!(io::offload(|| 7).await, 7);
            assert_eq!(io::fsync(-1).await, Err(Errno(libc::EBADF)));
        });
    }
}
