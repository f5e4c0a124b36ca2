//! Single key presses from the terminal, without echo.
//!
//! Guards that the terminal's settings are restored in the end.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// The terminal of standard input, set to tell of each key.
pub struct Keys {
    old: libc::termios,
}

/// Why a wait has ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    Time,
    Key(u8),
    /// A signal ends the program.
    End,
}

impl Keys {
    /// None if standard input is no terminal, or belongs to another job of the shell.
    pub fn open() -> Option<Keys> {
        // SAFETY: all zeroes are valid settings; the calls read and write them, and nothing else.
        unsafe {
            if libc::tcgetpgrp(libc::STDIN_FILENO) != libc::getpgrp() {
                return None;
            }
            let mut old = std::mem::zeroed::<libc::termios>();
            if libc::tcgetattr(libc::STDIN_FILENO, &mut old) != 0 {
                return None;
            }
            let mut new = old;
            new.c_lflag &= !(libc::ICANON | libc::ECHO);
            new.c_cc[libc::VMIN] = 0;
            new.c_cc[libc::VTIME] = 0;
            let set = libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &new);
            (set == 0).then_some(Keys { old })
        }
    }

    /// The key that was pressed. None at the end of the terminal, too.
    fn take(&self) -> Option<u8> {
        let mut key = 0;
        // SAFETY: one byte, which is ours.
        let read = unsafe { libc::read(libc::STDIN_FILENO, (&raw mut key).cast(), 1) };
        (read == 1).then_some(key)
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        // SAFETY: the settings are those that the terminal had.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &self.old) };
    }
}

/// Sleeps for `time`, or until a key is pressed or a signal comes, whose descriptor is `stop`.
pub fn wait(keys: Option<&Keys>, stop: &OwnedFd, time: Duration) -> Event {
    let end = Instant::now() + time;
    let mut listens = keys.is_some();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let polled = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // A negative descriptor is passed over.
        let stdin = if listens { libc::STDIN_FILENO } else { -1 };
        let mut fds = [polled(stop.as_raw_fd()), polled(stdin)];
        let limit = libc::c_int::try_from(left.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: two entries, which live through the call.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 2, limit) };
        if ready > 0 && fds[0].revents != 0 {
            return Event::End;
        }
        if ready > 0 && fds[1].revents != 0 {
            match keys.and_then(Keys::take) {
                Some(key) => return Event::Key(key),
                // Nobody is at the terminal any more.
                None => listens = false,
            }
        } else if Instant::now() >= end {
            return Event::Time;
        }
    }
}
