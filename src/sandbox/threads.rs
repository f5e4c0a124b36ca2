//! Landlock for threads that exist already.
//!
//! The kernel confines the thread that asks, and all that it starts later; only version 8 of its
//! interface has a flag for the others. So each thread is made to ask by a signal, as the C library
//! does it for setuid(2). A thread that is started meanwhile has its starter's rules or is found in the
//! next round.

use crate::io::{Errno, IoResult};
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

/// What became of the threads.
pub(super) enum Outcome {
    /// All of them are confined.
    Confined,
    /// None of them is, and why.
    LeftOut(String),
}

/// Confines every thread of the process, or none where that is not to be had.
///
/// # Errors
/// A thread could not be confined, and others are, or may be.
pub(super) fn restrict_all(ruleset: OwnedFd) -> Result<Outcome, String> {
    let failed = |what: &str, errno| format!("Landlock: {what}: {errno}");
    // SAFETY: takes no arguments and cannot fail.
    let this = unsafe { libc::gettid() };
    // Before anything is changed: without /proc the other threads cannot be found.
    match threads() {
        Err(why) => return Ok(Outcome::LeftOut(why)),
        Ok(all) if !all.contains(&this) => {
            // The numbers are those of another namespace, and signals to them would go astray.
            return Ok(Outcome::LeftOut("/proc is of other processes".into()));
        }
        Ok(_) => {}
    }
    RULESET.store(ruleset.as_raw_fd(), Ordering::SeqCst);
    let signal = libc::SIGRTMIN();
    let old = handle(signal).map_err(|errno| failed("sigaction", errno))?;
    let outcome = restrict_others(this, signal)?;
    if let Outcome::Confined = outcome {
        // Last, because it could not look for the others afterwards.
        match restrict_this() {
            0 => {}
            errno => return Err(failed("this thread", Errno(errno))),
        }
    }
    RULESET.store(-1, Ordering::SeqCst);
    // SAFETY: what was there before; nobody sends the signal any more.
    unsafe { libc::sigaction(signal, &old, std::ptr::null_mut()) };
    Ok(outcome)
}

/// Confines all threads but this one, or none if the first that is asked cannot be.
fn restrict_others(this: i32, signal: i32) -> Result<Outcome, String> {
    let end = Instant::now() + PATIENCE;
    let mut done = HashSet::from([this]);
    loop {
        let new: Vec<i32> = threads()?.into_iter().filter(|id| !done.contains(id)).collect();
        if new.is_empty() {
            return Ok(Outcome::Confined);
        }
        for thread in new {
            match ask(thread, signal, end)? {
                Ok(()) => done.insert(thread),
                Err(errno) if done.len() == 1 => return Ok(Outcome::LeftOut(errno.to_string())),
                Err(errno) => return Err(format!("Landlock: thread {thread}: {errno}")),
            };
        }
    }
}

/// The threads of this process, without those of the kernel that work for its rings: they take no
/// signals, and open nothing.
fn threads() -> Result<Vec<i32>, String> {
    let failed = |e: std::io::Error| format!("/proc/self/task: {}", Errno::from(e));
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

/// Makes a thread confine itself, and waits until it has, or is gone. Gives what keeps it from that.
///
/// # Errors
/// It does not answer: it may do so later.
fn ask(thread: i32, signal: i32, end: Instant) -> Result<Result<(), Errno>, String> {
    ANSWER.store(0, Ordering::SeqCst);
    match send(thread, signal) {
        Ok(()) => {}
        Err(Errno(libc::ESRCH)) => return Ok(Ok(())),
        // Too many signals wait to be taken, for one.
        Err(errno) => return Ok(Err(errno)),
    }
    loop {
        let answer = ANSWER.load(Ordering::SeqCst);
        if answer >> 32 == thread as u64 {
            return Ok(match answer as u32 as i32 {
                0 => Ok(()),
                errno => Err(Errno(errno)),
            });
        }
        if send(thread, 0) == Err(Errno(libc::ESRCH)) {
            return Ok(Ok(()));
        }
        if Instant::now() > end {
            return Err(format!("Landlock: thread {thread} does not answer"));
        }
        std::thread::sleep(Duration::from_micros(20));
    }
}

/// Sends a signal that has a handler to a thread of this process, or none (0) to see whether it is there.
fn send(thread: i32, signal: i32) -> IoResult {
    // SAFETY: neither ends the process or names memory.
    match unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
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
