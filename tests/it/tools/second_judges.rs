//! VHD and VHDX images that are made and written here, read by libyal's libvhdi, which follows parents, too.

use super::Place;
use std::process::{Command, Output};

/// Writes what the last image of a chain shows to its standard output. The images are named from the base on, and each has
/// to say that the one before it is its parent.
const READ: &str = "\
import sys, pyvhdi
chain = []
for name in sys.argv[1:]:
    image = pyvhdi.file()
    image.open(name)
    if chain:
        wanted, found = image.get_parent_identifier(), chain[-1].get_identifier()
        assert wanted == found, f'{name}: {wanted} is wanted, and {found} is there'
        image.set_parent(chain[-1])
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

#[test]
fn what_is_written_here_is_what_libvhdi_reads() {
    let seed = crate::disks::seed();
    let mut rng = fastrand::Rng::with_seed(seed);
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
            let mut line = format!("qemu-io -f {format}");
            for _ in 0..8 {
                let at = rng.u64(..9 << 11);
                let len = rng.u64(1..1000).min((9 << 11) - at);
                let request =
                    if rng.u8(..5) == 0 { "-z".into() } else { format!("-P {}", rng.u8(1..)) };
                line += &format!(" -c 'write {request} {} {}'", at * 512, len * 512);
            }
            run(&place, &format!("{line} {name}"));
            run(&place, &format!("qemu-img convert -f {format} -O raw {name} raw"));
            let chain = [&["-c", READ], &names[..=n]].concat();
            let theirs = output(&place, "/usr/bin/python3", &chain);
            let ours = std::fs::read(place.path().join("raw")).unwrap();
            assert!(theirs == ours, "{format} {options} {name}, seed {seed}: other bytes");
            let told = String::from_utf8(output(&place, "vhdiinfo", &[name])).unwrap();
            let kind = if n == 0 { kind } else { "Differential" };
            for said in [format!(": {kind}\n"), "(9437184 bytes)".into()] {
                assert!(told.contains(&said), "{format} {options} {name}: {said}: {told}");
            }
        }
    }
}
