//! Fuzzing a VHD image with changed footers, header, table and sector bitmap.
//!
//! It is opened, used and checked. There must be no panic, an end, and only errors of one line.

use super::image;
use super::input::Input;
use std::sync::LazyLock;
use vublk::block::{Error, Fix, WriteFlags, ZeroFlags};
use vublk::io::IoVec;
use vublk::protocol::sim::SimDisk;

/// Images that grow by blocks of 4 KiB, of which the first is there, one of them without its parent; and one of fixed size.
static IMAGES: LazyLock<[Vec<u8>; 3]> = LazyLock::new(|| {
    let fixed = image::create_as("vpc", "size=64k,subformat=fixed,force_size=on");
    [growing(3), growing(4), fixed]
});

/// Where the header and the table are.
const HEADER: usize = 512;
const TABLE: usize = 1536;
/// Bytes of a sector, and of a footer.
const SECTOR: usize = 512;
const BLOCK: u32 = 4096;
/// Bytes of the disk of an image that grows.
const SIZE: u64 = 64 * BLOCK as u64;

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..][..field.len()].copy_from_slice(field);
}

/// The checksum of a structure that has it at `at`.
fn checksum(bytes: &[u8], at: usize) -> [u8; 4] {
    let others = bytes.iter().enumerate().filter(|(n, _)| !(at..at + 4).contains(n));
    (!others.map(|(_, &byte)| u32::from(byte)).sum::<u32>()).to_be_bytes()
}

/// An image of this kind, as the footer has it.
fn growing(kind: u8) -> Vec<u8> {
    // A table of 64 entries.
    let mut bytes = image::create_as("vpc", "size=128M,force_size=on");
    put(&mut bytes, 40, &[SIZE; 2].map(u64::to_be_bytes).concat());
    put(&mut bytes, 63, &[kind]);
    let sum = checksum(&bytes[..SECTOR], 64);
    put(&mut bytes, 64, &sum);
    put(&mut bytes, HEADER + 32, &BLOCK.to_be_bytes());
    let sum = checksum(&bytes[HEADER..TABLE], 36);
    put(&mut bytes, HEADER + 36, &sum);
    let footer = bytes[..SECTOR].to_vec();
    bytes.truncate(bytes.len() - SECTOR);
    let block = (bytes.len() / SECTOR) as u32;
    put(&mut bytes, TABLE, &block.to_be_bytes());
    // Of its sectors, those in the middle are there.
    bytes.push(0b0011_1100);
    bytes.resize(bytes.len() + SECTOR - 1, 0);
    bytes.resize(bytes.len() + BLOCK as usize, 3);
    bytes.extend(footer);
    bytes
}

/// Puts the checksum of a structure right that has it at `sum_at`.
fn seal(disk: &SimDisk, at: u64, len: u64, sum_at: usize) {
    let bytes: Vec<u8> =
        (at..at + len).step_by(SECTOR).flat_map(|at| disk.get::<SECTOR>(at)).collect();
    disk.put(at + sum_at as u64, &checksum(&bytes, sum_at));
}

/// Changes one of the images as the input says, and uses it.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let which = input.below(3) as usize;
    let disk = image::put(&IMAGES[which]);
    let tail = disk.len() - SECTOR as u64;
    for _ in 0..1 + input.u8() % 6 {
        change(&disk, tail, &mut input);
    }
    if !input.one_in(8) {
        seal(&disk, tail, SECTOR as u64, 64);
        if which < 2 {
            seal(&disk, 0, SECTOR as u64, 64);
            seal(&disk, HEADER as u64, 1024, 36);
        }
    }
    if input.one_in(8) {
        disk.set_len(input.below(disk.len()));
    }
    let (at, len) = (input.below(SIZE), 1 + input.below(20 << 10));
    let ended = image::with_format("vpc,backing=null", async move |node| {
        let mut bytes = vec![7; len as usize];
        if at + len <= node.len() {
            let _ = node.read(at, &IoVec::from_mut(&mut bytes)).await;
            let _ = node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await;
            let _ = node.zero(at, len, ZeroFlags::UNMAP).await;
            let _ = node.read(at, &IoVec::from_mut(&mut bytes)).await;
            let _ = node.flush().await;
        }
        let mut say = |line: &str| assert_line(line);
        let image = node.driver().image().ok_or_else(|| Error::new("no image"))?;
        image.check(Fix::Nothing, &mut say).await.map(drop)
    });
    if let Err(error) = ended {
        assert_line(&error.to_string());
    }
}

fn change(disk: &SimDisk, tail: u64, input: &mut Input) {
    let value = match input.u8() % 3 {
        0 => input.edgy(),
        1 => input.below(40),
        _ => input.below(1 << 16),
    };
    // The same change of both footers, mostly. Behind the table is the bitmap.
    let (places, reach): (&[u64], u64) = match input.u8() % 5 {
        0 | 1 => (&[0, tail], 88),
        2 => (&[HEADER as u64], 600),
        3 => (&[TABLE as u64], 64),
        _ => (&[TABLE as u64 + SECTOR as u64], 8),
    };
    let at = input.below(reach);
    let bytes = &value.to_be_bytes()[8 - (1 << input.below(4))..];
    for &place in places {
        if input.one_in(8) {
            continue;
        }
        disk.put(place + at, bytes);
    }
}

fn assert_line(line: &str) {
    assert!(!line.contains('\n') && line.len() < 1000, "{line:?}");
}
