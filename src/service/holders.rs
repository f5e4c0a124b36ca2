//! The process that has an image locked, found in /proc.
//!
//! Messages name it, and it tells a lasting lock from one that the kernel is about to release.

use crate::block::LockedFile;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A process that lives and has the file open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub pid: u32,
    name: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.name.escape_debug(), self.pid)
    }
}

/// The name and number of a process that lives and has locked the file, if one can be seen.
pub fn holder_of(file: &LockedFile) -> Option<String> {
    find(file).map(|holder| holder.to_string())
}

/// The first process found that has locked the file, and is not being killed. Processes that may not
/// be looked at are not seen.
pub(super) fn find(file: &LockedFile) -> Option<Holder> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids: Vec<u32> =
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids.into_iter().find_map(|pid| {
        let process = Path::new("/proc").join(pid.to_string());
        if !has_locked(&process, pid, file) || is_ending(&process) {
            return None;
        }
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        Some(Holder { pid, name: name.trim_end().to_owned() })
    })
}

fn has_locked(process: &Path, pid: u32, file: &LockedFile) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
    descriptors.flatten().any(|descriptor| {
        // Of the link's target, which is there even if its name is not.
        let Ok(found) = fs::metadata(descriptor.path()) else { return false };
        let number = descriptor.file_name();
        let ours = pid == std::process::id() && number.to_str() == Some(&file.fd.to_string());
        if ours || (found.dev(), found.ino()) != (file.device, file.inode) {
            return false;
        }
        // Locks belong to the open file description, and are listed with it.
        let info = fs::read_to_string(process.join("fdinfo").join(number));
        info.is_ok_and(|info| info.lines().any(|line| line.starts_with("lock:")))
    })
}

/// Whether a process is dead, or will be as soon as the kernel lets it.
fn is_ending(process: &Path) -> bool {
    let Ok(status) = fs::read_to_string(process.join("status")) else { return true };
    status.lines().any(|line| match line.split_once(':') {
        Some(("State", state)) => state.trim_start().starts_with(['Z', 'X']),
        Some(("SigPnd" | "ShdPnd", pending)) => {
            let pending = u64::from_str_radix(pending.trim(), 16).unwrap_or(0);
            pending & 1 << (libc::SIGKILL - 1) != 0
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_file_that_is_open_and_not_locked_has_no_holder() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let found = file.as_file().metadata().unwrap();
        let (device, inode) = (found.dev(), found.ino());
        assert_eq!(find(&LockedFile { device, inode, fd: -1 }), None);
        // Locked by this process, through a descriptor that is not the one that asks.
        file.as_file().lock().unwrap();
        let holder = find(&LockedFile { device, inode, fd: -1 }).unwrap();
        assert_eq!(holder.pid, std::process::id());
        let fd = file.as_file().as_raw_fd();
        assert_eq!(find(&LockedFile { device, inode, fd }), None);
    }
}
