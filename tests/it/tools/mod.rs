//! The image tools beside the real ones: same output, exit codes and files.
//!
//! The same command lines run through `vublk` under the tools' names and through Debian's qemu-img and qemu-io on
//! equal files.

mod advice;
mod bitmaps;
mod chains;
mod compressed;
mod data_files;
mod deep;
mod events;
mod files;
mod formats;
mod guessing;
mod io;
mod lengths;
mod lines;
mod map;
mod measure;
mod messages;
mod names;
mod newer;
mod no_text;
mod options;
mod parallels;
mod parallels_bundle;
mod progress;
mod qcow;
mod qcow_random;
mod qed;
mod random;
mod read_only;
mod round_trips;
mod second_judges;
mod served;
mod snapshots;
mod targets;
mod unheard;
mod vdi;
mod vhdx;
mod vhdx_parents;
mod vmdk;
mod vmdk_esx;
mod vmdk_made;
mod vmdk_random;
mod vmdk_writing;
mod vpc;
mod vpc_parents;

pub use deep::chain_of;

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const VUBLK: &str = env!("CARGO_BIN_EXE_vublk");

/// What a command line came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A directory in which programs run, and links to both implementations.
pub struct Place {
    dir: tempfile::TempDir,
    links: tempfile::TempDir,
    ours: bool,
}

impl Place {
    /// `ours`: the tools are vublk. Otherwise they are QEMU's.
    pub fn new(ours: bool) -> Place {
        let links = tempfile::tempdir().unwrap();
        if ours {
            for name in ["qemu-img", "qemu-io"] {
                symlink(VUBLK, links.path().join(name)).unwrap();
            }
        }
        Place { dir: tempfile::tempdir().unwrap(), links, ours }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The program to call for this name.
    pub fn program(&self, name: &str) -> PathBuf {
        if self.ours { self.links.path().join(name) } else { name.into() }
    }

    /// Runs a line of words; those in single quotes may hold blanks.
    pub fn run(&self, line: &str) -> Ended {
        let words = words(line);
        self.run_program(&self.program(&words[0]), &words[1..])
    }

    /// As [`Place::run`], with QEMU's programs in any place.
    pub fn run_theirs(&self, line: &str) -> Ended {
        let words = words(line);
        self.run_program(Path::new(&words[0]), &words[1..])
    }

    fn run_program(&self, program: &Path, arguments: &[String]) -> Ended {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.path()).stdin(Stdio::null());
        command.env_remove("RUST_LOG").env("LC_ALL", "C");
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| mask(&String::from_utf8_lossy(bytes));
        Ended {
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }

    /// Copies all files: raw ones with their holes, images without, as they were written.
    fn copy_to(&self, place: &Place) {
        let entries = std::fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().path());
        let (images, others): (Vec<PathBuf>, Vec<PathBuf>) =
            entries.partition(|path| path.extension().is_some_and(|found| found == "qcow2"));
        for (files, sparse) in [(images, "never"), (others, "auto")] {
            let mut copy = Command::new("cp");
            copy.args(["-a", &format!("--sparse={sparse}"), "-t"]).arg(place.path()).args(&files);
            assert!(files.is_empty() || copy.status().unwrap().success());
        }
    }

    /// All files with their contents and the bytes that are no holes.
    pub fn files(&self) -> BTreeMap<String, (Vec<u8>, u64)> {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(self.path()).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().to_string_lossy().into_owned();
            let file = std::fs::File::open(entry.path()).unwrap();
            files.insert(name, (std::fs::read(entry.path()).unwrap(), stored(&file)));
        }
        files
    }
}

impl Place {
    /// As [`Place::files`], for images what a guest would see of them, and where it comes from.
    fn disks(&self) -> BTreeMap<String, (Vec<u8>, u64)> {
        self.disks_and_maps(|_| true)
    }

    /// As [`Place::disks`], where only of some images it counts where their contents come from.
    fn disks_and_maps(&self, mapped: impl Fn(&str) -> bool) -> BTreeMap<String, (Vec<u8>, u64)> {
        let mut files = self.files();
        let run = |arguments: &[&str]| {
            let output = Command::new("qemu-img").args(arguments).current_dir(self.path()).output();
            let output = output.unwrap();
            output.status.success().then_some(output.stdout)
        };
        for (name, file) in files.iter_mut().filter(|(name, _)| name.ends_with(".qcow2")) {
            let Some(map) = run(&["map", "--output=json", name]) else {
                *file = (Vec::new(), 0);
                continue;
            };
            assert!(run(&["check", "-q", name]).is_some(), "{name} is not sound");
            let map = String::from_utf8(map).unwrap();
            let map = map.lines().map(|line| line.split(", \"offset\"").next().unwrap_or_default());
            let mut seen = Vec::new();
            if mapped(name) {
                seen.extend(map.flat_map(|line| line.trim_end_matches("},").bytes()));
            }
            let contents = self.links.path().join("contents.raw");
            run(&["convert", "-O", "raw", name, contents.to_str().unwrap()]).unwrap();
            seen.extend(std::fs::read(&contents).unwrap());
            std::fs::remove_file(contents).unwrap();
            *file = (seen, 0);
        }
        files
    }
}

/// How many bytes of a file are no holes.
fn stored(file: &std::fs::File) -> u64 {
    let (mut at, mut sum) = (0, 0);
    loop {
        // SAFETY: the descriptor is open.
        let data = unsafe { libc::lseek(file.as_raw_fd(), at, libc::SEEK_DATA) };
        if data < 0 {
            return sum;
        }
        // SAFETY: as above.
        at = unsafe { libc::lseek(file.as_raw_fd(), data, libc::SEEK_HOLE) };
        sum += (at - data) as u64;
    }
}

/// The words of a line.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (index, part) in line.split('\'').enumerate() {
        match index % 2 {
            1 => words.push(part.to_owned()),
            _ => words.extend(part.split_whitespace().map(str::to_owned)),
        }
    }
    words
}

/// What stands before the name of a node of ours.
const NAMED: [&str; 3] = ["node 'image", " to image", " in 'image"];

/// What differs from run to run: times, rates and the names that nodes are given.
fn mask(text: &str) -> String {
    let mut out = String::new();
    // What QEMU says where Debian's package of its modules is not installed.
    let lines = text.split_inclusive('\n').filter(|line| !line.starts_with("qemu: module "));
    for line in lines {
        let timed = line.starts_with("Run completed in ") || line.contains(" ops/sec)");
        match (timed, line.find("#block"), NAMED.iter().find_map(|before| line.find(before))) {
            (true, ..) => {
                let end = line.find(" in ").map(|at| at + 4).or(line.find(';'));
                out.push_str(&line[..end.unwrap_or_default()]);
                out.push_str("TIME\n");
            }
            (_, Some(at), _) => {
                let rest = line[at + 6..].trim_start_matches(|c: char| c.is_ascii_digit());
                out.push_str(&format!("{}NODE{rest}", &line[..at]));
            }
            (_, _, Some(at)) => {
                let at = at + line[at..].find("image").unwrap();
                let rest = line[at + 5..].trim_start_matches(|c: char| c.is_ascii_digit());
                out.push_str(&format!("{}NODE{rest}", &line[..at]));
            }
            _ => out.push_str(line),
        }
    }
    out
}

/// Runs each line in fresh places, behind the same preparation, and compares everything. All
/// differences are told at once.
pub fn assert_same(prepare: &[&str], lines: &[&str]) {
    assert_alike(prepare, lines, |place| place.files());
}

/// As [`assert_same`], but of qcow2 images the contents are compared, as qemu-img reads them, and what
/// layer they come from; the images must be sound.
pub fn assert_same_disks(prepare: &[&str], lines: &[&str]) {
    assert_alike(prepare, lines, Place::disks);
}

fn assert_alike(
    prepare: &[&str],
    lines: &[&str],
    left: impl Fn(&Place) -> BTreeMap<String, (Vec<u8>, u64)>,
) {
    let mut wrong = String::new();
    // Made once, by the same programs for both.
    let prepared = Place::new(false);
    fixture(prepared.path());
    for step in prepare {
        let ended = prepared.run(step);
        assert_eq!(ended.code, Some(0), "{step}: {}", ended.stderr);
    }
    for line in lines {
        let both = [true, false].map(|ours| {
            let place = Place::new(ours);
            prepared.copy_to(&place);
            let ended: Vec<Ended> = line.split(" && ").map(|step| place.run(step)).collect();
            (ended, left(&place))
        });
        let [(ours, our_files), (theirs, their_files)] = both;
        if ours != theirs {
            wrong += &format!("\n{line}\n  ours:   {ours:?}\n  theirs: {theirs:?}\n");
        }
        let names: Vec<&String> = our_files.keys().chain(their_files.keys()).collect();
        for name in names {
            let (a, b) = (our_files.get(name), their_files.get(name));
            if a != b {
                let shown = |file: Option<&(Vec<u8>, u64)>| match file {
                    Some((bytes, stored)) => format!("{} bytes, {stored} stored", bytes.len()),
                    None => "none".into(),
                };
                wrong += &format!("\n{line}\n  file {name}: {}; {}\n", shown(a), shown(b));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Runs the lines with our tools on the image `x.FORMAT`; then QEMU finds it sound, and the same bytes as it finds after
/// it has run them itself.
fn assert_same_contents(format: &str, prepare: &[&str], lines: &[&str]) {
    let mut contents = Vec::new();
    for ours in [true, false] {
        let place = Place::new(ours);
        fixture(place.path());
        for line in prepare {
            assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
        }
        let ended: Vec<_> = lines.iter().map(|line| place.run(line)).collect();
        let checked = place.run_theirs(&format!("qemu-img check -f {format} x.{format}"));
        assert_eq!(checked.code, Some(0), "ours: {ours}: {lines:?}: {checked:?}");
        let copied =
            place.run_theirs(&format!("qemu-img convert -f {format} -O raw x.{format} all.raw"));
        assert_eq!(copied.code, Some(0), "ours: {ours}: {copied:?}");
        let info = place.run_theirs(&format!("qemu-img info -f {format} --output=json x.{format}"));
        let info = info.stdout.lines().filter(|line| !line.contains("actual-size"));
        let info = info.collect::<Vec<_>>().join("\n");
        contents.push((ended, info, std::fs::read(place.path().join("all.raw")).unwrap()));
    }
    assert_eq!(contents[0].0, contents[1].0);
    assert_eq!(contents[0].1, contents[1].1);
    assert!(contents[0].2 == contents[1].2, "{lines:?}: other bytes");
}

/// The files that command lines name: `a.raw` has data, written zeroes and holes; `b.raw` is nearly
/// the same; `long.raw` is `a.raw` and more holes; `odd.raw` ends within a sector; `magic.bin`,
/// `h.bochs`, `h.cloop` and `h.luks` begin as images of QEMU's formats do.
fn fixture(dir: &Path) {
    use std::os::unix::fs::FileExt;
    let make = |name: &str, len: u64, parts: &[(u64, usize, u8)]| {
        let file = std::fs::File::create(dir.join(name)).unwrap();
        file.set_len(len).unwrap();
        for &(at, count, byte) in parts {
            file.write_all_at(&vec![byte; count], at).unwrap();
        }
    };
    let parts = [(0, 4096, 0), (65536, 65536, 7), (262144, 65536, 0), (700_000, 5_000, 9)];
    make("a.raw", 1 << 20, &parts);
    make("b.raw", 1 << 20, &[&parts[..], &[(307_200, 1024, 9)]].concat());
    make("long.raw", 3 << 20, &parts);
    make("longer.raw", 3 << 20, &[&parts[..], &[(2_500_000, 1, 9)]].concat());
    make("odd.raw", 70_000, &[(0, 70_000, 3)]);
    make("small.raw", 1024, &[]);
    make("empty.raw", 0, &[]);
    let mut luks = [0; 512];
    luks[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
    std::fs::write(dir.join("h.luks"), luks).unwrap();
    std::fs::write(dir.join("magic.bin"), b"QFI\xfb\0\0\0\x03").unwrap();
    let bochs =
        [(0, "Bochs Virtual HD Image"), (32, "Redolog"), (48, "Growing"), (64, "\0\0\x02\0")];
    let cloop = "#!/bin/sh\n#V2.0 Format\n\
                 modprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
    for (name, parts) in [("h.bochs", &bochs[..]), ("h.cloop", &[(0, cloop)])] {
        let file = std::fs::File::create(dir.join(name)).unwrap();
        file.set_len(512).unwrap();
        parts.iter().for_each(|&(at, text)| file.write_all_at(text.as_bytes(), at).unwrap());
    }
}
