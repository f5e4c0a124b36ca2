//! Holes of an image's file inside allocated clusters.
//!
//! They read as zeroes, and are shown and left out where qemu-img does that.

use super::assert_same;

/// Images whose names end otherwise than in `.qcow2` are copied with their holes.
const PREPARE: &[&str] = &[
    "qemu-img create -q -f qcow2 -o preallocation=metadata meta.img 8M",
    "qemu-io -f qcow2 -c 'write -P 1 100k 100k' -c 'write -P 2 3M 64k' -c 'write -z 5M 128k' \
     -c 'discard 6M 128k' meta.img",
    "qemu-img create -q -f qcow2 -o preallocation=metadata,cluster_size=4k small.img 1M",
    "qemu-io -f qcow2 -c 'write -P 1 100k 100k' -c 'write -P 2 333k 1000' small.img",
    "qemu-img create -q -f qcow2 -o preallocation=metadata,extended_l2=on ext.img 4M",
    "qemu-io -f qcow2 -c 'write -P 1 100k 3k' -c 'write -z 1M 30k' ext.img",
    "qemu-img create -q -f qcow2 -o preallocation=falloc full.img 2M",
    "qemu-io -f qcow2 -c 'write -P 1 10k 3k' full.img",
    "qemu-img create -q -f qcow2 -o preallocation=metadata,refcount_bits=1 narrow.img 2M",
    "qemu-img create -q -f qcow2 -o preallocation=metadata,refcount_bits=64 wide.img 2M",
    "qemu-img create -q -f qcow2 -o data_file=data.raw,data_file_raw=on solid.img 4M",
    "qemu-io -f qcow2 -c 'write -P 1 100k 100k' solid.img",
    "cp --sparse=always solid.img apart.img",
    "qemu-img create -q -f qcow2 -b meta.img -F qcow2 over.img",
    "qemu-io -f qcow2 -c 'write -P 7 2M 256k' -c 'write -z 3M 32k' over.img",
    "qemu-img create -q -f qcow2 20.img 1280k",
    "qemu-io -f qcow2 -c 'write -P 1 0 1280k' 20.img",
    "cp 20.img short.img",
    "truncate -s 1000000 short.img",
    "qemu-img create -q -f qcow2 -b short.img -F qcow2 long.img 2M",
];

const LINES: &[&str] = &[
    "map",
    "map --output=json",
    "map --output=json -s 100k -l 3M",
    "measure -O qcow2",
    "compare -s meta.img",
];

#[test]
fn holes_of_the_file_are_shown_inside_clusters() {
    let images = ["meta", "small", "ext", "full", "narrow", "wide", "solid", "apart", "over"];
    let mut lines = Vec::new();
    for image in images.iter().chain(&["20", "short", "long"]) {
        lines.extend(LINES.iter().map(|line| format!("qemu-img {line} {image}.img")));
    }
    lines.extend(
        ["meta", "over"].map(|image| format!("qemu-img convert -O raw {image}.img new.raw")),
    );
    assert_same(PREPARE, &lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn a_file_with_few_holes_is_not_asked_for_them() {
    // 25 clusters in use. QEMU goes by whether they are 10 for 9 that are stored, and 2 more.
    for punched in 0..4 {
        let mut prepare = PREPARE.to_vec();
        let steps: Vec<String> = (0..punched)
            .map(|n| format!("fallocate -p -o {} -l 65536 20.img", 327_680 + 3 * n * 65536))
            .collect();
        prepare.retain(|step| step.contains("20.img"));
        prepare.extend(steps.iter().map(String::as_str));
        assert_same(&prepare, &["qemu-img map --output=json 20.img", "qemu-img map 20.img"]);
    }
}
