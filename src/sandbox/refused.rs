//! Refused system calls: they fail with EPERM, and the log has one line for each kind.
//!
//! It is not death, because a disk that a guest works on is worth more than the certainty that a call
//! was an attack: a new version of the C library may make calls that nobody thought of, and most code
//! has a way on when a call fails. Nor is the kernel's own log enough: many do not have one.
//!
//! The filter raises SIGSYS (SECCOMP_RET_TRAP); its handler lets the call fail, and leaves a mark.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

/// Numbers from here on share a mark.
const NUMBERS: usize = 512;

const REFUSED: u8 = 1;
const TOLD: u8 = 2;

/// By the number of the system call.
static MARKS: [AtomicU8; NUMBERS] = [const { AtomicU8::new(0) }; NUMBERS];
static WAKEUP: AtomicI32 = AtomicI32::new(-1);

/// Logs what was refused since this was last called, and not told before.
pub fn report_refused() {
    for (number, mark) in MARKS.iter().enumerate() {
        if mark.load(Ordering::Relaxed) == REFUSED {
            mark.store(TOLD, Ordering::Relaxed);
            log::warn!(
                "sandbox: refused the system call {number} (ausyscall {number} tells its name)"
            );
        }
    }
}

/// Whether refused calls can be made to fail by [`handle`] here.
pub(super) const CAN_HANDLE: bool = cfg!(any(target_arch = "x86_64", target_arch = "aarch64"));

/// From now on SIGSYS lets the call fail. `wakeup` is an eventfd that is then written to.
pub(super) fn handle(wakeup: Option<RawFd>) -> std::io::Result<()> {
    WAKEUP.store(wakeup.unwrap_or(-1), Ordering::SeqCst);
    // SAFETY: all zeroes is a valid value; the handler calls what a handler may.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = refuse;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

extern "C" fn refuse(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO the thread's state, to be changed at will.
    let number = unsafe { fail(context.cast()) };
    let mark = &MARKS[number.min(NUMBERS - 1)];
    if mark.compare_exchange(0, REFUSED, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
        let one = 1u64;
        let wakeup = WAKEUP.load(Ordering::Relaxed);
        // SAFETY: eight bytes; a descriptor that is none fails.
        unsafe { libc::write(wakeup, (&raw const one).cast(), 8) };
    }
}

/// Sets the result of the interrupted call to EPERM; gives its number.
///
/// # Safety
/// `context` is a signal handler's.
#[cfg(target_arch = "x86_64")]
unsafe fn fail(context: *mut libc::ucontext_t) -> usize {
    // SAFETY: the caller's promise.
    let result = unsafe { &mut (*context).uc_mcontext.gregs[libc::REG_RAX as usize] };
    let number = *result as usize;
    *result = -i64::from(libc::EPERM);
    number
}

/// # Safety
/// As above.
#[cfg(target_arch = "aarch64")]
unsafe fn fail(context: *mut libc::ucontext_t) -> usize {
    // SAFETY: the caller's promise.
    let registers = unsafe { &mut (*context).uc_mcontext.regs };
    registers[0] = -i64::from(libc::EPERM) as u64;
    registers[8] as usize
}

/// # Safety
/// None: not called, see [`CAN_HANDLE`].
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn fail(_: *mut libc::ucontext_t) -> usize {
    0
}
