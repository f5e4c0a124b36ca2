//! Fuzzing a VHDX image with changed headers, tables, metadata and log.
//!
//! It is opened, used and checked. There must be no panic, an end, and only errors of one line.

use super::image;
use super::input::Input;
use std::sync::LazyLock;
use vublk::block::{Error, Fix, WriteFlags, ZeroFlags};
use vublk::io::IoVec;
use vublk::protocol::sim::SimDisk;

/// Images with a dirty log: blocks of 1 MiB, of which the first was written.
static IMAGES: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
    ["size=3M,block_size=1M", "size=2000k,block_size=1M,subformat=fixed"].map(|options| {
        let mut bytes = image::create_as("vhdx", options);
        add_entry(&mut bytes);
        bytes
    })
});

const HEADERS: [usize; 2] = [0x10000, 0x20000];
const TABLES: [usize; 2] = [0x30000, 0x40000];
const LOG: usize = 0x100000;
const BAT: usize = 0x200000;
const METADATA: usize = 0x300000;
const ITEMS: usize = 0x310000;
const GUID: [u8; 16] = *b"the log's GUID--";
/// Bytes of the entry of the log.
const ENTRY: usize = 8192;

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..][..field.len()].copy_from_slice(field);
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..4]), &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[8..]).to_le_bytes()
}

/// An entry of the log that changes the first sector of the block table to what it has.
fn add_entry(bytes: &mut [u8]) {
    put(bytes, LOG, b"loge");
    put(bytes, LOG + 8, &(ENTRY as u32).to_le_bytes());
    put(bytes, LOG + 16, &1u64.to_le_bytes());
    put(bytes, LOG + 24, &1u32.to_le_bytes());
    put(bytes, LOG + 32, &GUID);
    put(bytes, LOG + 64, b"desc");
    let sector = bytes[BAT..][..4096].to_vec();
    put(bytes, LOG + 68, &sector[4092..]);
    put(bytes, LOG + 72, &sector[..8]);
    put(bytes, LOG + 80, &(BAT as u64).to_le_bytes());
    put(bytes, LOG + 88, &1u64.to_le_bytes());
    put(bytes, LOG + 4096, &sector);
    put(bytes, LOG + 4096, b"data\0\0\0\0");
    put(bytes, LOG + 8188, &1u32.to_le_bytes());
    let sum = checksum(&bytes[LOG..][..ENTRY]);
    put(bytes, LOG + 4, &sum);
    for header in HEADERS {
        put(bytes, header + 48, &GUID);
        let sum = checksum(&bytes[header..][..4096]);
        put(bytes, header + 4, &sum);
    }
}

/// Puts the checksum of a structure right.
fn seal(disk: &SimDisk, at: usize, len: usize) {
    let mut bytes = Vec::with_capacity(len);
    for sector in (0..len).step_by(512) {
        bytes.extend(disk.get::<512>((at + sector) as u64));
    }
    disk.put(at as u64 + 4, &checksum(&bytes));
}

/// Changes one of the images as the input says, and uses it.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let disk = image::put(&IMAGES[input.below(2) as usize]);
    for _ in 0..1 + input.u8() % 8 {
        change(&disk, &mut input);
    }
    for (places, len) in [(HEADERS, 4096), (TABLES, 65536)] {
        if !input.one_in(8) {
            places.iter().for_each(|&place| seal(&disk, place, len));
        }
    }
    if !input.one_in(8) {
        seal(&disk, LOG, ENTRY);
    }
    if input.one_in(8) {
        disk.set_len(input.below(disk.len()));
    }
    let (at, len) = (input.below(4 << 20), 1 + input.below(64 << 10));
    let fix = input.pick(&[Fix::Nothing, Fix::All]);
    let ended = image::with_format("vhdx", async move |node| {
        let mut bytes = vec![7; len as usize];
        if at + len <= node.len() {
            let _ = node.read(at, &IoVec::from_mut(&mut bytes)).await;
            let _ = node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await;
            let _ = node.zero(at, len, ZeroFlags::UNMAP).await;
            let _ = node.flush().await;
        }
        let mut say = |line: &str| assert_line(line);
        let image = node.driver().image().ok_or_else(|| Error::new("no image"))?;
        image.check(fix, &mut say).await.map(drop)
    });
    if let Err(error) = ended {
        assert_line(&error.to_string());
    }
}

fn change(disk: &SimDisk, input: &mut Input) {
    let value = match input.u8() % 3 {
        0 => input.edgy(),
        1 => input.below(16) << 20 | input.below(8),
        _ => input.below(1 << 16),
    };
    // The same change of both copies, mostly.
    let (places, reach): (&[usize], u64) = match input.u8() % 6 {
        0 => (&HEADERS, 80),
        1 => (&TABLES, 112),
        2 => (&[METADATA], 200),
        3 => (&[ITEMS], 48),
        4 => (&[BAT], 64),
        _ => (&[LOG], 128),
    };
    let at = input.below(reach);
    let width = 1 << input.below(4);
    for &place in places {
        if input.one_in(16) {
            continue;
        }
        disk.put(place as u64 + at, &value.to_le_bytes()[..width]);
    }
}

fn assert_line(line: &str) {
    assert!(!line.contains('\n') && line.len() < 1000, "{line:?}");
}
