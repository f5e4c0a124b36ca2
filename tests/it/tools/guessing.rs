//! Guessed formats: no image is taken for raw, and a guessed raw image stays raw.

use super::{Place, assert_same, fixture};

/// How QEMU makes an image of each format; those that it does not make are among the test's files.
const OURS: [(&str, &str); 12] = [
    ("bochs", "h.bochs"),
    ("cloop", "h.cloop"),
    ("luks", "h.luks"),
    ("parallels", "-f parallels h.parallels 4M"),
    ("qcow", "-f qcow h.qcow 4M"),
    ("qed", "-f qed h.qed 4M"),
    ("vdi", "-f vdi h.vdi 4M"),
    ("vhdx", "-f vhdx h.vhdx 4M"),
    ("vmdk", "-f vmdk h.vmdk 4M"),
    ("vmdk", "-f vmdk -o subformat=streamOptimized h.vmdk 4M"),
    ("vmdk", "-f vmdk -o subformat=monolithicFlat h.vmdk 4M"),
    ("vpc", "-f vpc h.vpc 4M"),
];

/// The lines that make the image.
fn made(how: &str) -> Vec<String> {
    match how.contains(' ') {
        true => vec![format!("qemu-img create -q {how}")],
        false => Vec::new(),
    }
}

#[test]
fn a_guessed_raw_image_stays_one() {
    assert_same(
        &[],
        &[
            "qemu-io -c 'write -s magic.bin 0 512' -c 'write -P 1 512 512' a.raw",
            "qemu-io -c 'write -s magic.bin 0 4096' a.raw",
            "qemu-io -c 'write -s magic.bin 512 512' a.raw",
            "qemu-io -f raw -c 'write -s magic.bin 0 512' a.raw && qemu-img info a.raw",
        ],
    );
    // Images that are ours make no raw image into one, either.
    for (format, how) in OURS {
        let made = made(how);
        let made: Vec<&str> = made.iter().map(|line| &**line).collect();
        let guarded = format!("qemu-io -c 'write -s h.{format} 0 512' a.raw");
        let place = Place::new(true);
        fixture(place.path());
        made.iter().for_each(|line| assert_eq!(place.run_theirs(line).code, Some(0), "{line}"));
        let refused = place.run(&guarded);
        assert!(refused.stdout.contains("Operation not permitted"), "{format}: {refused:?}");
        assert_same(
            &made,
            &[
                &guarded,
                &format!("qemu-io -f raw -c 'write -s h.{format} 0 512' a.raw"),
                &format!("qemu-img info -f raw h.{format}"),
                &format!("qemu-img convert -f raw h.{format} copy.raw"),
            ],
        );
    }
}

#[test]
fn a_qcow2_image_of_a_later_version_is_refused_as_one() {
    assert_same(
        &["qemu-img create -q -f qcow2 v4.qcow2 4M", "qemu-io -f raw -c 'write -P 4 7 1' v4.qcow2"],
        &[
            "qemu-img info v4.qcow2",
            "qemu-img convert v4.qcow2 copy.raw",
            "qemu-img resize v4.qcow2 8M",
            "qemu-img check v4.qcow2",
            "qemu-img create -f qcow2 -F qcow2 -b v4.qcow2 over.qcow2",
            "qemu-io -c 'read 0 512' v4.qcow2",
            "qemu-io -c 'write -s v4.qcow2 0 512' a.raw",
        ],
    );
}
