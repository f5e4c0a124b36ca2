//! A cloop image with arbitrary words changed, read: no panic, no endless work, errors of one line.

use super::input::Input;
use super::opened::{damage, stored_zlib, work};
use std::sync::LazyLock;
use vublk::block::Registry;
use vublk::format::cloop;
use vublk::protocol::sim;

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[&[&cloop::ENTRY, &sim::ENTRY]]));

/// An image of four blocks of 1 KiB.
fn image() -> Vec<u8> {
    let block = stored_zlib(&[9; 1024]);
    let mut image = b"#!/bin/sh\n#V2.0 Format\n".to_vec();
    image.resize(128, 0);
    image.extend([1024u32, 4].map(u32::to_be_bytes).concat());
    let first = 136 + 5 * 8;
    image.extend((0..5).flat_map(|n| (first + n * block.len() as u64).to_be_bytes()));
    image.extend(block.repeat(4));
    image
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut image = image();
    damage(&mut image, &mut input);
    work(&REGISTRY, "cloop", &image, &mut input);
}
