//! Progress of long work: QEMU's lines with `-p` and on a signal, and a bar on a terminal.

use super::{Place, VUBLK, assert_same, words};
use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

/// `d.raw` has data, holes and an end that is no step's; `o.qcow2` stands on it.
const PREPARE: &[&str] = &[
    "qemu-img create -q -f raw d.raw 9M",
    "qemu-io -f raw -c 'write -P 1 0 5M' -c 'write -P 2 6M 1500k' d.raw",
    "qemu-img create -q -f raw e.raw 7M",
    "qemu-io -f raw -c 'write -P 1 0 5M' -c 'write -P 3 6M 500k' e.raw",
    "qemu-img create -q -f qcow2 -b d.raw -F raw o.qcow2",
    "qemu-io -c 'write -P 3 1M 2500k' -c 'write -z 7M 1M' o.qcow2",
];

#[test]
fn lines_of_progress_are_reported_as_qemu_tells_them() {
    assert_same(
        PREPARE,
        &[
            "qemu-img convert -p -f raw d.raw new.raw",
            "qemu-img convert -p -f raw -S 0 d.raw new.raw",
            "qemu-img convert -p -f raw d.raw e.raw new.raw",
            "qemu-img convert -p -W -m 1 o.qcow2 new.raw",
            "qemu-img convert -p -q o.qcow2 new.raw",
            "qemu-img compare -p -f raw -F raw d.raw d.raw",
            "qemu-img compare -p -f raw -F raw d.raw e.raw",
            "qemu-img compare -p -s -f raw -F raw d.raw e.raw",
            "qemu-img compare -p o.qcow2 e.raw",
        ],
    );
    super::assert_same_disks(
        PREPARE,
        &[
            "qemu-img convert -p -f raw -c -O qcow2 d.raw new.qcow2",
            "qemu-img convert -p -O qcow2 -B d.raw -F raw o.qcow2 new.qcow2",
            "qemu-img rebase -p -b e.raw -F raw o.qcow2",
            "qemu-img rebase -p -b '' o.qcow2",
            "qemu-img rebase -p -u -b e.raw -F raw o.qcow2",
            "qemu-img rebase -p -b nothere -F raw o.qcow2",
        ],
    );
}

/// A place with the files of [`PREPARE`].
fn prepared(ours: bool) -> Place {
    let place = Place::new(ours);
    for step in PREPARE {
        let ended = place.run_theirs(step);
        assert_eq!(ended.code, Some(0), "{step}: {}", ended.stderr);
    }
    place
}

/// Both ends of a new terminal.
fn terminal() -> (File, File) {
    let (mut outer, mut inner) = (0, 0);
    let none = std::ptr::null_mut();
    // SAFETY: both places are ours to write to; a terminal may have no name, settings and size.
    let made = unsafe {
        libc::openpty(&mut outer, &mut inner, none, none.cast_const().cast(), none.cast())
    };
    assert_eq!(made, 0);
    // SAFETY: the descriptors are new, and nobody else has them.
    unsafe { (File::from_raw_fd(outer), File::from_raw_fd(inner)) }
}

/// What a program writes to a terminal.
fn on_terminal(program: &Path, line: &str, place: &Place) -> (ExitStatus, String) {
    let (mut outer, inner) = terminal();
    let mut command = Command::new(program);
    command.args(&words(line)[..]).current_dir(place.path()).stdin(Stdio::null());
    command.env("TERM", "xterm").env("LC_ALL", "C");
    command.stdout(inner.try_clone().unwrap()).stderr(inner);
    let mut child = command.spawn().unwrap();
    // The last inner end is the child's.
    drop(command);
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    // An error is how a terminal tells that nobody has its inner end any more.
    while let Ok(n @ 1..) = outer.read(&mut part) {
        bytes.extend(&part[..n]);
    }
    (child.wait().unwrap(), String::from_utf8(bytes).unwrap())
}

/// What somebody sees at the end of what a terminal was sent.
fn seen(text: &str) -> String {
    let mut lines = vec![String::new()];
    for part in text.split_inclusive(['\r', '\n']) {
        let line = lines.last_mut().unwrap();
        let printed = match part.rsplit_once("\u{1b}[2K") {
            Some((_, rest)) => {
                line.clear();
                rest
            }
            None => part,
        };
        line.push_str(printed.trim_end_matches(['\r', '\n']));
        if part.ends_with('\n') {
            lines.push(String::new());
        }
    }
    lines.join("\n")
}

#[test]
fn a_terminal_shows_a_bar_which_leaves_nothing_behind() {
    for (line, left) in [
        // Slow enough for each step to be drawn.
        ("convert -r 8M -f raw -O qcow2 d.raw new.qcow2", ""),
        ("convert -p -r 8M -f raw -O qcow2 d.raw new.qcow2", ""),
        ("dd -f raw if=d.raw of=new.raw bs=64k", ""),
        ("compare -f raw -F raw d.raw d.raw", "Images are identical.\n"),
        ("compare -f raw -F raw d.raw e.raw", "Content mismatch at offset 6291456!\n"),
        ("rebase -b e.raw -F raw o.qcow2", ""),
        ("commit o.qcow2", "Image committed.\n"),
        ("amend -o lazy_refcounts=on o.qcow2", ""),
    ] {
        let place = prepared(true);
        let (status, text) = on_terminal(Path::new(VUBLK), line, &place);
        assert!(status.success() || line.contains("e.raw"), "{line}: {text}");
        assert_eq!(seen(&text), left, "{line}: {text:?}");
        assert!(text.starts_with('[') && text.contains("%, "), "{line}: {text:?}");
        assert!(text.contains("[===") || !line.starts_with("convert"), "{line}: {text:?}");
        assert!(text.contains(" MB/s, ") || !line.starts_with("convert"), "{line}: {text:?}");
    }
}

#[test]
fn there_is_no_bar_without_a_terminal_with_q_or_for_qemus_names() {
    let place = prepared(true);
    let quiet =
        place.run_program(Path::new(VUBLK), &words("convert -f raw -O qcow2 d.raw new.qcow2"));
    assert_eq!((quiet.code, &*quiet.stdout, &*quiet.stderr), (Some(0), "", ""));
    let (status, text) = on_terminal(Path::new(VUBLK), "convert -q -f raw d.raw new.raw", &place);
    assert_eq!((status.code(), &*text), (Some(0), ""));
    for line in ["convert -f raw d.raw new.raw", "compare -p -f raw -F raw d.raw d.raw"] {
        let ours = on_terminal(&place.program("qemu-img"), line, &place);
        let theirs = on_terminal(Path::new("qemu-img"), line, &place);
        assert_eq!(ours, theirs, "{line}");
    }
}

/// What a conversion answers to a signal that reaches it under way; empty if it came too late.
fn answer_of_conversion(place: &Place) -> String {
    let mut command = Command::new(place.program("qemu-img"));
    command.args(words("convert -f raw -r 3M d.raw new.raw")).current_dir(place.path());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let catches_it = || {
        let status = std::fs::read_to_string(&status).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        let caught = u64::from_str_radix(caught.trim(), 16).unwrap();
        caught & 1 << (libc::SIGUSR1 - 1) != 0
    };
    while !catches_it() && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    if child.try_wait().unwrap().is_none() {
        // SAFETY: the child is ours, and has not been waited for.
        assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGUSR1) }, 0);
    }
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success() && ended.stdout.is_empty(), "{ended:?}");
    String::from_utf8(ended.stderr).unwrap()
}

#[test]
fn a_signal_asks_a_conversion_how_far_it_has_come() {
    for ours in [true, false] {
        let place = prepared(ours);
        // On a busy machine it may have ended before it could be asked.
        let mut answers = (0..20).map(|_| answer_of_conversion(&place));
        let answer = answers.find(|answer| !answer.is_empty()).unwrap_or_default();
        let percent = answer.strip_prefix("    (").and_then(|rest| rest.strip_suffix("/100%)\n"));
        let (whole, rest) = percent.and_then(|percent| percent.split_once('.')).unwrap_or_default();
        assert!(whole.parse::<u8>().is_ok_and(|n| n <= 100) && rest.len() == 2, "{answer:?}");
    }
}
