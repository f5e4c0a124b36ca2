//! VMDK images that are made and written here, and read by QEMU; with parents, and compressed.

use super::{Ended, Place, fixture, mask};
use std::os::unix::fs::MetadataExt;

/// What both programs tell of the images that each has made by the same lines, content IDs left out.
fn assert_made_alike(lines: &[&str], names: &[&str]) {
    let places = [true, false].map(Place::new);
    let mut reported = Vec::new();
    for place in &places {
        fixture(place.path());
        let ended: Vec<Ended> = lines.iter().map(|line| place.run(line)).collect();
        let texts = names.iter().map(|name| {
            let bytes = std::fs::read(place.path().join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(66 << 10)]).into_owned();
            // QEMU's IDs have fewer digits where they begin with zeroes.
            let text = text.replace('\0', "");
            let is_id = |line: &&str| !line.starts_with("CID=") && !line.starts_with("parentCID=");
            let lines: Vec<&str> = text.split('\n').filter(is_id).collect();
            let len = bytes.len() * usize::from(bytes.starts_with(b"KDMV"));
            (len, mask(&lines.join("\n")))
        });
        reported.push((ended, texts.collect::<Vec<_>>()));
    }
    let [ours, theirs] = &reported[..] else { unreachable!("there are two places") };
    assert_eq!(ours, theirs, "{lines:?}");
}

#[test]
fn new_images_are_made_byte_for_byte_as_qemu_makes_them() {
    for (options, size, names) in [
        ("", "10M", &["x.vmdk"][..]),
        ("-o zeroed_grain=on,adapter_type=buslogic", "64M", &["x.vmdk"]),
        ("-o compat6=on,toolsversion=abc", "5G", &["x.vmdk"]),
        ("-o hwversion=11,adapter_type=legacyESX", "300G", &["x.vmdk"]),
        ("-o subformat=monolithicFlat", "1000", &["x.vmdk", "x-flat.vmdk"]),
        ("-o subformat=twoGbMaxExtentSparse", "5G", &["x.vmdk", "x-s001.vmdk", "x-s003.vmdk"]),
        ("-o subformat=twoGbMaxExtentSparse", "1500", &["x.vmdk", "x-s001.vmdk"]),
        ("-o subformat=twoGbMaxExtentFlat", "2049M", &["x.vmdk", "x-f002.vmdk"]),
        ("-o subformat=streamOptimized,adapter_type=lsilogic", "1001", &["x.vmdk"]),
    ] {
        assert_made_alike(&[&format!("qemu-img create -f vmdk {options} x.vmdk {size}")], names);
    }
}

#[test]
fn what_cannot_be_made_is_refused_in_qemus_words() {
    let refused: Vec<String> = [
        "-o compat6=on,hwversion=11 x.vmdk 10M",
        "-o adapter_type=foo x.vmdk 10M",
        "-o subformat=bogus x.vmdk 10M",
        "-o subformat=monolithicFlat,zeroed_grain=on x.vmdk 10M",
        "-F vmdk -b p.vmdk -o subformat=monolithicFlat x.vmdk",
        "-F vmdk -b p.vmdk -o subformat=twoGbMaxExtentFlat x.vmdk",
        "-F raw -b a.raw x.vmdk",
        "-F raw -b p.vmdk x.vmdk",
        "-F vmdk -b nope.vmdk x.vmdk 1M",
        "-b p.vmdk x.vmdk",
        "x.vmdk",
        "-o help",
    ]
    .iter()
    .map(|rest| format!("qemu-img create -f vmdk {rest}"))
    .collect();
    let places = [true, false].map(Place::new);
    for place in &places {
        fixture(place.path());
        assert_eq!(place.run_theirs("qemu-img create -q -f vmdk p.vmdk 1M").code, Some(0));
    }
    for line in refused.iter().map(String::as_str).chain([
        "qemu-img measure -O vmdk --size 1M",
        "qemu-img resize p.vmdk 2M",
        "qemu-img resize --shrink p.vmdk 1k",
        "qemu-img check -r all p.vmdk",
        "qemu-img amend -o size=2M p.vmdk",
    ]) {
        let [ours, theirs] = places.each_ref().map(|place| place.run(line));
        assert_eq!(ours, theirs, "{line}");
    }
}

#[test]
fn images_that_are_written_here_hold_what_qemu_would_write() {
    for (options, size) in [
        ("", "9000k"),
        ("-o zeroed_grain=on", "9000k"),
        ("-o subformat=monolithicFlat", "9000k"),
        ("-o subformat=twoGbMaxExtentSparse", "2100M"),
    ] {
        let create = format!("qemu-img create -q -f vmdk {options} x.vmdk {size}");
        let mut lines = vec![
            "qemu-io -f vmdk -c 'write -P 1 0 10k' -c 'write -P 2 700k 70k' -c 'write -z 128k 64k' x.vmdk",
            "qemu-io -f vmdk -c 'write -P 3 5M 1M' -c 'write -z 5M 100k' -c 'write -P 4 130000 5' x.vmdk",
            "qemu-io -f vmdk -c 'write -z 0 1M' -c 'write -P 5 512 512' -c 'read -P 0 1024 512' x.vmdk",
            "qemu-io -f vmdk -c 'write -P 6 8999k 1k' -c 'write -z -u 8900k 100k' -c 'discard 5M 1M' x.vmdk",
            "qemu-io -f vmdk -c 'write -P 7 1000k 7000k' -c 'read -P 7 1000k 7000k' x.vmdk",
        ];
        if size == "2100M" {
            lines.push("qemu-io -f vmdk -c 'write -P 8 2047M 2M' -c 'read -P 8 2047M 2M' x.vmdk");
        }
        // Content IDs differ from run to run.
        let ended = |ours: bool| {
            let place = Place::new(ours);
            fixture(place.path());
            assert_eq!(place.run(&create).code, Some(0), "{create}");
            let before = std::fs::read(place.path().join("x.vmdk")).unwrap();
            let ended: Vec<Ended> = lines.iter().map(|line| place.run(line)).collect();
            let checked = place.run_theirs("qemu-img check -f vmdk x.vmdk");
            assert_eq!(checked.code, Some(0), "{checked:?}");
            let after = std::fs::read(place.path().join("x.vmdk")).unwrap();
            assert!(
                before[..200] != after[..200] || before[512..700] != after[512..700],
                "the content ID is the same"
            );
            let copied = place.run_theirs("qemu-img convert -f vmdk -O raw x.vmdk all.raw");
            assert_eq!(copied.code, Some(0), "{copied:?}");
            let is_split = size == "2100M";
            let bytes = std::fs::read(place.path().join("all.raw")).unwrap();
            (ended, if is_split { bytes[..9 << 20].to_vec() } else { bytes })
        };
        let [ours, theirs] = [ended(true), ended(false)];
        assert_eq!(ours.0, theirs.0, "{options}");
        assert!(ours.1 == theirs.1, "{options}: other bytes");
    }
}

#[test]
fn zeroing_and_discarding_give_space_back_and_grains_stay_in_their_places() {
    for options in ["", "-o zeroed_grain=on", "-o subformat=monolithicFlat"] {
        let place = Place::new(true);
        let create = format!("qemu-img create -q -f vmdk {options} x.vmdk 8M");
        assert_eq!(place.run(&create).code, Some(0));
        let data = if options.contains("Flat") { "x-flat.vmdk" } else { "x.vmdk" };
        let file = || std::fs::metadata(place.path().join(data)).unwrap();
        let io = |requests: &str| {
            let ended = place.run(&format!("qemu-io -f vmdk {requests} x.vmdk"));
            assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{ended:?}");
        };
        io("-c 'write -P 1 0 8M'");
        let full = file();
        io("-c 'write -z -u 0 3M' -c 'discard 4M 3M' -c 'write -z 7168k 64k'");
        assert!(file().blocks() * 512 < 3 << 20, "{options}: {} blocks", file().blocks());
        io(
            "-c 'read -P 0 0 3M' -c 'read -P 1 3M 1M' -c 'read -P 0 7168k 64k' -c 'write -P 2 0 8M'",
        );
        assert_eq!(file().len(), full.len(), "{options}: new grains were taken");
        let checked = place.run_theirs("qemu-img check -f vmdk x.vmdk");
        assert_eq!(checked.code, Some(0), "{checked:?}");
    }
}

#[test]
fn images_are_converted_to_every_subformat_and_back() {
    let place = Place::new(true);
    fixture(place.path());
    for options in [
        "-o subformat=monolithicSparse",
        "-o subformat=monolithicFlat",
        "-o subformat=twoGbMaxExtentSparse",
        "-o subformat=twoGbMaxExtentFlat",
        "-o subformat=streamOptimized",
        "-c -o subformat=streamOptimized",
        "-c -o subformat=monolithicSparse",
        "-W -m 16 -o subformat=streamOptimized",
    ] {
        for source in ["longer.raw", "odd.raw"] {
            for line in [
                format!("qemu-img convert -f raw -O vmdk {options} {source} x.vmdk"),
                "qemu-img check -f vmdk x.vmdk".to_owned(),
                format!("qemu-img compare -f raw -F vmdk {source} x.vmdk"),
                "qemu-img convert -f vmdk -O vmdk -o subformat=streamOptimized x.vmdk y.vmdk"
                    .to_owned(),
                format!("qemu-img compare -f raw -F vmdk {source} y.vmdk"),
            ] {
                let ended = place.run(&line);
                assert_eq!(ended.code, Some(0), "{options}: {line}: {ended:?}");
                if line.contains("check") || line.contains("compare") {
                    let ended = place.run_theirs(&line);
                    assert_eq!(ended.code, Some(0), "{options}: {line}: {ended:?}");
                }
            }
        }
    }
}

#[test]
fn grains_of_a_stream_are_written_once_and_whole() {
    let lines = [
        "qemu-io -f vmdk -c 'write -P 5 0 64k' -c 'write 0 64k' -c 'write 65k 4k' -c 'write 64k 4k' x.vmdk",
        "qemu-io -f vmdk -c 'write -c -P 6 128k 64k' -c 'write -P 7 1024k 976k' -c 'read -P 5 0 64k' -c map x.vmdk",
    ];
    let mut reported = Vec::new();
    for ours in [true, false] {
        let place = Place::new(ours);
        let create = "qemu-img create -q -f vmdk -o subformat=streamOptimized x.vmdk 2000k";
        assert_eq!(place.run(create).code, Some(0));
        let mut ended: Vec<Ended> = lines.iter().map(|line| place.run(line)).collect();
        // A line of QEMU's own.
        ended.iter_mut().for_each(|ended| ended.stderr.clear());
        let read = "qemu-io -r -f vmdk -c 'read -P 5 0 64k' -c 'read -P 6 128k 64k' -c 'read -P 7 1024k 976k' x.vmdk";
        reported.push((
            ended,
            place.run_theirs(read),
            place.run_theirs("qemu-img map --output=json x.vmdk"),
        ));
    }
    assert_eq!(reported[0], reported[1]);
}

#[test]
fn what_a_vmware_program_streams_is_read_from_its_footer() {
    // Header, descriptor, two grains, their table, the directory, the footer, the end.
    let place = Place::new(true);
    let make = "qemu-img create -q -f vmdk -o subformat=streamOptimized x.vmdk 128k";
    assert_eq!(place.run_theirs(make).code, Some(0));
    let write = "qemu-io -f vmdk -c 'write -P 5 0 64k' -c 'write -P 6 64k 64k' x.vmdk";
    assert_eq!(place.run_theirs(write).code, Some(0));
    let path = place.path().join("x.vmdk");
    let mut bytes = std::fs::read(&path).unwrap();
    let number = |bytes: &[u8], at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    let directory = number(&bytes, 56) as usize * 512;
    let table = u32::from_le_bytes(*bytes[directory..].first_chunk().unwrap()) as usize * 512;
    let tables = bytes[table..table + 2048].to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let marker = |kind: u32| {
        let mut marker = vec![0; 512];
        marker[12..16].copy_from_slice(&kind.to_le_bytes());
        marker
    };
    bytes.extend(marker(1));
    let place_of_table = (bytes.len() / 512) as u32;
    bytes.extend(tables);
    bytes.extend(marker(2));
    let place_of_directory = (bytes.len() / 512) as u64;
    bytes.extend(place_of_table.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let mut footer = bytes[..512].to_vec();
    footer[56..64].copy_from_slice(&place_of_directory.to_le_bytes());
    footer[48..56].fill(0);
    footer[8] = 1;
    bytes.extend(marker(3));
    bytes.extend(footer);
    bytes.extend(marker(0));
    bytes[48..56].fill(0);
    bytes[56..64].fill(0xff);
    bytes[8] = 1;
    bytes[directory..directory + 4].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    let read = "qemu-io -r -f vmdk -c 'read -P 5 0 64k' -c 'read -P 6 64k 64k' x.vmdk";
    let [ours, theirs] = [place.run(read), place.run_theirs(read)];
    assert_eq!(ours, theirs);
    assert!(!ours.stdout.contains("failed"), "{ours:?}");
    let written = place.run("qemu-io -f vmdk -c 'write 0 64k' x.vmdk");
    assert!(written.stderr.contains("must be read only"), "{written:?}");
    std::fs::write(&path, &bytes[..bytes.len() - 512]).unwrap();
    assert!(place.run(read).stderr.contains("no footer"), "{:?}", place.run(read));
}

/// A parent with data, and an image on it.
fn with_parent(options: &str) -> Place {
    let place = Place::new(true);
    fixture(place.path());
    for line in [
        "qemu-img create -q -f vmdk p.vmdk 8M",
        "qemu-io -f vmdk -c 'write -P 1 0 4M' p.vmdk",
        &format!("qemu-img create -q -f vmdk -F vmdk -b p.vmdk {options} x.vmdk"),
    ] {
        let ended = place.run(line);
        assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
    }
    place
}

#[test]
fn an_image_shows_its_parent_and_both_programs_write_over_it() {
    for options in ["", "-o zeroed_grain=on", "-o subformat=twoGbMaxExtentSparse"] {
        let place = with_parent(options);
        for line in [
            "qemu-io -f vmdk -c 'write -P 2 100k 4k' -c 'write -z 1M 100k' -c 'write -P 3 5M 1k' x.vmdk",
            "qemu-io -f vmdk -c 'read -P 1 0 100k' -c 'read -P 2 100k 4k' -c 'read -P 0 1M 100k' -c 'read -P 1 1200k 1M' x.vmdk",
        ] {
            let ended = place.run(line);
            assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{ended:?}");
        }
        for line in [
            "qemu-img info --backing-chain x.vmdk",
            "qemu-img info --output=json x.vmdk",
            "qemu-img map --output=json x.vmdk",
            "qemu-img check x.vmdk",
            "qemu-io -r -f vmdk -c 'read -P 1 0 100k' -c 'read -P 2 100k 4k' -c 'read -P 0 1M 100k' -c 'read -P 1 3M 1M' x.vmdk",
        ] {
            assert_eq!(place.run(line), place.run_theirs(line), "{options}: {line}");
        }
    }
}

#[test]
fn a_parent_that_has_changed_is_refused_and_one_that_was_committed_to_is_followed() {
    let place = with_parent("");
    assert_eq!(place.run("qemu-io -f vmdk -c 'write -P 2 64k 64k' x.vmdk").code, Some(0));
    let committed = place.run("qemu-img commit -d x.vmdk");
    assert_eq!(committed.code, Some(0), "{committed:?}");
    let read = "qemu-io -r -f vmdk -c 'read -P 1 0 64k' -c 'read -P 2 64k 64k' x.vmdk";
    for ended in [place.run(read), place.run_theirs(read)] {
        assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{ended:?}");
    }
    assert_eq!(place.run("qemu-io -f vmdk -c 'write 0 512' p.vmdk").code, Some(0));
    let ended = place.run(read);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("The parent 'p.vmdk' has changed"), "{ended:?}");
    assert_eq!(place.run("qemu-img info x.vmdk"), place.run_theirs("qemu-img info x.vmdk"));
}

#[test]
fn a_commit_leaves_an_image_without_grains_that_shows_its_parent() {
    for options in ["", "-o zeroed_grain=on", "-o subformat=twoGbMaxExtentSparse"] {
        let place = with_parent(options);
        let data = if options.contains("two") { "x-s001.vmdk" } else { "x.vmdk" };
        let len = || std::fs::metadata(place.path().join(data)).unwrap().len();
        let new = len();
        for line in [
            "qemu-io -f vmdk -c 'write -P 2 64k 2M' -c 'write -P 3 5M 1k' x.vmdk",
            "qemu-img commit x.vmdk",
        ] {
            let ended = place.run(line);
            assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
        }
        assert_eq!(len(), new, "{options}");
        let read = "qemu-io -f vmdk -c 'read -P 1 0 64k' -c 'read -P 2 64k 2M' -c 'read -P 3 5M 1k' x.vmdk";
        let write = "qemu-io -f vmdk -c 'write -P 4 6M 64k' -c 'write -P 5 0 100' x.vmdk";
        let again = "qemu-io -f vmdk -c 'read -P 4 6M 64k' -c 'read -P 5 0 100' -c 'read -P 1 100 1k' x.vmdk";
        for line in [read, "qemu-img check x.vmdk", write, again, "qemu-img check x.vmdk"] {
            for ended in [place.run(line), place.run_theirs(line)] {
                assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{ended:?}");
            }
        }
        let map = place.run_theirs("qemu-img map --output=json x.vmdk").stdout;
        assert_eq!(map.matches("\"depth\": 0").count(), 2, "{map}");
    }
}

#[test]
fn a_rebase_records_the_new_parent_and_its_contents() {
    let place = with_parent("");
    for line in [
        "qemu-img create -q -f vmdk q.vmdk 8M",
        "qemu-io -f vmdk -c 'write -P 1 0 1M' -c 'write -P 9 1M 1M' q.vmdk",
        "qemu-img rebase -f vmdk -F vmdk -b q.vmdk x.vmdk",
    ] {
        let ended = place.run(line);
        assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
    }
    let read = "qemu-io -r -f vmdk -c 'read -P 1 0 4M' -c 'read -P 0 4M 4M' x.vmdk";
    let [ours, theirs] = [place.run(read), place.run_theirs(read)];
    assert_eq!(ours, theirs);
    assert!(!ours.stdout.contains("failed"), "{ours:?}");
    // Moved, and without a parent.
    std::fs::create_dir(place.path().join("sub")).unwrap();
    std::fs::rename(place.path().join("q.vmdk"), place.path().join("sub/quite-a-long-name.vmdk"))
        .unwrap();
    let moved =
        place.run("qemu-img rebase -u -f vmdk -F vmdk -b sub/quite-a-long-name.vmdk x.vmdk");
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert_eq!(place.run(read), place.run_theirs(read));
    assert_eq!(place.run("qemu-img rebase -f vmdk -b '' x.vmdk").code, Some(0));
    assert_eq!(place.run(read), ours);
    assert_eq!(place.run("qemu-img info x.vmdk"), place.run_theirs("qemu-img info x.vmdk"));
}
