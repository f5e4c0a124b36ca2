//! Backing chains: rebased, committed, and written to below the top.

use super::{Place, assert_same_disks};

const CHAIN: &[&str] = &[
    "qemu-img create -q -f raw new.raw 512k",
    "qemu-io -f raw -c 'write -P 1 0 100k' -c 'write -P 7 300k 64k' new.raw",
    "qemu-img create -q -f qcow2 -b a.raw -F raw mid.qcow2 1M",
    "qemu-io -f qcow2 -c 'write -P 2 100k 100k' -c 'write -z 640k 128k' mid.qcow2",
    "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 1M",
    "qemu-io -f qcow2 -c 'write -P 3 192k 64k' -c 'write -z 256k 128k' -c 'write -P 4 5000 100' \
     -c 'discard 832k 64k' top.qcow2",
    "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 long.qcow2 3M",
    "qemu-io -f qcow2 -c 'write -P 3 192k 64k' -c 'write -P 5 2M 64k' long.qcow2",
];

#[test]
fn rebased_images_show_the_same_and_stand_on_another_file() {
    assert_same_disks(
        CHAIN,
        &[
            "qemu-img rebase -b new.raw -F raw top.qcow2 && qemu-img info top.qcow2",
            "qemu-img rebase -b a.raw -F raw top.qcow2",
            "qemu-img rebase -b longer.raw -F raw top.qcow2",
            "qemu-img rebase -b new.raw -F raw long.qcow2",
            "qemu-img rebase -b a.raw -F raw long.qcow2",
            "qemu-img rebase -b '' top.qcow2 && qemu-img info top.qcow2",
            "qemu-img rebase -b '' long.qcow2",
            "qemu-img rebase -b nope -F raw top.qcow2",
            "qemu-img rebase -b new.raw -F bogus top.qcow2",
            "qemu-img rebase -u -b nope -F raw top.qcow2 && qemu-img info top.qcow2",
            "qemu-img rebase -u -b nope -F raw top.qcow2 && qemu-img rebase -u -b a.raw -F raw top.qcow2",
            "qemu-img rebase -u -b new.raw -F raw top.qcow2 && qemu-io -c 'read -P 1 0 4k' top.qcow2",
            "qemu-img rebase -u top.qcow2 && qemu-img info top.qcow2",
            "qemu-img rebase -u -b new.raw top.qcow2",
            "qemu-img rebase -t none -T none -b new.raw -F raw top.qcow2",
            "qemu-img rebase -b new.raw -F raw mid.qcow2",
            "qemu-img rebase --image-opts -b new.raw -F raw driver=qcow2,file.filename=top.qcow2",
        ],
    );
    // Version 2 can only write zeroes, where the old file has ended and the new one has something.
    assert_same_disks(
        &[
            "qemu-img create -q -f qcow2 data.qcow2 2000k",
            "qemu-io -c 'write -P 7 512k 1400k' data.qcow2",
            "qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=4k -b b.raw -F raw old.qcow2 2M",
        ],
        &["qemu-img rebase -b data.qcow2 -F qcow2 old.qcow2"],
    );
    let long = "x".repeat(1030);
    let full = "x".repeat(500);
    assert_same_disks(
        &["qemu-img create -q -f qcow2 -o cluster_size=512 -b a.raw -F raw small.qcow2"],
        &[
            &format!("qemu-img rebase -u -b {long} -F raw small.qcow2"),
            &format!("qemu-img rebase -u -b {full} -F raw small.qcow2"),
            "qemu-img rebase -u -b b.raw -F raw small.qcow2 && qemu-img info small.qcow2",
        ],
    );
}

#[test]
fn an_image_below_a_filter_is_rebased_and_shows_the_same() {
    let image = "driver=copy-on-read,file.driver=qcow2,file.file.filename=top.qcow2";
    let on_copies = "driver=qcow2,file.driver=copy-on-read,file.file.filename=top.qcow2";
    assert_same_disks(
        CHAIN,
        &[
            &format!("qemu-img rebase -p --image-opts -b '' {image}"),
            &format!("qemu-img rebase --image-opts -u -b '' {image}"),
            &format!("qemu-img rebase --image-opts -b '' {on_copies}"),
        ],
    );
    // QEMU takes no relative name here.
    let place = Place::new(true);
    super::fixture(place.path());
    for line in CHAIN {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    assert_eq!(place.run_theirs("qemu-img convert -O raw top.qcow2 before.raw").code, Some(0));
    let line = format!("qemu-img rebase --image-opts -b new.raw -F raw {image}");
    let ended = place.run(&line);
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    assert!(place.run_theirs("qemu-img info top.qcow2").stdout.contains("backing file: new.raw"));
    let compared = place.run_theirs("qemu-img compare -F raw top.qcow2 before.raw");
    assert_eq!(compared.stdout, "Images are identical.\n");
}

#[test]
fn an_image_that_cannot_be_rebased_stays_as_it_is() {
    let place = Place::new(true);
    super::fixture(place.path());
    for line in CHAIN {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    assert_eq!(place.run_theirs("qemu-img convert -O raw top.qcow2 before.raw").code, Some(0));
    let images = [
        "driver=raw,file.driver=qcow2,file.file.filename=top.qcow2",
        "driver=raw,file.driver=copy-on-read,file.file.driver=qcow2,file.file.file.filename=top.qcow2",
    ];
    for image in images {
        let line = format!("qemu-img rebase --image-opts -b new.raw -F raw {image}");
        let ended = place.run(&line);
        assert_eq!(ended.code, Some(1));
        assert!(ended.stderr.ends_with("Operation not supported\n"), "{}", ended.stderr);
        let compared = place.run_theirs("qemu-img compare -F raw top.qcow2 before.raw");
        assert_eq!(compared.stdout, "Images are identical.\n");
    }
}

#[test]
fn a_committed_image_is_in_its_base_and_empty() {
    assert_same_disks(
        CHAIN,
        &[
            "qemu-img commit top.qcow2 && qemu-img map top.qcow2",
            "qemu-img commit -q top.qcow2",
            "qemu-img commit -d top.qcow2",
            "qemu-img commit -b a.raw top.qcow2",
            "qemu-img commit -b mid.qcow2 top.qcow2",
            "qemu-img commit -d -b a.raw top.qcow2",
            "qemu-img commit -b nope top.qcow2",
            "qemu-img commit -b top.qcow2 top.qcow2",
            "qemu-img commit -r 100M -t none top.qcow2",
            "qemu-img commit -b a.raw long.qcow2",
            "qemu-img commit long.qcow2",
            "qemu-img commit mid.qcow2 && qemu-img commit mid.qcow2",
            "qemu-img commit mid.qcow2 && qemu-io -c 'write -P 9 0 64k' mid.qcow2 && qemu-img commit mid.qcow2",
        ],
    );
    assert_same_disks(
        &[
            "qemu-img create -q -f qcow2 -o extended_l2=on -b a.raw -F raw sub.qcow2",
            "qemu-io -c 'write -P 3 100k 2k' -c 'write -z 64k 2k' -c 'discard 200k 100k' sub.qcow2",
            "qemu-img create -q -f qcow2 -o compat=0.10 -b a.raw -F raw old.qcow2",
            "qemu-io -c 'write -P 3 100k 2k' -c 'write -c -P 8 256k 64k' old.qcow2",
        ],
        &["qemu-img commit sub.qcow2", "qemu-img commit old.qcow2"],
    );
}

#[test]
fn a_snapshot_session_leaves_the_image_as_it_is() {
    assert_same_disks(
        CHAIN,
        &[
            "qemu-io -s -f raw -c 'write -P 9 0 64k' -c 'read -P 9 0 64k' -c map a.raw",
            "qemu-io -s -c 'write -P 9 0 64k' -c 'read -P 9 0 64k' a.raw",
            "qemu-io -s -c 'write -P 9 0 64k' -c 'read -P 9 0 64k' -c 'discard 0 64k' top.qcow2",
            "qemu-io -c 'open -s -o driver=raw a.raw' -c 'write -P 9 0 512' -c length",
        ],
    );
}

#[test]
fn a_temporary_overlay_has_no_name_while_it_is_open() {
    let place = Place::new(true);
    super::fixture(place.path());
    let overlays = place.path().join("overlays");
    std::fs::create_dir(&overlays).unwrap();
    let mut command = std::process::Command::new(place.program("qemu-io"));
    command.args(["-s", "-f", "raw", "-c", "write -P 9 0 64k", "-c", "read -P 9 0 64k", "a.raw"]);
    let run = command.current_dir(place.path()).env("TMPDIR", &overlays).output().unwrap();
    assert!(run.status.success());
    assert_eq!(std::fs::read_dir(&overlays).unwrap().count(), 0);
    let mut command = std::process::Command::new(place.program("qemu-io"));
    command.args(["-s", "-f", "raw", "-c", "length", "a.raw"]).current_dir(place.path());
    let run = command.env("TMPDIR", "/nonexistent").output().unwrap();
    let text = String::from_utf8(run.stderr).unwrap();
    assert!(text.contains("Could not open temporary file '/nonexistent/vl."), "{text}");
}

#[test]
fn a_committed_image_is_as_short_as_a_new_one() {
    for options in ["", "-o extended_l2=on", "-o compat=0.10", "-o data_file=data.raw"] {
        let lengths = [true, false].map(|ours| {
            let place = super::Place::new(ours);
            let theirs = |line: &str| {
                let ended = place.run_theirs(line);
                assert_eq!((ended.code, &*ended.stderr), (Some(0), ""), "{line}");
            };
            theirs("qemu-img create -q -f qcow2 base.qcow2 64M");
            theirs(&format!(
                "qemu-img create -q -f qcow2 {options} -b base.qcow2 -F qcow2 top.qcow2"
            ));
            theirs("qemu-io -c 'write -P 3 0 8M' -c 'write -P 4 40M 1M' top.qcow2");
            let ended = place.run("qemu-img commit top.qcow2");
            assert_eq!((ended.code, &*ended.stdout), (Some(0), "Image committed.\n"));
            theirs("qemu-img check -q top.qcow2");
            theirs("qemu-img check -q base.qcow2");
            theirs("qemu-io -r -c 'read -P 3 0 8M' -c 'read -P 4 40M 1M' top.qcow2");
            // It takes data again.
            let write = place.run("qemu-io -c 'write -P 5 1M 1M' top.qcow2");
            assert_eq!(write.code, Some(0));
            theirs("qemu-img check -q top.qcow2");
            theirs("qemu-io -r -c 'read -P 3 0 1M' -c 'read -P 5 1M 1M' top.qcow2");
            assert_eq!(place.run("qemu-img commit top.qcow2").code, Some(0));
            std::fs::metadata(place.path().join("top.qcow2")).unwrap().len()
        });
        let [ours, theirs] = lengths;
        assert!(ours <= theirs, "{options}: {ours}, {theirs}");
    }
}
