//! The kernel's io_uring.
//!
//! The ring is made for one thread that both submits and reaps (SINGLE_ISSUER, DEFER_TASKRUN):
//! the kernel then does its completion work only when this thread enters it, so nothing interrupts
//! the worker and no locks are taken. Such a ring's descriptor never wakes epoll; the worker waits
//! inside the ring, and everything it waits for comes through it.
//!
//! A ring is made disabled, restricted to the operations of [`Op`], and enabled by its worker. A system call filter
//! does not see what goes through a ring: without the restriction it would open files and connect sockets for an
//! attacker that has taken the process over. For that reason connecting goes by system calls ([`super::socket`]).

use super::clock::Clock;
use super::descriptors;
use super::message::message;
use super::op::{Durable, Op};
use super::ring::{Completion, Pin, Ring, Wait};
use io_uring::{IoUring, opcode, register::Restriction, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

/// Entries that may be queued between two `enter`s. Small enough to stay in the first-level cache.
const SUBMISSIONS: u32 = 256;
/// Completions that may wait to be reaped before the kernel has to put them aside.
const COMPLETIONS: u32 = 4096;

/// Most files that a ring pins.
const PINS: usize = 1024;

/// Turns for which a flag that led to nothing is not looked at.
const STALE_TURNS: u32 = 64;

/// The kernel's io_uring.
pub struct Uring {
    ring: IoUring,
    queued: u32,
    /// Turns until the kernel's task-work flag is looked at again.
    ///
    /// The kernel adds work to the ring's list first and sets the flag then. If this thread runs the work between the
    /// two, the flag stays although nothing is left, until some later work clears it. A worker that believed it would
    /// enter the ring forever, and neither sleep nor end. Nothing is missed meanwhile: a worker that sleeps or starts
    /// something enters the ring anyway.
    stale_turns: u32,
    clock: Clock,
    /// Which descriptors the ring's table of files has, and how often they are pinned. Nothing uses the table: the
    /// kernel releases what is in it when the last request of the ring has ended.
    pinned: Vec<Option<(RawFd, u32)>>,
    /// Made with the first operation that needs one.
    messages: Option<Messages>,
}

/// All that [`Uring::entry`] makes, each without flags. On sockets that is no more than the system calls that
/// every confined process keeps; what makes and connects sockets is not here.
const OPERATIONS: [u8; 12] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::Send::CODE,
    opcode::SendMsg::CODE,
    opcode::Recv::CODE,
    opcode::RecvMsg::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

/// IORING_REGISTER_FILES_UPDATE, the one thing that is registered with a ring after it is enabled: a file
/// is pinned.
pub const REGISTER_FILES_UPDATE: u8 = 6;

/// The size of a ring's table of files, which may not be larger than what the process may open.
fn pins() -> usize {
    descriptors::limit().clamp(1, PINS)
}

/// Tries the call that everything goes through. System call filters may allow a ring to be made and not to be
/// used.
fn can_enter(disabled: &IoUring) -> io::Result<()> {
    match disabled.submitter().submit() {
        // What the kernel itself says while the ring is disabled.
        Err(error) if error.raw_os_error() != Some(libc::EBADFD) => {
            Err(io::Error::new(error.kind(), format!("io_uring_enter: {error}")))
        }
        _ => Ok(()),
    }
}

impl Uring {
    /// A ring for the calling thread alone.
    pub fn new() -> io::Result<Uring> {
        let ring = Uring::disabled()?;
        ring.enable()?;
        Ok(ring)
    }

    /// A ring for the thread that will enable it. Setup flags that an older kernel refuses are left
    /// out one after the other.
    pub fn disabled() -> io::Result<Uring> {
        let attempts: [fn(&mut io_uring::Builder); 3] = [
            |b| {
                b.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
            },
            |b| {
                b.setup_coop_taskrun().setup_taskrun_flag();
            },
            |_| {},
        ];
        let mut refusal = None;
        for attempt in attempts {
            let mut builder = IoUring::builder();
            builder.setup_cqsize(COMPLETIONS).setup_clamp().setup_r_disabled().dontfork();
            attempt(&mut builder);
            match builder.build(SUBMISSIONS) {
                Ok(ring) => {
                    if !ring.params().is_feature_nodrop() || !ring.params().is_feature_ext_arg() {
                        return Err(io::Error::other("io_uring is too old (Linux 5.11 is needed)"));
                    }
                    can_enter(&ring)?;
                    ring.submitter().register_files(&[-1; PINS][..pins()])?;
                    let mut allowed: Vec<_> =
                        OPERATIONS.into_iter().map(Restriction::sqe_op).collect();
                    allowed.push(Restriction::register_op(REGISTER_FILES_UPDATE));
                    ring.submitter().register_restrictions(&mut allowed)?;
                    return Ok(Uring {
                        ring,
                        queued: 0,
                        stale_turns: 0,
                        clock: Clock::new(),
                        pinned: Vec::new(),
                        messages: None,
                    });
                }
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refusal = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(refusal.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)))
    }

    /// Whether the kernel says that it has work which only this thread may do.
    fn has_task_work(&self) -> bool {
        // SAFETY: only the kernel writes the flags that are looked at here; the queue's tail, which
        // this shared view would also write back on drop, is unchanged.
        unsafe { self.ring.submission_shared() }.taskrun()
    }

    /// Makes the ring the calling thread's.
    pub fn enable(&self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()
    }

    fn entry(&mut self, user_data: u64, fd: RawFd, op: Op) -> squeue::Entry {
        let fd = types::Fd(fd);
        let entry = match op {
            Op::Read { segments, offset } => {
                // SAFETY: the caller of `push` guarantees that the list is in place.
                match unsafe { segments.as_slice() } {
                    [one] => opcode::Read::new(fd, one.iov_base.cast(), one.iov_len as u32)
                        .offset(offset)
                        .build(),
                    many => opcode::Readv::new(fd, many.as_ptr(), many.len() as u32)
                        .offset(offset)
                        .build(),
                }
            }
            Op::Write { segments, offset, durable } => {
                let flags = if durable == Durable::Yes { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as above.
                match unsafe { segments.as_slice() } {
                    [one] => {
                        opcode::Write::new(fd, one.iov_base.cast_const().cast(), one.iov_len as u32)
                            .offset(offset)
                            .rw_flags(flags)
                            .build()
                    }
                    many => opcode::Writev::new(fd, many.as_ptr(), many.len() as u32)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                }
            }
            Op::Fsync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Op::Fallocate { mode, offset, len } => {
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
            Op::Send { segments } => {
                // SAFETY: as above.
                match unsafe { segments.as_slice() } {
                    [one] => {
                        opcode::Send::new(fd, one.iov_base.cast_const().cast(), one.iov_len as u32)
                            .flags(libc::MSG_NOSIGNAL)
                            .build()
                    }
                    many => opcode::SendMsg::new(fd, self.message(many))
                        .flags(libc::MSG_NOSIGNAL as u32)
                        .build(),
                }
            }
            Op::Receive { segments } => {
                // SAFETY: as above.
                match unsafe { segments.as_slice() } {
                    [one] => opcode::Recv::new(fd, one.iov_base.cast(), one.iov_len as u32).build(),
                    many => opcode::RecvMsg::new(fd, self.message(many)).build(),
                }
            }
            Op::Poll { events, many } => opcode::PollAdd::new(fd, events).multi(many).build(),
            Op::Cancel(user_data) => opcode::AsyncCancel::new(user_data).build(),
        };
        entry.user_data(user_data)
    }
}

/// The heads of messages, which the kernel reads when it takes the entry that names them.
struct Messages {
    list: Box<[libc::msghdr]>,
    next: usize,
}

// SAFETY: between two turns nobody follows the pointers; the ring moves to the thread that enables it empty.
unsafe impl Send for Messages {}

impl Uring {
    /// Fills in the head of a message that stays in place until the kernel has read it.
    fn message(&mut self, list: &[libc::iovec]) -> *mut libc::msghdr {
        let messages = self.messages.get_or_insert_with(|| {
            // One more than entries: the oldest may still be queued.
            let list = (0..=SUBMISSIONS).map(|_| message(&[])).collect();
            Messages { list, next: 0 }
        });
        messages.next = (messages.next + 1) % messages.list.len();
        let place = &mut messages.list[messages.next];
        *place = message(list);
        place
    }
}

impl Ring for Uring {
    unsafe fn push(&mut self, user_data: u64, fd: RawFd, op: Op) {
        let entry = self.entry(user_data, fd, op);
        // SAFETY: the caller's promise on the memory that the entry names.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.enter(Wait::No);
        }
        self.queued += 1;
    }

    fn must_enter(&self) -> bool {
        self.queued > 0 || self.stale_turns == 0 && self.has_task_work()
    }

    fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    fn enter(&mut self, wait: Wait) {
        let had_work = self.has_task_work();
        let submitter = self.ring.submitter();
        let result = match wait {
            Wait::No => submitter.submit(),
            Wait::Forever => submitter.submit_and_wait(1),
            Wait::For(time) => {
                let time = types::Timespec::from(time);
                submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
            }
        };
        // EINTR, ETIME (nothing completed in time), EBUSY and EAGAIN (reap first, then enter again)
        // all mean: look at the completions and come back.
        if let Err(error) = result
            && !matches!(
                error.raw_os_error(),
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)
            )
        {
            log::error!("io_uring_enter: {error}");
        }
        self.queued = self.ring.submission().len() as u32;
        let in_vain = had_work && self.has_task_work() && !self.has_completions();
        self.stale_turns = if in_vain { STALE_TURNS } else { 0 };
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.stale_turns = self.stale_turns.saturating_sub(1);
        let mut queue = self.ring.completion();
        while out.len() < out.capacity() {
            let Some(cqe) = queue.next() else { break };
            out.push(Completion {
                user_data: cqe.user_data(),
                result: cqe.result(),
                more: io_uring::cqueue::more(cqe.flags()),
            });
        }
    }

    fn now(&self) -> u64 {
        self.clock.now()
    }

    fn pin(&mut self, file: &Arc<File>) -> io::Result<Pin> {
        let (fd, pin) = (file.as_raw_fd(), Pin { file: file.clone() });
        let mut pinned = self.pinned.iter_mut().flatten();
        if let Some((_, count)) = pinned.find(|(pinned, _)| *pinned == fd) {
            *count += 1;
            return Ok(pin);
        }
        let free = self.pinned.iter().position(Option::is_none).unwrap_or(self.pinned.len());
        self.ring.submitter().register_files_update(free as u32, &[fd])?;
        self.pinned.resize(self.pinned.len().max(free + 1), None);
        self.pinned[free] = Some((fd, 1));
        Ok(pin)
    }

    fn unpin(&mut self, pin: Pin) {
        let fd = pin.file.as_raw_fd();
        let is_match = |slot: &Option<(RawFd, u32)>| slot.is_some_and(|(pinned, _)| pinned == fd);
        let Some(at) = self.pinned.iter().position(is_match) else { return };
        match &mut self.pinned[at] {
            Some((_, count)) if *count > 1 => *count -= 1,
            slot => {
                *slot = None;
                if let Err(error) = self.ring.submitter().register_files_update(at as u32, &[-1]) {
                    log::error!("io_uring keeps a file open: {error}");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Where the kernel keeps a ring's flags, in its mapping at IORING_OFF_SQ_RING.
    fn offset_of_flags() -> usize {
        let mut params = [0u32; 30];
        // SAFETY: io_uring_setup fills in the 120 bytes of its parameters; the ring ends with its descriptor.
        unsafe {
            let fd = libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr());
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            libc::close(fd as i32);
        }
        params[14] as usize
    }

    /// Leaves the task-work flag set, as the kernel does when it loses the race with its own list.
    fn leave_flag(ring: &Uring) {
        const IORING_SQ_TASKRUN: u32 = 1 << 2;
        let at = offset_of_flags();
        assert!(at + 4 <= 4096);
        // SAFETY: the first page of the ring's own mapping, unmapped again before the ring ends.
        unsafe {
            let map = libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                ring.ring.as_raw_fd(),
                0,
            );
            assert_ne!(map, libc::MAP_FAILED);
            let flags = &*map.cast::<u8>().add(at).cast::<AtomicU32>();
            flags.fetch_or(IORING_SQ_TASKRUN, Ordering::SeqCst);
            libc::munmap(map, 4096);
        }
    }

    /// None where io_uring is refused.
    fn ring() -> Option<Uring> {
        match Uring::new() {
            Ok(ring) => Some(ring),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_flag_that_the_kernel_left_behind_keeps_nobody_busy() {
        let Some(mut ring) = ring() else { return };
        leave_flag(&ring);
        assert!(ring.must_enter());
        ring.enter(Wait::No);
        assert!(!ring.must_enter(), "the flag led to nothing");

        // It is looked at again, and real work is seen at once.
        let mut out = Vec::with_capacity(8);
        for _ in 0..STALE_TURNS {
            ring.reap(&mut out);
        }
        assert!(ring.must_enter());
        // SAFETY: names no memory.
        unsafe { ring.push(9, -1, Op::Cancel(1)) };
        ring.enter(Wait::Forever);
        ring.reap(&mut out);
        assert_eq!(out.len(), 1);
        assert_eq!((out[0].user_data, out[0].result), (9, -libc::ENOENT));
    }

    #[test]
    fn a_pinned_file_is_open_until_it_is_unpinned_as_often() {
        let Some(mut ring) = ring() else { return };
        let (reader, file) = pipe();
        let pins = [ring.pin(&file).unwrap(), ring.pin(&file).unwrap()];
        drop(file);
        for pin in pins {
            assert!(is_open(&reader));
            ring.unpin(pin);
        }
        // The kernel may let go a little later.
        while is_open(&reader) {
            std::thread::yield_now();
        }
        let (_reader, file) = pipe();
        assert!((0..PINS + 1).all(|_| ring.pin(&file).is_ok()), "one file takes room once");
    }

    #[test]
    fn a_file_that_is_opened_when_a_pinned_one_has_gone_is_pinned_itself() {
        let Some(mut ring) = ring() else { return };
        let (_reader, file) = pipe();
        let _first = ring.pin(&file).unwrap();
        drop(file);
        // It may get the descriptor that the other one has given up.
        let (reader, file) = pipe();
        let pin = ring.pin(&file).unwrap();
        drop(file);
        assert!(is_open(&reader));
        ring.unpin(pin);
    }

    fn pipe() -> (io::PipeReader, Arc<File>) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, Arc::new(File::from(std::os::fd::OwnedFd::from(writer))))
    }

    /// Whether the pipe's other end is.
    fn is_open(reader: &io::PipeReader) -> bool {
        let mut poll = libc::pollfd { fd: reader.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one structure, which is on the stack.
        assert!(unsafe { libc::poll(&mut poll, 1, 0) } >= 0);
        poll.revents & libc::POLLHUP == 0
    }

    #[test]
    fn a_ring_does_nothing_but_the_operations_in_use() {
        let Some(mut ring) = ring() else { return };
        let path = c"/dev/null";
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build();
        let linked = opcode::Fsync::new(types::Fd(-1)).build().flags(squeue::Flags::ASYNC);
        let plain = opcode::Fsync::new(types::Fd(-1)).build();
        let connect = opcode::Connect::new(types::Fd(-1), std::ptr::null(), 0).build();
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        let refused = [open, linked, connect, socket].map(|entry| (entry, libc::EACCES));
        for (entry, wanted) in refused.into_iter().chain([(plain, libc::EBADF)]) {
            // SAFETY: the path outlives the ring.
            unsafe { ring.ring.submission().push(&entry) }.unwrap();
            ring.ring.submit_and_wait(1).unwrap();
            assert_eq!(ring.ring.completion().next().unwrap().result(), -wanted);
        }
    }
}
