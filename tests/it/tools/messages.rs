//! Messages about files that are missing, have no format given, or have the wrong type.

use super::{Place, assert_alike, assert_same, assert_same_disks};
use std::collections::BTreeMap;

/// `lone.qcow2` and `lowest.qcow2`, at the end of a chain, stand on files that are gone.
const PREPARE: &[&str] = &[
    "qemu-img create -q -f qcow2 -u -b gone.raw -F raw lone.qcow2 1M",
    "qemu-img bitmap --add lone.qcow2 old",
    "qemu-img create -q -f qcow2 -u -b gone.qcow2 -F qcow2 lowest.qcow2 1M",
    "qemu-img create -q -f qcow2 -u -b lowest.qcow2 -F qcow2 top.qcow2 1M",
    "qemu-img create -q -f qcow2 -o data_file=d.raw d.qcow2 1M",
    "qemu-img create -q -f qcow2 plain.qcow2 1M",
];

#[test]
fn a_missing_backing_file_is_reported_of_in_the_same_words() {
    let mut lines = Vec::new();
    for image in ["lone.qcow2", "top.qcow2"] {
        for line in [
            "convert IMAGE x.raw",
            "map IMAGE",
            "compare IMAGE a.raw",
            "info --backing-chain IMAGE",
            "rebase -b a.raw -F raw IMAGE",
            "rebase -b '' IMAGE",
            "commit IMAGE",
            "resize IMAGE 2M",
            "measure -O qcow2 IMAGE",
            "dd if=IMAGE of=x",
            "snapshot -c x IMAGE",
            "bench -c 1 IMAGE",
            "amend -o lazy_refcounts=on IMAGE",
            "create -f qcow2 -b IMAGE -F qcow2 n.qcow2",
            "create -f qcow2 -b IMAGE n.qcow2",
            "convert -O qcow2 -B IMAGE -F qcow2 a.raw n.qcow2",
        ] {
            lines.push(format!("qemu-img {}", line.replace("IMAGE", image)));
        }
        lines.push(format!("qemu-io -c 'read 0 512' {image}"));
        lines.push(format!("qemu-img bitmap --add {image} new"));
        lines.push("qemu-img bitmap --add --merge old -b lone.qcow2 plain.qcow2 new".into());
    }
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    assert_same_disks(PREPARE, &lines);
}

#[test]
fn a_format_that_is_left_out_is_reported_of_in_the_same_words() {
    assert_same_disks(
        PREPARE,
        &[
            "qemu-img create -f qcow2 -b a.raw n.qcow2",
            "qemu-img create -q -f qcow2 -b plain.qcow2 n.qcow2",
            "qemu-img create -f qcow2 -u -b a.raw n.qcow2 1M",
            "qemu-img create -f qcow2 -o backing_file=a.raw n.qcow2",
            "qemu-img convert -O qcow2 -B a.raw b.raw n.qcow2",
            "qemu-img convert -O qcow2 -B gone.raw b.raw n.qcow2",
            "qemu-img convert -O qcow2 -o backing_file=a.raw b.raw n.qcow2",
            "qemu-img rebase -u -b a.raw plain.qcow2",
            "qemu-io -c 'write 0 512' a.raw",
        ],
    );
}

#[test]
fn what_cannot_be_compressed_is_refused_in_the_same_words() {
    // What QEMU's has zeroed before it fails is not all there.
    let words = |_: &Place| BTreeMap::new();
    assert_alike(
        PREPARE,
        &[
            "qemu-img convert -c -O raw a.raw n.raw",
            "qemu-img convert -c -n -O qcow2 a.raw d.qcow2",
            "qemu-img convert -c -n --target-image-opts a.raw driver=qcow2,file.filename=d.qcow2",
            "qemu-img convert -c -n --target-image-opts a.raw driver=raw,file.filename=b.raw",
            "qemu-img convert -c -n a.raw b.raw",
        ],
        words,
    );
}

#[test]
fn of_several_writes_that_fail_the_first_in_the_image_is_reported() {
    let place = Place::new(true);
    std::fs::write(place.path().join("full.raw"), vec![7; 8 << 20]).unwrap();
    let made = place.run("qemu-img create -q -f qcow2 -o data_file=d.raw d.qcow2 8M");
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    // Which of them fails first is a matter of chance.
    for _ in 0..12 {
        let ended = place.run("qemu-img convert -c -n -m 16 -f raw -O qcow2 full.raw d.qcow2");
        let said = "qemu-img: error while writing at byte 0: Operation not supported\n";
        assert_eq!((ended.code, &*ended.stderr), (Some(1), said));
    }
}

#[test]
fn an_option_of_an_image_may_stand_beside_its_single_kinds() {
    let info = |options: &str| {
        format!("qemu-img info --image-opts driver=qcow2,file.filename=plain.qcow2,{options}")
    };
    let lines = [
        "overlap-check=all,overlap-check.active-l1=off",
        "overlap-check.active-l1=off,overlap-check=all",
        "overlap-check=all,overlap-check.template=all",
        "overlap-check=all,overlap-check.active-l1=maybe",
    ]
    .map(info);
    assert_same(PREPARE, &lines.each_ref().map(String::as_str));
}

#[test]
fn nothing_is_made_by_a_description_of_what_there_is() {
    let plain = r#"'json:{"driver":"file","filename":"a.raw"}'"#;
    let format = r#"'json:{"driver":"qcow2","file":{"driver":"file","filename":"plain.qcow2"}}'"#;
    let mut lines = Vec::new();
    for name in [plain, format, "'json:{}'"] {
        for line in [
            "create -f raw NAME 1k",
            "create -f qcow2 NAME 1M",
            "convert b.raw NAME",
            "convert -O qcow2 b.raw NAME",
            "create -f raw -o help NAME",
        ] {
            lines.push(format!("qemu-img {}", line.replace("NAME", name)));
        }
        // What is given with -f is the driver of what is described.
        for line in ["info -f raw NAME", "map -f raw NAME", "resize -f raw NAME 2M"] {
            lines.push(format!("qemu-img {}", line.replace("NAME", name)));
        }
    }
    lines.push(r#"qemu-img dd if=b.raw 'of=json:{"driver":"file","filename":"a.raw"}'"#.into());
    assert_same_disks(PREPARE, &lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn a_data_file_is_made_by_a_name_alone() {
    let place = Place::new(true);
    let ended = place
        .run(r#"qemu-img create -q -f qcow2 -o 'data_file=json:{"driver":"qcow2"}' a.qcow2 1M"#);
    assert_eq!(ended.code, Some(1));
    assert_eq!(ended.stderr, "qemu-img: a.qcow2: Unknown protocol 'json'\n");
}
