//! The driver `nbd`, against real servers and against one that does what no good one does.

mod hostile;
mod lost;
mod servers;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use vublk_testkit::Server;
use vublk_testkit::nbd::{NbdServer, Setup};

const LIMIT: Duration = Duration::from_secs(20);

/// A server, and where it listens.
struct Place<S> {
    server: S,
    dir: tempfile::TempDir,
}

impl<S> Place<S> {
    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// The export of this name.
    fn name(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// The options of a node, with more of them.
    fn options(&self, more: &str) -> String {
        let socket = self.socket();
        format!("driver=nbd,server.type=unix,server.path={}{more}", socket.display())
    }
}

fn by_hand(setup: Setup) -> Place<NbdServer> {
    let dir = tempfile::tempdir().unwrap();
    Place { server: NbdServer::start(&dir.path().join("s"), setup).unwrap(), dir }
}

/// A program, in whose line `SOCKET` stands for the socket and `DIR` for a directory.
fn program(line: &str) -> Place<Server> {
    let dir = tempfile::tempdir().unwrap();
    Place { server: begin(&dir, line), dir }
}

fn begin(dir: &tempfile::TempDir, line: &str) -> Server {
    let socket = dir.path().join("s");
    let line = line.replace("SOCKET", socket.to_str().unwrap());
    let line = line.replace("DIR", dir.path().to_str().unwrap());
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    let mut server = Server::spawn(command).unwrap();
    server.wait_socket(&socket, LIMIT).unwrap();
    server
}

/// What a tool of ours, called by this name, came to: whether it succeeded, and all that it said.
fn tool(name: &str, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    let output = command.arg0(name).args(arguments).env("LC_ALL", "C").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout) + &text(&output.stderr))
}

/// Runs these commands of `io`.
fn io(options: &str, commands: &[&str]) -> (bool, String) {
    let mut arguments = vec!["--image-opts", options];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    tool("qemu-io", &arguments)
}
