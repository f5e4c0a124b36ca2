//! The kernel's files about this machine: sysfs, procfs and device nodes below one root.
//!
//! What is there changes while it is read (devices come and go), so what cannot be read counts as not
//! there; only writes, and reads that a decision needs, report errors.

use super::Address;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// How an attribute of sysfs is written: the file's path and what to write.
type Write = dyn Fn(&Path, &str) -> io::Result<()>;

/// A machine as its kernel shows it.
pub struct Machine {
    root: PathBuf,
    write: Box<Write>,
}

impl Machine {
    /// The machine whose `/sys`, `/proc` and `/dev` are below `root`.
    pub fn new(root: impl Into<PathBuf>) -> Machine {
        Machine::with_kernel(root, |path, text| {
            // One write, into what is there: an attribute is not a file to be made.
            let mut file = fs::OpenOptions::new().write(true).open(path)?;
            io::Write::write_all(&mut file, text.as_bytes())
        })
    }

    /// The same with `kernel` in place of the one that acts on what is written to attributes.
    pub fn with_kernel(
        root: impl Into<PathBuf>,
        kernel: impl Fn(&Path, &str) -> io::Result<()> + 'static,
    ) -> Machine {
        Machine { root: root.into(), write: Box::new(kernel) }
    }

    /// A path below the root.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The folder of a PCI function.
    pub fn function(&self, address: Address) -> PathBuf {
        self.path("/sys/bus/pci/devices").join(address.to_string())
    }

    /// The folder of a PCI driver, which is there while the driver is loaded.
    pub fn driver(&self, name: &str) -> PathBuf {
        self.path("/sys/bus/pci/drivers").join(name)
    }

    /// Writes an attribute of sysfs.
    pub fn write(&self, path: &Path, text: &str) -> Result<(), String> {
        (self.write)(path, text).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => {
                format!("{}: permission denied: run this as root", path.display())
            }
            _ => format!("{}: {}", path.display(), crate::io::Errno::from(error)),
        })
    }

    /// Whether the kernel permits an exclusive open of a block device: it does not while a file system, swap space, a
    /// device mapper or md has claimed it, wherever that is mounted.
    pub fn is_claimed(&self, device: &str) -> bool {
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL | libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(self.path("/dev").join(device));
        opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    }

    /// A file that is missing here, in a jail say, and without which the users of a block device cannot
    /// be seen: the mounts, or the device's node, by which the kernel is asked.
    pub fn lacks(&self, device: &str) -> Option<PathBuf> {
        let needed = [Path::new("/proc/self/mountinfo").to_owned(), Path::new("/dev").join(device)];
        needed.into_iter().find(|path| !self.path(path).exists())
    }

    /// The processes that have a device node open: pid and program.
    pub fn openers(&self, node: &str) -> Vec<(u32, String)> {
        let node = Path::new("/dev").join(node);
        let mut found = Vec::new();
        for process in names(&self.path("/proc")) {
            let Ok(pid) = process.parse() else { continue };
            let folder = self.path("/proc").join(&process);
            let fds = names(&folder.join("fd"));
            let opens = |fd: &String| {
                fs::read_link(folder.join("fd").join(fd)).is_ok_and(|target| target == node)
            };
            if fds.iter().any(opens) {
                found.push((pid, text(&folder.join("comm")).unwrap_or_default()));
            }
        }
        found
    }
}

/// What a file holds, without the white space around it; `None` if it is not there.
pub fn text(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// A number as sysfs writes them: decimal, or hexadecimal behind `0x`.
pub fn number(path: &Path) -> Option<u64> {
    let text = text(path)?;
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The last part of where a symbolic link leads.
pub fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// The names in a folder, sorted; none if it is not there.
pub fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<_> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
