//! Reading QEMU's images of every kind byte for byte, by every path.

use super::images::{Images, random_commands};
use crate::disks::{open_holding, seed, simulated};
use crate::fast_path::FastPath;
use std::path::Path;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{AlignedBuf, IoVec};

/// What an image is made with, and how large it is in clusters.
pub const KINDS: &[(&str, u64)] = &[
    ("cluster_size=512", 600),
    ("cluster_size=4k,refcount_bits=1", 200),
    ("cluster_size=16k,extended_l2=on", 60),
    ("cluster_size=64k", 40),
    ("cluster_size=64k,extended_l2=on", 40),
    ("cluster_size=2M", 5),
    ("compat=0.10,cluster_size=4k", 200),
    ("compat=0.10", 30),
    ("refcount_bits=2,cluster_size=8k", 100),
    ("refcount_bits=64,cluster_size=1k", 400),
    ("refcount_bits=8,lazy_refcounts=on", 30),
    ("compression_type=zstd", 30),
    ("compression_type=zstd,cluster_size=2M", 4),
    ("preallocation=metadata,cluster_size=4k", 200),
    ("preallocation=metadata,extended_l2=on,cluster_size=32k", 40),
];

pub fn cluster_size(options: &str) -> u64 {
    let named = options.split(',').find_map(|option| option.strip_prefix("cluster_size="));
    let (number, unit) = match named {
        None => return 65536,
        Some(text) => text.split_at(text.find(['k', 'M']).unwrap_or(text.len())),
    };
    let number: u64 = number.parse().unwrap();
    number
        << match unit {
            "k" => 10,
            "M" => 20,
            _ => 0,
        }
}

/// Opens the image as the daemon would, and reads it in every way.
fn read_everything(options: String, wanted: Vec<u8>, seed: u64) {
    simulated(Disorder::wild(seed), |local| {
        let fast_path = FastPath::attach(local);
        async move {
            let opened = open_holding(&options, Perm::CONSISTENT_READ).await;
            let opened = opened.unwrap_or_else(|error| panic!("{options}: {error}"));
            let node = &opened.node;
            fast_path.serve(node);
            assert_eq!(node.len(), wanted.len() as u64, "{options}");
            let mut rng = fastrand::Rng::with_seed(seed);
            let len = node.len();
            let mut whole = vec![0xaa; wanted.len()];
            node.read(0, &IoVec::from_mut(&mut whole)).await.unwrap();
            same(&options, 0, &whole, &wanted);
            let mut fast_ones = 0;
            for _ in 0..200 {
                let unit = if rng.bool() { 512 } else { 4096 };
                let first = rng.u64(0..len / unit);
                let count = rng.u64(1..=(len / unit - first).min(40));
                let (at, n) = (first * unit, count * unit);
                let mut buf = AlignedBuf::new(n as usize, 4096).unwrap();
                buf.fill(0x55);
                let (mut buf, fast) = fast_path.transfer(Access::Read, at, buf).await;
                fast_ones += u32::from(fast.is_some());
                match fast {
                    Some(result) => result.unwrap(),
                    None => node.read(at, &buf.io_vec()).await.unwrap(),
                }
                same(&options, at, &buf, &wanted[at as usize..][..n as usize]);
                let mut part = vec![0x55; (n - 3) as usize];
                node.read(at + 1, &IoVec::from_mut(&mut part)).await.unwrap();
                same(&options, at + 1, &part, &wanted[at as usize + 1..][..n as usize - 3]);
            }
            assert!(fast_ones > 10, "{options}: {fast_ones} reads were fast");
            zeroes_are_zeroes(node, &wanted).await;
            fast_path.close();
        }
    });
}

fn same(options: &str, at: u64, found: &[u8], wanted: &[u8]) {
    if let Some(n) = (0..wanted.len()).find(|&n| found[n] != wanted[n]) {
        panic!("{options}: byte {} is {}, not {}", at + n as u64, found[n], wanted[n]);
    }
}

async fn zeroes_are_zeroes(node: &Node, wanted: &[u8]) {
    let mut at = 0;
    while at < node.len() {
        let extent = node.status(at, node.len() - at, Precision::Zeroes).await.unwrap();
        assert!(extent.len > 0 && extent.status.intersects(Status::DATA | Status::ZERO));
        if extent.status.contains(Status::ZERO) {
            let said = &wanted[at as usize..(at + extent.len) as usize];
            assert!(said.iter().all(|&b| b == 0), "{at}: {extent:?}");
        }
        at += extent.len;
    }
}

fn options_for(path: &Path) -> String {
    format!("driver=qcow2,read-only=on,file.driver=file,file.filename={}", path.display())
}

#[test]
fn images_of_every_kind_are_read_as_qemu_reads_them() {
    let seed = seed();
    for (n, &(kind, clusters)) in KINDS.iter().enumerate() {
        println!("{kind}");
        let images = Images::new();
        let mut rng = fastrand::Rng::with_seed(seed + n as u64);
        let size = cluster_size(kind) * clusters - 512;
        images.fill("a", size, kind, &mut rng, true);
        let wanted = images.contents("a");
        let path = images.path("a");
        read_everything(options_for(&path), wanted.clone(), rng.u64(..));
        // As little memory as can be asked for: every slice is thrown out again and again.
        let small = format!("{},l2-cache-size=1,l2-cache-entry-size=512", options_for(&path));
        read_everything(small, wanted, rng.u64(..));
    }
}

#[test]
fn what_an_overlay_does_not_have_comes_from_below_or_is_zero() {
    let seed = seed();
    for (n, (below, above)) in [(300u64, 200u64), (200, 300), (256, 256)].into_iter().enumerate() {
        for kind in ["cluster_size=4k", "extended_l2=on,cluster_size=16k"] {
            let images = Images::new();
            let mut rng = fastrand::Rng::with_seed(seed + n as u64);
            let (below, above) = (below * 8192 + 512, above * 8192);
            let base: Vec<u8> = (0..below).map(|at| (at / 512) as u8 | 1).collect();
            std::fs::write(images.path("base"), &base).unwrap();
            images.create("middle", below, "backing_file=base,backing_fmt=raw");
            images.io("middle", &random_commands(&mut rng, below, 512, 65536, true, false));
            images.create("top", above, &format!("backing_file=middle,backing_fmt=qcow2,{kind}"));
            images.io(
                "top",
                &random_commands(
                    &mut rng,
                    above,
                    512,
                    cluster_size(kind),
                    true,
                    kind.contains("extended_l2"),
                ),
            );
            let wanted = images.contents("top");
            read_everything(options_for(&images.path("top")), wanted, rng.u64(..));
        }
    }
}

#[test]
fn a_data_file_is_read_where_the_tables_say() {
    let seed = seed();
    for raw in ["off", "on"] {
        let images = Images::new();
        let mut rng = fastrand::Rng::with_seed(seed);
        let size = 100 << 12;
        let data = images.path("d").display().to_string();
        images.create("a", size, &format!("cluster_size=4k,data_file={data},data_file_raw={raw}"));
        images.io("a", &random_commands(&mut rng, size, 512, 4096, false, false));
        let wanted = images.contents("a");
        // As the image names it, and as the options do.
        let without = options_for(&images.path("a"));
        let options = format!("{without},data-file.driver=file,data-file.filename={data}");
        read_everything(without, wanted.clone(), rng.u64(..));
        read_everything(options, wanted, rng.u64(..));
    }
}

/// The extents of `qemu-img map`, of the top image: start, length, zero, data, offset.
#[test]
fn block_status_is_what_qemu_img_maps() {
    let seed = seed();
    for (kind, clusters) in [("cluster_size=4k", 200u64), ("extended_l2=on", 40)] {
        let images = Images::new();
        let mut rng = fastrand::Rng::with_seed(seed);
        let size = cluster_size(kind) * clusters;
        images.create("a", size, kind);
        images.io(
            "a",
            &random_commands(
                &mut rng,
                size,
                512,
                cluster_size(kind),
                true,
                kind.contains("extended_l2"),
            ),
        );
        let map = images.run("qemu-img", &["map", "--output=json", "-f", "qcow2", "a"]);
        let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
        let options = options_for(&images.path("a"));
        simulated(Disorder::wild(seed), |_| async move {
            let opened = open_holding(&options, Perm::CONSISTENT_READ).await.unwrap();
            for extent in map {
                let (start, len) =
                    (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
                let mut at = start;
                while at < start + len {
                    let found =
                        opened.node.status(at, start + len - at, Precision::Zeroes).await.unwrap();
                    let is = |status| found.status.contains(status);
                    assert_eq!(extent["zero"], is(Status::ZERO), "{at} {found:?} {extent}");
                    assert_eq!(extent["data"], is(Status::DATA), "{at} {found:?} {extent}");
                    let offset = extent["offset"].as_u64().map(|offset| offset + at - start);
                    let place = found.place.map(|place| place.offset);
                    if extent["present"].as_bool().unwrap() {
                        assert_eq!(offset, place, "{at} {found:?} {extent}");
                    }
                    at += found.len;
                }
            }
        });
    }
}

#[test]
fn what_cannot_be_opened_is_refused_in_one_line() {
    let images = Images::new();
    images.create("a", 1 << 20, "");
    std::fs::write(images.path("secret"), "x").unwrap();
    let secret = "secret,id=s,file=secret";
    images.run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            secret,
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            "luks",
            "1M",
        ],
    );
    std::fs::write(images.path("text"), [0x20; 4096]).unwrap();
    let cut = std::fs::read(images.path("a")).unwrap();
    std::fs::write(images.path("cut"), &cut[..65536]).unwrap();
    let mut unknown = cut;
    unknown[72 + 6] = 0x40;
    std::fs::write(images.path("unknown"), unknown).unwrap();
    for (name, more, wanted) in [
        ("a", ",bogus=1", "Parameter 'bogus' is unexpected"),
        (
            "a",
            ",l2-cache-entry-size=100",
            "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
        ),
        ("a", ",cache-size=5,l2-cache-size=6", "l2-cache-size may not exceed cache-size"),
        ("luks", "", "Encrypted qcow2 images are not supported"),
        ("text", "", "Image is not in qcow2 format"),
        ("cut", "", "Could not read L1 table: Input/output error"),
        ("unknown", "", "Unsupported qcow2 feature(s): Unknown incompatible feature: 4000"),
    ] {
        let options = format!("{}{more}", options_for(&images.path(name)));
        let refused = simulated(Disorder::wild(1), |_| async move {
            open_holding(&options, Perm::CONSISTENT_READ).await.err()
        });
        assert_eq!(refused.map(|error| error.to_string()).as_deref(), Some(wanted), "{name}");
    }
}
