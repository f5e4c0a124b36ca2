//! The previous contents of a target, and the parts that the tools leave alone.

use super::{Place, assert_same_disks};
use crate::file::{Loop, Mount};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

const MIB: u64 = 1 << 20;

/// A loop device over a file of 0xff in the place.
fn stale_device(place: &Place, len: u64) -> Loop {
    let under = place.path().join("under.bin");
    std::fs::write(&under, vec![0xff; len as usize]).unwrap();
    Loop::new(&under, &[])
}

/// Runs a line that must succeed without a word.
fn run(place: &Place, line: &str) {
    let ended = place.run(line);
    assert_eq!((ended.code, &*ended.stdout, &*ended.stderr), (Some(0), "", ""), "{line}");
}

/// Whether the real qemu-io reads these bytes.
fn assert_reads(place: &Place, format: &str, name: &str, commands: &[&str]) {
    let commands = commands.iter().map(|command| format!(" -c '{command}'")).collect::<String>();
    let ended = place.run_theirs(&format!("qemu-io -r -f {format}{commands} {name}"));
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""), "{name}: {}", ended.stdout);
    assert!(!ended.stdout.contains("failed"), "{name}: {}", ended.stdout);
}

/// The name of a file as seen from the place, without a leading slash.
fn relative(place: &Place, name: &str) -> String {
    let depth = std::fs::canonicalize(place.path()).unwrap().components().count() - 1;
    format!("{}{}", "../".repeat(depth), name.trim_start_matches('/'))
}

#[test]
fn zeroes_are_written_to_a_device_by_whatever_name_it_is_reached() {
    let place = Place::new(true);
    std::fs::File::create(place.path().join("zeros.img")).unwrap().set_len(4 * MIB).unwrap();
    let device = stale_device(&place, 8 * MIB);
    symlink(&device.0, place.path().join("link")).unwrap();
    let near = relative(&place, &device.0);
    let file = std::fs::File::options().write(true).open(&device.0).unwrap();
    for name in [&*device.0, "link", &near, "host_device:link"] {
        for options in
            ["-O raw", "-O host_device", "-O qcow2 -o preallocation=metadata", "-n -O raw"]
        {
            file.write_all_at(&vec![0xff; 8 << 20], 0).unwrap();
            file.sync_all().unwrap();
            run(&place, &format!("qemu-img convert -f raw {options} zeros.img {name}"));
            let format = if options.contains("qcow2") { "qcow2" } else { "raw" };
            assert_reads(&place, format, &device.0, &["read -P 0 0 4M"]);
        }
    }
}

#[test]
fn zeroes_are_written_to_a_data_file_that_is_a_device() {
    let place = Place::new(true);
    std::fs::File::create(place.path().join("zeros.img")).unwrap().set_len(4 * MIB).unwrap();
    let device = stale_device(&place, 8 * MIB);
    symlink(&device.0, place.path().join("link")).unwrap();
    for options in ["data_file_raw=on", "preallocation=metadata"] {
        let line = format!(
            "qemu-img convert -f raw -O qcow2 -o data_file=link,{options} zeros.img t.qcow2"
        );
        run(&place, &line);
        assert_reads(&place, "qcow2", "t.qcow2", &["read -P 0 0 4M"]);
    }
    // Every byte of a raw data file is the disk's.
    run(&place, "qemu-img convert -O qcow2 -o data_file=link,data_file_raw=on zeros.img t.qcow2");
    assert_reads(&place, "raw", &device.0, &["read -P 0 0 4M"]);
}

#[test]
fn a_new_file_in_dev_stays_sparse() {
    let place = Place::new(true);
    std::fs::File::create(place.path().join("zeros.img")).unwrap().set_len(4 * MIB).unwrap();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let target = folder.path().join("t.raw");
    run(&place, &format!("qemu-img convert -f raw -O raw zeros.img {}", target.display()));
    assert!(std::fs::metadata(&target).unwrap().blocks() * 512 <= 64 << 10);
}

#[test]
fn only_off_preallocates_a_device() {
    let said = [true, false].map(|ours| {
        let place = Place::new(ours);
        let device = stale_device(&place, 8 * MIB);
        let mut said = String::new();
        for mode in ["off", "metadata", "falloc", "full", "bogus"] {
            for command in [
                "create -f raw -o preallocation=MODE DEVICE 4M",
                "convert -f raw -O raw -o preallocation=MODE /dev/null DEVICE",
                "resize -f raw --preallocation=MODE DEVICE 8M",
            ] {
                let line = command.replace("MODE", mode).replace("DEVICE", &device.0);
                let ended = place.run(&format!("qemu-img {line}"));
                said += &format!("{command} {mode}: {ended:?}\n").replace(&device.0, "DEVICE");
            }
            if mode != "off" {
                let ended = place
                    .run(&format!("qemu-img resize -f raw --preallocation={mode} {} 1G", device.0));
                said += &format!("{mode}: {ended:?}\n").replace(&device.0, "DEVICE");
            }
        }
        for format in ["raw", "host_device"] {
            let line = format!("qemu-img create -f {format} -o help {}", device.0);
            said += &format!("{:?}\n", place.run(&line));
        }
        said
    });
    let [ours, theirs] = said;
    assert_eq!(ours, theirs);
    assert!(ours.contains("Unsupported preallocation mode 'falloc'"), "{ours}");
}

#[test]
fn space_is_preallocated_where_the_file_system_cannot_do_it_by_itself() {
    let place = Place::new(true);
    let mount = Mount::new(&place.path().join("ramfs"), &["-t", "ramfs", "none"]);
    let stored = |name: &str| std::fs::metadata(mount.0.join(name)).unwrap().blocks() * 512;
    run(&place, "qemu-img create -q -f raw -o preallocation=falloc ramfs/a.raw 3M");
    assert_eq!(stored("a.raw"), 3 * MIB);
    run(&place, "qemu-img create -q -f raw ramfs/b.raw 1M");
    run(&place, "qemu-img resize -q -f raw --preallocation=falloc ramfs/b.raw 3M");
    assert!(stored("b.raw") >= 2 * MIB);
    assert_reads(&place, "raw", "ramfs/b.raw", &["read -P 0 0 3M"]);
    run(&place, "qemu-img create -q -f qcow2 -o preallocation=falloc ramfs/c.qcow2 3M");
    assert!(stored("c.qcow2") >= 3 * MIB);
    assert_reads(&place, "qcow2", "ramfs/c.qcow2", &["read -P 0 0 3M"]);
    let data = "preallocation=falloc,data_file=ramfs/data.raw";
    run(&place, &format!("qemu-img create -q -f qcow2 -o {data} d.qcow2 3M"));
    assert_eq!(stored("data.raw"), 3 * MIB);
}

/// Images over `base.qcow2` and without it, with data, zeroes and nothing.
const LAYERS: [&str; 11] = [
    "qemu-img create -q -f qcow2 base.qcow2 1M",
    "qemu-io -c 'write -P 1 0 1M' base.qcow2",
    "qemu-img create -q -f qcow2 big.qcow2 2M",
    "qemu-io -c 'write -P 9 0 2M' big.qcow2",
    "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 ov.qcow2",
    "qemu-io -c 'write -z 0 64k' -c 'write -P 2 256k 64k' ov.qcow2",
    "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 longer.qcow2 2M",
    "qemu-io -c 'write -z 0 64k' -c 'write -P 2 1280k 64k' longer.qcow2",
    "qemu-img create -q -f qcow2 plain.qcow2 2M",
    "qemu-io -c 'write -P 3 256k 64k' -c 'write -P 3 1536k 64k' plain.qcow2",
    "qemu-io -f raw -c 'write -z -u 0 1M' a.raw",
];

#[test]
fn a_backing_file_is_the_same_by_its_own_option_and_among_the_others() {
    assert_same_disks(
        &LAYERS,
        &[
            "qemu-img convert -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 ov.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -o backing_file=base.qcow2 -F qcow2 ov.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -B base.qcow2 -o backing_fmt=qcow2 ov.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -B base.qcow2 -F qcow2 -o backing_file=nope ov.qcow2 t.qcow2",
            "qemu-img convert -c -O qcow2 -o backing_file=base.qcow2 -F qcow2 ov.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2,compat=0.10 ov.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -o backing_file=base.qcow2 -F qcow2 longer.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -o backing_file=base.qcow2 ov.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -o backing_file= ov.qcow2 t.qcow2",
            "qemu-img convert -O raw -o backing_file=base.qcow2,backing_fmt=qcow2 ov.qcow2 t.raw",
            "qemu-img convert -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 ov.qcow2 a.raw t.qcow2",
            "qemu-img convert -n -O qcow2 -B base.qcow2 ov.qcow2 a.raw longer.qcow2",
            "qemu-img convert -O qcow2 -B base.qcow2 -F qcow2 ov.qcow2 a.raw t.qcow2",
        ],
    );
}

#[test]
fn options_that_have_no_effect_are_read_all_the_same() {
    assert_same_disks(
        &LAYERS,
        &[
            "qemu-img convert -O qcow2 -o size=bogus plain.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -o size=1M plain.qcow2 t.qcow2",
            "qemu-img convert -c -O qcow2 -o encryption=on plain.qcow2 t.qcow2",
            "qemu-img convert -c -O qcow2 -o encryption=bogus plain.qcow2 t.qcow2",
            "qemu-img convert -c -O qcow2 -o encrypt.format=luks plain.qcow2 t.qcow2",
        ],
    );
}

#[test]
fn what_a_source_has_not_does_not_show_the_targets_backing_file() {
    assert_same_disks(
        &LAYERS,
        &[
            "qemu-img convert -O qcow2 -B base.qcow2 -F qcow2 plain.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -B big.qcow2 -F qcow2 plain.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -o backing_file=big.qcow2 -F qcow2 a.raw t.qcow2",
            "qemu-img convert -c -O qcow2 -B base.qcow2 -F qcow2 plain.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -B base.qcow2 -F qcow2 -o compat=0.10 plain.qcow2 t.qcow2",
            "qemu-img convert -O qcow2 -B base.qcow2 -F qcow2 -o extended_l2=on,preallocation=metadata plain.qcow2 t.qcow2",
            "qemu-img create -q -f qcow2 -b big.qcow2 -F qcow2 t.qcow2 && qemu-img convert -n -O qcow2 -B big.qcow2 plain.qcow2 t.qcow2",
            "qemu-img create -q -f qcow2 -b big.qcow2 -F qcow2 t.qcow2 && qemu-img convert -n -O qcow2 plain.qcow2 t.qcow2",
            "qemu-img create -q -f qcow2 -b big.qcow2 -F qcow2 t.qcow2 && qemu-img convert -n -c -O qcow2 -B big.qcow2 plain.qcow2 t.qcow2",
        ],
    );
}

/// Where qemu-img leaves what another image has behind the end of the source's backing file, or what
/// the target had before.
#[test]
fn zeroes_behind_a_backing_file_are_written_where_the_target_has_something_else() {
    let place = Place::new(false);
    for line in &LAYERS[..10] {
        assert_eq!(place.run(line).code, Some(0), "{line}");
    }
    let convert = |options: &str, source: &str| {
        let vublk = Path::new(super::VUBLK).display();
        run(&place, &format!("{vublk} convert {options} -O qcow2 {source}.qcow2 t.qcow2"));
        place.run_theirs("qemu-img info t.qcow2").stdout
    };
    // From the end of the source's backing file on there are zeroes.
    convert("-B big.qcow2 -F qcow2", "longer");
    assert_reads(&place, "qcow2", "t.qcow2", &["read -P 0 1M 256k", "read -P 2 1280k 64k"]);
    // The target has data behind the end of its own.
    let fill = "qemu-io -c 'write -P 7 1M 1M' t.qcow2";
    for line in ["qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 t.qcow2 2M", fill] {
        assert_eq!(place.run(line).code, Some(0), "{line}");
    }
    convert("-n -B base.qcow2", "longer");
    assert_eq!(place.run("qemu-img compare longer.qcow2 t.qcow2").code, Some(0));
    // A target without a backing file is supplied with nothing.
    for line in ["qemu-img create -q -f qcow2 t.qcow2 2M", fill] {
        assert_eq!(place.run(line).code, Some(0), "{line}");
    }
    convert("-n -B base.qcow2", "longer");
    assert_eq!(place.run("qemu-img compare longer.qcow2 t.qcow2").code, Some(0));
}

#[test]
fn an_empty_name_of_a_backing_file_is_refused() {
    let place = Place::new(true);
    run(&place, "qemu-img create -q -f qcow2 a.qcow2 1M");
    for options in ["-B '' -F qcow2", "-o backing_file=,backing_fmt=qcow2"] {
        let ended = place.run(&format!("qemu-img convert {options} -O qcow2 a.qcow2 t.qcow2"));
        let wanted = "qemu-img: Expected backing file name, got empty string\n";
        assert_eq!((ended.code, &*ended.stderr), (Some(1), wanted), "{options}");
        assert!(!place.path().join("t.qcow2").exists());
    }
}

#[test]
fn what_a_filter_passes_on_from_a_backing_file_is_seen() {
    let place = Place::new(true);
    for line in &LAYERS[..10] {
        assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
    }
    let through = "driver=blkdebug,image.driver=qcow2,image.file.filename=ov.qcow2";
    run(&place, &format!("qemu-img convert --image-opts -O qcow2 {through} t.qcow2"));
    let same = place.run_theirs("qemu-img compare ov.qcow2 t.qcow2");
    assert_eq!((same.code, &*same.stdout), (Some(0), "Images are identical.\n"));
    let other = "driver=blkdebug,image.driver=qcow2,image.file.filename=longer.qcow2";
    let differs = place.run(&format!("qemu-img compare --image-opts {through} {other}"));
    assert_eq!(differs.code, Some(1), "{differs:?}");
}
