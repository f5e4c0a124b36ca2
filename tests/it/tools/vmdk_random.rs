//! Random scripts over VMDK images with parents and over compressed ones, run by vublk and by QEMU on equal images.

use super::{Ended, Place, fixture};
use fastrand::Rng;
use std::fmt::Write;

const GRAIN: u64 = 64 << 10;
/// Of the disks, in bytes.
const SIZE: u64 = 3000 << 10;

/// One line of requests of qemu-io to `x.vmdk`.
fn requests(rng: &mut Rng, of: impl Fn(&mut Rng) -> String) -> String {
    let mut line = "qemu-io -f vmdk".to_owned();
    for _ in 0..rng.usize(1..6) {
        write!(line, " -c '{}'", of(rng)).unwrap();
    }
    line + " x.vmdk"
}

/// A request to a disk that may be written anywhere.
fn anywhere(rng: &mut Rng) -> String {
    let unit = [1, 512, 4096, GRAIN][rng.usize(..4)];
    let at = rng.u64(..SIZE / unit) * unit;
    let len = (rng.u64(1..=3 * GRAIN / unit) * unit).min(SIZE - at);
    let value = rng.u8(1..);
    match rng.u8(..8) {
        0 => format!("write -z {at} {len}"),
        1 => format!("write -z -u {at} {len}"),
        2 => format!("discard {at} {len}' -c 'write -P {value} {at} {len}"),
        3 => format!("read -v {at} {}", len.min(200)),
        _ => format!("write -P {value} {at} {len}"),
    }
}

/// A request to one whose grains are written once, and whole.
fn grains(rng: &mut Rng) -> String {
    let grain = rng.u64(..SIZE / GRAIN);
    let (at, value) = (grain * GRAIN, rng.u8(1..));
    match rng.u8(..6) {
        0 => format!("write -P {value} {at} 4k"),
        1 => format!("read -v {at} 100"),
        2 => format!("write -P {value} {at} 64k"),
        _ => format!("write -c -P {value} {at} 64k"),
    }
}

/// Runs a line in both places, where it comes to the same.
fn run_both(places: &[Place; 2], line: &str, done: &mut String) {
    writeln!(done, "{line}").unwrap();
    let [ours, theirs] = places.each_ref().map(|place| {
        let ended = place.run(line);
        // QEMU has more to say of a request that it refuses.
        Ended { stderr: String::new(), ..ended }
    });
    assert_eq!(ours, theirs, "{done}");
}

/// Both programs tell the same of the image that was made here.
fn judge(ours: &Place, done: &str) {
    for line in [
        "qemu-img check -f vmdk x.vmdk",
        "qemu-img info --backing-chain -f vmdk x.vmdk",
        "qemu-img info --output=json -f vmdk x.vmdk",
        "qemu-img map --output=json -f vmdk x.vmdk",
    ] {
        let [by_us, by_them] = [ours.run(line), ours.run_theirs(line)];
        assert_eq!(by_us, by_them, "{done}{line}");
        assert_eq!(by_us.code, Some(0), "{done}{line}: {by_us:?}");
    }
}

fn assert_equal(places: [&Place; 2], names: [&str; 2], done: &str) {
    let path = |n: usize| places[n].path().join(names[n]).display().to_string();
    let line = format!("qemu-img compare -f vmdk -F vmdk {} {}", path(0), path(1));
    for same in [places[0].run(&line), places[0].run_theirs(&line)] {
        assert_eq!(same.code, Some(0), "{done}{line}: {same:?}");
    }
}

fn prepared(lines: &[&str], done: &mut String) -> [Place; 2] {
    let places = [true, false].map(Place::new);
    for place in &places {
        fixture(place.path());
    }
    lines.iter().for_each(|line| run_both(&places, line, done));
    places
}

#[test]
fn images_over_parents_come_to_the_same_and_so_do_the_parents_after_a_commit() {
    let seed = crate::disks::seed();
    for (n, options) in
        ["", "-o zeroed_grain=on", "-o subformat=twoGbMaxExtentSparse"].into_iter().enumerate()
    {
        let mut rng = Rng::with_seed(seed.wrapping_add(n as u64));
        let mut done = String::new();
        let places = prepared(
            &[
                "qemu-img convert -f raw -O vmdk longer.raw p.vmdk",
                "qemu-img create -q -f vmdk q.vmdk 2M",
                "qemu-io -f vmdk -c 'write -P 77 100k 1M' q.vmdk",
            ],
            &mut done,
        );
        let create =
            format!("qemu-img create -q -f vmdk {options} -b p.vmdk -F vmdk x.vmdk {SIZE}");
        run_both(&places, &create, &mut done);
        for _ in 0..5 {
            run_both(&places, &requests(&mut rng, anywhere), &mut done);
        }
        let [ours, theirs] = &places;
        judge(ours, &done);
        assert_equal([ours, theirs], ["x.vmdk"; 2], &done);
        // QEMU does not record other parents.
        let copy = "qemu-img convert -f vmdk -O vmdk x.vmdk copy.vmdk";
        assert_eq!(ours.run_theirs(copy).code, Some(0), "{done}");
        for parent in ["q.vmdk", "''", "p.vmdk"] {
            let line = format!("qemu-img rebase -f vmdk -F vmdk -b {parent} x.vmdk");
            writeln!(done, "{line}").unwrap();
            let ended = ours.run(&line);
            assert_eq!(ended.code, Some(0), "{done}{ended:?}");
            judge(ours, &done);
            assert_equal([ours, ours], ["x.vmdk", "copy.vmdk"], &done);
        }
        run_both(&places, "qemu-img commit x.vmdk", &mut done);
        judge(ours, &done);
        assert_equal([ours, ours], ["p.vmdk", "copy.vmdk"], &done);
        assert_equal([ours, ours], ["x.vmdk", "copy.vmdk"], &done);
    }
}

#[test]
fn compressed_grains_come_to_the_same() {
    let seed = crate::disks::seed();
    for n in 0..2 {
        let mut rng = Rng::with_seed(seed.wrapping_add(n));
        let mut done = String::new();
        let create =
            format!("qemu-img create -q -f vmdk -o subformat=streamOptimized x.vmdk {SIZE}");
        let places = prepared(&[&create], &mut done);
        for _ in 0..6 {
            run_both(&places, &requests(&mut rng, grains), &mut done);
        }
        let [ours, theirs] = &places;
        judge(ours, &done);
        assert_equal([ours, theirs], ["x.vmdk"; 2], &done);
    }
}
