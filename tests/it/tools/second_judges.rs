//! VHD, VHDX and VMDK images that are made and written here, read by libyal's libvhdi and libvmdk, which follow parents, too.

use super::Place;
use fastrand::Rng;
use std::process::{Command, Output};

/// Writes what the last image of a chain shows to its standard output. The images are named from the base on, and each has
/// to say that the one before it is its parent.
const READ: &str = "\
import sys, importlib
module = importlib.import_module(sys.argv[1])
is_vmdk = module.__name__ == 'pyvmdk'
chain = []
for name in sys.argv[2:]:
    image = module.handle() if is_vmdk else module.file()
    image.open(name)
    if is_vmdk:
        image.open_extent_data_files()
    if chain:
        below = chain[-1]
        if is_vmdk:
            wanted, found = image.get_parent_content_identifier(), below.get_content_identifier()
        else:
            wanted, found = image.get_parent_identifier(), below.get_identifier()
        assert wanted == found, f'{name}: {wanted} is wanted, and {found} is there'
        image.set_parent(below)
    chain.append(image)
left = image.get_media_size()
while left:
    read = image.read_buffer(min(left, 1 << 20))
    sys.stdout.buffer.write(read)
    left -= len(read)
";

fn run(place: &Place, line: &str) {
    let ended = place.run(line);
    assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{line}: {ended:?}");
}

/// A program's output when it ends well.
fn output(place: &Place, program: &str, arguments: &[&str]) -> Vec<u8> {
    // Debian's Python has the package's module.
    let ended = Command::new(program).args(arguments).current_dir(place.path()).output();
    let Output { status, stdout, stderr } = ended.unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&stderr));
    stdout
}

/// A line that writes to an image of 9 MiB.
fn writes(rng: &mut Rng, format: &str, name: &str) -> String {
    let mut line = format!("qemu-io -f {format}");
    for _ in 0..8 {
        let at = rng.u64(..9 << 11);
        let len = rng.u64(1..1000).min((9 << 11) - at);
        let request = if rng.u8(..5) == 0 { "-z".into() } else { format!("-P {}", rng.u8(1..)) };
        line += &format!(" -c 'write {request} {} {}'", at * 512, len * 512);
    }
    format!("{line} {name}")
}

/// A module of Python reads the last image of a chain as it is read here.
fn assert_read(place: &Place, format: &str, module: &str, names: &[&str], what: &str) {
    let name = names[names.len() - 1];
    run(place, &format!("qemu-img convert -f {format} -O raw {name} raw"));
    let arguments = [&["-c", READ, module], names].concat();
    let theirs = output(place, "/usr/bin/python3", &arguments);
    let ours = std::fs::read(place.path().join("raw")).unwrap();
    assert!(theirs == ours, "{format} {name}, {what}: other bytes");
}

#[test]
fn what_is_written_here_is_what_libvmdk_reads() {
    let seed = crate::disks::seed();
    let mut rng = Rng::with_seed(seed);
    for options in ["adapter_type=ide", "zeroed_grain=on", "subformat=twoGbMaxExtentSparse"] {
        let place = Place::new(true);
        let names = ["base.vmdk", "child.vmdk", "grandchild.vmdk"];
        // Through zeroed grains, libvmdk shows the parent.
        let images = if options.starts_with("zeroed") { 1 } else { names.len() };
        for n in 0..images {
            let backing =
                if n > 0 { format!("-b {} -F vmdk", names[n - 1]) } else { String::new() };
            let name = names[n];
            run(&place, &format!("qemu-img create -q -f vmdk -o {options} {backing} {name} 9M"));
            run(&place, &writes(&mut rng, "vmdk", name));
            let what = format!("{options}, seed {seed}");
            assert_read(&place, "vmdk", "pyvmdk", &names[..=n], &what);
        }
    }
    for subformat in ["monolithicFlat", "twoGbMaxExtentFlat", "streamOptimized"] {
        let place = Place::new(true);
        run(&place, "qemu-img create -q -f vmdk base.vmdk 9M");
        run(&place, &writes(&mut rng, "vmdk", "base.vmdk"));
        let convert = "qemu-img convert -f vmdk -O vmdk";
        run(&place, &format!("{convert} -o subformat={subformat} base.vmdk x.vmdk"));
        assert_read(&place, "vmdk", "pyvmdk", &["x.vmdk"], &format!("{subformat}, seed {seed}"));
    }
}

#[test]
fn what_is_written_here_is_what_libvhdi_reads() {
    let seed = crate::disks::seed();
    let mut rng = Rng::with_seed(seed);
    let kinds = [
        ("vpc", "force_size=on", "Dynamic"),
        ("vpc", "force_size=on,subformat=fixed", "Fixed"),
        ("vhdx", "block_size=1M", "Dynamic"),
        ("vhdx", "block_size=2M,subformat=fixed", "Fixed"),
    ];
    for (format, options, kind) in kinds {
        let place = Place::new(true);
        let names = ["base", "child", "grandchild"];
        for n in 0..names.len() {
            let name = names[n];
            run(
                &place,
                &match n {
                    0 => format!("qemu-img create -q -f {format} -o {options} {name} 9M"),
                    _ => format!(
                        "qemu-img create -q -f {format} -b {} -F {format} {name}",
                        names[n - 1]
                    ),
                },
            );
            run(&place, &writes(&mut rng, format, name));
            assert_read(&place, format, "pyvhdi", &names[..=n], &format!("{options}, seed {seed}"));
            let told = String::from_utf8(output(&place, "vhdiinfo", &[name])).unwrap();
            let kind = if n == 0 { kind } else { "Differential" };
            for said in [format!(": {kind}\n"), "(9437184 bytes)".into()] {
                assert!(told.contains(&said), "{format} {options} {name}: {said}: {told}");
            }
        }
    }
}
