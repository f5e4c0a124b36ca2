//! The time to wait for a locked image.
//!
//! The kernel ends the I/O of a killed process, and releases its locks, after the process is gone: seconds later
//! where storage is slow. A live process keeps its locks, and is not waited for.

use super::holders::{self, Holder};
use crate::block::Error;
use crate::io::{self, Errno};
use std::time::{Duration, Instant};

/// The wait for locks whose holder cannot be seen to live.
const LONGEST: Duration = Duration::from_secs(30);

/// How long a holder must have been seen alive: one that was asked to end may be about to.
const SEEN: Duration = Duration::from_millis(1900);

/// How often holders are looked for.
const LOOK: Duration = Duration::from_millis(500);

/// How often the lock is tried.
const TRY: Duration = Duration::from_millis(10);

/// When the log says what is waited for.
const REPORT_AFTER: Duration = Duration::from_secs(1);

/// Whether an attempt failed because something is locked, and another may succeed.
pub fn is_locked(error: &Error) -> bool {
    error.errno() == Some(Errno(libc::EAGAIN))
}

/// Tries again while an image is locked. The last refusal is the answer, and names a holder that
/// lives. Gives up when `give_up` says so; without it, there is one attempt.
pub(super) async fn patiently<T>(
    give_up: Option<fn() -> bool>,
    mut attempt: impl AsyncFnMut() -> Result<T, Error>,
) -> Result<T, Error> {
    let Some(give_up) = give_up else { return attempt().await };
    let began = Instant::now();
    let mut next_look = began;
    let mut seen: Option<(Holder, Instant)> = None;
    let mut reported = false;
    loop {
        let error = match attempt().await {
            Err(error) if is_locked(&error) => error,
            result => return result,
        };
        let now = Instant::now();
        if now >= next_look {
            next_look = now + LOOK;
            let found = match error.locked_file().copied() {
                Some(file) => io::offload(move || holders::find(&file)).await,
                None => None,
            };
            seen = match (found, seen) {
                (Some(holder), Some((same, since))) if holder == same => Some((holder, since)),
                (found, _) => found.map(|holder| (holder, now)),
            };
        }
        let lives = seen.as_ref().is_some_and(|(_, since)| now >= *since + SEEN);
        if lives || now >= began + LONGEST || give_up() {
            return Err(match seen {
                None => error,
                Some((holder, _)) => {
                    let hint = error.hint().unwrap_or_default().to_owned();
                    error.with_hint(format!("{hint}\nIt is held by {holder}").trim_start())
                }
            });
        }
        if now >= began + REPORT_AFTER && !reported {
            reported = true;
            match &seen {
                Some((holder, _)) => {
                    log::warn!("{error}: it is held by {holder}, which may be about to end");
                }
                None => {
                    let hint = error.hint().unwrap_or_default();
                    log::warn!("{error}: trying for {} s. {hint}", LONGEST.as_secs());
                }
            }
        }
        io::sleep(TRY).await;
    }
}
