//! A disk that is converted from format to format and back is what it was.

use super::Place;
use crate::disks::{REGISTRY, seed};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vublk::block::DriverEntry;
use vublk::block::registry::Kind;

/// MiB of the disk, of which a guest has written little; `VUBLK_DISK_MIB` says it for a longer run.
fn disk_len() -> u64 {
    let given = std::env::var("VUBLK_DISK_MIB").ok();
    given.map_or(48, |mib| mib.parse().expect("VUBLK_DISK_MIB: a number")) << 20
}

/// What a guest leaves on a disk: a boot sector, files that can be packed and others, zeroes that were written, the last
/// sector.
fn write_disk(path: &Path, len: u64) {
    let mut rng = fastrand::Rng::with_seed(seed());
    let file = File::create(path).unwrap();
    file.set_len(len).unwrap();
    file.write_all_at(b"\x55\xaa", 510).unwrap();
    for _ in 0..60 {
        let count = [512, 4096, 65536, 300 << 10][rng.usize(..4)];
        let at = rng.u64(..(len - count as u64) / 512) * 512;
        let mut bytes = vec![0; count];
        match rng.u8(..4) {
            0 => rng.fill(&mut bytes),
            1 => bytes.iter_mut().enumerate().for_each(|(n, byte)| *byte = (n % 61) as u8),
            2 => bytes.fill(rng.u8(1..)),
            _ => {}
        }
        file.write_all_at(&bytes, at).unwrap();
    }
    file.write_all_at(&[9; 512], len - 512).unwrap();
}

#[test]
fn a_disk_that_goes_through_every_format_comes_back_as_it_was() {
    let place = Place::new(true);
    let len = disk_len();
    write_disk(&place.path().join("disk.raw"), len);
    // LUKS images need a secret: the tests of luks convert them.
    let makes = |entry: &&&DriverEntry| {
        let is_made = entry.kind == Kind::Format && entry.create.is_some();
        is_made && !entry.is_raw() && entry.name != "luks"
    };
    let formats: Vec<&str> =
        REGISTRY.iter().collect::<Vec<_>>().iter().filter(makes).map(|entry| entry.name).collect();
    assert!(formats.len() >= 8, "{formats:?}");
    let (mut from, mut format) = ("disk.raw".to_owned(), "raw");
    for next in formats {
        let to = format!("disk.{next}");
        // Its sizes are rounded otherwise.
        let options = if next == "vpc" { "-o force_size=on" } else { "" };
        for line in [
            format!("qemu-img convert -f {format} -O {next} {options} {from} {to}"),
            format!("qemu-img compare -f raw -F {next} disk.raw {to}"),
        ] {
            let ended = place.run(&line);
            assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
        }
        let line = format!("qemu-img compare -f raw -F {next} disk.raw {to}");
        let theirs = place.run_theirs(&line);
        assert_eq!(theirs.code, Some(0), "{line}: {theirs:?}");
        if format != "raw" {
            std::fs::remove_file(place.path().join(&from)).unwrap();
        }
        (from, format) = (to, next);
    }
    let ended = place.run(&format!("qemu-img convert -f {format} -O raw {from} back.raw"));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let same = std::process::Command::new("cmp")
        .args(["disk.raw", "back.raw"])
        .current_dir(place.path())
        .output()
        .unwrap();
    assert!(same.status.success(), "{same:?}");
}
