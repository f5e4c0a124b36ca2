//! The system calls that the confined process may make: a seccomp filter.
//!
//! The rule held here: no call that starts a program or a process, makes a socket for another host (unless a driver
//! that is open works over the network), changes the user of the process or its rights, looks into other processes,
//! makes memory executable, or makes a ring. What opens files is there, because Landlock decides on it
//! ([`super::files`]).
//!
//! # For drivers with needs of their own
//!
//! A driver that makes system calls while it serves, other than I/O on what it has open, lists them
//! here: requests of ioctl(2) in [`REQUESTS`], others in [`SERVING`]. One that drives a device itself
//! (VFIO) adds that interface's requests, for mapping guest memory is one, and it comes at any time. One
//! that connects to servers says so (`uses_network` in src/block/driver.rs).

use super::plan::Plan;
use super::refused;
use crate::io::uring::REGISTER_FILES_UPDATE;
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter_all_threads,
};
use std::collections::BTreeMap;

/// Calls with any arguments, of a process that serves what it has open.
const SERVING: &[c_long] = &[
    // Rings, and what stands in for them.
    libc::SYS_io_uring_enter,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_fadvise64,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    // Files. What may be opened or removed is Landlock's to say.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_readlinkat,
    // realpath, of names with `..` in them.
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_unlinkat,
    // Records of failed flushes.
    libc::SYS_symlinkat,
    libc::SYS_getcwd,
    libc::SYS_chdir,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup3,
    // Front ends and clients that come to sockets that are there.
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_memfd_create,
    // Threads. Other filters answer where it would not be one.
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_getcpu,
    // Signals of its own.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    // Time and chance.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
];

/// The same calls under older names.
#[cfg(target_arch = "x86_64")]
const SERVING_BEFORE: &[c_long] = &[
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_symlink,
    libc::SYS_dup2,
    libc::SYS_time,
    // Answered by another filter.
    libc::SYS_fork,
    libc::SYS_vfork,
];
#[cfg(not(target_arch = "x86_64"))]
const SERVING_BEFORE: &[c_long] = &[];

/// Besides, of a process that meets front ends at new sockets, or whose drivers connect to servers.
const MEETING: &[c_long] = &[libc::SYS_connect];

/// Besides, of one whose monitor may add exports, and accepts what failed flushes have lost: their records are looked for
/// in whole folders.
const GROWING: &[c_long] =
    &[libc::SYS_bind, libc::SYS_listen, libc::SYS_flock, libc::SYS_getdents64];

/// Requests of ioctl(2): of the standard library, and of files and block devices
/// (src/protocol/file/sys.rs).
const REQUESTS: &[libc::Ioctl] = &[
    libc::FIONBIO,
    libc::FIOCLEX,
    libc::TCGETS,
    libc::BLKSSZGET,
    libc::BLKPBSZGET,
    libc::_IO(0x12, 94),  // BLKROGET
    libc::_IO(0x12, 119), // BLKDISCARD
    libc::_IO(0x12, 127), // BLKZEROOUT
    libc::FS_IOC_GETFLAGS,
    libc::FS_IOC_SETFLAGS,
    libc::_IOR::<[u8; 28]>(b'X' as u32, 31), // FS_IOC_FSGETXATTR
    libc::_IOW::<[u8; 28]>(b'X' as u32, 32), // FS_IOC_FSSETXATTR
    // What an NVMe controller that is open is reset with and given memory by (vfio/src/real.rs).
    libc::_IO(VFIO, 110), // VFIO_DEVICE_SET_IRQS
    libc::_IO(VFIO, 111), // VFIO_DEVICE_RESET
    libc::_IO(VFIO, 113), // VFIO_IOMMU_MAP_DMA
    libc::_IO(VFIO, 114), // VFIO_IOMMU_UNMAP_DMA
    libc::_IO(VFIO, 105), // VFIO_GROUP_UNSET_CONTAINER
];

const VFIO: u32 = b';' as u32;

/// IORING_REGISTER_ENABLE_RINGS: a worker takes a ring that was made ahead.
const ENABLE_RINGS: u64 = 12;
/// PR_SET_VMA, by which the C library names its memory.
const NAME_MEMORY: u64 = 0x5356_4d41;

/// Leaves all threads of the process the calls that `plan` asks for.
///
/// # Errors
/// The kernel, or what has started the process, does not allow it.
pub(super) fn restrict(plan: &Plan) -> Result<(), String> {
    let failed = |error: seccompiler::Error| error.to_string();
    let programs = [threads_by_clone(), no_processes(), listed(plan)];
    refused::handle(plan.wakeup).map_err(|e| format!("SIGSYS: {e}"))?;
    for program in programs {
        apply_filter_all_threads(&program.map_err(|e| failed(e.into()))?).map_err(failed)?;
    }
    Ok(())
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;
type Program = Result<BpfProgram, seccompiler::BackendError>;

fn compile(rules: Rules, others: SeccompAction, matching: SeccompAction) -> Program {
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, others, matching, arch)?.try_into()
}

/// The arguments of clone3 are in memory, where no filter sees them. Without it the C library makes threads by clone.
/// (Filters add up, and the strictest answer counts.)
fn threads_by_clone() -> Program {
    let rules = Rules::from([(libc::SYS_clone3, Vec::new())]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

/// By an errno, for the C library forks with all signals blocked, and a SIGSYS that is blocked kills.
fn no_processes() -> Program {
    let is_none = one(0, SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64), 0)?;
    let mut rules = Rules::from([(libc::SYS_clone, vec![is_none])]);
    #[cfg(target_arch = "x86_64")]
    rules.extend([(libc::SYS_fork, Vec::new()), (libc::SYS_vfork, Vec::new())]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32))
}

fn listed(plan: &Plan) -> Program {
    let mut rules = Rules::new();
    let mut allow = |calls: &[c_long]| rules.extend(calls.iter().map(|&call| (call, Vec::new())));
    allow(SERVING);
    allow(SERVING_BEFORE);
    if plan.connects || plan.grows || plan.network {
        allow(MEETING);
    }
    if plan.grows {
        allow(GROWING);
    }
    let is = SeccompCmpOp::Eq;
    let without = |bits: i32| SeccompCmpOp::MaskedEq(bits as u64);
    let not_executable = || one(2, without(libc::PROT_EXEC), 0);
    rules.insert(libc::SYS_mmap, vec![not_executable()?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    rules.insert(
        libc::SYS_io_uring_register,
        any(1, &[ENABLE_RINGS, REGISTER_FILES_UPDATE.into()])?,
    );
    // A process that aborts signals itself.
    rules.insert(libc::SYS_tgkill, vec![one(0, is.clone(), std::process::id().into())?]);
    let names = [libc::PR_SET_NAME as u64, NAME_MEMORY];
    rules.insert(libc::SYS_prctl, any(0, &names)?);
    let requests: Vec<u64> = REQUESTS.iter().map(|&request| request as u32 as u64).collect();
    rules.insert(libc::SYS_ioctl, any(1, &requests)?);
    // Limits are looked at, of this process.
    let this = SeccompCondition::new(0, SeccompCmpArgLen::Dword, is.clone(), 0)?;
    let no_new_limit = SeccompCondition::new(2, SeccompCmpArgLen::Qword, is.clone(), 0)?;
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![this, no_new_limit])?]);
    // Both ends are the process's own: a connection begins with one.
    rules.insert(libc::SYS_socketpair, vec![one(0, is.clone(), libc::AF_UNIX as u64)?]);
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_VSOCK];
    let families = families.map(|family| family as u64);
    match plan {
        Plan { network: true, .. } => drop(rules.insert(libc::SYS_socket, any(0, &families)?)),
        Plan { connects: true, .. } | Plan { grows: true, .. } => {
            rules.insert(libc::SYS_socket, any(0, &families[..1])?);
        }
        _ => {}
    }
    let others = match refused::CAN_HANDLE {
        true => SeccompAction::Trap,
        false => SeccompAction::Errno(libc::EPERM as u32),
    };
    compile(rules, others, SeccompAction::Allow)
}

/// One argument, of an int's size.
fn one(
    argument: u8,
    compared: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, seccompiler::BackendError> {
    let length = SeccompCmpArgLen::Dword;
    SeccompRule::new(vec![SeccompCondition::new(argument, length, compared, value)?])
}

/// One of several values.
fn any(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    values.iter().map(|&value| one(argument, SeccompCmpOp::Eq, value)).collect()
}
