//! Compressed images, each made by one implementation and read by the other.

use super::{Place, assert_same, assert_same_disks};
use std::os::unix::fs::FileExt;

const DISK: &[&str] = &[
    "qemu-img create -q -f raw disk.raw 1000k",
    "qemu-io -f raw -c 'write -P 1 0 64k' -c 'write -P 0 64k 64k' -c 'write -P 2 130k 1k' \
     -c 'write -P 4 210000 3' -c 'write -s magic.bin 300k 8' -c 'write -P 9 990k 10k' disk.raw",
    "qemu-img create -q -f qcow2 old.qcow2 1000k",
];

#[test]
fn what_is_compressed_reads_the_same_in_both_programs() {
    assert_same_disks(
        DISK,
        &[
            "qemu-img convert -c -O qcow2 disk.raw new.qcow2 && qemu-img check new.qcow2",
            "qemu-img convert -c -W -m 16 -O qcow2 disk.raw new.qcow2",
            "qemu-img convert -c -S 0 -O qcow2 disk.raw new.qcow2",
            "qemu-img convert -c -O qcow2 -o compression_type=zstd disk.raw new.qcow2",
            "qemu-img convert -c -O qcow2 -o cluster_size=512 disk.raw new.qcow2",
            "qemu-img convert -c -O qcow2 -o cluster_size=2M,compression_type=zstd disk.raw new.qcow2",
            "qemu-img convert -c -O qcow2 -o extended_l2=on,cluster_size=16k disk.raw new.qcow2",
            "qemu-img convert -c -O qcow2 -o refcount_bits=1 disk.raw new.qcow2",
            "qemu-img convert -c -O qcow2 -o refcount_bits=2 disk.raw new.qcow2",
            "qemu-img convert -c -O qcow2 -o compat=0.10,cluster_size=4k disk.raw new.qcow2",
            "qemu-img convert -c -O qcow2 odd.raw disk.raw a.raw new.qcow2",
            "qemu-img convert -c -O qcow2 -B a.raw -F raw disk.raw new.qcow2",
            "qemu-img convert -c -n -O qcow2 disk.raw old.qcow2",
            "qemu-img convert -c -p -O qcow2 empty.raw new.qcow2",
            "qemu-img convert -c -t none -O qcow2 disk.raw new.qcow2",
            "qemu-img convert -c -O qcow2 disk.raw new.qcow2 && qemu-img convert -O raw new.qcow2 back.raw",
            "qemu-img convert -c -O qcow2 disk.raw new.qcow2 && qemu-io -c 'write -P 7 0 1000' \
             -c 'discard 64k 64k' -c 'write -z 128k 64k' new.qcow2",
        ],
    );
}

#[test]
fn compressing_is_refused_alike() {
    assert_same(
        DISK,
        &[
            "qemu-img convert -c -O raw disk.raw new.raw",
            "qemu-img convert -c -O qcow2 -o preallocation=metadata disk.raw new.qcow2",
            "qemu-img convert -c -O qcow2 -o compat=0.10,compression_type=zstd disk.raw new.qcow2",
        ],
    );
    let io = [
        "'write -P 1 0 64k' -c 'write -c -P 2 0 64k'",
        "'write -c -P 2 64k 64k' -c 'write -c -P 3 64k 64k' -c 'read -P 2 64k 64k'",
        "'write -c -P 2 128k 32k'",
        "'write -c -P 2 960k 40k' -c 'write -c 1k 64k' -c 'write -c 0 0' -c 'write -c 2M 64k'",
        "'write -z 128k 64k' -c 'write -c -P 2 128k 64k'",
        "'write -c -P 2 0 1000k'",
        "'write -c -z 0 64k' -c 'write -c -f 64k 64k'",
    ];
    let lines: Vec<String> = io
        .iter()
        .flat_map(|commands| {
            let images = ["-f qcow2 old.qcow2", "-f raw a.raw"];
            images.map(|image| format!("qemu-io -c {commands} {image}"))
        })
        .collect();
    let lines: Vec<&str> = lines.iter().map(|line| &**line).collect();
    assert_same_disks(DISK, &lines);
}

#[test]
fn the_compress_filter_stores_what_is_written_compressed() {
    let prepare = [DISK, &["qemu-img create -q -f qcow2 even.qcow2 1M"]].concat();
    let filter = "driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename";
    let lines = [
        format!(
            "qemu-io --image-opts -c 'write -P 1 1000 5000' -c 'write -P 2 1000 5000' \
             -c 'read -P 1 1000 5000' -c 'write -P 3 100k 200k' -c 'write -P 4 990k 10k' \
             -c 'write -z 400k 64k' {filter}=even.qcow2"
        ),
        "qemu-io --image-opts -c length driver=compress,file.driver=raw,file.file.filename=a.raw"
            .into(),
        "qemu-io --image-opts -c length driver=compress,file.driver=file,file.filename=a.raw"
            .into(),
    ];
    let lines: Vec<&str> = lines.iter().map(|line| &**line).collect();
    assert_same_disks(&prepare, &lines);
}

/// Text of few words: what compressors are compared on.
fn text(len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(1);
    let words: Vec<String> = (0..4000)
        .map(|_| (0..rng.usize(2..9)).map(|_| rng.lowercase()).chain([' ']).collect())
        .collect();
    let mut text = Vec::with_capacity(len + 10);
    while text.len() < len {
        text.extend(words[rng.usize(..words.len())].bytes());
    }
    text.truncate(len);
    text
}

#[test]
fn compressed_images_are_hardly_larger_than_qemu_imgs() {
    for kind in ["zlib", "zstd"] {
        let sizes = [true, false].map(|ours| {
            let place = Place::new(ours);
            let disk = std::fs::File::create(place.path().join("disk.raw")).unwrap();
            disk.write_all_at(&text(6 << 20), 0).unwrap();
            let line = format!(
                "qemu-img convert -c -f raw -O qcow2 -o compression_type={kind} disk.raw new.qcow2"
            );
            assert_eq!(place.run(&line).code, Some(0));
            std::fs::metadata(place.path().join("new.qcow2")).unwrap().len()
        });
        println!("{kind}: {sizes:?}");
        assert!(sizes[0] * 100 <= sizes[1] * 103, "{kind}: {sizes:?}");
    }
}

#[test]
fn a_compressed_image_ends_with_its_last_cluster() {
    for options in ["cluster_size=4k", "cluster_size=64k", "cluster_size=2M,compression_type=zstd"]
    {
        let lengths = [true, false].map(|ours| {
            let place = super::Place::new(ours);
            let mut random = fastrand::Rng::with_seed(7);
            let bytes: Vec<u8> = (0..3_000_832).map(|_| random.u8(0..20)).collect();
            std::fs::write(place.path().join("in.raw"), bytes).unwrap();
            let line = format!("qemu-img convert -c -f raw -O qcow2 -o {options} in.raw t.qcow2");
            assert_eq!(place.run(&line).code, Some(0), "{line}");
            let len = std::fs::metadata(place.path().join("t.qcow2")).unwrap().len();
            for line in ["qemu-img check -q t.qcow2", "qemu-img compare -q in.raw t.qcow2"] {
                assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
            }
            // What comes later goes behind what is there.
            let write = "qemu-io -c 'write -P 1 0 64k' -c 'discard 64k 64k' t.qcow2";
            assert_eq!(place.run(write).code, Some(0));
            for line in ["qemu-img check -q t.qcow2", "qemu-io -r -c 'read -P 1 0 64k' t.qcow2"] {
                assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
            }
            len
        });
        let [ours, theirs] = lengths;
        // The streams themselves are not the same.
        assert!(ours <= theirs + theirs / 25, "{options}: {ours}, {theirs}");
    }
}

#[test]
fn nothing_follows_the_last_compressed_cluster() {
    let lengths = [true, false].map(|ours| {
        let place = super::Place::new(ours);
        let lines = [
            "qemu-img create -q -f qcow2 t.qcow2 1M",
            "qemu-io -c 'write -c -P 3 0 64k' -c 'write -c -P 4 64k 64k' t.qcow2",
        ];
        lines.iter().for_each(|line| assert_eq!(place.run(line).code, Some(0), "{line}"));
        for line in ["qemu-img check -q t.qcow2", "qemu-io -r -c 'read -P 4 64k 64k' t.qcow2"] {
            assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
        }
        std::fs::metadata(place.path().join("t.qcow2")).unwrap().len()
    });
    assert!(lengths[0].abs_diff(lengths[1]) <= 512, "{lengths:?}");
}
