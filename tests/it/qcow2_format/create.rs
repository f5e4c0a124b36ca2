//! `create -f qcow2` beside qemu-img's.

use super::*;
use std::fs;

/// Makes the same image with both programs, each in a directory of its own.
struct Pair {
    ours: tempfile::TempDir,
    theirs: tempfile::TempDir,
}

impl Pair {
    fn new() -> Pair {
        let directory = || {
            let dir = crate::file::on_tmpfs();
            fs::File::create(dir.path().join("base.raw")).unwrap().set_len(3 << 20).unwrap();
            dir
        };
        Pair { ours: directory(), theirs: directory() }
    }

    /// What both said: the same, but for advice that follows QEMU's sentence.
    fn create(&self, arguments: &[&str]) -> Outcome {
        let arguments = [&["create", "-f", "qcow2"][..], arguments].concat();
        let outcome = ours(self.ours.path(), &arguments);
        let wanted = theirs(self.theirs.path(), &arguments);
        let begins = outcome.stderr.starts_with(&wanted.stderr);
        let is_same = begins && outcome.stdout == wanted.stdout && outcome.code == wanted.code;
        assert!(is_same, "{arguments:?}: {outcome:?} beside {wanted:?}");
        outcome
    }

    fn read(&self, name: &str) -> [Vec<u8>; 2] {
        [&self.ours, &self.theirs].map(|dir| fs::read(dir.path().join(name)).unwrap())
    }

    /// What qemu-img says of both images, without what they take on the disk.
    fn info(&self, arguments: &[&str]) -> [String; 2] {
        [&self.ours, &self.theirs].map(|dir| {
            let text = qemu_img(dir.path(), arguments);
            let lines = text.lines().filter(|line| !line.contains("actual-size"));
            lines.collect::<Vec<_>>().join("\n")
        })
    }
}

#[test]
fn new_images_are_those_of_qemu_img_to_the_byte() {
    let pair = Pair::new();
    let mapped = "preallocation=metadata";
    for options in [
        &["a.qcow2", "0"][..],
        &["a.qcow2", "1"],
        &["a.qcow2", "1000000"],
        &["a.qcow2", "1.5T"],
        &["-o", "size=10M", "a.qcow2"],
        &["-o", "compat=0.10", "a.qcow2", "10G"],
        &["-o", "compat=v2,cluster_size=512", "a.qcow2", "10M"],
        &["-o", "compat=v3,lazy_refcounts=on", "a.qcow2", "10M"],
        &["-o", "cluster_size=512", "a.qcow2", "1G"],
        &["-o", "cluster_size=4k,refcount_bits=1", "a.qcow2", "10M"],
        &["-o", "cluster_size=8k,refcount_bits=2", "a.qcow2", "10M"],
        &["-o", "cluster_size=2M,refcount_bits=64", "a.qcow2", "10M"],
        &["-o", "extended_l2=on,cluster_size=16k,refcount_bits=32", "a.qcow2", "10M"],
        &["-o", "compression_type=zstd,refcount_bits=4", "a.qcow2", "10M"],
        &["-b", "base.raw", "-F", "raw", "a.qcow2"],
        &["-b", "base.raw", "-F", "raw", "a.qcow2", "10M"],
        &["-o", "backing_file=base.raw,backing_fmt=raw,compat=0.10", "a.qcow2", "10M"],
        &["-u", "-b", "no,where", "-F", "qcow2", "-o", "cluster_size=512", "a.qcow2", "10M"],
        &["-o", "data_file=d.raw", "a.qcow2", "10M"],
        &["-o", "data_file=d.raw,data_file_raw=on", "a.qcow2", "10M"],
        &["-o", "data_file=d.raw,extended_l2=on,preallocation=full", "a.qcow2", "10M"],
        &["-o", "data_file=d.raw,data_file_raw=on,preallocation=falloc", "a.qcow2", "10M"],
        &["-u", "-b", "none", "-F", "raw", "-o", "data_file=d.raw", "a.qcow2", "10M"],
        &["-o", mapped, "a.qcow2", "0"],
        &["-o", mapped, "a.qcow2", "1000"],
        &["-o", mapped, "a.qcow2", "600M"],
        &["-o", "preallocation=metadata,cluster_size=512", "a.qcow2", "1M"],
        &["-o", "preallocation=metadata,cluster_size=4k,refcount_bits=64", "a.qcow2", "30M"],
        &["-o", "preallocation=metadata,cluster_size=512,refcount_bits=1", "a.qcow2", "30M"],
        &["-o", "preallocation=metadata,extended_l2=on", "-b", "base.raw", "-F", "raw", "a.qcow2"],
    ] {
        let outcome = pair.create(options);
        assert_eq!(outcome.code, Some(0), "{options:?}: {outcome:?}");
        let [ours, theirs] = pair.read("a.qcow2");
        assert_eq!(ours.len(), theirs.len(), "{options:?}");
        if ours != theirs {
            let at = ours.iter().zip(&theirs).position(|(a, b)| a != b).unwrap();
            let around = at & !15..(at & !15) + 32;
            let (ours, theirs) = (&ours[around.clone()], &theirs[around]);
            panic!("{options:?}: at {at:#x}: {ours:x?}, not {theirs:x?}");
        }
        if options.iter().any(|option| option.contains("data_file")) {
            let [ours, theirs] = pair.read("d.raw");
            assert!(ours == theirs);
        }
    }
}

#[test]
fn images_that_are_laid_out_otherwise_are_sound_and_say_the_same() {
    let pair = Pair::new();
    for options in [
        &["-o", "preallocation=falloc", "a.qcow2", "10M"][..],
        &["-o", "preallocation=full", "a.qcow2", "10M"],
        &["-o", "preallocation=full,cluster_size=512,compat=0.10", "a.qcow2", "100k"],
        &["-o", "preallocation=full,extended_l2=on,cluster_size=16k", "a.qcow2", "1M"],
        // Refcount tables of several clusters.
        &["-o", "cluster_size=512", "a.qcow2", "20G"],
        &["-o", "cluster_size=512,refcount_bits=64,preallocation=metadata", "a.qcow2", "8M"],
    ] {
        pair.create(options);
        let [ours, theirs] = pair.info(&["info", "--output=json", "a.qcow2"]);
        assert_eq!(ours, theirs);
        let allocated = [&pair.ours, &pair.theirs].map(|dir| {
            let check = qemu_img(dir.path(), &["check", "a.qcow2"]);
            assert!(check.starts_with("No errors were found on the image."), "{check}");
            check.split("allocated").next().unwrap().to_owned()
        });
        assert_eq!(allocated[0], allocated[1]);
        let blocks = |dir: &tempfile::TempDir| {
            use std::os::unix::fs::MetadataExt;
            fs::metadata(dir.path().join("a.qcow2")).unwrap().blocks() / 2
        };
        let (ours, theirs) = (blocks(&pair.ours), blocks(&pair.theirs));
        assert!(ours.abs_diff(theirs) <= 1024, "{options:?}: {ours} KiB, not {theirs}");
    }
}

#[test]
fn what_cannot_be_made_is_refused_in_qemu_imgs_words() {
    let pair = Pair::new();
    for options in [
        &["-o", "compat=1.2", "a.qcow2", "1M"][..],
        &["-o", "cluster_size=256", "a.qcow2", "1M"],
        &["-o", "cluster_size=4M", "a.qcow2", "1M"],
        &["-o", "cluster_size=5000", "a.qcow2", "1M"],
        &["-o", "cluster_size=0", "a.qcow2", "1M"],
        &["-o", "cluster_size=8k,extended_l2=on", "a.qcow2", "1M"],
        &["-o", "compat=0.10,extended_l2=on", "a.qcow2", "1M"],
        &["-o", "compat=0.10,refcount_bits=8", "a.qcow2", "1M"],
        &["-o", "refcount_bits=3", "a.qcow2", "1M"],
        &["-o", "refcount_bits=128", "a.qcow2", "1M"],
        &["-o", "refcount_bits=0", "a.qcow2", "1M"],
        &["-o", "compat=0.10,lazy_refcounts=on", "a.qcow2", "1M"],
        &["-o", "compat=0.10,compression_type=zstd", "a.qcow2", "1M"],
        &["-o", "compression_type=lz4", "a.qcow2", "1M"],
        &["-o", "compat=0.10,data_file=d", "a.qcow2", "1M"],
        &["-o", "data_file_raw=on", "a.qcow2", "1M"],
        &["-o", "preallocation=bogus", "a.qcow2", "1M"],
        &["-o", "preallocation=full", "-b", "base.raw", "-F", "raw", "a.qcow2", "1M"],
        &["-o", "data_file=d,data_file_raw=on", "-b", "base.raw", "-F", "raw", "a.qcow2", "1M"],
        &["-b", "base.raw", "a.qcow2", "1M"],
        &["-b", "nothere", "-F", "raw", "a.qcow2", "1M"],
        &["-b", "nothere", "-F", "raw", "a.qcow2"],
        &["-u", "-b", "nothere", "-F", "raw", "a.qcow2"],
        &["-u", "-b", "nothere", "a.qcow2", "1M"],
        &["-u", "-b", "nothere", "-F", "bogus", "a.qcow2", "1M"],
        &["-b", "base.raw", "-F", "bogus", "a.qcow2", "1M"],
        &["-b", "a.qcow2", "-F", "raw", "a.qcow2"],
        &["-b", "base.raw", "-F", "raw", "sub/a.qcow2"],
        &["-F", "raw", "a.qcow2", "1M"],
        &["-b", "", "-F", "raw", "a.qcow2", "1M"],
        &["-o", "backing_file=,backing_fmt=raw", "a.qcow2", "1M"],
        &["-o", "cluster_size=512", "a.qcow2", "129G"],
        &["a.qcow2", "7E"],
        &["a.qcow2"],
        &["no/a.qcow2", "1M"],
        &["-o", "nonsense=1", "a.qcow2", "1M"],
        &[r#"json:{"driver":"qcow2","file.filename":"a.qcow2","file.driver":"file"}"#, "1M"],
        &[r#"json:{"driver":"raw","file.filename":"a.qcow2","file.driver":"file"}"#, "1M"],
    ] {
        let outcome = pair.create(options);
        assert_eq!(outcome.code, Some(1), "{options:?}: {outcome:?}");
        assert!(!pair.ours.path().join("a.qcow2").exists(), "{options:?}");
    }
    let long = "x/".repeat(510) + "x";
    let name = ["-u", "-F", "qcow2", "-o", "cluster_size=512", "-b", &long, "a.qcow2", "1M"];
    let outcome = pair.create(&name);
    assert!(outcome.stderr.ends_with("No space left on device"), "{outcome:?}");
    let long = "x/".repeat(511) + "xy";
    let outcome = pair.create(&["-u", "-F", "qcow2", "-b", &long, "a.qcow2", "1M"]);
    assert!(outcome.stderr.ends_with("Invalid argument"), "{outcome:?}");

    let raw = ["create", "-f", "raw", "-b", "base.raw", "-F", "raw", "a.raw", "1M"];
    assert_eq!(ours(pair.ours.path(), &raw), theirs(pair.theirs.path(), &raw));
    let outcome =
        ours(pair.ours.path(), &["create", "-f", "qcow2", "-o", "encryption=on", "e", "1M"]);
    assert_eq!(outcome.stderr, "e: Encryption of qcow2 images is not supported");
}

#[test]
fn the_options_are_listed_as_qemu_img_lists_them() {
    let pair = Pair::new();
    for arguments in [&["-o", "help"][..], &["-o", "help", "a.qcow2"]] {
        let arguments = [&["create", "-f", "qcow2"][..], arguments].concat();
        let mut outcome = ours(pair.ours.path(), &arguments);
        // Of a later version.
        let lines = outcome.stdout.split_inclusive('\n');
        outcome.stdout = lines.filter(|line| !line.contains("keep_data_file")).collect();
        assert_eq!(outcome, theirs(pair.theirs.path(), &arguments), "{arguments:?}");
    }
}

#[test]
fn all_options_are_shown_in_qemu_imgs_order() {
    let pair = Pair::new();
    let all = "nocow=on,extent_size_hint=0,preallocation=metadata,lazy_refcounts=on,compat=1.1,\
               cluster_size=128k,refcount_bits=8,compression_type=zstd,extended_l2=on,\
               data_file=d,data_file_raw=on";
    pair.create(&["-o", all, "a,b.qcow2", "1M"]);
}

#[test]
fn an_image_and_its_data_file_are_two_files() {
    let pair = Pair::new();
    let dir = pair.ours.path();
    fs::write(dir.join("a.qcow2"), "old").unwrap();
    let options = ["create", "-f", "qcow2", "-o", "data_file=./a.qcow2", "a.qcow2", "1M"];
    let outcome = ours(dir, &options);
    let wanted = "a.qcow2: './a.qcow2' cannot be the image and its data file";
    assert_eq!((outcome.stderr.as_str(), outcome.code), (wanted, Some(1)));
}
