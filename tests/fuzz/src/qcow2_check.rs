//! Fuzzing check and repair of a qcow2 image with arbitrary bytes changed.
//!
//! There must be no panic and an end, and an image that a repair calls sound is sound when it is checked again.

use super::image;
use super::input::Input;
use std::sync::LazyLock;
use vublk::block::{CheckReport, Error, Fix};
use vublk::format::qcow2::check;
use vublk::format::qcow2::snapshots::Snapshot;
use vublk::protocol::sim::SimDisk;

/// Mapped images with clusters of 512 bytes and of 16 KiB: without and with subclusters.
static IMAGES: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
    ["cluster_size=512,refcount_bits=2,size=50k", "cluster_size=16k,extended_l2=on,size=100k"]
        .map(|options| image::create(&format!("{options},preallocation=metadata")))
});

/// Changes one of the images as the input says, and checks it.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let disk = image::put(&IMAGES[input.below(2) as usize]);
    if input.one_in(3) {
        add_snapshot(&disk, &mut input);
    }
    for _ in 0..1 + input.u8() % 8 {
        // Most of what matters is in the first clusters.
        let words = disk.len() / 8;
        let reach = if input.one_in(4) { words } else { words.min(512) };
        let at = input.below(reach) * 8;
        let value = match input.u8() % 3 {
            0 => input.edgy(),
            1 => 1 << 63 | input.below(1 << 10) << 9,
            _ => input.below(1 << 19),
        };
        disk.put(at, &value.to_be_bytes());
    }
    if input.one_in(8) {
        disk.set_len(input.below(disk.len()));
    }
    let fix = input.pick(&[Fix::Nothing, Fix::Leaks, Fix::All, Fix::All]);
    let first = check_once(fix);
    if let Ok(report) = first
        && fix == Fix::All
        && report.corruptions + report.check_errors == 0
    {
        let again = check_once(Fix::Nothing).expect("what was repaired is checked");
        let left = (again.corruptions, again.leaks, again.check_errors);
        assert_eq!(left, (0, 0, 0), "{report:?}, then {again:?}");
    }
}

/// A snapshot that shares the active L1 table, at the end of the file.
fn add_snapshot(disk: &SimDisk, input: &mut Input) {
    let [bits] = disk.get(23);
    let at = disk.len().next_multiple_of(1 << bits);
    let word = |at: u64| u64::from_be_bytes(disk.get(at));
    let snapshot = Snapshot {
        l1_table_offset: word(40),
        l1_size: word(32) as u32,
        id: input.bytes(3).to_vec(),
        name: input.bytes(5).to_vec(),
        seconds: 0,
        nanoseconds: 0,
        vm_clock: 0,
        vm_state_size: 0,
        extra: vec![0; input.below(24) as usize],
    };
    let entry = snapshot.encode();
    disk.set_len(at + entry.len() as u64);
    disk.put(at, &entry);
    disk.put(60, &(1 + input.u8() as u32 % 3).to_be_bytes());
    disk.put(64, &at.to_be_bytes());
}

fn check_once(fix: Fix) -> Result<CheckReport, Error> {
    image::with_disk(async move |node| {
        let mut say = |line: &str| {
            assert!(!line.contains('\n') && line.len() < 1000, "{line:?}");
        };
        check::check(node, fix, &mut say).await
    })
}
