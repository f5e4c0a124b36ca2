//! Backing chains of the greatest length.

use super::Place;
use std::path::Path;
use std::process::Command;

/// As many images as there can be in a chain.
const LIMIT: usize = 1000;

/// Makes `i0000.qcow2`, full of sevens, and overlays over each other, `count` images of 1 MiB in all.
pub fn chain_of(dir: &Path, count: usize) {
    let run = |program: &str, arguments: &[&str]| {
        let status = Command::new(program).args(arguments).current_dir(dir).status().unwrap();
        assert!(status.success(), "{program} {arguments:?}");
    };
    let create = ["create", "-q", "-u", "-f", "qcow2", "-o", "cluster_size=4096"];
    run("qemu-img", &[&create[..], &["i0000.qcow2", "1M"]].concat());
    run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 7 0 1M", "i0000.qcow2"]);
    // One overlay is made, and the others are copies of it with other names of the same length in them.
    const NAME: &[u8] = b"i9999.qcow2";
    let over = ["-b", "i9999.qcow2", "-F", "qcow2", "one.qcow2", "1M"];
    run("qemu-img", &[&create[..], &over].concat());
    let one = std::fs::read(dir.join("one.qcow2")).unwrap();
    let at = one.windows(NAME.len()).position(|part| part == NAME).unwrap();
    for n in 1..count {
        let mut image = one.clone();
        image[at..][..NAME.len()].copy_from_slice(format!("i{:04}.qcow2", n - 1).as_bytes());
        std::fs::write(dir.join(format!("i{n:04}.qcow2")), image).unwrap();
    }
}

/// Runs lines of ours in a folder with the longest chain, with `TOP` for its top. What each printed.
fn in_longest_chain(lines: &[&str]) -> Vec<String> {
    let place = Place::new(true);
    chain_of(place.path(), LIMIT);
    let top = format!("i{:04}.qcow2", LIMIT - 1);
    let run = |line: &&str| {
        let ended = place.run(&line.replace("TOP", &top));
        assert_eq!((ended.code, &*ended.stderr), (Some(0), ""), "{line}");
        ended.stdout
    };
    lines.iter().map(run).collect()
}

#[test]
fn the_longest_chain_is_described_mapped_and_read() {
    let out = in_longest_chain(&[
        "qemu-img info --backing-chain TOP",
        "qemu-img map --output=json TOP",
        "qemu-img compare TOP i0000.qcow2",
        "qemu-io -f qcow2 -c 'read -P 7 0 1M' TOP",
    ]);
    assert_eq!(out[0].matches("image: ").count(), LIMIT);
    assert!(out[1].contains("\"depth\": 999"), "{}", out[1]);
    assert_eq!(out[2], "Images are identical.\n");
    assert!(!out[3].contains("failed"), "{}", out[3]);
}

#[test]
fn the_longest_chain_is_converted_committed_and_rebased() {
    let out = in_longest_chain(&[
        "qemu-img convert -O raw TOP all.raw",
        "qemu-img compare all.raw i0000.qcow2",
        "qemu-io -f qcow2 -c 'write -q -P 9 64k 64k' TOP",
        "qemu-img rebase -F qcow2 -b i0001.qcow2 TOP",
        "qemu-img rebase -u -F qcow2 -b i0998.qcow2 TOP",
        "qemu-img commit -b i0000.qcow2 TOP",
        "qemu-io -f qcow2 -c 'read -q -P 9 64k 64k' -c 'read -P 7 128k 64k' i0000.qcow2",
    ]);
    assert_eq!(out[5], "Image committed.\n");
    assert!(!out[6].contains("failed"), "{}", out[6]);
}

#[test]
fn a_chain_of_more_images_is_refused_in_one_line() {
    let place = Place::new(true);
    chain_of(place.path(), LIMIT + 1);
    for line in
        ["qemu-img map i1000.qcow2", "qemu-img create -q -f qcow2 -F qcow2 -b i1000.qcow2 n.qcow2"]
    {
        let ended = place.run(line);
        assert_eq!(ended.code, Some(1), "{line}");
        let end = "more than 1000 images in the backing chain";
        assert!(ended.stderr.lines().any(|line| line.ends_with(end)), "{}", ended.stderr);
        assert!(ended.stderr.len() < 1000, "{}", ended.stderr);
    }
    assert!(!place.path().join("n.qcow2").exists());
}
