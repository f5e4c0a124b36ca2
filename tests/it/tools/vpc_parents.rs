//! Differencing VHD images, which QEMU reads wrongly, made, read and written here.
//!
//! Images with blocks of which only some sectors are there are made by the specification.

use super::{Ended, Place};

fn run(place: &Place, lines: &[&str]) {
    for line in lines {
        let ended = place.run(line);
        let is_right = ended.code == Some(0) && !ended.stdout.contains("failed");
        assert!(is_right, "{line}: {ended:?}");
    }
}

/// A parent with some data, and a child without any.
fn family(parent: &str) -> Place {
    let place = Place::new(true);
    run(
        &place,
        &[
            &format!("qemu-img create -q -f vpc -o force_size=on,subformat={parent} p.vpc 9M"),
            "qemu-io -f vpc -c 'write -P 1 0 3M' -c 'write -P 2 5M 700k' p.vpc",
            "qemu-img create -q -f vpc -b p.vpc -F vpc c.vpc",
        ],
    );
    place
}

fn change(place: &Place, change: impl FnOnce(&mut Vec<u8>)) {
    let path = place.path().join("c.vpc");
    let mut bytes = std::fs::read(&path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

/// Puts the checksum of the header right.
fn seal(bytes: &mut [u8]) {
    bytes[548..552].fill(0);
    let sum = bytes[512..1536].iter().map(|&byte| u32::from(byte)).sum::<u32>();
    bytes[548..552].copy_from_slice(&(!sum).to_be_bytes());
}

/// An error of one line that says this.
fn refused(ended: Ended, wanted: &str) {
    let is_named = ended.stderr.contains(wanted) && ended.stderr.lines().count() == 1;
    assert!(ended.code == Some(1) && is_named, "{wanted}: {ended:?}");
}

#[test]
fn what_a_child_has_not_is_its_parents() {
    for parent in ["dynamic", "fixed"] {
        let place = family(parent);
        run(
            &place,
            &[
                "qemu-io -r -f vpc -c 'read -P 1 0 3M' -c 'read -P 0 3M 2M' -c 'read -P 2 5M 700k' c.vpc",
                "qemu-img compare -f vpc -F vpc p.vpc c.vpc",
                "qemu-io -f vpc -c 'write -P 3 1M 1k' -c 'write -P 4 4095k 2k' c.vpc",
                "qemu-io -r -f vpc -c 'read -P 1 0 1M' -c 'read -P 3 1M 1k' -c 'read -P 1 1025k 2047k' \
                 -c 'read -P 0 3M 1023k' -c 'read -P 4 4095k 2k' -c 'read -P 0 4097k 1023k' -c 'read -P 2 5M 700k' c.vpc",
                "qemu-io -f vpc -c 'write -z 0 2M' -c 'write -z 5200k 100k' -c 'write -z 6M 3M' c.vpc",
                "qemu-io -r -f vpc -c 'read -P 0 0 2M' -c 'read -P 1 2M 1M' -c 'read -P 2 5M 80k' \
                 -c 'read -P 0 5200k 100k' -c 'read -P 2 5300k 520k' -c 'read -P 0 6M 3M' c.vpc",
                "qemu-img check -f vpc c.vpc",
                "qemu-io -r -f vpc -c 'read -P 1 0 3M' -c 'read -P 2 5M 700k' p.vpc",
                "qemu-img commit -d -f vpc c.vpc",
                "qemu-img compare -f vpc -F vpc p.vpc c.vpc",
            ],
        );
        let info = place.run("qemu-img info -f vpc c.vpc").stdout;
        for line in ["backing file: ./p.vpc", "backing file format: vpc", "cluster_size: 2097152"] {
            assert!(info.contains(line), "{line}: {info}");
        }
    }
}

#[test]
fn sectors_that_the_bitmap_has_not_are_the_parents() {
    let place = family("dynamic");
    run(&place, &["qemu-io -f vpc -c 'write -P 5 2M 2M' c.vpc"]);
    change(&place, |bytes| {
        let table = u64::from_be_bytes(bytes[528..536].try_into().unwrap()) as usize;
        let entry = u32::from_be_bytes(bytes[table + 4..table + 8].try_into().unwrap());
        let bitmap = entry as usize * 512;
        // Of the block, sectors 2 to 4 and all from 2048 on are the child's.
        bitmap_of(&mut bytes[bitmap..bitmap + 512]);
    });
    let reads = "qemu-io -r -f vpc -c 'read -P 1 2M 1k' -c 'read -P 5 2049k 1536' -c 'read -P 1 2099712 1021k' \
                 -c 'read -P 5 3M 1M' -c 'read -P 2 5M 700k' c.vpc";
    run(&place, &[reads, "qemu-img map -f vpc c.vpc"]);
    // A write makes the block whole.
    run(
        &place,
        &[
            "qemu-io -f vpc -c 'write -P 6 3000k 1k' c.vpc",
            "qemu-io -r -f vpc -c 'read -P 1 2M 1k' -c 'read -P 5 2049k 1536' -c 'read -P 1 2099712 100k' \
             -c 'read -P 6 3000k 1k' -c 'read -P 5 3M 1M' c.vpc",
        ],
    );
}

fn bitmap_of(bitmap: &mut [u8]) {
    bitmap[..256].fill(0);
    bitmap[0] = 0b0011_1000;
}

#[test]
fn only_the_parent_that_is_meant_is_taken() {
    let place = family("dynamic");
    let read = "qemu-io -r -f vpc -c 'read -P 1 0 3M' c.vpc";
    run(
        &place,
        &[
            "qemu-img create -q -f vpc -o force_size=on other.vpc 9M",
            "qemu-io -f vpc -c 'write -P 1 0 3M' other.vpc",
            // One that changes stays the same.
            "qemu-io -f vpc -c 'write -P 2 6M 1k' p.vpc",
            read,
        ],
    );
    std::fs::rename(place.path().join("other.vpc"), place.path().join("p.vpc")).unwrap();
    refused(place.run(read), "is another one than when the image was made");
    run(
        &place,
        &[
            "qemu-io -r --image-opts -c 'read -P 1 0 3M' driver=vpc,file.filename=c.vpc,backing.driver=vpc,backing.file.filename=p.vpc",
        ],
    );
}

#[test]
fn names_of_parents_lead_down_only() {
    let place = family("dynamic");
    let read = "qemu-io -r -f vpc -c 'read -P 1 0 3M' c.vpc";
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>();
    let locator = |place: &Place, code: &[u8; 4], text: &[u8]| {
        change(place, |bytes| {
            bytes[1088..1092].copy_from_slice(code);
            bytes[1096..1100].copy_from_slice(&(text.len() as u32).to_be_bytes());
            bytes[1536..2048].fill(0);
            bytes[1536..1536 + text.len()].copy_from_slice(text);
            seal(bytes);
        });
    };
    for (code, text) in [
        (b"W2ru", utf16("p.vpc")),
        (b"MacX", b"file://./p.vpc".to_vec()),
        (b"Wi2r", b".\\p.vpc".to_vec()),
        // Without a path that is relative, it is called by its own name.
        (b"W2ku", utf16("c:\\images\\p.vpc")),
    ] {
        locator(&place, code, &text);
        run(&place, &[read]);
    }
    for (text, wanted) in [
        ("..\\p.vpc", "does not lie below the folder"),
        ("/dev/sda", "does not lie below the folder"),
        ("nbd:localhost", "does not lie below the folder"),
        ("nothing.vpc", "Could not open"),
        ("c.vpc", "Could not open backing file"),
    ] {
        locator(&place, b"W2ru", &utf16(text));
        refused(place.run(read), wanted);
    }
    change(&place, |bytes| {
        bytes[1096] = 0x7f;
        seal(bytes);
    });
    refused(place.run(read), "VHD parent locator: W2ru at 0x600");
}
