//! A qcow image with arbitrary words changed, read and written: no panic, no endless work, errors of one line.

use super::input::Input;
use super::opened::{damage, work};
use std::sync::LazyLock;
use vublk::block::Registry;
use vublk::format::qcow;
use vublk::protocol::sim;

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[&[&qcow::ENTRY, &sim::ENTRY]]));

/// An image of 64 KiB in clusters of 512 bytes: a table of 64 entries, eight clusters, and a packed one.
fn image() -> Vec<u8> {
    let mut image = b"QFI\xfb\0\0\0\x01".to_vec();
    image.resize(24, 0);
    image.extend((64u64 << 10).to_be_bytes());
    image.extend([9, 6, 0, 0, 0, 0, 0, 0]);
    image.extend(48u64.to_be_bytes());
    image.extend([512u64, 0].map(u64::to_be_bytes).concat());
    image.resize(512, 0);
    image.extend((0..8u64).flat_map(|n| (1024 + 512 * n).to_be_bytes()));
    // A raw deflate stream of 512 bytes as they are takes more than a cluster has, so this one is of zeroes.
    let packed = [0xed, 0xc1, 0x01, 0x01, 0, 0, 0, 0x80, 0x90, 0xfe, 0xaf, 0x6e, 0x48, 0x40, 0];
    image.extend((1u64 << 63 | (packed.len() as u64) << 54 | 5120).to_be_bytes());
    image.resize(5120, 3);
    image.extend(packed);
    image
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut image = image();
    damage(&mut image, &mut input);
    work(&REGISTRY, "qcow", &image, &mut input);
}
