//! Landlock for the threads that are there already.
//!
//! The kernel confines the thread that asks, and all that it starts later; only version 8 of its
//! interface has a flag for the others. So each thread is made to ask by a signal, as the C library
//! does it for setuid(2). A thread that is started meanwhile has its starter's rules or is found in the
//! next round.

use crate::io::Errno;
use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long all of them together may take. A thread answers at once unless the kernel holds it in
/// I/O that does not end.
const PATIENCE: Duration = Duration::from_secs(5);

/// The rules, for the signal's handler.
static RULESET: AtomicI32 = AtomicI32::new(-1);
/// A thread's ID, and below it the errno that it has come to.
static ANSWER: AtomicU64 = AtomicU64::new(0);

/// Confines every thread of the process.
///
/// # Errors
/// A thread could not be confined. Others are.
pub(super) fn restrict_all(ruleset: OwnedFd) -> Result<(), String> {
    let failed = |what: &str, errno| format!("Landlock: {what}: {errno}");
    RULESET.store(ruleset.as_raw_fd(), Ordering::SeqCst);
    let signal = libc::SIGRTMIN();
    let old = handle(signal).map_err(|errno| failed("sigaction", errno))?;
    let end = Instant::now() + PATIENCE;
    // SAFETY: takes no arguments and cannot fail.
    let this = unsafe { libc::gettid() };
    let mut done = HashSet::from([this]);
    loop {
        let new: Vec<i32> = threads()?.into_iter().filter(|id| !done.contains(id)).collect();
        if new.is_empty() {
            break;
        }
        for thread in new {
            ask(thread, signal, end)?;
            done.insert(thread);
        }
    }
    // Last, for it could not look for the others then.
    match restrict_this() {
        0 => {}
        errno => return Err(failed("this thread", Errno(errno))),
    }
    RULESET.store(-1, Ordering::SeqCst);
    // SAFETY: what was there before; nobody sends the signal any more.
    unsafe { libc::sigaction(signal, &old, std::ptr::null_mut()) };
    Ok(())
}

/// The threads of this process, without those of the kernel that work for its rings: they take no
/// signals, and open nothing.
fn threads() -> Result<Vec<i32>, String> {
    let failed = |e| format!("/proc/self/task: {e}");
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc/self/task").map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // It may be gone by now.
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let id: Option<i32> = entry.file_name().to_str().and_then(|id| id.parse().ok());
        all.extend(id.filter(|_| !name.starts_with("iou-")));
    }
    Ok(all)
}

/// Has a thread confine itself, and waits until it has, or is gone.
fn ask(thread: i32, signal: i32, end: Instant) -> Result<(), String> {
    ANSWER.store(0, Ordering::SeqCst);
    // SAFETY: sends a signal that has a handler to a thread of this process, if it is still there.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
    if sent != 0 {
        return Ok(());
    }
    loop {
        let answer = ANSWER.load(Ordering::SeqCst);
        if answer >> 32 == thread as u64 {
            return match answer as u32 as i32 {
                0 => Ok(()),
                errno => Err(format!("Landlock: thread {thread}: {}", Errno(errno))),
            };
        }
        if fs::metadata(format!("/proc/self/task/{thread}")).is_err() {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(format!("Landlock: thread {thread} does not answer"));
        }
        std::thread::sleep(Duration::from_micros(20));
    }
}

/// Confines the calling thread. Gives an errno, or 0. Async-signal-safe.
fn restrict_this() -> i32 {
    // SAFETY: neither call names memory.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_landlock_restrict_self, RULESET.load(Ordering::SeqCst), 0)
                == 0
        {
            return 0;
        }
    }
    Errno::last().0
}

extern "C" fn answer(_: libc::c_int) {
    let before = Errno::last();
    let errno = restrict_this();
    // SAFETY: takes no arguments and cannot fail.
    let thread = unsafe { libc::gettid() };
    ANSWER.store((thread as u64) << 32 | errno as u32 as u64, Ordering::SeqCst);
    // SAFETY: the location is this thread's own.
    unsafe { *libc::__errno_location() = before.0 };
}

/// Installs the handler; gives what was there.
fn handle(signal: i32) -> Result<libc::sigaction, Errno> {
    // SAFETY: all zeroes is a valid value of both; the handler calls what a handler may.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        let mut old: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = answer as extern "C" fn(libc::c_int) as usize;
        new.sa_flags = libc::SA_RESTART;
        libc::sigfillset(&mut new.sa_mask);
        if libc::sigaction(signal, &new, &mut old) != 0 {
            return Err(Errno::last());
        }
        Ok(old)
    }
}
