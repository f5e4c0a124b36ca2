//! Resizing a disk, compared with qemu-img resize.

use super::images::{Images, random_commands};
use super::read::{KINDS, cluster_size};
use crate::cli::VUBLK;
use crate::disks::seed;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

/// Runs `resize` in the images' folder; what it printed, and how it ended.
fn resize(images: &Images, ours: bool, arguments: &[String]) -> (Option<i32>, String) {
    let mut tool = Command::new(if ours { VUBLK } else { "qemu-img" });
    let dir = images.path("");
    let output = tool.arg("resize").args(arguments).current_dir(dir).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text.replace("qemu-img: ", "").replace("vublk: ", ""))
}

/// What `qemu-img map` says of each 512 bytes that is in the image, and at which depth; zeroes and data
/// are also a matter of where things happen to be in the file.
fn map(images: &Images, name: &str) -> Vec<(u64, bool)> {
    let map = images.run("qemu-img", &["map", "--output=json", name]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let runs = map.iter().map(|run| {
        let is = (run["depth"].as_u64().unwrap(), run["present"].as_bool().unwrap());
        vec![is; run["length"].as_u64().unwrap() as usize / 512]
    });
    runs.collect::<Vec<_>>().concat()
}

#[test]
fn a_shrink_gives_the_storage_back_what_it_frees_inside_the_file() {
    let blocks = [false, true].map(|ours| {
        let images = Images::new();
        images.run("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "16M"]);
        // The end of the disk is before its start in the file.
        images.run("qemu-io", &["-c", "write 8M 8M", "-c", "write 0 8M", "a.qcow2"]);
        let image =
            "driver=qcow2,discard=ignore,file.driver=file,file.filename=a.qcow2,file.discard=unmap";
        let line = ["-q", "--shrink", "--image-opts", image, "8M"].map(str::to_owned);
        assert_eq!(resize(&images, ours, &line), (Some(0), String::new()));
        assert!(is_sound(&images));
        std::fs::metadata(images.path("a.qcow2")).unwrap().blocks()
    });
    assert!(blocks[1] <= blocks[0] + 256, "{blocks:?}");
}

fn is_sound(images: &Images) -> bool {
    let check = ["check", "-f", "qcow2", "a.qcow2"];
    let check = Command::new("qemu-img").args(check).current_dir(images.path("")).output().unwrap();
    print!("{}", String::from_utf8_lossy(&check.stdout));
    check.status.success()
}

#[test]
fn images_are_resized_as_qemu_resizes_them() {
    let seed = seed();
    for (n, &(kind, clusters)) in KINDS.iter().enumerate() {
        let seed = seed.wrapping_add(n as u64);
        let mut rng = fastrand::Rng::with_seed(seed);
        let cluster = cluster_size(kind);
        let both = [Images::new(), Images::new()];
        let mut size = rng.u64(2..=clusters) * cluster;
        let has_backing = rng.bool() && !kind.contains("preallocation");
        for images in &both {
            if has_backing {
                images.run("qemu-img", &["create", "-q", "-f", "raw", "base.raw", "2M"]);
                let fill = ["-f", "raw", "-c", "write -P 251 0 2M", "base.raw"];
                images.run("qemu-io", &fill);
                let options = format!("{kind},backing_file=base.raw,backing_fmt=raw");
                images.create("a.qcow2", size, options.trim_start_matches(','));
            } else {
                images.create("a.qcow2", size, kind);
            }
        }
        for step in 0..3 {
            let what = format!("{kind}, backing {has_backing}, seed {seed}, step {step}");
            let extended = kind.contains("extended_l2");
            let commands = random_commands(&mut rng, size, 512, cluster, false, extended);
            let shrinks = rng.u8(0..3) == 0;
            // A cluster that the end cuts shows what was there when QEMU makes the disk longer.
            let new = match shrinks {
                true => rng.u64(1..=size / cluster) * cluster,
                false => (size + rng.u64(0..=4 << 20)).next_multiple_of(512),
            };
            let mut arguments: Vec<String> = vec!["-f".into(), "qcow2".into()];
            if shrinks {
                arguments.push("--shrink".into());
            } else if new > size && rng.bool() {
                let mode = ["off", "metadata", "falloc", "full"][rng.usize(0..4)];
                arguments.push(format!("--preallocation={mode}"));
            }
            arguments.extend(["a.qcow2".into(), new.to_string()]);
            let ended = [true, false].map(|ours| {
                let images = &both[usize::from(ours)];
                images.io("a.qcow2", &commands);
                resize(images, ours, &arguments)
            });
            assert_eq!(ended[0], ended[1], "{what}: {arguments:?}");
            if ended[0].0 == Some(0) {
                size = new;
            }
            // QEMU 7.2 at times leaks what it cuts off; such an image says nothing of ours.
            if !is_sound(&both[0]) {
                println!("{what}: QEMU has spoilt its image");
                break;
            }
            assert!(is_sound(&both[1]), "{what}: {arguments:?}");
            let [a, b] = &both;
            assert!(a.contents("a.qcow2") == b.contents("a.qcow2"), "{what}: {arguments:?}");
            assert!(map(a, "a.qcow2") == map(b, "a.qcow2"), "{what}: {arguments:?}");
        }
    }
}

#[test]
fn what_qemu_refuses_to_resize_is_refused_in_its_words() {
    let both = [Images::new(), Images::new()];
    for images in &both {
        images.create("old.qcow2", 1 << 20, "compat=0.10");
        images.run("qemu-img", &["snapshot", "-c", "s", "old.qcow2"]);
        images.create("small.qcow2", 1 << 20, "cluster_size=512");
        images.run("qemu-img", &["create", "-q", "-f", "raw", "base.raw", "2M"]);
        images.create("over.qcow2", 1 << 20, "compat=0.10,backing_file=base.raw,backing_fmt=raw");
    }
    for line in [
        "old.qcow2 2M",
        "small.qcow2 1000001",
        "small.qcow2 200G",
        "small.qcow2 512k",
        "--shrink --preallocation=metadata small.qcow2 512k",
        "over.qcow2 1536k",
    ] {
        let arguments: Vec<String> = line.split(' ').map(String::from).collect();
        let ended = [true, false].map(|ours| resize(&both[usize::from(ours)], ours, &arguments));
        assert_eq!(ended[0].0, Some(1), "{line}");
        assert_eq!(ended[0], ended[1], "{line}");
    }
}

#[test]
fn what_a_shrunk_disk_had_does_not_come_back_when_it_grows() {
    let images = Images::new();
    images.create("a.qcow2", 1 << 20, "");
    images.run("qemu-io", &["-c", "write -P 7 0 1M", "a.qcow2"]);
    for size in [["--shrink", "100k"], ["-q", "1M"]] {
        let arguments = [size[0], "a.qcow2", size[1]].map(String::from);
        let (code, said) = resize(&images, true, &arguments);
        assert_eq!(code, Some(0), "{said}");
    }
    let found = images.contents("a.qcow2");
    assert!(found[..100 << 10].iter().all(|&byte| byte == 7));
    assert!(found[100 << 10..].iter().all(|&byte| byte == 0));
    assert!(std::fs::metadata(images.path("a.qcow2")).unwrap().len() < 600 << 10, "it is cut");
}

#[test]
fn the_state_of_a_machine_does_not_become_the_disk() {
    let images = Images::new();
    images.create("a.qcow2", 1 << 20, "");
    images.run(VUBLK, &["io", "-c", "write -b -P 7 0 64k", "a.qcow2"]);
    // In QEMU it does: the state begins where the disk that one L2 table maps ends.
    let (code, said) = resize(&images, true, &["a.qcow2", "1G"].map(String::from));
    assert_eq!(code, Some(0), "{said}");
    images.run("qemu-io", &["-c", "read -P 0 512M 64k", "a.qcow2"]);
    images.run(VUBLK, &["io", "-c", "read -b -P 0 0 64k", "a.qcow2"]);
    assert!(is_sound(&images));
}

#[test]
fn a_snapshot_keeps_the_disk_that_it_has() {
    let images = Images::new();
    images.create("a.qcow2", 1 << 20, "cluster_size=4k");
    images.run("qemu-io", &["-c", "write -P 7 0 1M", "a.qcow2"]);
    images.run("qemu-img", &["snapshot", "-c", "s", "a.qcow2"]);
    for size in ["64k", "4M", "1M"] {
        let arguments = ["--shrink", "a.qcow2", size].map(String::from);
        let (code, said) = resize(&images, true, &arguments);
        assert_eq!(code, Some(0), "{said}");
        let said = images.run("qemu-img", &["check", "-f", "qcow2", "a.qcow2"]);
        assert!(said.contains("No errors were found"), "{said}");
    }
    images.run("qemu-img", &["snapshot", "-a", "s", "a.qcow2"]);
    assert!(images.contents("a.qcow2").iter().all(|&byte| byte == 7));
}
