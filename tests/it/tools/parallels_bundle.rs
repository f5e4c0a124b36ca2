//! Parallels bundles, read and written through their descriptors.
//!
//! QEMU makes, fills and judges the images. It does not read descriptors.

use super::{Ended, Place};

const TOP: &str = "5fbaabe3-6958-40ff-92a7-860e329aab41";
const NONE: &str = "00000000-0000-0000-0000-000000000000";

/// A GUID that stands for a number.
fn guid(n: u32) -> String {
    format!("{n:08x}-0000-0000-0000-000000000000")
}

/// An image of a part: its GUID, its type and its file.
type Image<'a> = (&'a str, &'a str, &'a str);
/// A part of a disk: where it begins and ends, in sectors, and its images.
type Part<'a> = (u64, u64, &'a [Image<'a>]);

/// Writes a descriptor; the snapshots are named with their parents.
fn describe(place: &Place, sectors: u64, parts: &[Part], shots: &[(&str, &str)]) {
    let mut text = format!(
        "<?xml version='1.0' encoding='UTF-8'?>\r\n<!-- made by a test -->\n<Parallels_disk_image Version=\"1.0\">\n\
         <Disk_Parameters><Disk_size>{sectors}</Disk_size><Padding>0</Padding><Miscellaneous/></Disk_Parameters>\n\
         <StorageData>\n"
    );
    for (start, end, images) in parts {
        text.push_str(&format!(
            "<Storage><Start>{start}</Start><End>{end}</End><Blocksize>128</Blocksize>\n"
        ));
        for (guid, kind, file) in *images {
            text.push_str(&format!(
                "<Image><GUID>{{{guid}}}</GUID><Type>{kind}</Type><File> {file} </File></Image>\n"
            ));
        }
        text.push_str("</Storage>\n");
    }
    text.push_str("</StorageData>\n<Snapshots>\n");
    for (own, parent) in shots {
        text.push_str(&format!(
            "<Shot><GUID>{{{own}}}</GUID><ParentGUID>{{{parent}}}</ParentGUID></Shot>\n"
        ));
    }
    text.push_str("</Snapshots>\n</Parallels_disk_image>\n");
    std::fs::write(place.path().join("DiskDescriptor.xml"), text).unwrap();
}

fn theirs(place: &Place, lines: &[&str]) {
    for line in lines {
        let ended = place.run_theirs(line);
        assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{line}: {ended:?}");
    }
}

fn ours(place: &Place, line: &str) -> Ended {
    let ended = place.run(line);
    assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{line}: {ended:?}");
    ended
}

fn refused(place: &Place, line: &str, wanted: &str) {
    let ended = place.run(line);
    assert_eq!(ended.code, Some(1), "{line}: {ended:?}");
    assert!(ended.stderr.contains(wanted) && ended.stderr.lines().count() == 1, "{ended:?}");
}

/// A disk of 7 MiB in two parts, each in a base and two images on top of it; the first part's base is plain.
fn split() -> Place {
    let place = Place::new(true);
    theirs(
        &place,
        &[
            "qemu-img create -q a0 4M",
            "qemu-io -f raw -c 'write -P 1 0 4M' a0",
            "qemu-img create -q -f parallels -o cluster_size=64k a1 4M",
            "qemu-io -f parallels -c 'write -P 2 1M 1M' a1",
            "qemu-img create -q -f parallels -o cluster_size=64k a2 4M",
            "qemu-io -f parallels -c 'write -P 3 2M 64k' a2",
            "qemu-img create -q -f parallels b0 3M",
            "qemu-io -f parallels -c 'write -P 4 0 1M' b0",
            "qemu-img create -q -f parallels -o cluster_size=64k b1 3M",
            "qemu-io -f parallels -c 'write -P 5 512k 1M' b1",
            "qemu-img create -q -f parallels -o cluster_size=64k b2 3M",
        ],
    );
    let (base, middle) = (guid(1), guid(2));
    let a = [(TOP, "Compressed", "a2"), (&*middle, "Compressed", "a1"), (&*base, "Plain", "a0")];
    let b =
        [(&*base, "Compressed", "b0"), (&*middle, "Compressed", "b1"), (TOP, "Compressed", "b2")];
    let parts: [Part; 2] = [(8192, 14336, &b), (0, 8192, &a)];
    describe(&place, 14336, &parts, &[(&base, NONE), (TOP, &middle), (&middle, &base)]);
    place
}

#[test]
fn a_disk_in_parts_with_snapshots_is_read_and_its_top_images_are_written() {
    let place = split();
    let below = ["a0", "a1", "b0", "b1", "DiskDescriptor.xml"];
    let read = |name: &str| std::fs::read(place.path().join(name)).unwrap();
    let before = below.map(read);
    ours(
        &place,
        "qemu-io -c 'read -P 1 0 1M' -c 'read -P 2 1M 1M' -c 'read -P 3 2M 64k' -c 'read -P 1 2112k 1984k' \
         -c 'read -P 4 4M 512k' -c 'read -P 5 4608k 1M' -c 'read -P 0 5632k 1536k' DiskDescriptor.xml",
    );
    let map = ours(&place, "qemu-img map DiskDescriptor.xml");
    let wanted = "0               0x100000        0               a0\n\
                  0x100000        0x100000        0x10000         a1\n\
                  0x200000        0x10000         0x10000         a2\n\
                  0x210000        0x1f0000        0x210000        a0\n\
                  0x400000        0x80000         0x100000        b0\n\
                  0x480000        0x100000        0x10000         b1\n";
    assert!(map.stdout.ends_with(wanted), "{map:?}");
    ours(
        &place,
        "qemu-io -c 'write -P 9 4000k 200k' -c 'write -z 5M 100k' -c 'discard 2M 64k' -c 'write -P 8 7167k 1k' \
         DiskDescriptor.xml",
    );
    assert!(below.map(read) == before, "something else than the top images was written");
    theirs(&place, &["qemu-img check a2", "qemu-img check b2"]);
    // Each part as QEMU reads its chain.
    let over = |top: &str, middle: &str, base: &str| {
        format!(
            "qemu-img convert --image-opts -O raw driver=parallels,file.filename={top},backing.driver=parallels,\
             backing.file.filename={middle},backing.backing.driver={base}"
        )
    };
    theirs(
        &place,
        &[
            &format!("{},backing.backing.file.filename=a0 a.raw", over("a2", "a1", "raw")),
            &format!("{},backing.backing.file.filename=b0 b.raw", over("b2", "b1", "parallels")),
        ],
    );
    ours(&place, "qemu-img convert -f parallels -O raw DiskDescriptor.xml all.raw");
    assert!(read("all.raw") == [read("a.raw"), read("b.raw")].concat());
    let checked = ours(&place, "qemu-img check DiskDescriptor.xml");
    assert!(checked.stdout.contains("/227 = "), "{checked:?}");
    refused(&place, "qemu-img resize DiskDescriptor.xml 8M", "does not support resize");
}

#[test]
fn damage_in_an_image_is_found_and_repaired_in_the_top_one_alone() {
    let place = split();
    let damage = |name: &str| {
        let path = place.path().join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[64..68].copy_from_slice(&[0xff; 4]);
        std::fs::write(&path, bytes).unwrap();
    };
    damage("b2");
    let found = place.run("qemu-img check DiskDescriptor.xml");
    assert_eq!(found.code, Some(2), "{found:?}");
    assert!(found.stderr.contains("b2: ERROR cluster 0 is outside image"), "{found:?}");
    let refused = place.run("qemu-io -c 'write 0 512' DiskDescriptor.xml");
    assert!(refused.stderr.contains("repair the image"), "{refused:?}");
    ours(&place, "qemu-img check -r all DiskDescriptor.xml");
    damage("a1");
    let found = place.run("qemu-img check -r all DiskDescriptor.xml");
    assert_eq!(found.code, Some(2), "{found:?}");
    assert!(found.stderr.contains("a1: ERROR cluster 0 is outside image"), "{found:?}");
}

#[test]
fn names_in_a_descriptor_lead_below_its_folder_and_to_images_of_its_own() {
    let place = Place::new(true);
    std::fs::create_dir(place.path().join("in")).unwrap();
    theirs(
        &place,
        &[
            "qemu-img create -q -f parallels in/x 1M",
            "qemu-img create -q -f parallels y 1M",
            "qemu-img create -q short 512k",
        ],
    );
    let one = |kind: &str, file: &str| {
        describe(&place, 2048, &[(0, 2048, &[(TOP, kind, file)])], &[(TOP, NONE)]);
    };
    one("Compressed", "in/x");
    let info = ours(&place, "qemu-img info DiskDescriptor.xml");
    assert!(info.stdout.contains("virtual size: 1 MiB (1048576 bytes)"), "{info:?}");
    // What serves is stricter than the tools: only images that lie below are opened.
    let strict = |wanted: &str| {
        let output = std::process::Command::new(super::VUBLK)
            .args(["serve", "--socket", "s", "-f", "parallels", "DiskDescriptor.xml"])
            .current_dir(place.path())
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && told.contains(wanted), "{told}");
    };
    let absolute = place.path().join("y");
    for name in ["../y", absolute.to_str().unwrap(), "nbd://a/b"] {
        one("Compressed", name);
        strict("does not lie below the folder");
    }
    std::os::unix::fs::symlink(place.path().parent().unwrap(), place.path().join("up")).unwrap();
    let name = place.path().file_name().unwrap().to_str().unwrap();
    one("Compressed", &format!("up/{name}/../none"));
    strict("does not lie below the folder");
    for (kind, file, wanted) in [
        ("Compressed", "DiskDescriptor.xml", "names its own file"),
        ("Plain", "DiskDescriptor.xml", "names its own file"),
        ("Compressed", "none", "No such file"),
        ("Compressed", "short", "not in Parallels format"),
        ("Plain", "short", "has 524288 bytes, and its part of the disk 1048576"),
    ] {
        one(kind, file);
        refused(&place, "qemu-img info DiskDescriptor.xml", wanted);
    }
    // Two writers of one file: the second part is what the first is.
    std::fs::hard_link(place.path().join("y"), place.path().join("z")).unwrap();
    let parts: [Part; 2] =
        [(0, 2048, &[(TOP, "Compressed", "y")]), (2048, 4096, &[(TOP, "Compressed", "z")])];
    describe(&place, 4096, &parts, &[(TOP, NONE)]);
    let ended = place.run("qemu-io -c 'write 0 512' DiskDescriptor.xml");
    assert!(ended.code == Some(1) && ended.stderr.contains("lock"), "{ended:?}");
}

#[test]
fn a_chain_of_two_hundred_snapshots_is_opened() {
    let place = Place::new(true);
    theirs(&place, &["qemu-img create -q -f parallels -o cluster_size=64k s0 1M"]);
    for n in 1..200 {
        std::fs::copy(place.path().join("s0"), place.path().join(format!("s{n}"))).unwrap();
    }
    theirs(&place, &["qemu-io -f parallels -c 'write -P 7 0 512k' s0"]);
    let guids: Vec<String> =
        (0..200).map(|n| if n == 199 { TOP.to_owned() } else { guid(n + 1) }).collect();
    let files: Vec<String> = (0..200).map(|n| format!("s{n}")).collect();
    let images: Vec<Image> =
        guids.iter().zip(&files).map(|(guid, file)| (&**guid, "Compressed", &**file)).collect();
    let mut shots = vec![(&*guids[0], NONE)];
    shots.extend(guids.windows(2).map(|pair| (&*pair[1], &*pair[0])));
    describe(&place, 2048, &[(0, 2048, &images)], &shots);
    ours(
        &place,
        "qemu-io -c 'read -P 7 0 512k' -c 'write -P 8 64k 4k' -c 'read -P 7 0 64k' -c 'read -P 7 68k 60k' \
         DiskDescriptor.xml",
    );
}
