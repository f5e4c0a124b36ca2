//! SIGUSR1 asks long work how far it has come.

use crate::tools::progress::ASKED;
use std::sync::atomic::Ordering;

extern "C" fn ask(_signal: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// Sends this process a signal.
pub fn raise(signal: libc::c_int) {
    // SAFETY: the call takes a number, and refuses one that is no signal.
    unsafe { libc::kill(libc::getpid(), signal) };
}

/// Has SIGUSR1 answered by whatever [`crate::tools::Progress`] is running.
pub fn answer_usr1() {
    let handler = ask as extern "C" fn(libc::c_int);
    // SAFETY: the handler does nothing but store to an atomic, which a signal's handler may.
    unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
}
