//! `amend` beside qemu-img's: the same messages, and equivalent images.

use super::*;

/// An image with data, zero clusters and holes.
fn make(dir: &Path, options: &str) {
    qemu_img(dir, &["create", "-q", "-f", "raw", "base.raw", "2M"]);
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        create.extend(["-o", options]);
    }
    qemu_img(dir, &[&create[..], &["a.qcow2", "1M"]].concat());
    let commands =
        ["write -P 5 0 128k", "write -z 256k 128k", "write -z 64k 64k", "write -z 900k 124k"];
    let output = run(
        dir,
        &["qemu-io", "-c", commands[0], "-c", commands[1], "-c", commands[2]],
        &["-c", commands[3], "a.qcow2"],
    );
    assert!(output.status.success(), "{}", stderr(&output));
}

fn contents(dir: &Path) -> Vec<u8> {
    qemu_img(dir, &["convert", "-O", "raw", "a.qcow2", "contents.raw"]);
    std::fs::read(dir.join("contents.raw")).unwrap()
}

/// What an image reports about itself, without what it occupies.
fn info(dir: &Path) -> String {
    let info = qemu_img(dir, &["info", "a.qcow2"]);
    info.lines().filter(|line| !line.starts_with("disk size")).collect::<Vec<_>>().join("\n")
}

/// Amends equal images with both, one list of options after the other.
fn assert_same(create: &str, steps: &[&str]) {
    let both = [true, false].map(|is_ours| {
        let dir = crate::file::on_tmpfs();
        let path = dir.path();
        make(path, create);
        let before = contents(path);
        let mut seen = Vec::new();
        for step in steps {
            let arguments = ["amend", "-f", "qcow2", "-o", step, "a.qcow2"];
            let outcome = if is_ours { ours(path, &arguments) } else { theirs(path, &arguments) };
            let checked = theirs(path, &["check", "a.qcow2"]);
            assert_eq!(checked.code, Some(0), "{create}: {step}: {checked:?}");
            seen.push((outcome, info(path)));
        }
        let after = contents(path);
        let both = before.len().min(after.len());
        assert!(before[..both] == after[..both], "{create}: {steps:?}");
        assert!(after[both..].iter().all(|&byte| byte == 0), "{create}: {steps:?}");
        seen
    });
    assert_eq!(both[0], both[1], "{create}: {steps:?}");
}

#[test]
fn options_are_changed_as_qemu_img_changes_them() {
    assert_same("", &["compat=0.10", "compat=1.1", "compat=v2", "compat=v3"]);
    assert_same("backing_file=base.raw,backing_fmt=raw", &["compat=0.10", "size=2M", "compat=1.1"]);
    assert_same("cluster_size=4k", &["lazy_refcounts=on", "compat=0.10", "size=3M"]);
    assert_same("", &["size=2M", "size=512k", "lazy_refcounts=on,size=1M", "lazy_refcounts=off"]);
    assert_same(
        "cluster_size=512",
        &["refcount_bits=1", "refcount_bits=64", "refcount_bits=2,size=2M", "refcount_bits=16"],
    );
    assert_same(
        "refcount_bits=8",
        &["compat=0.10", "compat=0.10,refcount_bits=16", "compat=1.1,refcount_bits=32"],
    );
    assert_same("compat=0.10", &["compat=1.1,lazy_refcounts=on,refcount_bits=8"]);
}

#[test]
fn what_qemu_img_does_not_change_is_refused_in_its_words() {
    let refused = [
        "refcount_bits=3",
        "refcount_bits=0",
        "refcount_bits=128",
        "refcount_bits=x",
        "size=1000001",
        "size=abc",
        "cluster_size=4k",
        "preallocation=off",
        "extended_l2=on",
        "encryption=off",
        "encrypt.format=luks",
        "encrypt.state=active",
        "backing_file=base.raw,backing_fmt=raw",
        "backing_fmt=",
        "data_file=x",
        "data_file_raw=on",
        "compat=9",
        "compat=0.10,lazy_refcounts=on",
        "compat=0.10,refcount_bits=8",
        "lazy_refcounts=maybe",
        "nosuch=1",
        "help",
    ];
    assert_same("", &refused);
    assert_same("compat=0.10", &["refcount_bits=8", "lazy_refcounts=on"]);
    assert_same("extended_l2=on", &["compat=0.10"]);
}

#[test]
fn what_qemu_img_would_spoil_is_refused() {
    let dir = crate::file::on_tmpfs();
    make(dir.path(), "");
    qemu_img(dir.path(), &["snapshot", "-c", "s", "a.qcow2"]);
    let outcome = ours(dir.path(), &["amend", "-o", "refcount_bits=1", "a.qcow2"]);
    let found = "Cannot decrease refcount entry width to 1 bits: Cluster at offset";
    assert!(outcome.stderr.starts_with(found), "{outcome:?}");
    let checked = theirs(dir.path(), &["check", "a.qcow2"]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
}
