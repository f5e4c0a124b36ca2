//! A Parallels image with arbitrary words changed, read and written: no panic, no endless work, errors of one line.

use super::input::Input;
use super::opened::{damage, work};
use std::sync::LazyLock;
use vublk::block::Registry;
use vublk::format::parallels;
use vublk::protocol::sim;

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[&[&parallels::ENTRY, &sim::ENTRY]]));

/// An image of 16 KiB, of whose clusters every other one is there.
fn image(magic: &[u8; 16], sectors: u32) -> Vec<u8> {
    let entries = 32 / sectors + 1;
    let mut image = magic.to_vec();
    image.extend(
        [2, 16, 0, sectors, entries, 32, 0, 0, 2 * sectors, 0, 0, 0].map(u32::to_le_bytes).concat(),
    );
    let unit = if magic == b"WithoutFreeSpace" { sectors } else { 1 };
    let named = |index: u32| if index.is_multiple_of(2) { (2 + index / 2) * unit } else { 0 };
    image.extend((0..entries).flat_map(|index| named(index).to_le_bytes()));
    image.resize(2 * sectors as usize * 512, 0);
    image.resize(image.len() + entries.div_ceil(2) as usize * sectors as usize * 512, 3);
    image
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kinds = [(b"WithoutFreeSpace", 4), (b"WithouFreSpacExt", 4), (b"WithouFreSpacExt", 3)];
    for (magic, sectors) in kinds {
        let mut image = image(magic, sectors);
        damage(&mut image, &mut input);
        work(&REGISTRY, "parallels", &image, &mut input);
    }
}
