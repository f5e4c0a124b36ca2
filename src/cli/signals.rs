//! The signals that a running command ignores or answers.

use crate::tools::progress::ASKED;
use std::sync::atomic::Ordering;

extern "C" fn ask(_signal: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// Ignores the signals that the kernel sends for a request that it refuses: they would end the process
/// with every disk that it serves. The request then fails with an error code of its own.
///
/// * SIGXFSZ: a write past the limit on a file's length (`RLIMIT_FSIZE`) fails with EFBIG.
/// * SIGPIPE: a write to a socket or a pipe that nobody reads fails with EPIPE.
///
/// SIGBUS, of a guest's memory that is taken away, has a handler ([`crate::io::shared_mapping`]).
pub fn ignore_refusals() {
    for signal in [libc::SIGXFSZ, libc::SIGPIPE] {
        // SAFETY: the signals exist, and ignoring them runs no code.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Sends this process a signal.
pub fn raise(signal: libc::c_int) {
    // SAFETY: the call takes a number, and refuses one that is no signal.
    unsafe { libc::kill(libc::getpid(), signal) };
}

/// Lets the [`crate::tools::Progress`] that is running answer SIGUSR1.
pub fn answer_usr1() {
    let handler = ask as extern "C" fn(libc::c_int);
    // SAFETY: the handler does nothing but store to an atomic, which a signal's handler may.
    unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
}
