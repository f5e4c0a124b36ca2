//! Stored names that contain NUL bytes, which end the name, as in QEMU.

use super::*;

const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;
const FEATURE_NAMES: u32 = 0x6803_f857;

/// An overlay whose backing file and its format are stored as these bytes.
fn overlay(name: &[u8], format: Option<&[u8]>) -> Bytes {
    let mut image = Bytes::new("compat=1.1", &[]);
    let start = image.word(96) & 0xffff_ffff;
    image.put(start, &[0; 2048]);
    if let Some(format) = format {
        let head = [BACKING_FORMAT.to_be_bytes(), (format.len() as u32).to_be_bytes()].concat();
        image.put(start, &head).put(start + 8, format);
    }
    image.set(8, 2048).put(16, &(name.len() as u32).to_be_bytes()).put(2048, name);
    image
}

#[test]
fn names_of_backing_files_and_formats_end_at_a_nul_byte() {
    let names: [(&[u8], Option<&[u8]>); 8] = [
        (b"base.raw", Some(b"raw")),
        (b"base.raw\0junk", Some(b"raw")),
        (b"base.raw\0", Some(b"raw\0")),
        (b"base.raw", Some(b"raw\0qcow2")),
        (b"base.raw", Some(b"\0raw")),
        (b"base.raw", Some(b"")),
        (b"base.raw", None),
        (b"\0base.raw", Some(b"raw")),
    ];
    for (name, format) in names {
        let image = overlay(name, format);
        let what = format!("{name:?} {format:?}");
        assert_same(
            &what,
            &image,
            &["info", "info --output=json", "info --backing-chain", "check"],
        );
        assert_same(&what, &image, &["io read -P 0 0 64k", "map", "convert -O raw image out.raw"]);
        assert_same(
            &what,
            &image,
            &["io write -P 3 0 64k", "amend -o compat=0.10", "info", "check"],
        );
        assert_same(&what, &image, &["rebase -u -F raw -b base.raw", "info", "commit", "info"]);
        assert_same(&what, &image, &["snapshot -c s1", "bitmap --add image b", "check"]);
    }
}

#[test]
fn ids_and_names_of_snapshots_end_at_a_nul_byte() {
    let commands = ["write 0 64k", "!snapshot -c aXb", "write 0 64k", "!snapshot -c aXc"];
    let mut image = Bytes::new("compat=1.1", &commands);
    image.with_nul("aXb").with_nul("aXc");
    for lines in [
        ["snapshot -l", "info --output=json", "snapshot -d a", "snapshot -d a"],
        ["snapshot -a a", "snapshot -c x", "snapshot -d x", "check"],
        ["snapshot -d b", "snapshot -a b", "convert -l a -O raw image out.raw", "check"],
    ] {
        for left in assert_same("names", &image, &lines) {
            assert_eq!(check(&left).code, Some(0), "{lines:?}");
        }
    }
    // An identifier, the first byte of which is missing.
    let id = image.snapshots()[0] + 40 + 24;
    let mut image = image.clone();
    image.put(id, &[0]);
    assert_same("no id", &image, &["snapshot -l", "snapshot -d a", "snapshot -l", "check"]);
}

#[test]
fn names_of_bitmaps_end_at_a_nul_byte() {
    let add = ["!bitmap --add image aXb", "!bitmap --add image cXd"];
    let mut image = Bytes::new("compat=1.1", &add);
    image.with_nul("aXb").with_nul("cXd");
    assert_same("names", &image, &["info", "check", "bitmap --remove image a", "info", "check"]);
    assert_same("names", &image, &["bitmap --add image a", "bitmap --add image b", "info"]);
    let mut same =
        Bytes::new("compat=1.1", &["!bitmap --add image aXb", "!bitmap --add image aXc"]);
    same.with_nul("aXb").with_nul("aXc");
    let [left, _] =
        assert_same("the same", &same, &["info", "bitmap --add image b", "io read 0 4k"]);
    assert!(left.0 == same.0);
    // qemu-img loses all bitmaps of such an image.
    let mut none = Bytes::new("compat=1.1", &["!bitmap --add image XYb"]);
    none.with_nul("XYb");
    let (seen, left) = run_all(&none, &["bitmap --add image b"], true);
    assert!(seen[0].code == Some(1) && left.0 == none.0, "{seen:?}");
}

#[test]
fn names_of_data_files_and_features_end_at_a_nul_byte() {
    let dir = crate::file::on_tmpfs();
    let file = dir.path().join("data.raw");
    let options = format!("data_file={}", file.display());
    let mut image = Bytes::new(&options, &["write -P 1 0 64k"]);
    let at = image.extension(DATA_FILE);
    let len = image.word(at - 8) & 0xffff_ffff;
    // The padding, then all.
    image.put(at - 4, &(len.next_multiple_of(8) as u32).to_be_bytes());
    let lines = ["info", "io read -P 1 0 64k", "amend -o data_file_raw=off", "info"];
    assert_same("padded", &image, &lines);
    image.put(at + 4, &[0]);
    assert_same("cut", &image, &["info"]);
    let mut image = Bytes::new("compat=1.1", &[]);
    let names = image.extension(FEATURE_NAMES);
    image.put(79, &[0x80]).put(names, &[0, 7]).put(names + 2, b"odd\0name");
    assert_same("a feature", &image, &["info", "check"]);
}
