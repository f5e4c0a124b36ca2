//! VDI images that QEMU has made and damaged, read by both.

use super::{Place, assert_same, fixture};

/// Lines that read the image `x.vdi`.
const READS: [&str; 11] = [
    "qemu-img info x.vdi",
    "qemu-img info --output=json x.vdi",
    "qemu-img map x.vdi",
    "qemu-img map --output=json x.vdi",
    "qemu-img check x.vdi",
    "qemu-img check -f vdi --output=json x.vdi",
    "qemu-img convert -O raw x.vdi out.raw",
    "qemu-img convert -f vdi -O raw x.vdi out.raw && qemu-img compare out.raw x.vdi",
    "qemu-img measure -O qcow2 x.vdi",
    "qemu-img dd -f vdi -O raw bs=1000 skip=1 count=99 if=x.vdi of=out.raw",
    "qemu-io -r -c 'read -v 1048570 20' -c 'map' -c 'alloc 0 5M' x.vdi",
];

#[test]
fn images_of_both_kinds_are_read_as_qemu_reads_them() {
    for (options, size) in [("", "6M"), ("", "5001k"), ("-o static=on", "6M"), ("", "3G")] {
        // Copies of a static image are compared below: holes of its file lie across pages of the copy's, of which
        // one program stores a few more than the other.
        let is_static = options.contains("static");
        let reads = READS.iter().filter(|line| !is_static || !line.contains("convert"));
        assert_same(
            &[
                &format!("qemu-img create -q -f vdi {options} x.vdi {size}"),
                "qemu-io -f vdi -c 'write -P 1 3M 10k' -c 'write -P 2 1M 1100k' -c 'write -P 3 4900k 512' \
                 -c 'write -z 0 64k' x.vdi",
            ],
            &reads.copied().collect::<Vec<_>>(),
        );
    }
    let place = Place::new(true);
    fixture(place.path());
    for line in [
        "qemu-img create -q -f vdi -o static=on x.vdi 6M",
        "qemu-io -f vdi -c 'write -P 1 3M 10k' -c 'write -P 2 1M 1100k' x.vdi",
    ] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    assert_eq!(place.run("qemu-img convert -f vdi -O raw x.vdi out.raw").code, Some(0));
    assert_eq!(place.run_theirs("qemu-img compare -f vdi -F raw x.vdi out.raw").code, Some(0));
}

/// Changes of single bytes of an image, as qemu-io makes them.
fn bytes(changes: &[(u64, u8)]) -> String {
    let writes = changes.iter().map(|(at, byte)| format!("-c 'write -P {byte} {at} 1' "));
    format!("qemu-io -f raw {}x.vdi", writes.collect::<String>())
}

#[test]
fn headers_that_make_no_sense_are_refused_in_qemus_words() {
    for changes in [
        &[(0x40, 0)][..],
        &[(0x44, 2)],
        &[(0x48, 0)],
        &[(0x4c, 4)],
        &[(0x4c, 2)],
        &[(0x50, 1)],
        &[(0x154, 1)],
        &[(0x158, 1)],
        &[(0x159, 2)],
        &[(0x169, 4)],
        &[(0x170, 1)],
        &[(0x171, 2)],
        &[(0x172, 64)],
        &[(0x177, 1)],
        &[(0x17a, 32)],
        &[(0x17c, 1)],
        &[(0x180, 4)],
        &[(0x183, 32)],
        &[(0x198, 1)],
        &[(0x1a8, 1)],
        &[(0x1c7, 1)],
    ] {
        assert_same(
            &["qemu-img create -q -f vdi x.vdi 5M", &bytes(changes)],
            &[
                "qemu-img info -f vdi x.vdi",
                "qemu-img check -f vdi x.vdi",
                "qemu-io -r -f vdi -c 'read 0 512' x.vdi",
            ],
        );
    }
}

#[test]
fn maps_that_make_no_sense_are_found() {
    for changes in [
        &[(0x184, 1)][..],
        &[(0x204, 0)],
        &[(0x204, 2)],
        &[(0x20c, 1), (0x208, 1)],
        &[(0x204, 7)],
        &[(0x207, 1)],
        &[(0x204, 254), (0x205, 255), (0x206, 255), (0x207, 255)],
        &[(0x204, 4)],
    ] {
        assert_same(
            &[
                "qemu-img create -q -f vdi x.vdi 5M",
                "qemu-io -f vdi -c 'write -P 1 0 2M' -c 'write -P 2 3M 1k' x.vdi",
                &bytes(changes),
            ],
            &[
                "qemu-img check -f vdi x.vdi",
                "qemu-img check -f vdi --output=json x.vdi",
                "qemu-img convert -f vdi -O raw x.vdi out.raw",
            ],
        );
    }
}

#[test]
fn an_image_whose_map_is_cut_off_is_refused() {
    let place = Place::new(true);
    fixture(place.path());
    let cut = "qemu-img resize -q --shrink -f raw x.vdi 512";
    for line in ["qemu-img create -q -f vdi x.vdi 5M", cut] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    let ended = place.run("qemu-img info -f vdi x.vdi");
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("The VDI block map ends at 0x214"), "{ended:?}");
}

#[test]
fn an_image_is_opened_for_reading_only() {
    let place = Place::new(true);
    fixture(place.path());
    assert_eq!(place.run_theirs("qemu-img create -q -f vdi x.vdi 1M").code, Some(0));
    let before = place.files();
    let ended = place.run("qemu-io -f vdi -c 'write 0 512' x.vdi");
    assert_ne!(ended.code, Some(0));
    assert!(ended.stderr.contains("vdi images cannot be written yet"), "{ended:?}");
    assert_eq!(place.run("qemu-img check -r all x.vdi").code, Some(1));
    assert_eq!(place.run("qemu-img create -f vdi y.vdi 1M").code, Some(1));
    assert!(before == place.files());
}
