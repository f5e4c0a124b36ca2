//! QED images that QEMU has made and damaged, read by both.

use super::{Place, assert_same, assert_same_contents, fixture};
use crate::disks::open_holding;
use crate::fast_path::FastPath;
use vublk::block::{Access, Perm};
use vublk::io::{AlignedBuf, IoVec, Worker, WorkerOptions};

/// Lines that read the image `x.qed`.
const READS: [&str; 14] = [
    "qemu-img info x.qed",
    "qemu-img info --output=json x.qed",
    "qemu-img info --backing-chain x.qed",
    "qemu-img map x.qed",
    "qemu-img map --output=json x.qed",
    "qemu-img check x.qed",
    "qemu-img check -f qed --output=json x.qed",
    "qemu-img convert -O raw x.qed out.raw",
    "qemu-img convert -f qed -O raw x.qed out.raw && qemu-img compare out.raw x.qed",
    "qemu-img measure -O qcow2 x.qed",
    "qemu-img snapshot -l x.qed",
    "qemu-img dd -f qed -O raw bs=1000 skip=1 count=99 if=x.qed of=out.raw",
    "qemu-io -r -c 'read -v 4090 20' -c 'map' -c 'alloc 0 1M' x.qed",
    "qemu-img create -q -f qcow2 -b x.qed -F qed over.qcow2 && qemu-img map over.qcow2",
];

#[test]
fn images_of_every_shape_are_read_as_qemu_reads_them() {
    let make = |options: &str, size: &str| {
        vec![
            format!("qemu-img create -q -f qed {options} x.qed {size}"),
            "qemu-io -f qed -c 'write -P 1 0 10k' -c 'write -P 2 700k 70k' -c 'write -z 128k 64k' \
             -c 'write -P 3 3900k 512' x.qed"
                .to_owned(),
        ]
    };
    for (options, size) in [
        ("", "4M"),
        ("-o cluster_size=4k,table_size=2", "6M"),
        ("-o cluster_size=8k,table_size=16", "4097k"),
        ("-o cluster_size=1M,table_size=2", "2G"),
    ] {
        let prepare = make(options, size);
        assert_same(&prepare.iter().map(|line| &**line).collect::<Vec<_>>(), &READS);
    }
}

#[test]
fn chains_of_images_are_read_as_qemu_reads_them() {
    for (below, format) in
        [("-f raw b.img", "raw"), ("-f qcow2 b.img", "qcow2"), ("-f qed b.img", "qed")]
    {
        let prepare = [
            format!("qemu-img create -q {below} 2M"),
            format!("qemu-io -f {format} -c 'write -P 9 0 1M' -c 'write -P 8 1536k 1k' b.img"),
            format!("qemu-img create -q -f qed -b b.img -F {format} x.qed 4M"),
            "qemu-io -f qed -c 'write -P 1 4k 10k' -c 'write -z 512k 64k' -c 'write -P 3 3M 1k' x.qed"
                .to_owned(),
        ];
        assert_same(&prepare.each_ref().map(|line| &**line), &READS);
    }
}

/// Changes of single bytes of an image, as qemu-io makes them.
fn bytes(changes: &[(u64, u8)]) -> String {
    let writes = changes.iter().map(|(at, byte)| format!("-c 'write -P {byte} {at} 1' "));
    format!("qemu-io -f raw {}x.qed", writes.collect::<String>())
}

#[test]
fn headers_that_make_no_sense_are_refused_in_qemus_words() {
    for changes in [
        &[(4, 1)][..],
        &[(7, 8)],
        &[(6, 0)],
        &[(8, 3)],
        &[(8, 32)],
        &[(8, 0)],
        &[(12, 0)],
        &[(12, 2)],
        &[(15, 255)],
        &[(16, 8)],
        &[(23, 1)],
        &[(24, 1)],
        &[(32, 1)],
        &[(40, 5)],
        &[(42, 0)],
        &[(46, 1)],
        &[(48, 1)],
        &[(54, 255)],
        &[(55, 1)],
        &[(16, 1), (56, 70), (62, 1)],
        &[(16, 1), (56, 64), (61, 8)],
        &[(16, 2)],
        &[(0, 0)],
    ] {
        let prepare = ["qemu-img create -q -f qed x.qed 1M", &bytes(changes)];
        assert_same(
            &prepare,
            &[
                "qemu-img info -f qed x.qed",
                "qemu-img check -f qed x.qed",
                "qemu-io -r -f qed -c 'read 0 512' x.qed",
            ],
        );
    }
}

#[test]
fn tables_that_make_no_sense_are_found_and_cost_their_reader_an_error() {
    // The L1 table is at 64 KiB, the data from 320 KiB on, and the L2 table behind it at 512 KiB.
    let (l1, l2) = (0x10000, 0x80000);
    for changes in [
        // Twice the same cluster; the middle of one; past the end; a table; zeroes; nothing.
        &[(l2 + 2, 6)][..],
        &[(l2, 2)],
        &[(l2 + 5, 1)],
        &[(l2 + 2, 8)],
        &[(l2, 1), (l2 + 2, 0)],
        &[(l2 + 2, 0)],
        // The header.
        &[(l2 + 2, 0), (l2 + 1, 0), (l2, 128)],
        // Behind the disk.
        &[(l2 + 130, 9)],
        // L2 tables past the end, in the middle of a cluster, twice, in the header.
        &[(l1 + 5, 1)],
        &[(l1, 1)],
        &[(l1 + 10, 8)],
        &[(l1 + 2, 0), (l1, 16)],
        &[(16, 2), (l2 + 5, 1)],
    ] {
        let prepare = [
            "qemu-img create -q -f qed x.qed 1M",
            "qemu-io -f qed -c 'write -P 1 0 192k' x.qed",
            &bytes(changes),
        ];
        assert_same(
            &prepare,
            &[
                "qemu-img check -f qed x.qed",
                "qemu-img check -f qed --output=json x.qed",
                "qemu-io -r -f qed -c 'read -P 1 0 64k' -c 'read -P 1 64k 64k' x.qed",
                "qemu-img convert -f qed -O raw x.qed out.raw",
            ],
        );
    }
}

#[test]
fn a_cluster_that_the_file_does_not_have_in_whole_is_none() {
    for len in [851_968 + 100_000, 851_968 - 1000, 0x70000 + 100, 0x50000 - 1, 600] {
        assert_same(
            &[
                "qemu-img create -q -f qed x.qed 1M",
                "qemu-io -f qed -c 'write -P 1 0 256k' x.qed",
                &format!("qemu-img resize -q --shrink -f raw x.qed {len}"),
            ],
            &[
                "qemu-img info -f qed x.qed",
                "qemu-img check -f qed x.qed",
                "qemu-io -r -f qed -c 'read -P 1 0 64k' -c 'read 128k 64k' -c 'read 192k 64k' x.qed",
            ],
        );
    }
}

#[test]
fn new_images_are_what_qemu_makes() {
    assert_same(
        &["qemu-img create -q -f raw b.img 3M"],
        &[
            "qemu-img create -f qed x.qed 5M",
            "qemu-img create -f qed x.qed 1000",
            "qemu-img create -f qed -o cluster_size=4k,table_size=16 x.qed 5M",
            "qemu-img create -f qed -o cluster_size=1M,table_size=2 x.qed 5G",
            "qemu-img create -f qed -b b.img -F raw x.qed",
            "qemu-img create -f qed -b b.img -F raw x.qed 7M",
            "qemu-img create -f qed -o help",
            "qemu-img create -f qed -o encryption=on x.qed 1M",
            "qemu-img convert -c -O qed b.img x.qed",
            "qemu-img measure -O qed --size 1M",
        ],
    );
    // QEMU leaves an empty file where the options make no sense.
    let place = Place::new(true);
    fixture(place.path());
    for (options, wanted) in [
        (
            "cluster_size=2048",
            "QED cluster size must be within range [4096, 67108864] and power of 2",
        ),
        (
            "cluster_size=5000",
            "QED cluster size must be within range [4096, 67108864] and power of 2",
        ),
        (
            "cluster_size=128M",
            "QED cluster size must be within range [4096, 67108864] and power of 2",
        ),
        ("table_size=3", "QED table size must be within range [1, 16] and power of 2"),
        ("table_size=32", "QED table size must be within range [1, 16] and power of 2"),
        (
            "cluster_size=4096,table_size=1,size=2G",
            "QED image size must be a non-zero multiple of cluster size and less than 1073741824 bytes",
        ),
    ] {
        let size = if options.contains("size=2G") { "" } else { "1M" };
        let ended = place.run(&format!("qemu-img create -q -f qed -o {options} n.qed {size}"));
        assert_eq!(ended.stderr, format!("qemu-img: n.qed: {wanted}\n"), "{options}");
        assert!(!place.path().join("n.qed").exists(), "{options}");
    }
}

#[test]
fn what_is_written_is_what_qemu_reads() {
    for options in ["", "-o cluster_size=4k,table_size=2", "-o cluster_size=8k,table_size=16"] {
        let create = format!("qemu-img create -q -f qed {options} x.qed 6M");
        assert_same_contents(
            "qed",
            &[&create],
            &[
                "qemu-io -f qed -c 'write -P 1 0 10k' -c 'write -P 2 700k 70k' -c 'write -z 128k 64k' x.qed",
                "qemu-io -f qed -c 'write -P 3 5M 1M' -c 'write -z 5M 100k' -c 'write -P 4 130000 5' x.qed",
                "qemu-io -f qed -c 'write -z -u 0 1M' -c 'write -P 5 512 512' -c 'read -P 0 1024 512' x.qed",
                "qemu-io -f qed -c 'discard 5M 512k' -c 'write -P 6 5M 512k' x.qed",
                "qemu-img resize x.qed 9M",
                "qemu-io -f qed -c 'write -P 7 8M 1M' x.qed",
            ],
        );
    }
    let base = ["qemu-img create -q -f raw b.img 2M", "qemu-io -f raw -c 'write -P 9 0 2M' b.img"];
    assert_same_contents(
        "qed",
        &[base[0], base[1], "qemu-img create -q -f qed -b b.img -F raw x.qed 4M"],
        &[
            "qemu-io -f qed -c 'write -P 1 4k 10k' -c 'write -z 512k 64k' -c 'write -z 700k 1k' x.qed",
            "qemu-io -f qed -c 'write -P 2 2097100 1000' -c 'write -P 3 3M 1k' x.qed",
            "qemu-img rebase -u -b ./b.img -F raw x.qed",
            "qemu-img rebase -b '' x.qed",
        ],
    );
    assert_same_contents(
        "qed",
        &[base[0], base[1]],
        &[
            "qemu-img convert -f raw -O qed b.img x.qed",
            "qemu-img compare -f raw -F qed b.img x.qed",
        ],
    );
    assert_same_contents(
        "qed",
        &[base[0], base[1], "qemu-img create -q -f qed -b b.img -F raw x.qed 2M"],
        &["qemu-io -f qed -c 'write -P 1 4k 1000k' x.qed", "qemu-img commit -q x.qed"],
    );
}

#[test]
fn lengths_are_changed_as_qemu_changes_them() {
    assert_same(
        &["qemu-img create -q -f qed x.qed 1M"],
        &[
            "qemu-img resize x.qed 1000",
            "qemu-img resize --shrink x.qed 512k",
            "qemu-img resize x.qed 1049088",
            "qemu-img resize x.qed 64T",
            "qemu-img resize x.qed 65T",
            "qemu-img resize --preallocation=full x.qed 2M",
        ],
    );
}

#[test]
fn new_space_reads_as_zeroes_whatever_the_backing_file_has_there() {
    // QEMU refuses to grow such an image.
    for options in ["", "-o cluster_size=4k,table_size=2"] {
        let place = Place::new(true);
        fixture(place.path());
        for line in [
            "qemu-img create -q -f raw b.img 4M",
            "qemu-io -f raw -c 'write -P 7 0 4M' b.img",
            &format!("qemu-img create -q -f qed {options} -b b.img -F raw x.qed 1000k"),
            "qemu-io -f qed -c 'write -P 1 990k 10k' x.qed",
        ] {
            assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
        }
        assert_eq!(place.run("qemu-img resize -q x.qed 6M").code, Some(0));
        let read = "qemu-io -r -f qed -c 'read -P 7 0 990k' -c 'read -P 1 990k 10k' -c 'read -P 0 1000k 5144k' x.qed";
        let read = place.run_theirs(read);
        assert_eq!(read.code, Some(0), "{read:?}");
        assert_eq!(place.run_theirs("qemu-img check -f qed x.qed").code, Some(0));
    }
}

#[test]
fn images_that_were_not_closed_are_repaired_when_they_are_opened() {
    let (l1, l2) = (0x10000, 0x80000);
    for (changes, is_repaired) in [
        (&[(16, 2)][..], true),
        (&[(16, 2), (l2 + 5, 1)], true),
        (&[(16, 2), (l1 + 5, 1)], true),
        (&[(16, 2), (l2 + 2, 6)], false),
    ] {
        let place = Place::new(true);
        fixture(place.path());
        for line in [
            "qemu-img create -q -f qed x.qed 1M",
            "qemu-io -f qed -c 'write -P 1 0 192k' x.qed",
            &bytes(changes),
            "qemu-img resize -q -f raw x.qed +1M",
        ] {
            assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
        }
        let written = place.run("qemu-io -f qed -c 'write -P 2 512k 64k' x.qed");
        assert_eq!(written.code, Some(if is_repaired { 0 } else { 1 }), "{written:?}");
        let checked = place.run_theirs("qemu-img check -f qed x.qed");
        let is_clean = checked.code == Some(0) || checked.code == Some(3);
        assert_eq!(is_clean, is_repaired, "{changes:?}: {checked:?}");
    }
}

#[test]
fn what_the_fast_path_reads_is_what_the_slow_path_reads() {
    let place = Place::new(true);
    fixture(place.path());
    for line in [
        "qemu-img create -q -f raw b.img 1M",
        "qemu-io -f raw -c 'write -P 9 0 1M' b.img",
        "qemu-img create -q -f qed -o cluster_size=4k,table_size=2 -b b.img -F raw x.qed 3M",
        "qemu-io -f qed -c 'write -P 1 4k 10k' -c 'write -z 512k 64k' -c 'write -P 3 2M 1k' x.qed",
    ] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    let options = format!(
        "driver=qed,read-only=on,file.driver=file,file.filename={0}/x.qed,backing.driver=raw,\
         backing.file.driver=file,backing.file.filename={0}/b.img",
        place.path().display()
    );
    let worker = Worker::start("qed", WorkerOptions::default()).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    worker.send(move |local| {
        let fast_path = FastPath::attach(local);
        local.io().spawn(async move {
            let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
            fast_path.serve(&opened.node);
            let mut fast = 0;
            for at in (0..3 << 20).step_by(16384) {
                let mut slow = vec![0; 16384];
                opened.node.read(at, &IoVec::from_mut(&mut slow)).await.unwrap();
                // What the slow path has looked up is in memory.
                for (step, part) in slow.chunks(4096).enumerate() {
                    let buf = AlignedBuf::new(4096, 4096).unwrap();
                    let at = at + step as u64 * 4096;
                    let (buf, result) = fast_path.transfer(Access::Read, at, buf).await;
                    if let Some(result) = result {
                        result.unwrap();
                        fast += 1;
                        assert!(buf[..] == *part, "at {at}");
                    }
                }
            }
            fast_path.close();
            let _ = sender.send(fast);
        });
    });
    assert_eq!(receiver.recv_timeout(std::time::Duration::from_secs(60)), Ok(3 << 20 >> 12));
}
