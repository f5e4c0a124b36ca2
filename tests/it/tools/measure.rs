//! `measure` for qcow2 images: qemu-img's numbers and words, and never less than `convert` takes.

use super::{Place, fixture};
use serde_json::Value;

/// Runs lines that change nothing through both, in one place.
fn assert_same_on(prepare: &[&str], lines: &[String]) {
    let theirs = Place::new(false);
    fixture(theirs.path());
    for step in prepare {
        let ended = theirs.run(step);
        assert_eq!(ended.code, Some(0), "{step}: {}", ended.stderr);
    }
    let ours = Place { dir: theirs.dir, ..Place::new(true) };
    let mut wrong = String::new();
    for line in lines {
        let ended = ours.run(line);
        let theirs = ours.run_theirs(line);
        if ended != theirs {
            wrong += &format!("\n{line}\n  ours:   {ended:?}\n  theirs: {theirs:?}\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

const OPTIONS: &[&str] = &[
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=1k,refcount_bits=1",
    "refcount_bits=8",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=2M,refcount_bits=32",
    "compat=0.10",
    "compat=1.1,lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full,cluster_size=8k",
    "data_file=x.data",
    "data_file=x.data,data_file_raw=on",
    "compression_type=zstd",
    "backing_fmt=raw",
];

#[test]
fn empty_disks_are_measured_as_by_qemu_img() {
    // Where another table or refcount block begins, among others.
    let sizes = [
        "0",
        "1",
        "512",
        "1001",
        "65536",
        "65537",
        "512M",
        "536870913",
        "1G",
        "2147287040",
        "2147352576",
        "8G",
        "100G",
        "1T",
        "128T",
        "2P",
        "2251799813685249",
        "7E",
        "9223372036854775807",
    ];
    let mut lines = Vec::new();
    for size in sizes {
        for options in OPTIONS {
            lines.push(format!("qemu-img measure -O qcow2 --size {size} -o {options}"));
        }
    }
    for line in [
        "--size 1G --output=json",
        "--size 1G -o compat=v3",
        "--size 1G -o compat=v2",
        "--size 1G -o compat=",
        "--size 1G -o compat=x,cluster_size=3",
        "--size 1G -o cluster_size=0",
        "--size 1G -o cluster_size=4M",
        "--size 1G -o cluster_size=x",
        "--size 1G -o extended_l2=on,cluster_size=3,preallocation=x",
        "--size 1G -o extended_l2=on,cluster_size=512,preallocation=x",
        "--size 1G -o extended_l2=on,compat=0.10",
        "--size 1G -o refcount_bits=3,preallocation=x",
        "--size 1G -o refcount_bits=0",
        "--size 1G -o refcount_bits=128",
        "--size 1G -o refcount_bits=1,compat=0.10",
        "--size 7E -o refcount_bits=3",
        "--size 1G -o preallocation=x",
        "--size 1G -o preallocation=",
        "--size 1G -o encryption=off",
        "--size 1G -o encryption=x",
        "--size 1G -o size=7E",
        "--size 1G -o bogus=1",
        "--size 1G -o help",
        "--size 1G -o cluster_size=4k -o refcount_bits=1",
        "--size 1G -o backing_file=x",
        "--size 1G -o backing_file=x,preallocation=full",
        "--size 1G -o compression_type=bogus",
        "--size 1G -o data_file_raw=on",
    ] {
        lines.push(format!("qemu-img measure -O qcow2 {line}"));
    }
    assert_same_on(&[], &lines);
}

/// Images with holes, zeroes, data, compressed clusters, backing files, bitmaps and snapshots.
const SOURCES: &[&str] = &[
    "qemu-img create -q -f raw holes.raw 40M",
    "qemu-io -f raw -c 'write 0 1k' -c 'write 65000 2k' -c 'write 30M 3M' -c 'write -z 10M 1M' holes.raw",
    "qemu-img convert -O qcow2 holes.raw plain.qcow2",
    "qemu-img convert -c -O qcow2 -o cluster_size=16k holes.raw packed.qcow2",
    "qemu-img create -q -f qcow2 -b plain.qcow2 -F qcow2 over.qcow2 70M",
    "qemu-io -c 'write 5M 100k' -c 'write -z 30M 1M' -c 'write 60M 70000' over.qcow2",
    "qemu-img create -q -f qcow2 -o extended_l2=on -b a.raw -F raw subs.qcow2",
    "qemu-io -c 'write 64k 3k' -c 'write -z 500k 6k' subs.qcow2",
    "qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 3M",
    "qemu-io -c 'write 1M 1M' old.qcow2",
    "qemu-img create -q -f qcow2 empty.qcow2 1000",
    "qemu-img create -q -f qcow2 -b plain.qcow2 -F qcow2 marked.qcow2 70M",
    "qemu-img snapshot -c before marked.qcow2",
    "qemu-io -c 'write 0 5M' marked.qcow2",
    "qemu-img bitmap --add marked.qcow2 b0",
    "qemu-img bitmap --add -g 512 marked.qcow2 a-name-that-is-not-short",
    "qemu-img bitmap --add --disable -g 2M marked.qcow2 b2",
];

#[test]
fn images_are_measured_as_by_qemu_img() {
    let images = [
        "a.raw",
        "odd.raw",
        "empty.raw",
        "holes.raw",
        "plain.qcow2",
        "packed.qcow2",
        "over.qcow2",
        "subs.qcow2",
        "old.qcow2",
        "empty.qcow2",
        "marked.qcow2",
    ];
    let mut lines = Vec::new();
    for image in images {
        let format = if image.ends_with("raw") { "raw" } else { "qcow2" };
        for options in OPTIONS {
            lines.push(format!("qemu-img measure -O qcow2 -f {format} -o {options} {image}"));
        }
    }
    for line in [
        "--output=json marked.qcow2",
        "--output=json plain.qcow2",
        "--output=json old.qcow2",
        "-l before marked.qcow2",
        "-l snapshot.name=before -o cluster_size=512 marked.qcow2",
        "-l nope marked.qcow2",
        "-l before holes.raw",
        "-U marked.qcow2",
        "-o backing_file=plain.qcow2 over.qcow2",
        "-o backing_file=plain.qcow2,backing_fmt=qcow2,preallocation=metadata over.qcow2",
        "--image-opts driver=qcow2,file.filename=over.qcow2,backing.file.filename=a.raw,backing.driver=raw,backing.file.driver=file",
        "--image-opts driver=raw,file.filename=holes.raw,offset=30M",
        "nope",
    ] {
        lines.push(format!("qemu-img measure -O qcow2 {line}"));
    }
    lines.push("qemu-img measure -O raw marked.qcow2".into());
    assert_same_on(SOURCES, &lines);
}

#[test]
fn what_is_required_is_enough_even_where_the_file_cannot_grow() {
    let place = Place::new(true);
    fixture(place.path());
    let run = |line: &str| {
        let ended = place.run(line);
        assert_eq!(ended.code, Some(0), "{line}: {}", ended.stderr);
        ended
    };
    for step in SOURCES {
        run(step);
    }
    let options = [
        "cluster_size=64k",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=1k,refcount_bits=1",
        "cluster_size=2M",
        "extended_l2=on",
        "compat=0.10",
        "preallocation=full,cluster_size=8k",
    ];
    for image in ["a.raw", "odd.raw", "holes.raw", "packed.qcow2", "over.qcow2", "marked.qcow2"] {
        for options in options {
            let line = format!("qemu-img measure --output=json -O qcow2 -o {options} {image}");
            let measured: Value = serde_json::from_str(&run(&line).stdout).unwrap();
            let bytes = |key: &str| measured[key].as_u64().unwrap_or(0);
            let all = bytes("required") + bytes("bitmaps");
            let keeps = if bytes("bitmaps") > 0 { "--bitmaps" } else { "" };
            run(&format!("qemu-img convert {keeps} -O qcow2 -o {options} {image} new.qcow2"));
            let taken = std::fs::metadata(place.path().join("new.qcow2")).unwrap().len();
            assert!(taken <= all, "{image} {options}: {taken} bytes are taken, {measured}");
            if options.contains("preallocation") {
                continue;
            }
            let info = run(&format!("qemu-img info --output=json {image}")).stdout;
            let len = serde_json::from_str::<Value>(&info).unwrap()["virtual-size"].clone();
            run(&format!("qemu-img create -q -f qcow2 -o {options} tight.qcow2 {len}"));
            let tight = std::fs::File::options().write(true).open(place.path().join("tight.qcow2"));
            tight.unwrap().set_len(all).unwrap();
            run(&format!(
                "qemu-img convert {keeps} -n --target-image-opts {image} \
                 driver=qcow2,file.driver=raw,file.size={all},file.file.driver=file,\
                 file.file.filename=tight.qcow2"
            ));
            assert_eq!(run(&format!("qemu-img compare tight.qcow2 {image}")).code, Some(0));
        }
    }
}
