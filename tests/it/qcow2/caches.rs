//! Caches and discards: unused memory is freed, and discarded clusters stay if asked for.

use super::images::Images;
use crate::monitor::{Client, MONITOR, is_same_but_for_advice};
use crate::vhost_user::{Daemon, LIMIT, export_of};
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};
use vublk_testkit::{Disk, Options};

/// Anonymous memory of a process, in KiB.
fn memory(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Makes all L2 tables read.
fn touch(disk: &mut Disk, len: u64, step: u64) {
    for at in (0..len).step_by(step as usize) {
        disk.read(at / 512, &mut [0; 512]).unwrap();
    }
}

#[test]
fn caches_that_nobody_uses_are_given_back_and_are_there_again_for_whoever_does() {
    const LEN: u64 = 4 << 30;
    let images = Images::new();
    // 8 MiB of L2 tables, of 4 KiB each.
    images.create("disk.img", LEN, "cluster_size=4k,preallocation=metadata");
    let path = images.path("disk.img").to_str().unwrap().to_owned();
    let start = |interval: &str| {
        let node = format!(
            "driver=qcow2,node-name=d0,cache-clean-interval={interval},read-only=on,\
             file.driver=file,file.filename={path}"
        );
        let daemon = Daemon::start(&["--blockdev", &node, "--export", &export_of("d0", 0)]);
        let mut disk = daemon.open(&Options::default());
        disk.read(0, &mut [0; 512]).unwrap();
        let empty = memory(&daemon);
        touch(&mut disk, LEN, 2 << 20);
        (daemon, disk, empty)
    };
    let (forever, mut kept, empty) = start("0");
    assert!(memory(&forever) > empty + 7 * 1024, "{} {empty}", memory(&forever));
    let (daemon, mut disk, empty) = start("1");
    let end = Instant::now() + LIMIT;
    // At most the table that is asked for, and what else the process has taken meanwhile.
    while memory(&daemon) > empty + 1024 {
        assert!(Instant::now() < end, "{} KiB, {empty} KiB when empty", memory(&daemon));
        std::thread::sleep(Duration::from_millis(50));
    }
    touch(&mut disk, LEN, 256 << 20);
    assert!(memory(&forever) > empty + 6 * 1024, "what is to be kept is kept");
    kept.read(0, &mut [0; 512]).unwrap();
}

/// Where guest clusters are, as qemu-img tells it.
fn map(images: &Images) -> Vec<(u64, bool, Option<u64>)> {
    let said = images.run("qemu-img", &["map", "--output=json", "disk.img"]);
    let list: Value = serde_json::from_str(&said).unwrap();
    let extent = |one: &Value| {
        (one["start"].as_u64().unwrap(), one["zero"].as_bool().unwrap(), one["offset"].as_u64())
    };
    list.as_array().unwrap().iter().map(extent).collect()
}

#[test]
fn what_is_discarded_keeps_its_place_where_that_is_asked_for() {
    const LEN: usize = 1 << 20;
    for create in ["cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
        for (options, unref, passes) in [
            ("", true, true),
            ("discard-no-unref=on", false, true),
            ("discard-no-unref=on,pass-discard-request=off", false, false),
        ] {
            let what = format!("{create} {options}");
            let images = Images::new();
            images.create("disk.img", 16 << 20, create);
            let path = images.path("disk.img");
            let node = format!(
                "driver=qcow2,node-name=d0,discard=unmap,file.driver=file,file.filename={},{options}",
                path.display()
            );
            let export = format!("{},writable=on", export_of("d0", 0));
            let more = ["--blockdev", node.trim_end_matches(','), "--export", &export];
            let used = || std::fs::metadata(&path).unwrap().blocks() * 512;
            let session = |work: &mut dyn FnMut(&mut Disk)| {
                let daemon = Daemon::start(&more);
                let mut disk = daemon.open(&Options::default());
                work(&mut disk);
                disk.flush().unwrap();
                drop(disk);
                daemon.end();
                images.run("qemu-img", &["check", "-q", "disk.img"]);
            };
            session(&mut |disk| disk.write(0, &[7; LEN]).unwrap());
            let (before, full) = (map(&images), used());
            let place = before[0].2.expect("it is somewhere");
            session(&mut |disk| {
                disk.discard(0, LEN as u32 / 1024, 0).unwrap();
                disk.write_zeroes(LEN as u64 / 1024, LEN as u32 / 1024, true).unwrap();
                let mut found = [1; LEN];
                disk.read(0, &mut found).unwrap();
                assert!(found.iter().all(|&byte| byte == 0), "{what}");
            });
            let after = map(&images);
            assert!(after.iter().all(|(_, is_zero, _)| *is_zero), "{what}: {after:?}");
            assert_eq!(after[0].2, (!unref).then_some(place), "{what}");
            let is_less = used() + LEN as u64 / 2 < full;
            assert_eq!(is_less, passes, "{what}: {} of {full}", used());
            session(&mut |disk| disk.write(0, &[8; LEN]).unwrap());
            if !unref {
                assert_eq!(map(&images)[0], (0, false, Some(place)), "{what}");
            }
            let said = images.run("qemu-io", &["-c", "read -P 8 0 1M", "disk.img"]);
            assert!(!said.contains("failed"), "{said}");
        }
    }
}

#[test]
fn what_caches_cannot_be_is_refused_in_qemus_words() {
    let images = Images::new();
    images.create("disk.img", 16 << 20, "");
    images.create("old.img", 16 << 20, "compat=0.10");
    let cases = [
        json!({"cache-clean-interval": -1}),
        json!({"cache-clean-interval": 1u64 << 32}),
        json!({"cache-clean-interval": 0xffff_ffffu32}),
        json!({"cache-size": 1, "l2-cache-size": 1, "refcount-cache-size": 1}),
        json!({"cache-size": 1, "l2-cache-size": 2}),
        json!({"cache-size": 1, "refcount-cache-size": 2}),
        json!({"cache-size": 0}),
        json!({"l2-cache-entry-size": 1000}),
        json!({"l2-cache-entry-size": 256}),
        json!({"l2-cache-entry-size": 131072}),
        json!({"l2-cache-entry-size": 512}),
        json!({"overlap-check": "some"}),
        json!({"overlap-check": {"template": "some"}}),
        json!({"overlap-check": {"active-l3": true}}),
        json!({"overlap-check": {"active-l1": "on"}}),
        json!({"overlap-check": {"template": "all", "active-l1": false}}),
        json!({"pass-discard-other": true, "pass-discard-request": false}),
    ];
    let ask = |program: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(images.path("disk.img"), dir.path().join("disk.img")).unwrap();
        std::fs::copy(images.path("old.img"), dir.path().join("old.img")).unwrap();
        let daemon = Daemon::start_in(dir, program, &MONITOR);
        let mut client = Client::connect(&daemon.path("m.sock"));
        let replies = cases.iter().map(|case| {
            let mut node = case.clone();
            node["driver"] = json!("qcow2");
            node["node-name"] = json!("d0");
            node["file"] = json!({"driver": "file", "filename": daemon.path("disk.img")});
            let reply = client.ask("blockdev-add", node);
            if reply.get("return").is_some() {
                client.run("blockdev-del", json!({"node-name": "d0"}));
            }
            reply
        });
        let replies: Vec<_> = replies.collect();
        let old = json!({"driver": "qcow2", "node-name": "d0", "discard-no-unref": true,
            "file": {"driver": "file", "filename": daemon.path("old.img")}});
        (replies, client.refusal("blockdev-add", old))
    };
    let (ours, old) = ask(&[env!("CARGO_BIN_EXE_vublk"), "daemon"]);
    let (theirs, _) = ask(&["qemu-storage-daemon"]);
    for ((case, ours), theirs) in cases.iter().zip(ours).zip(theirs) {
        assert!(is_same_but_for_advice(&ours, &theirs), "{case}: {ours} beside {theirs}");
    }
    // 7.2 does not know it.
    assert_eq!(old, "discard-no-unref is only supported since qcow2 version 3");
}
