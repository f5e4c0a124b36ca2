//! Images made with QEMU's tools, and QEMU's reports about them.

use super::read::cluster_size;
use std::path::PathBuf;
use std::process::Command;

/// A folder of images, beside the build, where files may have holes.
pub struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    pub fn new() -> Images {
        Images { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs one of QEMU's tools in the folder; its output.
    pub fn run(&self, tool: &str, arguments: &[&str]) -> String {
        let output = Command::new(tool).args(arguments).current_dir(&self.dir).output();
        let output = output.unwrap_or_else(|error| panic!("{tool}: {error}"));
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{tool} {arguments:?}: {out}{err}");
        out.into_owned()
    }

    pub fn create(&self, name: &str, size: u64, options: &str) {
        let size = size.to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([name, &size]);
        self.run("qemu-img", &arguments);
    }

    /// Commands for qemu-io, which must not fail but where QEMU's way is to fail.
    pub fn io(&self, name: &str, commands: &[String]) {
        if let Err(line) = self.try_io(name, commands) {
            panic!("{name}: {line}");
        }
    }

    /// Commands for qemu-io. Compressed writes of clusters that are there already fail, which is
    /// QEMU's way. The first line of another error, if any.
    fn try_io(&self, name: &str, commands: &[String]) -> Result<(), String> {
        for some in commands.chunks(200) {
            let mut tool = Command::new("qemu-io");
            tool.args(["-d", "unmap", "-f", "qcow2"]).current_dir(&self.dir);
            for command in some {
                tool.args(["-c", command]);
            }
            let output = tool.arg(name).output().unwrap();
            let text =
                String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            let is_error = |line: &&str| line.contains("ailed") || line.contains("rror");
            let mut errors = text.lines().filter(is_error);
            if let Some(line) = errors.find(|&line| line != "write failed: Input/output error") {
                return Err(line.to_owned());
            }
        }
        Ok(())
    }

    /// Makes an image and changes it at random; with `snapshot`, takes one and changes it again.
    ///
    /// QEMU 7.2 at times spoils compressed clusters as it writes, and then cannot read them itself, or
    /// finds its image corrupt and takes no more commands. Such an image proves nothing: the next one
    /// is taken.
    pub fn fill(&self, name: &str, size: u64, kind: &str, rng: &mut fastrand::Rng, snapshot: bool) {
        let cluster = cluster_size(kind);
        let extended = kind.contains("extended_l2");
        for _ in 0..10 {
            self.create(name, size, kind);
            let commands = random_commands(rng, size, 512, cluster, true, extended);
            let mut done = self.try_io(name, &commands);
            if snapshot && done.is_ok() {
                // Compressed clusters share host clusters: narrow refcounts may have no room for more.
                if !kind.contains("refcount_bits") || kind.contains("refcount_bits=64") {
                    self.run("qemu-img", &["snapshot", "-c", "one", name]);
                }
                let unit = 4096.min(cluster);
                let commands = random_commands(rng, size, unit, cluster, true, extended);
                done = self.try_io(name, &commands);
            }
            if done.is_ok() && self.is_sound(name) {
                return;
            }
            println!("{kind}: QEMU has spoilt its image: {done:?}");
        }
        panic!("{kind}: QEMU spoils every image");
    }

    /// Whether qemu-img finds no error in an image and can read all of it: `check` alone does not look
    /// into compressed clusters.
    fn is_sound(&self, name: &str) -> bool {
        let succeeds = |arguments: &[&str]| {
            let output = Command::new("qemu-img").args(arguments).current_dir(&self.dir).output();
            output.unwrap().status.success()
        };
        succeeds(&["check", "-q", "-f", "qcow2", name])
            && succeeds(&["convert", "-f", "qcow2", "-O", "raw", name, "contents.raw"])
    }

    /// Everything that a guest finds on the disk, as qemu-img sees it.
    pub fn contents(&self, name: &str) -> Vec<u8> {
        self.run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", name, "contents.raw"]);
        std::fs::read(self.path("contents.raw")).unwrap()
    }
}

/// Random changes of a disk of `size` bytes, as qemu-io takes them. `unit` is what they are multiples
/// of; whole clusters are what compressed writes need.
///
/// With `extended` L2 entries QEMU 7.2 spoils compressed clusters that it changes parts of, so that it
/// cannot read them itself: they are then kept to the upper half of the disk, and all else to the lower.
pub fn random_commands(
    rng: &mut fastrand::Rng,
    size: u64,
    unit: u64,
    cluster: u64,
    compress: bool,
    extended: bool,
) -> Vec<String> {
    let count = 60;
    let half = size / cluster / 2 * cluster;
    (0..count)
        .map(|n| {
            // Compressed ones first: later they hardly find a cluster that is free.
            let kind = if n < 8 { 9 } else { rng.u8(0..10) };
            let align = if kind >= 5 && compress { cluster } else { unit };
            let (from, to) = match (extended && compress, kind >= 8) {
                (true, true) => (half, size),
                (true, false) => (0, half),
                _ => (0, size),
            };
            let first = rng.u64(from / align..to / align);
            let most = (to / align - first).min(if align == unit { 40 } else { 3 });
            let (at, len) = (first * align, rng.u64(1..=most) * align);
            match kind {
                0..5 => format!("write -P {} {at} {len}", n % 250 + 1),
                5 => format!("write -z {at} {len}"),
                6 => format!("write -zu {at} {len}"),
                7 => format!("discard {at} {len}"),
                _ if compress => format!("write -c -P {} {at} {len}", n % 250 + 1),
                _ => format!("write -P {} {at} {len}", n % 250 + 1),
            }
        })
        .collect()
}
