//! Tests of headers that qemu-img made, and of qemu-img's messages about wrong ones.

use super::super::extensions::{BitmapsPointer, EncryptionPointer, feature_names};
use super::*;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Images(tempfile::TempDir);

impl Images {
    fn new() -> Images {
        Images(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("a.qcow2")
    }

    /// What qemu-img prints, or its error without what stands before it.
    fn qemu_img(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new("qemu-img");
        command.args(arguments).current_dir(self.0.path()).env("LC_ALL", "C");
        let output = command.output().expect("qemu-img: tests/setup.sh installs what is missing");
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap().trim().to_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stderr).replace("qemu-img: Could not open 'a.qcow2': ", "")),
        }
    }

    /// The first cluster of a new image.
    fn create(&self, options: &str, more: &[&str]) -> Vec<u8> {
        let options = format!("cluster_size=64k,{options}").trim_end_matches(',').to_owned();
        let start = ["create", "-q", "-f", "qcow2", "-u", "-o", &options];
        self.qemu_img(&[&start[..], more, &["a.qcow2", "3G"]].concat()).unwrap();
        self.first_cluster()
    }

    fn first_cluster(&self) -> Vec<u8> {
        first_cluster(&self.path())
    }

    /// What we say of the image with bytes changed, and what qemu-img says.
    fn patched(&self, patches: &[(usize, &[u8])]) -> (Result<(), String>, Result<(), String>) {
        let kept = std::fs::read(self.path()).unwrap();
        let mut bytes = kept.clone();
        for (at, patch) in patches {
            bytes[*at..][..patch.len()].copy_from_slice(patch);
        }
        std::fs::write(self.path(), &bytes).unwrap();
        let theirs = self.qemu_img(&["info", "-f", "qcow2", "a.qcow2"]).map(drop);
        let head = bytes.first_chunk().unwrap();
        let ours = Header::cluster_bits(head).and_then(|bits| {
            bytes.resize(bytes.len().max(1 << bits), 0);
            Header::parse(&bytes[..1 << bits])
        });
        std::fs::write(self.path(), kept).unwrap();
        (ours.map(drop).map_err(|e| e.to_string()), theirs)
    }
}

fn first_cluster(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()[..65536].to_vec()
}

#[test]
fn every_field_of_qemu_imgs_headers_is_read_and_written_back_to_the_bit() {
    let images = Images::new();
    let cases: &[(&str, &[&str])] = &[
        ("compat=0.10", &[]),
        ("compat=1.1", &[]),
        ("lazy_refcounts=on", &[]),
        ("refcount_bits=1", &[]),
        ("refcount_bits=64,extended_l2=on", &[]),
        ("compression_type=zstd", &[]),
        ("compat=0.10", &["-b", "base.img", "-F", "raw"]),
        ("extended_l2=on", &["-b", "some/long/base.qcow2", "-F", "qcow2"]),
        ("data_file=d.img", &[]),
        ("data_file=d.img,data_file_raw=on", &[]),
    ];
    for (options, more) in cases {
        let cluster = images.create(options, more);
        let mut header = Header::parse(&cluster).unwrap();
        let info = images.qemu_img(&["info", "--output=json", "a.qcow2"]);
        // A backing file that is not there does not hinder -U, nor -f alone.
        let info: serde_json::Value = serde_json::from_str(&info.unwrap()).unwrap();
        let specific = &info["format-specific"]["data"];
        assert_eq!(header.size, 3 << 30);
        assert_eq!(specific["compat"], if header.version == 2 { "0.10" } else { "1.1" });
        assert_eq!(1 << header.cluster_bits, info["cluster-size"].as_u64().unwrap());
        assert_eq!(1 << header.refcount_order, specific["refcount-bits"].as_u64().unwrap());
        let lazy = header.compatible.contains(Compatible::LAZY_REFCOUNTS);
        assert_eq!(lazy, specific["lazy-refcounts"].as_bool().unwrap_or(false));
        assert_eq!(header.compression.name(), specific["compression-type"]);
        let extended = specific["extended-l2"].as_bool().unwrap_or(false);
        assert_eq!(header.geometry().extended_l2, extended);
        let raw = specific["data-file-raw"].as_bool().unwrap_or(false);
        assert_eq!(header.autoclear.contains(Autoclear::RAW_DATA_FILE), raw);
        let backing = header.backing_file.clone().map(|name| String::from_utf8(name).unwrap());
        assert_eq!(backing.as_deref(), info["backing-filename"].as_str(), "{options}");
        let format = info["backing-filename-format"].as_str().map(|name| name.as_bytes().to_vec());
        let format = format.map(Extension::BackingFormat);
        assert!(format.is_none_or(|format| header.extensions.contains(&format)));
        let name = specific["data-file"].as_str().map(|name| name.as_bytes().to_vec());
        let name = name.map(Extension::DataFile);
        assert!(name.is_none_or(|name| header.extensions.contains(&name)));
        if header.version == 3 {
            assert!(header.extensions.contains(&feature_names()));
        }

        assert_eq!(header.fields(), cluster[..header.header_length as usize]);
        let kept = header.clone();
        assert!(header.encode().unwrap() == cluster, "{options}");
        assert_eq!(header, kept);
    }
    images.create("", &[]);
    images.qemu_img(&["bitmap", "--add", "a.qcow2", "b"]).unwrap();
    let cluster = images.first_cluster();
    let mut header = Header::parse(&cluster).unwrap();
    assert!(header.autoclear.contains(Autoclear::BITMAPS));
    assert!(matches!(&header.extensions[1], Extension::Bitmaps(at) if at.nb_bitmaps == 1));
    assert!(header.encode().unwrap() == cluster);
}

#[test]
fn wrong_headers_are_refused_in_qemus_words() {
    let images = Images::new();
    images.create("", &[]);
    let feature_table = {
        let mut table = [0; 64];
        table[..8].copy_from_slice(b"\x68\x03\xf8\x57\0\0\0\x30");
        table[8..14].copy_from_slice(b"\0\x05five");
        table
    };
    let q = u64::to_be_bytes;
    let w = u32::to_be_bytes;
    let cases: &[&[(usize, &[u8])]] = &[
        &[(0, b"QFI\0")],
        &[(4, &w(1))],
        &[(4, &w(4))],
        &[(20, &w(8))],
        &[(20, &w(22))],
        &[(20, &w(u32::MAX))],
        &[(20, &w(13)), (72, &q(16))],
        &[(100, &w(96))],
        &[(100, &w(65544))],
        &[(72, &q(1 << 5 | 1 << 63))],
        &[(72, &q(1 << 5 | 1 << 40)), (0x70, &feature_table)],
        // Names of other kinds of features, none, the first of two, cut off, in the last table.
        &[(72, &q(1 << 63)), (0x78, b"\x01\x3fname\0")],
        &[(72, &q(1 << 63)), (0x78, b"\x02\x3fname\0")],
        &[(72, &q(1 << 63 | 1 << 5)), (0x78, b"\x00\x3f\0")],
        &[(72, &q(1 << 63)), (0x78, b"\0\x3fa\0"), (0xa8, b"\0\x3fb\0")],
        &[(72, &q(1 << 63 | 1)), (0x78, b"\0\x00known\0")],
        &[(72, &q(1 << 63)), (0x78, b"\0\x3faaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")],
        &[(72, &q(1 << 63)), (0x74, &w(0x20)), (0x78, b"\0\x3fcut\0")],
        &[
            (72, &q(1 << 63 | 1 << 5)),
            (0x74, &w(0x30)),
            (0x78, b"\0\x3ffirst\0"),
            (0xa8, b"\x68\x03\xf8\x57\0\0\0\x30\0\x05last\0"),
        ],
        &[(72, &q(!0))],
        &[(72, &q(8))],
        &[(104, &[1])],
        &[(104, &[2]), (72, &q(8))],
        &[(104, &[1]), (72, &q(8)), (100, &w(104))],
        &[(96, &w(7))],
        &[(32, &w(3))],
        &[(36, &w(5))],
        &[(36, &w(0x40_0001))],
        &[(40, &q(0x30200))],
        &[(40, &q(1 << 63))],
        &[(24, &q(1 << 63))],
        &[(24, &q((1 << 63) - 1))],
        &[(24, &q(1 << 40))],
        &[(56, &w(129))],
        &[(48, &q(0x10200))],
        &[(48, &q(1 << 63))],
        &[(60, &w(65537))],
        &[(60, &w(1)), (64, &q(0x10200))],
        &[(8, &q(0x200)), (16, &w(1024))],
        &[(8, &q(65537)), (16, &w(10))],
        &[(8, &q(65530)), (16, &w(100))],
        &[(0x74, &w(0x10000))],
        &[(0x74, &w(u32::MAX))],
        &[(0x70, &w(0x1234_5678)), (0x74, &w(0xff78)), (0xfff0, &w(1)), (0xfff4, &w(9))],
        &[(0x70, &w(0x1234_5678)), (0x74, &w(0xff80)), (0xfff8, &w(1)), (0xfffc, &w(1))],
        &[(100, &w(0xfff8)), (0xfff8, &w(1)), (0xfffc, &w(8))],
        // Behind the last extension there is no room for another, nor for an end mark.
        &[(8, &q(0x71)), (16, &w(4))],
        &[(8, &q(0x74)), (16, &w(4))],
        &[(8, &q(0x77)), (16, &w(4)), (0x70, &w(0))],
        &[(8, &q(0x7c)), (16, &w(4)), (0x70, &w(1)), (0x74, &w(0))],
        &[(8, &q(0x1fd)), (16, &w(4)), (0x70, &w(1)), (0x74, &w(0x186))],
        &[(0x70, &w(0xe279_2aca)), (0x74, &w(16))],
        &[(0x70, &w(0x0537_be77)), (0x74, &w(16))],
        &[(0x70, &w(0x2385_2875)), (0x74, &w(16)), (88, &q(1))],
    ];
    for patches in cases {
        let (ours, theirs) = images.patched(patches);
        assert_eq!(ours, theirs, "{patches:x?}");
        assert!(ours.is_err(), "{patches:x?}");
    }
    // A bitmaps extension instead of the feature names.
    for (n, reserved, size, offset) in [
        (0, 0, 0, 0u64),
        (1, 1, 24, 0x40000),
        (65536, 0, 24, 0x40000),
        (1, 0, 24, 0x40200),
        (1, 0, 1u64 << 40, 0x40000),
    ] {
        let head = [w(0x2385_2875), w(24), w(n), w(reserved)].concat();
        let extension = [head, q(size).to_vec(), q(offset).to_vec()].concat();
        let (ours, theirs) = images.patched(&[(88, &q(1)), (0x70, &extension)]);
        assert_eq!(ours, theirs);
        assert!(ours.is_err());
    }
}

#[test]
fn odd_headers_that_qemu_opens_open_here_too() {
    let images = Images::new();
    images.create("", &[]);
    let q = u64::to_be_bytes;
    let w = u32::to_be_bytes;
    let cases: &[&[(usize, &[u8])]] = &[
        &[(100, &w(104))],
        &[(100, &w(65536))],
        &[(72, &q(3))],
        &[(104, &[1]), (72, &q(8))],
        &[(72, &q(16)), (36, &w(12))],
        &[(96, &w(6))],
        &[(36, &w(0x40_0000))],
        &[(56, &w(128))],
        &[(8, &q(0x210)), (16, &w(0))],
        &[(0x74, &w(65536 - 0x78))],
        &[(0x74, &w(7))],
        &[(8, &q(0x70)), (16, &w(4)), (0x70, b"name")],
        &[(8, &q(0x1fd)), (16, &w(4)), (0x70, &w(1)), (0x74, &w(0x185)), (0x1fd, b"name")],
        &[(0x70, &w(1)), (0x74, &w(0xff80)), (0xfff8, &w(1)), (0xfffc, &w(0))],
        &[(0x70, &w(0xe279_2aca)), (0x74, &w(15))],
        &[(80, &q(!0)), (88, &q(!0 << 2))],
    ];
    for patches in cases {
        assert_eq!(images.patched(patches), (Ok(()), Ok(())), "{patches:x?}");
    }
}

#[test]
fn what_is_not_known_is_kept() {
    let images = Images::new();
    let mut cluster = images.create("", &[]);
    // A longer header with fields of a later version, a byte in what is padding today, unknown bits
    // and an unknown extension.
    let extensions = cluster[112..1024].to_vec();
    cluster[128..1040].copy_from_slice(&extensions);
    cluster[105..128].copy_from_slice(b"later versions' fields ");
    cluster[100..104].copy_from_slice(&128u32.to_be_bytes());
    cluster[80..88].copy_from_slice(&(5u64 << 40).to_be_bytes());
    cluster[88..96].copy_from_slice(&(1u64 << 63).to_be_bytes());
    let end = 128 + 8 + 8 * 48;
    cluster[end..][..16].copy_from_slice(b"what\0\0\0\x05known\0\0\0");
    let mut header = Header::parse(&cluster).unwrap();
    assert_eq!(header.fields(), cluster[..112]);
    assert!(header.encode().unwrap() == cluster);

    header.backing_file = Some(b"base".to_vec());
    header.extensions.push(Extension::BackingFormat(b"raw".to_vec()));
    let encoded = header.encode().unwrap();
    let again = Header::parse(&encoded).unwrap();
    let unknown = Extension::Unknown { kind: u32::from_be_bytes(*b"what"), data: b"known".into() };
    let wanted = [Extension::BackingFormat(b"raw".to_vec()), feature_names(), unknown];
    assert_eq!(again.extensions, wanted);
    assert_eq!(again.backing_file.as_deref(), Some(&b"base"[..]));
    assert_eq!(again.fields()[80..], cluster[80..112]);
    assert_eq!(encoded[112..128], cluster[112..128]);
}

#[test]
fn a_header_that_does_not_fit_its_cluster_is_not_written() {
    let mut header = Header { l1_size: 100, ..Header::new(9, 1 << 20) };
    header.refcount_table_clusters = 1;
    header.extensions = vec![
        Extension::Bitmaps(BitmapsPointer::new(1, 24, 0)),
        Extension::Encryption(EncryptionPointer { offset: 0, len: 1 }),
    ];
    header.backing_file = Some(vec![b'x'; 512 - 112 - 32 - 24 - 8]);
    assert_eq!(header.encode().unwrap().len(), 512);
    header.backing_file.as_mut().unwrap().push(b'x');
    assert_eq!(header.encode().unwrap_err().errno().map(|e| e.0), Some(libc::ENOSPC));
    header.cluster_bits = 16;
    header.backing_file = Some(vec![b'x'; 1024]);
    assert_eq!(header.encode().unwrap_err().errno().map(|e| e.0), Some(libc::EINVAL));
}

#[test]
fn features_have_the_names_that_the_image_gives_them() {
    use FeatureKind::*;
    use extensions::names_of;
    let entry = |kind: u8, bit: u8, name: &str| {
        let mut entry = [&[kind, bit], name.as_bytes()].concat();
        entry.resize(48, 0);
        entry
    };
    let table = [
        entry(0, 69, "there is no such bit"),
        entry(0, 5, "five"),
        entry(1, 5, "may be ignored"),
        entry(2, 63, "ends"),
        entry(2, 5, "ends, too"),
        entry(3, 6, "another kind"),
        entry(0, 255, "nor this one"),
    ];
    let known = [Extension::FeatureNames(table.concat())];
    let mask = 1 << 63 | 1 << 6 | 1 << 5;
    let rest = "Unknown incompatible feature: 8000000000000040";
    assert_eq!(names_of(&known, Incompatible, mask), format!("five, {rest}"));
    let rest = "Unknown compatible feature: 8000000000000040";
    assert_eq!(names_of(&known, Compatible, mask), format!("may be ignored, {rest}"));
    let rest = "Unknown autoclear feature: 40";
    assert_eq!(names_of(&known, Autoclear, mask), format!("ends, ends, too, {rest}"));
    assert_eq!(names_of(&[], Autoclear, 3), "Unknown autoclear feature: 3");
    assert_eq!(names_of(&known, Autoclear, 0), "");
}
