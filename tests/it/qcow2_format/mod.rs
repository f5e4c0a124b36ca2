//! qcow2 image files made and repaired, beside qemu-img.

mod amend;
mod check;
mod check_lines;
mod create;
mod features;
mod info;
mod odd;

use crate::cli::{VUBLK, run, stderr};
use std::path::Path;
use std::process::Output;

/// What a program printed, and how it ended.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    stdout: String,
    stderr: String,
    code: Option<i32>,
}

/// Runs `qemu-img` in a directory.
fn theirs(dir: &Path, arguments: &[&str]) -> Outcome {
    outcome(&run(dir, &["qemu-img"], arguments), "qemu-img")
}

/// Runs `vublk` with the same arguments.
fn ours(dir: &Path, arguments: &[&str]) -> Outcome {
    outcome(&run(dir, &[VUBLK], arguments), "vublk")
}

/// Without the program's name, and without the blank ends that hints have.
fn outcome(output: &Output, name: &str) -> Outcome {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    let stderr = stderr(output).replace(&format!("{name}: "), "");
    Outcome {
        stdout: text(&output.stdout),
        stderr: text(stderr.as_bytes()),
        code: output.status.code(),
    }
}

/// Runs `qemu-img` to success, and gives what it printed.
fn qemu_img(dir: &Path, arguments: &[&str]) -> String {
    let outcome = theirs(dir, arguments);
    assert_eq!(outcome.code, Some(0), "{arguments:?}: {outcome:?}");
    outcome.stdout
}
