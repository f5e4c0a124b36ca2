//! A Linux guest under QEMU, which boots with disks, runs a shell script, and talks over its console.
//!
//! Guards that a guest never outlives its test and that no wait is without end.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::server::tied_to_this_thread;
use crate::client::Client;
use serde_json::json;

/// How long a guest may live, from its start to its power-off: tens of times what it takes on an
/// idle machine.
const LIFETIME: Duration = Duration::from_secs(180);

/// Guests run one at a time: each has several emulated processors and half a gigabyte of memory.
static TURN: Mutex<()> = Mutex::new(());

/// Waits until no other guest of this program runs.
pub fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A guest to boot. Disks appear in it as /dev/vda, /dev/vdb and so on, in the order they were
/// added.
#[derive(Clone, Default)]
pub struct Guest {
    boot_options: Vec<String>,
    qemu_options: Vec<String>,
    disks: usize,
    more_time: Duration,
}

/// A part of a script that says "loading", and runs a command again and again, with "round" after each
/// time, until a line comes from outside ([`RunningGuest::say`]).
pub fn until_stopped(command: &str) -> String {
    format!(
        r#"
        load() {{
            until [ -e /tmp/stop ]; do
                {command} || return 1
                echo "round"
            done
        }}
        echo loading
        load &
        read -r go
        touch /tmp/stop
        wait $! || exit 1
        "#
    )
}

/// A command that writes to the disk with as many jobs as it has queues, and verifies what it wrote.
pub fn fio_on_disk(queues: usize, loops: usize) -> String {
    let last = queues - 1;
    format!(
        "fio --name=load --filename=/dev/vda --size=8m --offset_increment=8m --numjobs={queues} \
         --cpus_allowed=0-{last} --cpus_allowed_policy=split --rw=randwrite --bsrange=4k-128k \
         --ioengine=libaio --iodepth=16 --direct=1 --fsync=64 --verify=crc32c --verify_fatal=1 \
         --randrepeat=0 --loops={loops}"
    )
}

impl Guest {
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the guest `cpus` processors (two without this). Its kernel uses no more queues of a
    /// disk than it has processors.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.boot_options.extend(["--cpus".into(), cpus.to_string()]);
        self
    }

    /// Puts fio into the guest, which then takes a second longer to boot.
    pub fn with_fio(mut self) -> Self {
        self.boot_options.push("--fio".into());
        self
    }

    /// Puts an IOMMU between the guest's memory and its devices.
    pub fn with_iommu(mut self) -> Self {
        self.boot_options.push("--iommu".into());
        self
    }

    /// Gives the guest `size` of memory, such as 1G (half of that without this).
    pub fn memory(mut self, size: &str) -> Self {
        self.boot_options.extend(["--memory".into(), size.into()]);
        self
    }

    /// Shows a folder of the host to the guest, at the same place.
    pub fn share(mut self, folder: &Path) -> Self {
        self.boot_options.extend(["--share".into(), folder.display().to_string()]);
        self
    }

    /// The same for a folder that the guest may write to.
    pub fn share_writable(mut self, folder: &Path) -> Self {
        self.boot_options.extend(["--share-writable".into(), folder.display().to_string()]);
        self
    }

    /// Lets the guest live longer than others may.
    pub fn for_more(mut self, time: Duration) -> Self {
        self.more_time += time;
        self
    }

    /// Attaches the vhost-user-blk server listening at `socket`, with QEMU's own choice of queues:
    /// one per processor.
    pub fn disk(self, socket: &Path) -> Self {
        self.attach(socket, "", "")
    }

    /// Attaches the vhost-user-blk server listening at `socket`, with `queues` queues.
    pub fn disk_with_queues(self, socket: &Path, queues: u32) -> Self {
        self.attach(socket, "", &format!(",num-queues={queues}"))
    }

    /// The same with a front end that connects again, within about a second, when the server has
    /// gone.
    pub fn reconnecting_disk(self, socket: &Path, queues: u32) -> Self {
        self.attach(socket, ",reconnect=1", &format!(",num-queues={queues}"))
    }

    fn attach(mut self, socket: &Path, connection: &str, properties: &str) -> Self {
        let chardev = format!("disk{}", self.disks);
        self.disks += 1;
        self.qemu_options.extend([
            "-chardev".into(),
            format!("socket,id={chardev},path={}{connection}", socket.display()),
            "-device".into(),
            format!("vhost-user-blk-pci,chardev={chardev}{properties}"),
        ]);
        self
    }

    /// More options of QEMU's.
    pub fn qemu(mut self, options: &[&str]) -> Self {
        self.qemu_options.extend(options.iter().map(|&option| option.to_owned()));
        self
    }

    /// Boots the guest, which then runs `script` under `sh`.
    pub fn boot(self, script: &str) -> RunningGuest {
        let turn = turn();
        build_guest();
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("script"), script).unwrap();
        let started = Instant::now();
        let end = started + LIFETIME + self.more_time;
        let (qemu, lines) = self.start(dir.path(), 0);
        RunningGuest {
            guest: self,
            qemu,
            moves: 0,
            plugged: Vec::new(),
            lines,
            console: Console::default(),
            started,
            end,
            dir,
            _turn: turn,
        }
    }

    /// Starts a QEMU for the script in `dir`, with a monitor on a socket there. After the first of
    /// them, they wait for the guest to come from another.
    fn start(&self, dir: &Path, moves: usize) -> (Child, Receiver<String>) {
        let mut command = tied_to_this_thread(guest_dir().join("boot.sh"));
        command.args(&self.boot_options).arg(dir.join("script")).args(&self.qemu_options);
        let monitor = monitor(dir, moves);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        if moves > 0 {
            command.arg("-incoming").arg(uri(dir, moves));
        }
        let mut qemu = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        forward_lines(qemu.stdout.take().unwrap(), sender.clone());
        forward_lines(qemu.stderr.take().unwrap(), sender);
        (qemu, lines)
    }

    /// Boots the guest, runs `script` to its end, and fails the test unless its exit code is 0.
    pub fn run(self, script: &str) -> Console {
        self.boot(script).finish()
    }
}

/// Where the QEMU that a guest comes to with its move of that number is talked to.
fn monitor(dir: &Path, moves: usize) -> PathBuf {
    dir.join(format!("qmp{moves}.sock"))
}

/// On which way it comes.
fn migration_socket(dir: &Path, moves: usize) -> PathBuf {
    dir.join(format!("migration{moves}.sock"))
}

/// The same as QEMU has it.
fn uri(dir: &Path, moves: usize) -> String {
    format!("unix:{}", migration_socket(dir, moves).display())
}

/// A booted guest. Ended with the value, by force if it still runs.
pub struct RunningGuest {
    guest: Guest,
    qemu: Child,
    /// How often it has moved to another QEMU.
    moves: usize,
    /// Options of QEMU's for what was plugged in meanwhile.
    pub plugged: Vec<String>,
    lines: Receiver<String>,
    console: Console,
    started: Instant,
    end: Instant,
    dir: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl RunningGuest {
    /// Waits until the guest prints a line that begins with `word`; fails the test if it ends
    /// without.
    pub fn wait_for(&mut self, word: &str) {
        while let Some(line) = self.next_line() {
            if line.starts_with(word) {
                return;
            }
        }
        panic!("the guest ended without saying {word:?}; its console:\n{}", self.console.text());
    }

    /// Waits until the guest prints a line that begins with `start`, and gives the rest of it; fails
    /// the test if that takes longer than `limit`.
    pub fn value_within(&mut self, start: &str, limit: Duration) -> String {
        let whole = std::mem::replace(&mut self.end, Instant::now() + limit);
        while let Some(line) = self.next_line() {
            if let Some(rest) = line.strip_prefix(start) {
                self.end = whole;
                return rest.to_owned();
            }
        }
        panic!("the guest ended without saying {start:?}; its console:\n{}", self.console.text());
    }

    /// What it has printed so far.
    pub fn console(&mut self) -> &Console {
        while let Ok(line) = self.lines.try_recv() {
            self.console.lines.push((self.started.elapsed(), line));
        }
        &self.console
    }

    /// Sends one line to the guest's standard input.
    pub fn say(&mut self, line: &str) {
        writeln!(self.qemu.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// The monitor of the guest's QEMU.
    pub fn monitor(&self) -> Client {
        Client::connect(&monitor(self.dir.path(), self.moves))
    }

    /// Starts another QEMU for the guest, whose disk is served at `to` there and at `from` here; a
    /// folder stands for the sockets in it.
    fn destination(&self, from: &Path, to: &Path) -> (Guest, Child, Receiver<String>) {
        let mut guest = self.guest.clone();
        for option in &mut guest.qemu_options {
            *option = option.replace(from.to_str().unwrap(), to.to_str().unwrap());
        }
        let mut with_plugged = guest.clone();
        with_plugged.qemu_options.extend(self.plugged.iter().cloned());
        let (mut qemu, lines) = with_plugged.start(self.dir.path(), self.moves + 1);
        let socket = migration_socket(self.dir.path(), self.moves + 1);
        while !socket.exists() {
            assert_eq!(qemu.try_wait().unwrap(), None, "{:?}", lines.iter().collect::<Vec<_>>());
            assert!(Instant::now() < self.end, "the destination does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        (guest, qemu, lines)
    }

    /// Migrates the guest, as it runs, to another QEMU whose disk is served at `to`.
    pub fn migrate(&mut self, from: &Path, to: &Path) {
        let (guest, qemu, lines) = self.destination(from, to);
        let mut here = self.monitor();
        self.begin_move(&mut here);
        let status = self.end_of_move(&mut here);
        assert_eq!(status["status"], "completed", "{status}");
        here.run("quit", json!({}));
        self.qemu.wait().unwrap();
        while let Ok(line) = self.lines.recv() {
            self.console.lines.push((self.started.elapsed(), line));
        }
        (self.guest, self.qemu, self.lines) = (guest, qemu, lines);
        self.moves += 1;
    }

    /// Begins to migrate the guest, and calls it off when some of it is there.
    pub fn migrate_and_cancel(&mut self, from: &Path, to: &Path) {
        let (_, mut qemu, _lines) = self.destination(from, to);
        let mut here = self.monitor();
        here.run("migrate-set-parameters", json!({"max-bandwidth": 8 << 20}));
        self.begin_move(&mut here);
        loop {
            let status = here.run("query-migrate", json!({}));
            if status["ram"]["transferred"].as_u64() > Some(1 << 20) {
                break;
            }
            assert!(status["status"] != "failed" && Instant::now() < self.end, "{status}");
            std::thread::sleep(Duration::from_millis(10));
        }
        here.run("migrate_cancel", json!({}));
        let status = self.end_of_move(&mut here);
        assert_eq!(status["status"], "cancelled", "{status}");
        // It ends by itself, or by this.
        let _ = qemu.kill();
        qemu.wait().unwrap();
        let (dir, moves) = (self.dir.path(), self.moves + 1);
        for file in [migration_socket(dir, moves), monitor(dir, moves)] {
            let _ = fs::remove_file(file);
        }
        here.run("migrate-set-parameters", json!({"max-bandwidth": 1 << 30}));
    }

    fn begin_move(&self, here: &mut Client) {
        // The guest writes faster than an emulated machine is sent.
        here.run("migrate-set-parameters", json!({"downtime-limit": 10000}));
        here.run("migrate", json!({"uri": uri(self.dir.path(), self.moves + 1)}));
    }

    fn end_of_move(&self, here: &mut Client) -> serde_json::Value {
        loop {
            let status = here.run("query-migrate", json!({}));
            if ["completed", "failed", "cancelled"].iter().any(|end| status["status"] == *end) {
                return status;
            }
            assert!(Instant::now() < self.end, "still on the way: {status}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the power-off, and fails the test unless the script's exit code is 0.
    pub fn finish(mut self) -> Console {
        while self.next_line().is_some() {}
        let status = self.qemu.wait().unwrap();
        let console = std::mem::take(&mut self.console);
        assert!(
            status.success() && console.values("GUEST-EXIT").eq(["0"]),
            "the guest's script failed (QEMU: {status}); its console:\n{}",
            console.text()
        );
        console
    }

    /// The next line of the console; `None` once QEMU has closed it.
    fn next_line(&mut self) -> Option<String> {
        let left = self.end.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => {
                self.console.lines.push((self.started.elapsed(), line.clone()));
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                panic!(
                    "the guest still ran after {:?}; its console:\n{}",
                    self.started.elapsed(),
                    self.console.text()
                )
            }
        }
    }
}

impl Drop for RunningGuest {
    fn drop(&mut self) {
        // Both fail only when QEMU has already been waited for.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// What a guest printed, each line with the time since QEMU's start.
#[derive(Default)]
pub struct Console {
    lines: Vec<(Duration, String)>,
}

impl Console {
    /// The rest of every line that begins with `word` and a space, in order.
    pub fn values(&self, word: &str) -> impl Iterator<Item = &str> {
        self.lines.iter().filter_map(move |(_, line)| line.strip_prefix(word)?.strip_prefix(' '))
    }

    /// The rest of the only line that begins with `word` and a space.
    pub fn value(&self, word: &str) -> &str {
        let mut values = self.values(word);
        match (values.next(), values.next()) {
            (Some(value), None) => value,
            _ => panic!("the guest did not print one line {word:?}; its console:\n{}", self.text()),
        }
    }

    /// All that was printed.
    pub fn plain(&self) -> String {
        self.lines.iter().map(|(_, line)| format!("{line}\n")).collect()
    }

    /// The whole console, for messages.
    pub fn text(&self) -> String {
        self.lines
            .iter()
            .map(|(time, line)| format!("{:8.2} {line}\n", time.as_secs_f64()))
            .collect()
    }
}

fn forward_lines(from: impl Read + Send + 'static, to: Sender<String>) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n') {
            let Ok(line) = line else { break };
            // The receiver is gone once the test has ended; there is nobody left to tell.
            if to.send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned()).is_err() {
                break;
            }
        }
    });
}

fn guest_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest")
}

/// Builds the kernel and the initramfs if they are not there (the script has a lock against other
/// processes).
pub fn build_guest() {
    static BUILT: Once = Once::new();
    BUILT.call_once(|| {
        let status =
            Command::new(guest_dir().join("build.sh")).stdin(Stdio::null()).status().unwrap();
        assert!(status.success(), "tests/guest/build.sh failed: {status}");
    });
}
