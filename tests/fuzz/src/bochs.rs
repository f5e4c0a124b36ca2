//! A redolog of Bochs with arbitrary words changed, read: no panic, no endless work, errors of one line.

use super::input::Input;
use super::opened::{damage, work};
use std::sync::LazyLock;
use vublk::block::Registry;
use vublk::format::bochs;
use vublk::protocol::sim;

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[&[&bochs::ENTRY, &sim::ENTRY]]));

/// An image of 16 KiB in extents of 4 KiB, of which two are there.
fn image(version: u32) -> Vec<u8> {
    let mut image = vec![0; 512];
    for (at, text) in [(0, "Bochs Virtual HD Image"), (32, "Redolog"), (48, "Growing")] {
        image[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    let fields = [version << 16, 512, 4, 1, 4096].map(u32::to_le_bytes).concat();
    image[64..84].copy_from_slice(&fields);
    let size = if version == 1 { 84 } else { 88 };
    image[size..size + 8].copy_from_slice(&(16u64 << 10).to_le_bytes());
    image.extend([1, u32::MAX, 0, u32::MAX].map(u32::to_le_bytes).concat());
    for bits in [0x5a, 0xff] {
        image.push(bits);
        image.extend([0; 511]);
        image.extend([bits; 4096]);
    }
    image
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut image = image(1 + u32::from(input.one_in(2)));
    damage(&mut image, &mut input);
    work(&REGISTRY, "bochs", &image, &mut input);
}
