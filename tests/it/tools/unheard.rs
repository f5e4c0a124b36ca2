//! Tools whose output nobody reads or that cannot write it: the work continues.

use super::VUBLK;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

/// A qcow2 image with a leaked cluster and one of which the refcount is too low.
fn broken(path: &Path) {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"])
        .arg(path)
        .arg("1M")
        .status()
        .unwrap();
    assert!(made.success());
    let mut image = std::fs::read(path).unwrap();
    let word = |at: usize| u64::from_be_bytes(*image[at..].first_chunk().unwrap()) as usize;
    let block = word(word(48));
    // Cluster 5 is the first data cluster; cluster 40 is used by nobody.
    image[block + 5 * 2..][..2].copy_from_slice(&[0, 0]);
    image[block + 40 * 2..][..2].copy_from_slice(&[0, 1]);
    std::fs::write(path, image).unwrap();
}

fn is_sound(path: &Path) -> bool {
    let checked = Command::new("qemu-img").args(["check", "-q"]).arg(path).status().unwrap();
    checked.success()
}

/// A pipe that nobody reads.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn full_device() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

#[test]
fn a_repair_goes_on_when_nobody_reads_what_it_prints() {
    for unheard in [closed_pipe, full_device] {
        for program in ["vublk", "qemu-img"] {
            let dir = tempfile::tempdir().unwrap();
            let image = dir.path().join("broken.qcow2");
            let link = dir.path().join(program);
            std::os::unix::fs::symlink(VUBLK, &link).unwrap();
            broken(&image);
            assert!(!is_sound(&image));
            let ended = Command::new(&link)
                .args(["check", "-r", "all"])
                .arg(&image)
                .stdout(unheard())
                .stderr(unheard())
                .status()
                .unwrap();
            assert_eq!(ended.code(), Some(0), "{program}");
            assert!(is_sound(&image), "{program}");
        }
    }
}

#[test]
fn an_error_that_cannot_be_printed_is_still_reported_by_the_exit_code() {
    let lines: [&[&str]; 5] = [
        &["info", "/nonexistent"],
        &["check", "--nonsense"],
        &["io", "-c", "read 0 1", "/nonexistent"],
        &["serve", "/nonexistent", "--socket", "/nonexistent"],
        &["nonsense"],
    ];
    for arguments in lines {
        for unheard in [closed_pipe, full_device] {
            let ended = Command::new(VUBLK)
                .args(arguments)
                .stdout(unheard())
                .stderr(unheard())
                .status()
                .unwrap();
            let code = ended.code();
            assert!(code.is_some_and(|code| code != 0 && code != 101), "{arguments:?}: {ended}");
        }
    }
}

#[test]
fn a_write_past_the_limit_on_file_sizes_fails_and_the_program_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("limited.raw");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let ran = Command::new("prlimit")
        .args(["--fsize=1048576", VUBLK, "io", "-f", "raw"])
        .args(["-c", "write 2M 4k", "-c", "write -P 7 0 4k", "-c", "read -P 7 0 4k"])
        .arg(&image)
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.code().is_some(), "it was killed: {}", ran.status);
    assert!(said.contains("File too large"), "{said}");
    assert!(said.contains("read 4096/4096 bytes at offset 0"), "{said}");
    let converted = Command::new("prlimit")
        .args(["--fsize=1048576", VUBLK, "convert", "-f", "raw", "-O", "qcow2"])
        .arg("-S0")
        .args([&image, &dir.path().join("t.qcow2")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&converted.stderr);
    assert_eq!(converted.status.code(), Some(1), "{said}");
    assert!(said.contains("File too large"), "{said}");
}
