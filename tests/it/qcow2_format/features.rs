//! Unknown feature bits, beside QEMU.

use super::*;

/// The autoclear bits of the image.
fn bits(dir: &Path) -> u64 {
    let image = std::fs::read(dir.join("a.qcow2")).unwrap();
    u64::from_be_bytes(*image[88..].first_chunk().unwrap())
}

#[test]
fn opening_an_image_for_writing_clears_the_autoclear_bits_that_are_not_known() {
    let dir = crate::file::on_tmpfs();
    let path = dir.path();
    qemu_img(path, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    qemu_img(path, &["bitmap", "--add", "a.qcow2", "b"]);
    let mut image = std::fs::read(path.join("a.qcow2")).unwrap();
    image[88..96].copy_from_slice(&(1u64 << 63 | 5).to_be_bytes());
    let reads: &[&[&str]] = &[
        &["qemu-io", "-r", "-c", "read 0 512", "a.qcow2"],
        &["qemu-img", "info", "a.qcow2"],
        &["qemu-img", "check", "a.qcow2"],
        &["qemu-img", "map", "a.qcow2"],
        &["qemu-img", "snapshot", "-l", "a.qcow2"],
        &["qemu-img", "compare", "a.qcow2", "a.qcow2"],
    ];
    let writes: &[&[&str]] = &[
        &["qemu-io", "-c", "read 0 512", "a.qcow2"],
        &["qemu-io", "-c", "length", "a.qcow2"],
        &["qemu-img", "check", "-r", "all", "a.qcow2"],
        &["qemu-img", "check", "-r", "leaks", "a.qcow2"],
        &["qemu-img", "amend", "-o", "lazy_refcounts=off", "a.qcow2"],
        &["qemu-img", "resize", "a.qcow2", "1M"],
        &["qemu-img", "snapshot", "-c", "s", "a.qcow2"],
    ];
    for (lines, wanted) in [(reads, 1 << 63 | 5), (writes, 1)] {
        for line in lines {
            for is_ours in [false, true] {
                std::fs::write(path.join("a.qcow2"), &image).unwrap();
                let program: &[&str] = match (is_ours, line[0]) {
                    (false, tool) => &[tool],
                    (true, "qemu-io") => &[VUBLK, "io"],
                    (true, _) => &[VUBLK],
                };
                let output = run(path, program, &line[1..]);
                assert!(output.status.success(), "{line:?}: {}", stderr(&output));
                assert!(!is_ours || output.stderr.is_empty(), "{line:?}: {}", stderr(&output));
                assert_eq!(bits(path), wanted, "{line:?}, ours: {is_ours}");
            }
        }
    }
}
