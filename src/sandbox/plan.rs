//! The resources that a confined process still needs.

use super::user::User;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// What a process needs when it has started.
#[derive(Debug, Default)]
pub struct Plan {
    /// What is open.
    pub files: Vec<Place>,
    /// What else may be opened, with all below it.
    pub folders: Vec<Place>,
    /// Files that the process has made and will remove.
    pub own: Vec<PathBuf>,
    /// It connects to sockets of others.
    pub connects: bool,
    /// Drivers make connections to servers, of whatever host, while they serve.
    pub network: bool,
    /// Nodes, exports and iothreads may be added: what is beside the files that are open, in their folders, may be
    /// opened, and sockets made where sockets are.
    pub grows: bool,
    /// Whose the process is then, if not whose it was.
    pub user: Option<User>,
    /// An eventfd that is written when a call is refused; its reader calls [`super::report_refused`].
    pub wakeup: Option<RawFd>,
}

/// A file or folder, and whether it may be written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub path: PathBuf,
    pub writable: bool,
}
