//! The command line of `check`, beside qemu-img's: output, exit codes, and the dirty and corrupt bits.

use super::*;

/// Changes an image's bytes, which are given with where its first L2 table is.
type Damage = fn(&mut Vec<u8>, usize);

fn word(image: &[u8], at: usize) -> u64 {
    image[at..at + 8].iter().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

const DAMAGE: &[(&str, Damage)] = &[
    ("nothing", |_, _| {}),
    ("dirty", |image, _| image[79] = 1),
    ("corrupt", |image, _| image[79] = 2),
    ("dirty and corrupt", |image, _| image[79] = 3),
    ("a leak", |image, l2| image[l2..l2 + 8].fill(0)),
    ("dirty and a leak", |image, l2| {
        image[79] = 1;
        image[l2..l2 + 8].fill(0);
    }),
    ("corrupt and a leak", |image, l2| {
        image[79] = 2;
        image[l2..l2 + 8].fill(0);
    }),
    ("a flag", |image, l2| image[l2] &= 0x7f),
    ("dirty and a flag", |image, l2| {
        image[79] = 1;
        image[l2] &= 0x7f;
    }),
];

const LINES: &[&[&str]] = &[
    &["check"],
    &["check", "--output=json"],
    &["check", "-r", "leaks"],
    &["check", "-r", "all"],
    &["check", "-r", "all", "--output=json"],
    &["check", "-q", "-r", "leaks"],
];

#[test]
fn images_are_checked_and_repaired_in_qemu_imgs_words() {
    let dir = crate::file::on_tmpfs();
    let path = dir.path();
    qemu_img(path, &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    let written = run(path, &["qemu-io", "-c", "write -P 7 0 1M"], &["a.qcow2"]);
    assert!(written.status.success());
    let sound = std::fs::read(path.join("a.qcow2")).unwrap();
    let l1 = word(&sound, 40) as usize;
    let l2 = (word(&sound, l1) & 0xff_ffff_ffff_fe00) as usize;
    for (what, damage) in DAMAGE {
        for line in LINES {
            let both = [true, false].map(|is_ours| {
                let mut image = sound.clone();
                damage(&mut image, l2);
                std::fs::write(path.join("a.qcow2"), &image).unwrap();
                let arguments = [*line, &["a.qcow2"]].concat();
                let outcome =
                    if is_ours { ours(path, &arguments) } else { theirs(path, &arguments) };
                // The bits that are left.
                (outcome, std::fs::read(path.join("a.qcow2")).unwrap()[79])
            });
            assert_eq!(both[0], both[1], "{what}: {line:?}");
        }
    }
}
