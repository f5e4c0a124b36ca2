//! A host without some of its kernel's features, as in a container with a system call filter.

use std::io;

const X86_64: u32 = 0xc000_003e;
const AARCH64: u32 = 0xc000_00b7;
/// io_uring_setup, the same number everywhere; so the other two.
pub const IO_URING_SETUP: u32 = 425;
pub const IO_URING_ENTER: u32 = 426;
pub const IO_URING_REGISTER: u32 = 427;

/// From now on this thread, and all threads and processes that it starts, get EPERM where they ask
/// for an io_uring. Allocates nothing: it may be called between fork and exec.
pub fn forbid_io_uring() -> io::Result<()> {
    forbid(IO_URING_SETUP)
}

/// The same where they make one system call, by its number.
pub fn forbid(call: u32) -> io::Result<()> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let line = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        // The architecture, and then the number, of seccomp_data.
        line(LOAD, 0, 0, 4),
        line(IF_EQUAL, 1, 0, X86_64),
        line(IF_EQUAL, 0, 3, AARCH64),
        line(LOAD, 0, 0, 0),
        line(IF_EQUAL, 0, 1, call),
        line(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        line(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program lives through the calls, and its length is given.
    let result = unsafe {
        match libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) {
            0 => libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter),
            failed => failed,
        }
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
