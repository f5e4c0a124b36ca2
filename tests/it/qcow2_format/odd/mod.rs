//! Images of old versions of QEMU, and odd ones with patched bytes.
//!
//! qemu-img and vublk run the same command lines on them.

mod counts;
mod names;
mod old;
mod snapshots;

use super::*;
use std::fs;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Runs commands of qemu-io, and others of qemu-img (which begin with `!`), on the image in a folder.
fn change(dir: &Path, commands: &[&str]) {
    for command in commands {
        match command.strip_prefix('!') {
            Some(line) => {
                qemu_img(dir, &with_image(line));
            }
            None => {
                let output = run(dir, &["qemu-io", "-c", command], &["image"]);
                assert!(output.status.success(), "{command}: {}", stderr(&output));
            }
        }
    }
}

/// An image's bytes.
#[derive(Clone)]
struct Bytes(Vec<u8>);

impl Bytes {
    /// An image made by `create`'s options, written by commands of qemu-io, and changed by others of
    /// qemu-img (which begin with `!`).
    fn new(options: &str, commands: &[&str]) -> Bytes {
        let dir = crate::file::on_tmpfs();
        qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", options, "image", "4M"]);
        change(dir.path(), commands);
        Bytes(fs::read(dir.path().join("image")).unwrap())
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(*self.0[at as usize..].first_chunk().unwrap())
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> &mut Bytes {
        self.0[at as usize..][..bytes.len()].copy_from_slice(bytes);
        self
    }

    fn set(&mut self, at: u64, word: u64) -> &mut Bytes {
        self.put(at, &word.to_be_bytes())
    }

    /// Where the entries of the snapshot table are.
    fn snapshots(&self) -> Vec<u64> {
        let mut at = self.word(64);
        let half = |at: u64| self.word(at) >> 48;
        (0..self.word(60) >> 32)
            .map(|_| {
                let here = at;
                let extra = self.word(here + 36) >> 32;
                at = (here + 40 + extra + half(here + 12) + half(here + 14)).next_multiple_of(8);
                here
            })
            .collect()
    }

    /// Cuts the extra data of all snapshots to this many bytes, as older versions of QEMU wrote it.
    fn cut_extra(&mut self, left: usize) -> &mut Bytes {
        let start = self.word(64) as usize;
        let mut table = Vec::new();
        for at in self.snapshots().into_iter().map(|at| at as usize) {
            let entry = &self.0[at..];
            let half = |at: usize| usize::from(u16::from_be_bytes([entry[at], entry[at + 1]]));
            let names = 40 + (self.word(at as u64 + 36) >> 32) as usize;
            table.extend(&entry[..36]);
            table.extend((left as u32).to_be_bytes());
            table.extend(&entry[40..40 + left]);
            table.extend(&entry[names..names + half(12) + half(14)]);
            table.resize(table.len().next_multiple_of(8), 0);
        }
        let end = self.0.len().max(start + 4096);
        self.0.resize(end, 0);
        self.0[start..start + 4096].fill(0);
        self.put(start as u64, &table)
    }

    /// The data of a header extension.
    fn extension(&self, kind: u32) -> u64 {
        let mut at = self.word(96) & 0xffff_ffff;
        loop {
            let head = self.word(at);
            if head >> 32 == u64::from(kind) {
                return at + 8;
            }
            assert!(head != 0, "no extension {kind:#x}");
            at += 8 + (head & 0xffff_ffff).next_multiple_of(8);
        }
    }

    /// Puts a NUL byte instead of each `X` of a text.
    fn with_nul(&mut self, text: &str) -> &mut Bytes {
        let bytes = text.replace('X', "\0");
        let find = |image: &Bytes| image.0.windows(text.len()).position(|at| at == text.as_bytes());
        assert!(find(self).is_some(), "no {text}");
        while let Some(at) = find(self) {
            self.put(at as u64, bytes.as_bytes());
        }
        self
    }
}

fn with_image(line: &str) -> Vec<&str> {
    let mut arguments: Vec<&str> = line.split(' ').collect();
    if !arguments.contains(&"image") {
        arguments.push("image");
    }
    arguments
}

/// What an image reports about itself, without what it occupies.
fn plain(text: &str) -> String {
    text.lines()
        .filter(|line| !line.contains("disk size") && !line.contains("actual-size"))
        .fold(String::new(), |all, line| all + line.trim_end() + "\n")
}

/// Runs command lines on an image, which is their last operand unless they name it; those that begin with
/// `io` are for qemu-io. What was told, without names of nodes, and the image that is left.
fn run_all(image: &Bytes, lines: &[&str], is_ours: bool) -> (Vec<Outcome>, Bytes) {
    let dir = crate::file::on_tmpfs();
    let path = dir.path();
    fs::write(path.join("image"), &image.0).unwrap();
    qemu_img(path, &["create", "-q", "-f", "raw", "base.raw", "4M"]);
    let seen = lines.iter().map(|line| {
        let mut outcome = match line.strip_prefix("io ") {
            Some(command) => {
                let program: &[&str] = if is_ours { &[VUBLK, "io"] } else { &["qemu-io"] };
                let name = if is_ours { "vublk" } else { "qemu-io" };
                outcome(&run(path, program, &["-f", "qcow2", "-c", command, "image"]), name)
            }
            None => {
                let arguments = with_image(line);
                if is_ours { ours(path, &arguments) } else { theirs(path, &arguments) }
            }
        };
        outcome.stdout = match line.starts_with("io ") {
            true => String::new(),
            false => plain(&outcome.stdout),
        };
        let logged =
            |line: &str| line.find("qcow2: ").map_or(line.to_owned(), |at| line[at..].to_owned());
        let closing = |line: &&str| !line.ends_with(": closing: Input/output error");
        outcome.stderr =
            outcome.stderr.lines().filter(closing).map(logged).collect::<Vec<_>>().join("\n");
        outcome
    });
    let seen = seen.collect();
    (seen, Bytes(fs::read(path.join("image")).unwrap()))
}

/// The same from both. The images that are left.
fn assert_same(what: &str, image: &Bytes, lines: &[&str]) -> [Bytes; 2] {
    let [mine, wanted] = [true, false].map(|is_ours| run_all(image, lines, is_ours));
    assert_eq!(mine.0, wanted.0, "{what}: {lines:?}");
    [mine.1, wanted.1]
}

fn check(image: &Bytes) -> Outcome {
    run_all(image, &["check"], false).0.remove(0)
}

fn is_corrupt(image: &Bytes) -> bool {
    image.word(72) & 2 != 0
}

const SNAPSHOTS: [&str; 4] =
    ["write -P 1 0 64k", "!snapshot -c s1", "write -P 2 0 64k", "!snapshot -c s2"];
