//! Images with external data files: every tool beside qemu-img and qemu-io.
//!
//! The qcow2 images show the same and are sound afterwards, and the data files are equal.

use super::{assert_alike, assert_same};

/// `d.qcow2` and `r.qcow2` have their data in `d.raw` and `r.raw`, which for `r.qcow2` is a disk image by itself;
/// `o.qcow2` has a backing file and `o.raw`; `plain.img` has none.
const PREPARE: &[&str] = &[
    "qemu-img create -q -f qcow2 -o data_file=d.raw d.qcow2 4M",
    "qemu-io -c 'write -P 1 64k 128k' -c 'write -P 2 1M 128k' -c 'write -z 2M 64k' -c 'write -z 64k 64k' d.qcow2",
    "qemu-img create -q -f qcow2 -o data_file=r.raw,data_file_raw=on r.qcow2 4M",
    "qemu-io -c 'write -P 3 64k 128k' -c 'write -P 4 1M 128k' -c 'write -z 1M 64k' r.qcow2",
    "qemu-img create -q -f qcow2 -o data_file=o.raw -b d.qcow2 -F qcow2 o.qcow2 5M",
    "qemu-io -c 'write -P 5 128k 64k' -c 'write -z 1M 64k' -c 'write -P 6 4480k 64k' o.qcow2",
    "qemu-img create -q -f qcow2 plain.img 4M",
    "qemu-io -c 'write -P 7 128k 256k' plain.img",
];

#[test]
fn what_is_reported_of_them_is_the_same() {
    let mut lines = Vec::new();
    for image in ["d.qcow2", "r.qcow2", "o.qcow2"] {
        for line in [
            "info",
            "info --output=json",
            "info --backing-chain",
            "check",
            "check --output=json",
            "check -r all",
            "map",
            "map --output=json",
            "measure -O qcow2",
            "measure -O raw",
            "snapshot -l",
            "compare a.raw",
            "bench -c 1 -q",
            "bench -c 1 -w -q",
        ] {
            lines.push(format!("qemu-img {line} {image}"));
        }
        for commands in [
            "-c map -c info -c length",
            "-r -c 'read -v 65500 100'",
            "-c 'alloc 0 4M' -c 'read -P 0 2M 64k'",
        ] {
            lines.push(format!("qemu-io {commands} {image}"));
        }
    }
    let opts =
        |options: &str| format!("qemu-img map --image-opts driver=qcow2,file.filename={options}");
    for options in [
        "d.qcow2,data-file.filename=r.raw",
        "d.qcow2,data-file.driver=file,data-file.filename=r.raw",
        "d.qcow2,data-file.driver=raw,data-file.file.filename=r.raw",
        "d.qcow2,data-file.filename=nope",
        "d.qcow2,data-file.filename=",
        "d.qcow2,data-file=nope",
        "plain.img,data-file.filename=r.raw",
        "o.qcow2,backing.file.filename=r.qcow2",
        "o.qcow2,backing.file.filename=r.qcow2,backing.data-file.filename=d.raw",
    ] {
        lines.push(opts(options));
    }
    for line in [
        "qemu-img map 'json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"d.qcow2\"},\"data-file\":{\"driver\":\"file\",\"filename\":\"r.raw\"}}'",
        "qemu-img map 'json:{\"driver\":\"qcow2\",\"file.filename\":\"d.qcow2\",\"data-file.filename\":\"r.raw\"}'",
        "qemu-img info --image-opts driver=qcow2,file.filename=plain.img,data-file.filename=r.raw",
        "qemu-img info --image-opts driver=qcow2,file.filename=d.qcow2,data-file.filename=nope",
        "qemu-img compare d.qcow2 r.qcow2",
        "qemu-img compare d.qcow2 d.raw",
        "qemu-img compare r.qcow2 r.raw",
        "qemu-img compare o.qcow2 plain.img",
    ] {
        lines.push(line.into());
    }
    assert_same(PREPARE, &lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn a_name_in_the_image_is_a_file_and_nothing_else() {
    let amend = |name: &str| {
        format!(
            "qemu-img amend --image-opts -o 'data_file={name}' driver=qcow2,file.filename=d.qcow2,data-file.filename=d.raw"
        )
    };
    for name in [
        "",
        "nope",
        "/nope/d.raw",
        ".",
        "file:d.raw",
        "nbd://localhost/",
        "bogus:x",
        "json:{\"driver\":\"file\",,\"filename\":\"d.raw\"}",
    ] {
        let prepare = [PREPARE[0], PREPARE[1], &amend(name)];
        assert_same(
            &prepare,
            &[
                "qemu-img map d.qcow2",
                "qemu-img info d.qcow2",
                "qemu-img check d.qcow2",
                "qemu-io -c 'write 0 1k' d.qcow2",
                "qemu-img convert -O raw d.qcow2 out.raw",
                "qemu-img resize d.qcow2 +1M",
                "qemu-img rebase -u -b '' d.qcow2",
                "qemu-img create -f qcow2 -b d.qcow2 -F qcow2 over.qcow2",
            ],
        );
    }
}

#[test]
fn what_is_done_to_them_is_the_same() {
    for (image, prepare) in [
        ("d", [&PREPARE[..2], &PREPARE[6..]].concat()),
        ("r", PREPARE[2..4].iter().chain(&PREPARE[6..]).copied().collect()),
        ("o", [&PREPARE[..2], &PREPARE[4..]].concat()),
    ] {
        let lines = [
            "qemu-io -c 'write -P 9 0 100k' IMAGE.qcow2",
            "qemu-io -c 'write -P 9 130k 2k' -c 'write -P 9 3M 1' IMAGE.qcow2",
            "qemu-io -c 'write -z 70k 1M' IMAGE.qcow2",
            "qemu-io -c 'write -z -u 70k 1M' IMAGE.qcow2",
            "qemu-io -d unmap -c 'discard 64k 1M' IMAGE.qcow2",
            "qemu-io -d unmap -c 'discard 64k 1M' -c 'write -P 9 70k 1k' IMAGE.qcow2",
            "qemu-io -c 'write -c 0 64k' IMAGE.qcow2",
            "qemu-img resize IMAGE.qcow2 +1M",
            "qemu-img resize --preallocation=metadata IMAGE.qcow2 +1M",
            "qemu-img resize --preallocation=falloc IMAGE.qcow2 +1M",
            "qemu-img resize --preallocation=full IMAGE.qcow2 +1M",
            "qemu-img resize --shrink IMAGE.qcow2 1M",
            "qemu-img resize --shrink IMAGE.qcow2 100k",
            "qemu-img resize --shrink IMAGE.qcow2 100k && qemu-img resize IMAGE.qcow2 2M",
            "qemu-img snapshot -c x IMAGE.qcow2",
            "qemu-img convert -O raw IMAGE.qcow2 out.raw",
            "qemu-img convert -O qcow2 IMAGE.qcow2 out.qcow2",
            "qemu-img convert -O qcow2 -o data_file=out.raw IMAGE.qcow2 out.qcow2",
            "qemu-img convert -O qcow2 -o data_file=out.raw,data_file_raw=on IMAGE.qcow2 out.qcow2",
            "qemu-img dd -O raw bs=64k if=IMAGE.qcow2 of=out.raw",
            "qemu-img rebase -b plain.img -F qcow2 IMAGE.qcow2",
            "qemu-img rebase -u -b plain.img -F qcow2 IMAGE.qcow2",
            "qemu-img rebase -b '' IMAGE.qcow2",
            "qemu-img commit -d IMAGE.qcow2",
            "qemu-img amend -o compat=0.10 IMAGE.qcow2",
            "qemu-img amend -o data_file_raw=off IMAGE.qcow2 && qemu-img info IMAGE.qcow2",
            "qemu-img amend -o data_file_raw=on IMAGE.qcow2",
            "qemu-img amend -o lazy_refcounts=on IMAGE.qcow2 && qemu-io -c 'write 0 64k' IMAGE.qcow2",
            "qemu-img amend -o refcount_bits=8 IMAGE.qcow2",
            "qemu-img bitmap --add IMAGE.qcow2 b && qemu-io -c 'write 0 64k' IMAGE.qcow2",
        ]
        .map(|line| line.replace("IMAGE", image));
        assert_same_images(&prepare, &lines, true);
        // QEMU never gives back the first block of a file that it has made.
        let lines = [
            "qemu-img convert -n -O qcow2 plain.img IMAGE.qcow2",
            "qemu-img convert -n --target-is-zero -O qcow2 plain.img IMAGE.qcow2",
            "qemu-img commit IMAGE.qcow2",
        ]
        .map(|line| line.replace("IMAGE", image));
        assert_same_images(&prepare, &lines, false);
    }
    let lines = [
        "qemu-img create -q -f qcow2 -b d.qcow2 -F qcow2 over.qcow2 && qemu-io -c 'write -P 9 100k 100k' over.qcow2 && qemu-img commit over.qcow2",
        "qemu-img create -q -f qcow2 -b r.qcow2 -F qcow2 over.qcow2 && qemu-io -c 'write -P 9 100k 1M' -c 'write -z 1M 64k' over.qcow2 && qemu-img commit over.qcow2",
        "qemu-img create -q -f qcow2 -b d.qcow2 -F qcow2 over.qcow2 && qemu-img rebase -b r.qcow2 -F qcow2 over.qcow2",
        "qemu-img amend -o data_file=x plain.img",
        "qemu-img amend -o data_file_raw=on plain.img",
    ];
    assert_same_images(PREPARE, &lines.map(str::to_owned), true);
}

/// `counts_holes`: the data files have the same holes, too.
fn assert_same_images(prepare: &[&str], lines: &[String], counts_holes: bool) {
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    assert_alike(prepare, &lines, |place| {
        // Where a raw data file has holes is its own matter.
        let mut left = place.disks_and_maps(|name| name != "r.qcow2");
        if !counts_holes {
            left.values_mut().for_each(|(_, stored)| *stored = 0);
        }
        left
    });
}
