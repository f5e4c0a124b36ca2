//! The sparse extents of ESX, which no tool here makes: made by the specification, and read by both programs.

use super::Place;
use std::path::Path;

const SECTOR: usize = 512;

/// Puts numbers of eight bytes where they belong.
fn put(bytes: &mut [u8], at: usize, numbers: &[u64]) {
    for (n, number) in numbers.iter().enumerate() {
        bytes[at + 8 * n..][..8].copy_from_slice(&number.to_le_bytes());
    }
}

fn put_short(bytes: &mut [u8], at: usize, numbers: &[u32]) {
    for (n, number) in numbers.iter().enumerate() {
        bytes[at + 4 * n..][..4].copy_from_slice(&number.to_le_bytes());
    }
}

/// A COWD extent of 10 MiB with these grains, by their numbers, each full of one byte.
fn cowd(grain: usize, grains: &[(usize, u8)]) -> Vec<u8> {
    const CAPACITY: usize = 20480;
    let tables = CAPACITY.div_ceil(4096 * grain);
    let mut bytes = vec![0; 5 * SECTOR];
    let mut directory = vec![0; tables];
    for &(number, value) in grains {
        let table = &mut directory[number / 4096];
        if *table == 0 {
            *table = (bytes.len() / SECTOR) as u32;
            bytes.resize(bytes.len() + 4096 * 4, 0);
        }
        let at = *table as usize * SECTOR + number % 4096 * 4;
        let place = (bytes.len() / SECTOR) as u32;
        put_short(&mut bytes, at, &[place]);
        bytes.resize(bytes.len() + grain * SECTOR, value);
    }
    bytes[..4].copy_from_slice(b"COWD");
    let end = (bytes.len() / SECTOR) as u32;
    let head = [1, 3, CAPACITY as u32, grain as u32, 4, tables as u32, end];
    put_short(&mut bytes, 4, &head);
    put_short(&mut bytes, 4 * SECTOR, &directory);
    bytes
}

/// A seSparse extent of 32 MiB with these entries: the number of a grain, the kind, and for stored ones a place and a byte.
fn se_sparse(entries: &[(usize, u64, usize, u8)], needs_replay: bool) -> Vec<u8> {
    const GRAINS: usize = 144;
    let mut bytes = vec![0; GRAINS * SECTOR];
    let mut head = [0u64; 26];
    head[..5].copy_from_slice(&[0xcafe_babe, 0x2_0000_0001, 65536, 8, 64]);
    head[10..20].copy_from_slice(&[1, 1, 2, 1, 3, 1, 8, 1, 9, 128]);
    head[24] = GRAINS as u64;
    put(&mut bytes, 0, &head);
    put(&mut bytes, SECTOR, &[0xcafe_cafe, 0, 0, u64::from(needs_replay)]);
    put(&mut bytes, 8 * SECTOR, &[1 << 60, 1 << 60 | 1]);
    for &(number, kind, place, value) in entries {
        let mut entry = kind << 60;
        if kind == 3 {
            entry |= (place as u64 & 0xfff) << 48 | place as u64 >> 12;
            let at = (GRAINS + 8 * place) * SECTOR;
            let len = bytes.len().max(at + 4096);
            bytes.resize(len, 0);
            bytes[at..at + 4096].fill(value);
        }
        put(&mut bytes, 9 * SECTOR + 8 * number, &[entry]);
    }
    bytes
}

fn write_descriptor(place: &Path, create_type: &str, line: &str) {
    let text = format!(
        "version=1\nCID=11111111\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n{line}\n"
    );
    std::fs::write(place.join("x.vmdk"), text).unwrap();
}

#[test]
fn extents_of_esx_are_read_as_qemu_reads_them() {
    let place = Place::new(true);
    let lines = [
        "qemu-img info -f vmdk x.vmdk",
        "qemu-img info -f vmdk --output=json x.vmdk",
        "qemu-img map -f vmdk --output=json x.vmdk",
        "qemu-img check -f vmdk x.vmdk",
        "qemu-img convert -f vmdk -O raw x.vmdk out.raw",
        "qemu-img compare -f vmdk -F raw x.vmdk out.raw",
        "qemu-io -r -f vmdk -c 'read 0 512' x.vmdk",
    ];
    let same = |what: &str| {
        for line in lines {
            let [ours, theirs] = [place.run(line), place.run_theirs(line)];
            assert_eq!(ours, theirs, "{what}: {line}");
        }
    };
    for (grain, grains) in
        [(1, &[(0, 1), (5, 2), (4096, 3), (20479, 4)][..]), (128, &[(0, 1), (159, 5)])]
    {
        std::fs::write(place.path().join("d"), cowd(grain, grains)).unwrap();
        write_descriptor(place.path(), "vmfsSparse", "RW 20480 VMFSSPARSE \"d\"");
        same("COWD");
    }
    let entries = [
        (0, 3, 0, 1),
        (1, 3, 2, 2),
        (2, 1, 0, 0),
        (3, 2, 0, 0),
        (5000, 3, 1, 3),
        (8191, 3, 4097, 9),
    ];
    for needs_replay in [false, true] {
        std::fs::write(place.path().join("d"), se_sparse(&entries, needs_replay)).unwrap();
        write_descriptor(place.path(), "seSparse", "RW 65536 SESPARSE \"d\"");
        same("seSparse");
    }
}

#[test]
fn a_cowd_extent_is_written_with_new_tables_and_without_a_descriptor_too() {
    let place = Place::new(true);
    std::fs::write(place.path().join("d"), cowd(1, &[(0, 1), (5, 2)])).unwrap();
    write_descriptor(place.path(), "vmfsSparse", "RW 20480 VMFSSPARSE \"d\"");
    let write = "qemu-io -f vmdk -c 'write -P 7 1M 1k' -c 'write -P 8 9M 100k' -c 'write -P 9 2000k 200k' x.vmdk";
    assert_eq!(place.run(write).code, Some(0));
    let read = "qemu-io -r -f vmdk -c 'read -P 1 0 512' -c 'read -P 7 1M 1k' -c 'read -P 8 9M 100k' -c 'read -P 9 2000k 200k' \
                -c 'read -P 0 3M 1M' x.vmdk";
    let [ours, theirs] = [place.run(read), place.run_theirs(read)];
    assert_eq!(ours, theirs);
    assert!(!theirs.stdout.contains("failed"), "{theirs:?}");
    // Where the file is free is what its header says.
    let bytes = std::fs::read(place.path().join("d")).unwrap();
    let free = u32::from_le_bytes(*bytes[28..].first_chunk().unwrap());
    assert_eq!(free as usize * SECTOR, bytes.len());
    // As VMware 3 has it.
    let alone = place.run("qemu-io -r -f vmdk -c 'read -P 8 9M 100k' d");
    assert!(alone.code == Some(0) && !alone.stdout.contains("failed"), "{alone:?}");
    assert!(place.run("qemu-img info d").stdout.contains("file format: vmdk"));
}
