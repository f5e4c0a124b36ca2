//! `bitmap`, and bitmaps in other tools: QEMU's messages, and bitmaps that both read.

use super::{Ended, Place};
use crate::monitor::MONITOR;
use crate::monitor::client::Client;
use crate::vhost_user::{Daemon, LIMIT};
use serde_json::json;
use std::path::Path;

/// Without what differs by where clusters are.
fn shown(ended: Ended) -> (Option<i32>, String) {
    let text = format!("{}{}", ended.stdout, ended.stderr);
    let lines = text.lines().filter(|line| {
        !line.starts_with("disk size:")
            && !line.contains("\"actual-size\"")
            && !line.starts_with("Image end offset")
            && !line.contains("% fragmented")
    });
    (ended.code, lines.collect::<Vec<_>>().join("\n"))
}

/// Runs lines one after the other with both, in places that begin with the same files.
fn assert_same_words(prepare: &[&str], lines: &[&str]) {
    let both = [true, false].map(Place::new);
    let theirs = Place::new(false);
    for step in prepare {
        let ended = theirs.run(step);
        assert_eq!(ended.code, Some(0), "{step}: {}", ended.stderr);
    }
    for place in &both {
        for (name, (bytes, _)) in theirs.files() {
            std::fs::write(place.path().join(name), bytes).unwrap();
        }
    }
    let mut wrong = String::new();
    for line in lines {
        let [ours, theirs] = [0, 1].map(|n| shown(both[n].run(line)));
        if ours != theirs {
            wrong += &format!("\n{line}\n  ours:   {ours:?}\n  theirs: {theirs:?}\n");
        }
    }
    // What ours has left is whole.
    for (name, _) in both[0].files().iter().filter(|(name, _)| name.ends_with(".qcow2")) {
        let checked =
            theirs.run(&format!("qemu-img check {}", both[0].path().join(name).display()));
        if checked.code != Some(0) {
            wrong += &format!("\n{name}: {}{}", checked.stdout, checked.stderr);
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn bitmaps_are_added_changed_and_refused_in_the_same_words() {
    let long = "x".repeat(1024);
    let fits = "x".repeat(1023);
    let all = format!(
        "bitmap --add a.qcow2 b0
        bitmap --add a.qcow2 b0
        bitmap --add -g 512 a.qcow2 b1
        bitmap --add -g 256 a.qcow2 b2
        bitmap --add -g 1000 a.qcow2 b2
        bitmap --add -g 4G a.qcow2 b2
        bitmap --add -g 2G a.qcow2 b2
        bitmap --add -g 0 a.qcow2 b3
        bitmap --add -g foo a.qcow2 b4
        bitmap --add -g 64k --disable a.qcow2 b3
        bitmap --remove a.qcow2 nope
        bitmap --clear a.qcow2 nope
        bitmap --enable a.qcow2 nope
        bitmap --disable a.qcow2 nope
        bitmap --merge x a.qcow2 nope
        bitmap --merge x a.qcow2 b0
        bitmap --merge b1 a.qcow2 b0
        bitmap --merge b1 --merge b0 --disable --clear a.qcow2 b0
        bitmap --add a.qcow2 ''
        bitmap --add a.qcow2 {fits}
        bitmap --add a.qcow2 {long}
        bitmap --add --remove a.qcow2 x
        bitmap --add --enable a.qcow2 x2
        bitmap --add --enable --disable a.qcow2 x2
        bitmap --enable --disable a.qcow2 x2
        info a.qcow2
        info --output=json a.qcow2
        check a.qcow2
        bitmap a.qcow2 x2
        bitmap --add -g 4k -b foo a.qcow2 x2
        bitmap --clear -g 4k a.qcow2 x2
        bitmap --merge foo -F qcow2 a.qcow2 x2
        bitmap --add nofile x
        bitmap --add a.qcow2
        bitmap --add a.qcow2 b c
        bitmap --add --merge nope a.qcow2 z
        bitmap --clear --add a.qcow2 zz
        bitmap --add --merge b0 -b a2.qcow2 -F qcow2 a.qcow2 n
        bitmap --merge b0 -b a2.qcow2 -F raw a.qcow2 n
        bitmap --merge b0 -b nofile -F qcow2 a.qcow2 n
        bitmap --merge nope -b a2.qcow2 a.qcow2 n
        bitmap --add --merge b0 -b a2.qcow2 big.qcow2 n
        bitmap --image-opts --add driver=qcow2,file.filename=a.qcow2 q
        bitmap --image-opts -f qcow2 --add driver=qcow2,file.filename=a.qcow2 q
        bitmap --add -f raw raw.img x
        bitmap --add raw.img x
        bitmap --remove -f raw raw.img x
        bitmap --add v2.qcow2 x
        bitmap --add -g 512 huge.qcow2 x
        info a.qcow2
        resize a.qcow2 +1M
        info a.qcow2
        bitmap --remove a.qcow2 b0
        bitmap --remove a.qcow2 b1
        bitmap --remove a.qcow2 b2
        bitmap --remove a.qcow2 b3
        bitmap --remove a.qcow2 {fits}
        bitmap --remove a.qcow2 x2
        bitmap --remove a.qcow2 z
        bitmap --remove a.qcow2 n
        info a.qcow2
        bitmap --remove a.qcow2 q
        info a.qcow2
        check a.qcow2"
    );
    let lines: Vec<String> = all.lines().map(|line| format!("qemu-img {}", line.trim())).collect();
    let lines: Vec<&str> = lines.iter().map(|line| &**line).collect();
    assert_same_words(
        &[
            "qemu-img create -q -f qcow2 a.qcow2 64M",
            "qemu-img create -q -f qcow2 a2.qcow2 64M",
            "qemu-img bitmap --add a2.qcow2 b0",
            "qemu-io -c 'write 1M 1M' -c 'write 20M 1k' a2.qcow2",
            "qemu-img create -q -f qcow2 big.qcow2 65M",
            "qemu-img create -q -f qcow2 -o compat=0.10 v2.qcow2 1M",
            "qemu-img create -q -f qcow2 -o cluster_size=2M huge.qcow2 3T",
            "qemu-img create -q -f raw raw.img 1M",
        ],
        &lines,
    );
}

#[test]
fn granularities_follow_the_clusters_and_measure_counts_what_bitmaps_take() {
    for cluster in ["512", "4k", "8k", "64k", "2M"] {
        let create = format!("qemu-img create -q -f qcow2 -o cluster_size={cluster} d.qcow2 64M");
        assert_same_words(
            &[&create],
            &[
                "qemu-img bitmap --add d.qcow2 x",
                "qemu-img bitmap --add -g 512 d.qcow2 y",
                "qemu-io -c 'write 1M 64k' -c 'discard 5M 3M' -c 'write -z 0 512' d.qcow2",
                "qemu-img info d.qcow2",
                "qemu-img check d.qcow2",
            ],
        );
    }
}

/// An image whose bitmaps `b` and `d` were in use when their daemon was killed.
fn inconsistent(dir: &Path) {
    let place = Place::new(false);
    for line in [
        "qemu-img create -q -f qcow2 k.qcow2 64M",
        "qemu-img bitmap --add k.qcow2 b",
        "qemu-img bitmap --add --disable k.qcow2 d",
    ] {
        assert_eq!(place.run(line).code, Some(0), "{line}");
    }
    let image = place.path().join("k.qcow2");
    let daemon = qsd(&image);
    drop(Client::connect(&daemon.path("m.sock")));
    // Killed.
    drop(daemon);
    std::fs::copy(image, dir.join("k.qcow2")).unwrap();
}

/// qemu-storage-daemon with the image as node `q`.
fn qsd(image: &Path) -> Daemon {
    daemon(&["qemu-storage-daemon"], image)
}

fn daemon(program: &[&str], image: &Path) -> Daemon {
    let node =
        format!("driver=qcow2,node-name=q,file.driver=file,file.filename={}", image.display());
    let arguments = [&MONITOR[..], &["--blockdev", &node]].concat();
    Daemon::start_in(tempfile::tempdir().unwrap(), program, &arguments)
}

#[test]
fn inconsistent_bitmaps_can_only_be_removed_and_are_copied_by_nobody() {
    let kept = tempfile::tempdir().unwrap();
    inconsistent(kept.path());
    let prepare = format!("qemu-img convert -f raw {}/k.qcow2 k.qcow2", kept.path().display());
    assert_same_words(
        &[&prepare, "qemu-img create -q -f qcow2 plain.qcow2 64M"],
        &[
            "qemu-img info k.qcow2",
            "qemu-img check k.qcow2",
            "qemu-img bitmap --clear k.qcow2 b",
            "qemu-img bitmap --enable k.qcow2 b",
            "qemu-img bitmap --disable k.qcow2 b",
            "qemu-img bitmap --add k.qcow2 b",
            "qemu-img bitmap --add k.qcow2 g",
            "qemu-img bitmap --merge b k.qcow2 g",
            "qemu-img bitmap --merge g k.qcow2 b",
            "qemu-img resize k.qcow2 +1M",
            "qemu-img info k.qcow2",
            "qemu-img convert -O qcow2 --bitmaps k.qcow2 k2.qcow2",
            "qemu-img convert -O qcow2 --bitmaps --skip-broken-bitmaps k.qcow2 k2.qcow2",
            "qemu-img info k2.qcow2",
            "qemu-img convert -O raw --bitmaps k2.qcow2 k2.raw",
            "qemu-img convert -O qcow2 -o compat=0.10 --bitmaps k2.qcow2 k3.qcow2",
            "qemu-img convert -O qcow2 --bitmaps k2.raw k4.qcow2",
            "qemu-img convert -O qcow2 --bitmaps k2.qcow2 k2.qcow2 k4.qcow2",
            "qemu-img convert -O qcow2 --bitmaps plain.qcow2 k4.qcow2",
            "qemu-img convert -n -O qcow2 --bitmaps k2.qcow2 k4.qcow2",
            "qemu-img convert -n -O qcow2 --bitmaps k2.qcow2 k4.qcow2",
            "qemu-img convert --skip-broken-bitmaps -O qcow2 k2.qcow2 k5.qcow2",
            "qemu-img info k4.qcow2",
            "qemu-img bitmap --remove k.qcow2 b",
            "qemu-img bitmap --remove k.qcow2 d",
            "qemu-img info k.qcow2",
            "qemu-img check k.qcow2",
        ],
    );
}

/// The sums of all bitmaps of an image, as one of the daemons tells them.
fn sums(program: &[&str], image: &Path) -> Vec<serde_json::Value> {
    let mut daemon = daemon(program, image);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let nodes = client.run("query-named-block-nodes", json!({}));
    let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "q").unwrap();
    let bitmaps = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    let list = bitmaps.into_iter().map(|bitmap| {
        let of = json!({"node": "q", "name": bitmap["name"]});
        json!([bitmap, client.run("x-debug-block-dirty-bitmap-sha256", of)])
    });
    let list = list.collect();
    client.run("quit", json!({}));
    daemon.server.wait_exit(LIMIT).unwrap();
    list
}

/// The same lines, each by either of the programs, leave bitmaps of which both tell the same.
#[test]
fn bitmaps_that_either_program_has_written_say_the_same_to_both() {
    let seed = crate::disks::seed();
    let mut rng = fastrand::Rng::with_seed(seed);
    for create in [
        "cluster_size=64k",
        "cluster_size=4k",
        "cluster_size=512",
        "cluster_size=16k,extended_l2=on",
    ] {
        // The first is changed by both in turns, the second by QEMU alone.
        let (ours, theirs) = (Place::new(true), Place::new(false));
        for line in [
            format!("qemu-img create -q -f qcow2 -o {create} i.qcow2 40M"),
            "qemu-img bitmap --add -g 512 i.qcow2 fine".into(),
            "qemu-img bitmap --add -g 4k i.qcow2 b".into(),
            "qemu-img bitmap --add -g 64k i.qcow2 c".into(),
        ] {
            assert_eq!(theirs.run(&line).code, Some(0), "{line}");
        }
        let image = ours.path().join("i.qcow2");
        std::fs::copy(theirs.path().join("i.qcow2"), &image).unwrap();
        for step in 0..6 {
            let mut line = "qemu-io -d unmap".to_owned();
            for _ in 0..rng.u32(1..6) {
                let at = rng.u64(0..70_000) * 512;
                let len = rng.u64(1..1000) * 512;
                let what = ["write", "write", "write -z", "write -zu", "discard"][rng.usize(0..5)];
                line += &format!(" -c '{what} {at} {len}'");
            }
            let change = [
                "qemu-img bitmap --disable i.qcow2 b",
                "qemu-img bitmap --enable i.qcow2 b",
                "qemu-img bitmap --clear i.qcow2 c",
                "qemu-img bitmap --merge c i.qcow2 fine",
                "qemu-img bitmap --merge fine i.qcow2 c",
                "qemu-img bitmap --remove --add -g 1k i.qcow2 b",
                "qemu-img resize i.qcow2 +1M",
                "qemu-img resize --shrink i.qcow2 -512k",
            ][rng.usize(0..8)];
            for line in [&format!("{line} i.qcow2"), change] {
                assert_eq!(theirs.run(line).code, Some(0), "{line}");
                // The same file, by turns.
                let program = match step % 2 {
                    0 => ours.run(line),
                    _ => Place::run(
                        &Place::new(false),
                        &line.replace("i.qcow2", image.to_str().unwrap()),
                    ),
                };
                assert_eq!(program.code, Some(0), "{line}: {}", program.stderr);
            }
        }
        let vublk = [env!("CARGO_BIN_EXE_vublk"), "daemon"];
        let reference = sums(&["qemu-storage-daemon"], &theirs.path().join("i.qcow2"));
        assert_eq!(reference.len(), 3);
        assert_eq!(sums(&["qemu-storage-daemon"], &image), reference, "{create}, seed {seed}");
        assert_eq!(sums(&vublk, &image), reference, "{create}, seed {seed}");
        assert_eq!(sums(&vublk, &theirs.path().join("i.qcow2")), reference, "{create}");
        let checked = theirs.run(&format!("qemu-img check {}", image.display()));
        assert_eq!(checked.code, Some(0), "{}{}", checked.stdout, checked.stderr);
    }
}
