//! Fuzzing a VMDK image with arbitrary words of its headers, descriptor and tables changed.
//!
//! It is read and written. There must be no panic, no endless work, and only errors of one line.

use super::input::Input;
use super::opened::{damage, stored_zlib, work};
use std::sync::LazyLock;
use vublk::block::Registry;
use vublk::format::vmdk;
use vublk::protocol::sim;

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[&[&vmdk::ENTRY, &sim::ENTRY]]));

const DESCRIPTOR: &str = "# Disk DescriptorFile\nversion=1\nencoding=\"windows-1252\"\nCID=01234567\nparentCID=ffffffff\n\
                          createType=\"monolithicSparse\"\n\nRW 64 SPARSE \"x\"\nRW 5 ZERO\nRW 8 FLAT \"y z\" 3\n";

/// Puts numbers of four bytes where they belong.
fn put(image: &mut [u8], at: usize, numbers: &[u32]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    image[at..at + bytes.len()].copy_from_slice(&bytes);
}

/// A hosted extent of 32 KiB in grains of 4 KiB, of which some are there; compressed ones behind markers.
fn hosted(is_packed: bool) -> Vec<u8> {
    let mut image = vec![0; 16 * 512];
    let flags = if is_packed { 0x3_0003 } else { 7 };
    image[..4].copy_from_slice(b"KDMV");
    put(&mut image, 4, &[if is_packed { 3 } else { 2 }, flags]);
    // Capacity, grain, descriptor, entries of a table, copy, directory, overhead.
    put(&mut image, 12, &[64, 0, 8, 0, 1, 0, 1, 0, 64, 5, 0, 3, 0, 16, 0]);
    image[73..77].copy_from_slice(b"\n \r\n");
    image[77] = u8::from(is_packed);
    image[512..512 + DESCRIPTOR.len()].copy_from_slice(DESCRIPTOR.as_bytes());
    put(&mut image, 3 * 512, &[4]);
    put(&mut image, 5 * 512, &[6]);
    for table in [4 * 512, 6 * 512] {
        put(&mut image, table, &[16, 0, 1, 32]);
    }
    for grain in [0u64, 3] {
        image.resize(if grain == 0 { 16 * 512 } else { 32 * 512 }, 0);
        if is_packed {
            let stream = stored_zlib(&[7; 4096]);
            image.extend((grain * 8).to_le_bytes());
            image.extend((stream.len() as u32).to_le_bytes());
            image.extend(stream);
        } else {
            image.extend([7; 4096]);
        }
    }
    image
}

/// A COWD extent of 32 KiB in grains of 512 bytes.
fn cowd() -> Vec<u8> {
    let mut image = vec![0; 2048 + 512 + 16384];
    image[..4].copy_from_slice(b"COWD");
    put(&mut image, 4, &[1, 3, 64, 1, 4, 1, 38]);
    put(&mut image, 2048, &[5]);
    put(&mut image, 2048 + 512, &[37]);
    image.extend([9; 512]);
    image
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut image = match input.u8() % 4 {
        0 => hosted(false),
        1 => hosted(true),
        2 => cowd(),
        _ => DESCRIPTOR.as_bytes().to_vec(),
    };
    damage(&mut image, &mut input);
    work(&REGISTRY, "vmdk", &image, &mut input);
}
