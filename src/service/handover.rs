//! Waiting for the socket of a previous daemon that is still ending.

use crate::export::core::socket::is_listened_on;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often the file is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// The interval between attempts to connect. Each time a listening daemon sees a front end come and go, and has no
/// more room for them than its backlog.
const ASK: Duration = Duration::from_secs(1);

/// Waits as long as somebody else listens on the socket, but no longer than `patience`, nor when `give_up`
/// says so: what is wrong with it, if anything, opening it will tell.
pub fn wait_for_socket(path: &Path, patience: Duration, give_up: fn() -> bool) {
    let file = || std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino())).ok();
    let end = Instant::now() + patience;
    while let Some(other) = file()
        && is_listened_on(path).unwrap_or(false)
    {
        let ask = Instant::now() + ASK;
        while file() == Some(other) && Instant::now() < ask {
            if Instant::now() > end || give_up() {
                return;
            }
            std::thread::sleep(LOOK);
        }
    }
}
