//! SIGUSR1 asks long work how far it has come.

use crate::tools::progress::ASKED;
use std::sync::atomic::Ordering;

extern "C" fn ask(_signal: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// Has SIGUSR1 answered by whatever [`crate::tools::Progress`] is running.
pub fn answer_usr1() {
    let handler = ask as extern "C" fn(libc::c_int);
    // SAFETY: the handler does nothing but store to an atomic, which a signal's handler may.
    unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
}
