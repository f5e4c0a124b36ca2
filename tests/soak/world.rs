//! The world of the soak: one guest, the daemon that serves its disks, and the images.

use crate::boot::{Guest, RunningGuest};
use crate::client::Client;
use crate::daemon::Daemon;
use crate::server::output_of;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

/// Bytes of the disks at first. The second is resized.
const SIZES: [u64; 2] = [64 * MIB, 64 * MIB];

/// How long the guest may take for a command: minutes, for a machine that is busy with other things.
const ANSWER: Duration = Duration::from_secs(240);

pub struct World {
    pub dir: TempDir,
    /// Declared, and so ended, before what it lives on.
    guest: Option<RunningGuest>,
    pub daemon: Option<Daemon>,
    lives: usize,
    /// Of the two hosts that there seem to be, the one on which the guest is: each has its sockets.
    host: usize,
    commands: usize,
    /// The hot-plugged disk is there.
    pub plugged: bool,
    /// What the hot-plugged disk held when it was unplugged.
    pub unplugged_sum: Option<String>,
    /// Numbers of the memory modules that are plugged in.
    pub modules: Vec<usize>,
    pub next_module: usize,
    counts: BTreeMap<&'static str, u64>,
    rounds: BTreeMap<String, u64>,
    time: Duration,
}

impl World {
    /// The guest, its disks and its daemon, begun.
    pub fn new(time: Duration) -> World {
        // Where O_DIRECT works.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut world = World {
            dir,
            guest: None,
            daemon: None,
            lives: 0,
            host: 0,
            commands: 0,
            plugged: false,
            unplugged_sum: None,
            modules: Vec::new(),
            next_module: 0,
            counts: BTreeMap::new(),
            rounds: BTreeMap::new(),
            time,
        };
        for (name, size) in ["disk0", "disk1", "hot"].iter().zip([SIZES[0], SIZES[1], 32 * MIB]) {
            File::create(world.image(name)).unwrap().set_len(size).unwrap();
        }
        for host in 0..2 {
            fs::create_dir(world.folder(host)).unwrap();
        }
        world.daemon = Some(world.next_daemon());
        let mut guest = world.machine().boot(include_str!("guest.sh"));
        guest.value_within("READY", ANSWER);
        world.guest = Some(guest);
        world.wait_connected();
        world
    }

    pub fn image(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.img"))
    }

    fn folder(&self, host: usize) -> PathBuf {
        self.dir.path().join(format!("host{host}"))
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.folder(self.host).join(format!("{name}.sock"))
    }

    /// QEMU with the disks.
    fn machine(&self) -> Guest {
        Guest::new()
            .cpus(4)
            .with_fio()
            .for_more(self.time * 2 + Duration::from_secs(600))
            .reconnecting_disk(&self.socket("disk0"), 4)
            .reconnecting_disk(&self.socket("disk1"), 2)
            .qemu(&["-m", "slots=4,maxmem=2G"])
            .qemu(&["-device", "pcie-root-port,id=slot1,chassis=1,slot=1,bus=pcie.0,addr=10"])
    }

    /// How a disk is described to the daemon: its node and its export.
    pub fn node(&self, name: &str) -> Value {
        json!({"driver": "raw", "node-name": name, "cache": {"direct": true}, "file": {
            "driver": "file", "filename": self.image(name), "cache": {"direct": true}}})
    }

    pub fn export(&self, name: &str, queues: u16) -> Value {
        json!({"type": "vhost-user-blk", "id": name, "node-name": name, "writable": true,
            "num-queues": queues, "addr": {"type": "unix", "path": self.socket(name)},
            "iothread": if name == "hot" { "io1" } else { "io0" }})
    }

    /// The disks that the daemon has to serve now, with their queues.
    fn disks(&self) -> Vec<(&'static str, u16)> {
        let mut disks = vec![("disk0", 4), ("disk1", 2)];
        if self.plugged {
            disks.push(("hot", 2));
        }
        disks
    }

    /// Starts the daemon's next life, with all that it has to serve now.
    pub fn next_daemon(&mut self) -> Daemon {
        self.start_daemon(false)
    }

    /// Moves the guest to the other host, where a daemon waits for it.
    pub fn migrate(&mut self) {
        let from = self.folder(self.host);
        self.host = 1 - self.host;
        let to = self.folder(self.host);
        let mut there = self.start_daemon(true);
        // Until it is ready.
        drop(there.monitor());
        self.guest().migrate(&from, &to);
        let disks = self.disks().len();
        self.daemon().wait_log("the disk is given up", disks);
        self.daemon().end();
        self.replace_daemon(there);
        self.wait_connected();
    }

    /// `incoming`: the guest, and with it the images, are still with another daemon.
    fn start_daemon(&mut self, incoming: bool) -> Daemon {
        let mut options: Vec<String> = Vec::new();
        for number in 0..2 {
            options.extend(["--object".into(), format!("iothread,id=io{number}")]);
        }
        for (name, queues) in self.disks() {
            let mut node = self.node(name);
            let mut export = self.export(name, queues);
            if incoming {
                node["active"] = json!(false);
                export["allow-inactive"] = json!(true);
            }
            if name == "disk0" {
                // Its queues are dealt to both.
                export["iothread"] = json!(["io0", "io1"]);
            }
            options.extend(["--blockdev".into(), node.to_string()]);
            options.extend(["--export".into(), export.to_string()]);
        }
        self.lives += 1;
        Daemon::start(self.dir.path(), self.lives, &options)
    }

    pub fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("it was begun")
    }

    pub fn guest(&mut self) -> &mut RunningGuest {
        self.guest.as_mut().expect("it was begun")
    }

    /// The monitor of the guest's QEMU, which has one client at a time.
    pub fn qmp(&mut self) -> Client {
        self.guest().monitor()
    }

    /// The daemon's next life has begun.
    pub fn replace_daemon(&mut self, next: Daemon) {
        let last = self.daemon.replace(next).expect("there was one");
        self.account(&last.said());
        // An hour has a thousand lives; of what went wrong, the last ones tell.
        if let Some(old) = self.lives.checked_sub(20) {
            let _ = fs::remove_file(self.dir.path().join(format!("daemon-{old}.log")));
        }
    }

    /// Adds up what a daemon's log says.
    fn account(&mut self, log: &str) {
        let again = log.lines().filter_map(|line| line.strip_suffix(" requests are begun again"));
        let again: u64 =
            again.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
        *self.counts.entry("requests begun again").or_default() += again;
        *self.counts.entry("lives of the daemon").or_default() += 1;
        let bad: Vec<&str> = log.lines().filter(|line| is_bad(line)).collect();
        assert!(bad.is_empty(), "the daemon says {bad:?}:\n{log}");
    }

    /// Waits until QEMU has come back to every disk.
    pub fn wait_connected(&mut self) {
        let disks = self.disks().len();
        self.daemon().wait_log("front end connected", disks);
    }

    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Runs a command in the guest, which must succeed. The last line of what it says.
    pub fn ask_guest(&mut self, command: &str) -> String {
        self.commands += 1;
        let id = self.commands;
        let guest = self.guest();
        guest.say(&format!("{id} {command}"));
        let answer = guest.value_within(&format!("DONE {id} "), ANSWER);
        let (code, line) = answer.split_once(' ').unwrap_or((&answer, ""));
        assert_eq!(code, "0", "in the guest: {command}: {line}");
        line.to_owned()
    }

    /// Nothing may have gone wrong so far.
    pub fn check(&mut self) {
        let console = self.guest().console();
        let failed: Vec<&str> = console.values("FAILED").collect();
        assert!(failed.is_empty(), "the guest says {failed:?}; its console:\n{}", console.text());
    }

    /// Ends the guest, and holds what it read last against the images.
    pub fn finish(&mut self) {
        let mut guest = self.guest.take().expect("it was begun");
        guest.say("0 stop");
        let console = guest.finish();
        for name in console.values("ROUND") {
            *self.rounds.entry(name.to_owned()).or_default() += 1;
        }
        let failed: Vec<&str> = console.values("FAILED").collect();
        assert!(failed.is_empty(), "{failed:?}; the console:\n{}", console.text());
        self.daemon().end();
        let log = self.daemon().said();
        self.account(&log);
        let sums: BTreeMap<&str, &str> =
            console.values("SUM").filter_map(|line| line.split_once(' ')).collect();
        for (disk, image) in [("vda", "disk0"), ("vdb", "disk1")] {
            let on_host = output_of("sha256sum", [self.image(image)]);
            let on_host = on_host.split(' ').next();
            assert_eq!(on_host, sums.get(disk).copied(), "{image} is not what the guest reads");
        }
        for name in ["four", "mixed"] {
            assert!(self.rounds.contains_key(name), "load {name} came to no end of a round");
        }
    }

    /// The verdict's figures.
    pub fn table(&mut self) -> String {
        if let Some(guest) = &mut self.guest {
            for name in guest.console().values("ROUND") {
                *self.rounds.entry(name.to_owned()).or_default() += 1;
            }
        }
        let rounds = self.rounds.iter().map(|(name, count)| (format!("rounds of {name}"), *count));
        let counts = self.counts.iter().map(|(name, count)| (name.to_string(), *count));
        let mut table = "| what | times |\n|---|--:|\n".to_owned();
        for (what, times) in counts.chain(rounds) {
            table += &format!("| {what} | {times} |\n");
        }
        table
    }

    /// Writes down what is not on the disk yet and keeps the folder, without the images.
    pub fn keep_logs(&mut self) -> PathBuf {
        let dir = self.dir.path().to_owned();
        if let Some(guest) = &mut self.guest {
            let _ = fs::write(dir.join("console.log"), guest.console().text());
        }
        self.guest = None;
        self.daemon = None;
        self.dir.disable_cleanup(true);
        dir
    }
}

/// A line of the daemon's that a guest which keeps to the rules gives no reason for.
fn is_bad(line: &str) -> bool {
    ["ERROR", "panicked", "stopped:", "connection ended"].iter().any(|word| line.contains(word))
}

/// Waits for an event of this name, from `client`, about the device `id`.
pub fn wait_event(client: &mut Client, name: &str, field: &str, id: &str) {
    loop {
        let event = client.event();
        if event["event"] == name && event["data"][field] == id {
            return;
        }
    }
}

/// A path as JSON has it.
pub fn text(path: &Path) -> String {
    path.to_str().expect("a path that is text").to_owned()
}
