//! Logs of VHDX images: replayed as QEMU replays them, or refused.

use super::*;

/// Says that the newest entry of the log counts.
fn with_log(image: &mut Bytes) -> usize {
    let entries = (0..100).map(|n| LOG + n * 4096);
    let newest = entries.rev().find(|&at| image.bytes[at..].starts_with(b"loge")).unwrap();
    let guid = image.bytes[newest + 32..][..16].to_vec();
    // QEMU gives each entry a GUID of its own: it is the only one, and the oldest.
    image.put_twice(HEADERS, 48, &guid);
    newest
}

#[test]
fn a_log_is_replayed_as_qemu_replays_it() {
    let read = "qemu-io -r -f vhdx -c 'read -P 1 0 10k' -c 'read -P 2 3M 1100k' x.vhdx";
    for damage in [false, true] {
        let place = with_image("-o block_size=1M", "8M");
        let mut image = Bytes::of(&place);
        let newest = with_log(&mut image);
        if damage {
            // What the log says is not in its place.
            image.put_entry(0, 0).put_entry(3, 7);
        }
        image.save();
        let both = [place.run(read), place.run_theirs(read)];
        assert_eq!(both[0], both[1]);
        assert!(both[0].stderr.contains("needs to be replayed"), "{:?}", both[0]);
        let repairs: Vec<(Ended, Vec<u8>)> = [true, false]
            .into_iter()
            .map(|ours| {
                let line = "qemu-img check -r all -f vhdx x.vhdx";
                image.save();
                let ended = if ours { place.run(line) } else { place.run_theirs(line) };
                (ended, Bytes::of(&place).bytes[BAT..].to_vec())
            })
            .collect();
        assert_eq!(repairs[0].0, repairs[1].0);
        assert!(repairs[0].1 == repairs[1].1, "damage: {damage}: other bytes");
        // A program that writes replays it, too.
        image.save();
        let written = place.run("qemu-io -f vhdx -c 'write -P 7 7M 64k' x.vhdx");
        assert_eq!(written.code, Some(0), "{written:?}");
        assert_eq!(place.run_theirs(read).code, Some(0));
        // A torn entry has not happened.
        image.put(newest + 4096 + 99, b"x");
        image.save();
        let found = place.run("qemu-img check -f vhdx x.vhdx");
        let theirs = place.run_theirs("qemu-img check -f vhdx x.vhdx");
        assert!(
            !found.stderr.contains("replayed") && !theirs.stderr.contains("replayed"),
            "{found:?}"
        );
    }
}

#[test]
fn a_log_that_cannot_be_meant_for_the_file_is_refused() {
    let place = with_image("-o block_size=1M", "8M");
    let original = Bytes::of(&place);
    let seal = |image: &mut Bytes, at: usize| {
        image.put(at + 4, &[0; 4]);
        let checksum = crc32c::crc32c(&image.bytes[at..][..8192]);
        image.put(at + 4, &checksum.to_le_bytes());
    };
    let cases: [(usize, &[u8], &str); 5] = [
        // Past the end, over a header, over the log itself; a file that was longer; one that is too long.
        (64 + 19, &[0x10], "no place for metadata"),
        (64 + 16, &[0, 0, 1], "no place for metadata"),
        (64 + 18, &[0x10], "no place for metadata"),
        (48 + 3, &[1], "truncated"),
        (56 + 7, &[1], "is said to have"),
    ];
    for (at, bytes, wanted) in cases {
        let mut image = Bytes { path: original.path.clone(), bytes: original.bytes.clone() };
        let newest = with_log(&mut image);
        image.put(newest + at, bytes);
        seal(&mut image, newest);
        image.save();
        let ended = place.run("qemu-io -f vhdx -c 'read 0 512' x.vhdx");
        let is_named = ended.stderr.contains(wanted) && ended.stderr.lines().count() == 1;
        assert!(ended.code == Some(1) && is_named, "{wanted}: {ended:?}");
        let same = Bytes::of(&place);
        assert!(same.bytes[BAT..] == image.bytes[BAT..], "{wanted}: something has changed");
    }
}
