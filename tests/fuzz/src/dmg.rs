//! Fuzzing dmg: arbitrary words changed, chunks of any packing, arbitrary property lists.
//!
//! There must be no panic, no endless work, and only errors of one line.

use super::input::Input;
use super::opened::{damage, stored_zlib, work};
use std::sync::LazyLock;
use vublk::block::Registry;
use vublk::format::dmg;
use vublk::protocol::sim;

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[&[&dmg::ENTRY, &sim::ENTRY]]));

/// The tables of chunks and the trailer behind some data.
fn image(input: &mut Input) -> Vec<u8> {
    let mut image = stored_zlib(&[5; 1024]);
    image.extend(input.bytes(64));
    let data = image.len() as u64;
    let (start, is_list) = (image.len() as u64, input.one_in(4));
    if is_list {
        image.extend(b"<plist><dict><data>");
        image.extend(input.bytes(200));
        image.extend(b"</data></dict></plist>");
    } else {
        let table = table(data, input);
        let len = table.len() as u32;
        image.extend([16, 0, len + 4, 0].map(u32::to_be_bytes).concat());
        image.extend(len.to_be_bytes());
        image.extend(table);
    }
    let len = image.len() as u64 - start;
    let mut trailer = b"koly\0\0\0\x04\0\0\x02\0\0\0\0\x01".to_vec();
    let fork = if is_list { [0, 0] } else { [start, len] };
    trailer.extend([0, 0, data, fork[0], fork[1]].map(u64::to_be_bytes).concat());
    trailer.resize(216, 0);
    let list = if is_list { [start, len] } else { [0, 0] };
    trailer.extend(list.map(u64::to_be_bytes).concat());
    trailer.resize(492, 0);
    trailer.extend(8u64.to_be_bytes());
    trailer.resize(512, 0);
    image.extend(trailer);
    image
}

/// Four chunks of two sectors, one of them of any packing.
fn table(data: u64, input: &mut Input) -> Vec<u8> {
    let packing = 0x8000_0004 + u32::from(input.u8() % 6);
    let packed = 1024 + 11;
    let chunks = [
        (0x8000_0005, 0, packed),
        (0, 0, 0),
        (packing, packed, data - packed),
        (1, 0, 1024),
        (0xffff_ffff, 0, 0),
    ];
    let mut table = b"mish\0\0\0\x01".to_vec();
    table.resize(200, 0);
    table.extend((chunks.len() as u32).to_be_bytes());
    for (n, (kind, offset, len)) in (0..).zip(chunks) {
        table.extend([kind, 0].map(u32::to_be_bytes).concat());
        table.extend([2 * n, 2, offset, len].map(u64::to_be_bytes).concat());
    }
    table
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut image = image(&mut input);
    damage(&mut image, &mut input);
    work(&REGISTRY, "dmg", &image, &mut input);
}
