//! Storage that is really full: a small tmpfs in a mount namespace of its own.
//!
//! It goes when the test ends, however it ends.

use crate::guest::server::tied_to_this_thread;
use crate::namespace;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

pub struct Small {
    /// Sits in the namespace, and keeps it.
    keeper: Child,
    /// The mount point, as processes in the namespace call it.
    pub path: PathBuf,
}

impl Small {
    /// A file system of so many MiB, mounted at `path`, an empty folder.
    pub fn mount(path: &Path, mib: u32) -> Small {
        let script = format!(
            "mount -t tmpfs -o size={mib}m none {} && echo mounted && exec sleep infinity",
            path.display()
        );
        let unshare = namespace::unshare();
        let mut keeper = tied_to_this_thread(unshare[0])
            .args(&unshare[1..])
            .args(["--mount", "sh", "-c", &script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "mounted\n", "a tmpfs could not be mounted in a namespace of its own");
        Small { keeper, path: path.to_owned() }
    }

    /// What comes before a command to run it there.
    pub fn enter(&self) -> Vec<String> {
        namespace::enter_mounts_of(self.keeper.id())
    }

    /// A file in it, as processes outside reach it.
    pub fn file(&self, name: &str) -> PathBuf {
        let inside = self.path.join(name);
        PathBuf::from(format!("/proc/{}/root{}", self.keeper.id(), inside.display()))
    }

    /// Takes room away, so that so many KiB are left.
    pub fn fill(&self, mib: u32, left_kib: u64) {
        let room = u64::from(mib) * 1024 - left_kib;
        std::fs::write(self.file("ballast"), vec![1; room as usize * 1024]).unwrap();
    }

    /// Gives it back.
    pub fn free(&self) {
        std::fs::remove_file(self.file("ballast")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Both fail only when it has already been waited for.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}
