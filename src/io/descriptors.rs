//! File descriptors: the limit of the process, those left, and a reserve.
//!
//! The limit, RLIMIT_NOFILE, is one for the whole process, and so is the count of what is set aside.

use super::errno::Errno;
use super::sync::Mutex;

/// Descriptors that are looked at in one call.
const LOOK: usize = 1024;

/// How many descriptors are set aside, and not yet used, by all [`Reserve`]s.
static SET_ASIDE: Mutex<usize> = Mutex::new(0);

fn limits() -> libc::rlimit {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes one structure. The resource exists, so it cannot fail.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    limit
}

/// How many descriptors the process may have: the soft limit.
pub fn limit() -> usize {
    usize::try_from(limits().rlim_cur).unwrap_or(usize::MAX)
}

/// Raises the soft limit to the hard one. The soft limit protects programs that use select(2), which this
/// one does not; and it starts no programs that would inherit it.
pub fn raise_limit() {
    let limit = limits();
    let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
    // SAFETY: the call reads one structure.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raised) } != 0 {
        log::warn!("the limit on descriptors stays at {}: {}", limit.rlim_cur, Errno::last());
    }
}

/// The limit, and how it is raised, for messages.
pub fn name_limit() -> String {
    format!(
        "RLIMIT_NOFILE = {}: raise the hard limit (LimitNOFILE= of a unit, ulimit -Hn)",
        limit()
    )
}

/// An error, with the limit that was reached if it is about descriptors.
pub fn explain(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EMFILE) => format!("{} ({})", Errno(libc::EMFILE), name_limit()),
        Some(libc::ENFILE) => {
            format!("{} (raise the host's fs.file-max with sysctl)", Errno(libc::ENFILE))
        }
        _ => error.to_string(),
    }
}

/// Whether the process could open this many more descriptors. It opens none for that.
pub fn are_left(count: usize) -> bool {
    let mut end = limit().min(libc::c_int::MAX as usize);
    let mut polled = Vec::with_capacity(LOOK.min(end));
    let mut left = 0;
    // The kernel hands out the lowest numbers first, so those at the top are free most often.
    while left < count && end > 0 {
        let start = end.saturating_sub(LOOK);
        polled.clear();
        let one = |fd| libc::pollfd { fd: fd as libc::c_int, events: 0, revents: 0 };
        polled.extend((start..end).map(one));
        // SAFETY: the list lives through the call, and its length is given.
        if unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, 0) } < 0 {
            return true;
        }
        left += polled.iter().filter(|one| one.revents & libc::POLLNVAL != 0).count();
        end = start;
    }
    left >= count
}

/// Descriptors that are set aside, so that other reservations leave them free. The holder opens them itself, and says
/// how many it has.
#[derive(Debug, Default)]
pub struct Reserve {
    /// Those that it is to have in all.
    wanted: usize,
    used: usize,
    most_used: usize,
}

impl Reserve {
    /// Sets `count` descriptors aside, unless fewer are left.
    pub fn take(count: usize) -> Option<Reserve> {
        let mut set_aside = SET_ASIDE.lock();
        are_left(set_aside.saturating_add(count)).then(|| {
            *set_aside += count;
            Reserve { wanted: count, used: 0, most_used: 0 }
        })
    }

    /// The holder has so many of them open now.
    pub fn set_used(&mut self, used: usize) {
        self.change(|reserve| {
            reserve.used = used;
            reserve.most_used = reserve.most_used.max(used);
        });
    }

    /// The holder will never have more than `more` open besides what it had at most so far.
    pub fn settle(&mut self, more: usize) {
        self.change(|reserve| reserve.wanted = reserve.most_used + more);
    }

    fn change(&mut self, change: impl FnOnce(&mut Reserve)) {
        let before = self.left();
        change(self);
        let mut set_aside = SET_ASIDE.lock();
        *set_aside = *set_aside + self.left() - before;
    }

    fn left(&self) -> usize {
        self.wanted.saturating_sub(self.used)
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        self.change(|reserve| reserve.wanted = 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_aside_is_counted_until_it_is_used_or_given_back() {
        let mut reserve = Reserve::take(5).unwrap();
        assert_eq!(reserve.left(), 5);
        reserve.set_used(3);
        assert_eq!(reserve.left(), 2);
        reserve.set_used(1);
        reserve.settle(1);
        assert_eq!(reserve.left(), 3, "it had three once");
        reserve.set_used(4);
        assert_eq!(reserve.left(), 0);
    }

    #[test]
    fn no_more_is_set_aside_than_is_left() {
        assert!(are_left(1));
        assert!(!are_left(limit() + 1));
        assert!(Reserve::take(limit() + 1).is_none());
    }
}
