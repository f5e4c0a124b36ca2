//! The sandbox: the process gives up for good what it no longer needs after start-up.
//!
//! A guest, a front end or an image that takes the process over then has what is open, and little more.
//!
//! * No new privileges, no core dumps (they would hold guests' data).
//! * [`files`]: which paths can be opened or removed (Landlock).
//! * [`calls`]: which system calls are left (seccomp); `refused`: what becomes of the others.
//! * Rings do only the operations in use ([`crate::io::uring`]), and no more can be made.
//! * [`user`]: another user than root.
//!
//! `threads` brings Landlock to the threads that are there already.

pub mod calls;
pub mod files;
mod plan;
mod refused;
mod threads;
pub mod user;

pub use plan::{Place, Plan};
pub use refused::report_refused;
pub use user::User;

use crate::io;

/// Rings that a process with a monitor keeps for iothreads that are added. About 90 KiB each of the
/// kernel's memory.
const SPARE_RINGS: usize = 32;

/// Confines the process. What the kernel does not offer is left out, and told: one clause for each.
///
/// # Errors
/// It failed half-way; the process must end.
pub fn confine(plan: &Plan) -> Result<Vec<String>, String> {
    let mut missing = Vec::new();
    forbid_core_dumps().map_err(|e| format!("no core dumps: {e}"))?;
    // The machine is asked for its memory, which budgets are measured by, as long as that is allowed.
    io::budget::Pool::of_process();
    let ruleset = files::ruleset(plan);
    if let Some(user) = &plan.user {
        user.drop_privileges()?;
    }
    let confined = match ruleset {
        Ok(ruleset) => threads::restrict_all(ruleset)?,
        Err(why) => threads::Outcome::LeftOut(why),
    };
    match confined {
        threads::Outcome::Confined => files::keep(plan),
        threads::Outcome::LeftOut(why) => missing.push(format!("files are not confined ({why})")),
    }
    io::make_last_rings(if plan.grows { SPARE_RINGS } else { 0 });
    if let Err(why) = calls::restrict(plan) {
        missing.push(format!("system calls are not confined ({why})"));
    }
    Ok(missing)
}

/// A limit of 0 would not keep the kernel from handing the memory to a program that collects dumps;
/// one of 1 does (it is how the kernel keeps such a program from being dumped itself). The other way,
/// PR_SET_DUMPABLE, would give /proc/PID to root, and then the next daemon of the same user could not
/// see that this one holds an image's locks.
fn forbid_core_dumps() -> std::io::Result<()> {
    let limit = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
    // SAFETY: the call reads one structure.
    match unsafe { libc::setrlimit(libc::RLIMIT_CORE, &limit) } {
        0 => Ok(()),
        // A limit that is lower already cannot be raised, and is as good for files.
        _ if std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM) => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests;
