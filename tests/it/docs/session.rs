//! Runs the commands of a page in one shell, in a folder of its own.
//!
//! Programs that may not or cannot run here are replaced. Guards that nothing that a page starts outlives its run.

use super::page::{Page, tree};
use crate::cli::VUBLK;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The programs that cannot run in a test, and why. Something that does nothing stands in for them; all else in
/// their blocks is run.
const STAND_INS: [(&str, &str); 5] = [
    ("cloud-hypervisor", "Debian has no package of it"),
    ("virsh", "libvirt's daemon does not run here"),
    ("cargo", "it would build the program under test"),
    ("lvextend", "there is no volume group"),
    ("sudo", "it would change this machine: its units, users and folders"),
];

/// How long a page may take. Guests are emulated, and machines busy.
const LIMIT: Duration = Duration::from_secs(600);

/// What the guests of a page do.
pub enum Guests {
    /// Each is made with its devices, connects to its disks, and ends before its first instruction.
    Stopped,
    /// They boot.
    Booted,
}

/// A shell at work in a folder, with all that it has started.
struct Session {
    dir: TempDir,
    shell: Child,
}

impl Drop for Session {
    fn drop(&mut self) {
        let kill = |target: &str| {
            let killed =
                Command::new("kill").args(["-KILL", "--", target]).stderr(Stdio::null()).status();
            drop(killed);
        };
        kill(&format!("-{}", self.shell.id()));
        drop(self.shell.wait());
        // What has left the shell's group has written where it is.
        for entry in fs::read_dir(self.dir.path()).unwrap().flatten() {
            if entry.path().extension().is_some_and(|name| name == "pid")
                && let Ok(pid) = fs::read_to_string(entry.path())
            {
                kill(pid.trim());
            }
        }
    }
}

/// Writes a program.
fn program(folder: &Path, name: &str, text: &str) {
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o755).open(folder.join(name));
    write!(file.unwrap(), "#!/bin/sh\n{text}\n").unwrap();
}

/// The folder of programs that comes first in PATH.
fn programs(dir: &Path, guests: Guests) -> PathBuf {
    let folder = dir.join("bin");
    fs::create_dir(&folder).unwrap();
    symlink(VUBLK, folder.join("vublk")).unwrap();
    for (name, _) in STAND_INS {
        program(&folder, name, ":");
    }
    // The goals are looked up, with all that they would run.
    let make = format!("exec /usr/bin/make --dry-run --directory '{}' \"$@\"", tree().display());
    program(&folder, "make", &make);
    if matches!(guests, Guests::Stopped) {
        let qemu =
            "echo quit | exec /usr/bin/qemu-system-x86_64 -S -display none -monitor stdio \"$@\"";
        program(&folder, "qemu-system-x86_64", qemu);
    }
    folder
}

/// The page's blocks as one script. A block in the background is waited for until it has said that it is ready.
fn script(page: &Page) -> String {
    let mut script = String::from("set -e -x -o pipefail\n");
    for block in &page.blocks {
        let (line, text) = (block.line, &block.text);
        match &*block.kind {
            "sh" => script += &format!(": line {line}\n{text}"),
            "sh background" => {
                let log = format!("background.{line}");
                script += &format!(": line {line}\n(\n{text}) > {log} 2>&1 &\n");
                script += &format!("until grep -q ': ready$' {log}; do\n");
                script +=
                    &format!("    kill -0 $! || {{ cat {log}; false; }}\n    sleep 0.1\ndone\n");
            }
            _ => {}
        }
    }
    script
}

/// Runs the commands of a page. An error has all that they printed.
pub fn run(page: &Page, guests: Guests) -> Result<(), String> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // Not in the system's temporary folder, which may be of a kind that knows no O_DIRECT.
    let dir = tempfile::tempdir_in(target).unwrap();
    let here = dir.path();
    // Where the page is read: in the source tree.
    symlink(tree().join("tests"), here.join("tests")).unwrap();
    symlink(tree().join("dist"), here.join("dist")).unwrap();
    symlink(target.parent().unwrap(), here.join("target")).unwrap();
    let path = format!("{}:{}", programs(here, guests).display(), std::env::var("PATH").unwrap());
    fs::write(here.join("script"), script(page)).unwrap();
    let output = fs::File::create(here.join("output")).unwrap();
    let mut command = Command::new("bash");
    command.arg("script").current_dir(here).env("PATH", path).process_group(0);
    command.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").env_remove("RUST_LOG");
    command.stdin(Stdio::null()).stderr(output.try_clone().unwrap()).stdout(output);
    let shell = command.spawn().unwrap();
    let mut session = Session { dir, shell };
    let end = Instant::now() + LIMIT;
    let status = loop {
        match session.shell.try_wait().unwrap() {
            Some(status) => break status.to_string(),
            None if Instant::now() > end => break "no end".into(),
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let output = fs::read_to_string(session.dir.path().join("output")).unwrap_or_default();
    match &*status {
        "exit status: 0" => Ok(()),
        _ => Err(format!("{}: {status}\n{output}", page.name)),
    }
}
