//! The same requests to `vublk daemon` and to the real `qemu-storage-daemon`.
//!
//! They get the same statuses and data, and leave the same image. Skipped, with a message, where that program is not
//! installed.
//!
//! Where the two differ on purpose:
//! * ours says at the start that the disk has a write cache (`wce`), theirs comes up write-through;
//! * ours offers DISCARD only where discards reach the file, theirs always;
//! * theirs offers DISCARD, WRITE_ZEROES and CONFIG_WCE on a read-only disk, ours none of them;
//! * theirs offers SIZE_MAX with a `size_max` of 0, and NOTIFY_ON_EMPTY;
//! * GET_ID: ours fills up the 20 bytes with zeroes as the specification says, theirs leaves what
//!   follows the text as it was; the used length of theirs counts all the room there was;
//! * the used length of what failed: theirs counts the data too, which was not written.

use vublk_testkit::request::{Cut, Placement, Range, Request, Shape};
use vublk_testkit::spec::{BlkConfig, feature, request_type, status};
use vublk_testkit::{Disk, MemoryLayout, Options};

use super::daemon::{export_of, new_image};
use super::{Daemon, pattern, seed};

/// VIRTIO_F_NOTIFY_ON_EMPTY, of devices before virtio 1.
const NOTIFY_ON_EMPTY: u64 = 1 << 24;

/// A flag of request types that says nothing any more.
const BARRIER: u32 = 1 << 31;

const THEIRS: &str = "qemu-storage-daemon";

/// Both daemons with the same arguments and images of the same bytes.
fn both(image: &[u8], blockdev: &str, export: &str) -> [Daemon; 2] {
    let export = format!("{},{export}", export_of("d0", 0));
    let arguments = ["--blockdev", blockdev, "--export", export.trim_end_matches(',')];
    let start = |program: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        new_image(&dir.path().join("disk.img"), 0);
        std::fs::write(dir.path().join("disk.img"), image).unwrap();
        Daemon::start_in(dir, program, &arguments)
    };
    [start(&[env!("CARGO_BIN_EXE_vublk"), "daemon"]), start(&[THEIRS])]
}

fn options() -> Options {
    Options { queue_size: 256, layout: MemoryLayout::adjacent(2, 8 << 20), ..Options::default() }
}

/// Sends the script to both and compares each answer, then the images.
fn compare(daemons: &[Daemon; 2], script: &[(Request, Shape)]) {
    let mut disks: Vec<Disk> = daemons.iter().map(|daemon| daemon.open(&options())).collect();
    let mut differences = Vec::new();
    for (request, shape) in script {
        let [ours, theirs] = [0, 1].map(|i| {
            let queue = disks[i].queue(0);
            queue.shape = shape.clone();
            queue.run(request).unwrap_or_else(|e| panic!("daemon {i}: {request:?}: {e}"))
        });
        let same = match ours.status {
            status::OK if is_get_id(request) => {
                let n = ours.data.len().min(14);
                theirs.status == status::OK && ours.data[..n] == theirs.data[..n]
            }
            status::OK => ours == theirs,
            _ => ours.status == theirs.status,
        };
        if !same {
            differences.push(format!(
                "{request:?} {shape:?}: status {} and {}, used {} and {}",
                ours.status, theirs.status, ours.used_len, theirs.used_len
            ));
        }
    }
    assert!(differences.is_empty(), "{differences:#?}");
    for disk in &mut disks {
        disk.flush().unwrap();
    }
    drop(disks);
    assert!(daemons[0].image() == daemons[1].image());
}

fn is_get_id(request: &Request) -> bool {
    let id = request_type::GET_ID;
    matches!(request, Request::Raw { request_type, .. } if request_type & !BARRIER == id)
}

fn raw(request_type: u32, sector: u64, data: usize, writable: usize) -> Request {
    Request::Raw { request_type, sector, data: vec![0x77; data], writable }
}

/// Every edge that a request can be put at, for a disk of this many sectors.
fn edges(sectors: u64) -> Vec<Request> {
    let mut all = Vec::new();
    let places = [
        0,
        1,
        7,
        8,
        sectors - 9,
        sectors - 8,
        sectors - 1,
        sectors,
        sectors + 1,
        1 << 54,
        1 << 55,
        u64::MAX / 512,
        u64::MAX,
    ];
    for sector in places {
        for len in [0, 1, 511, 512, 513, 4096, 4608] {
            all.push(raw(request_type::IN, sector, 0, len));
            all.push(raw(request_type::OUT, sector, len, 0));
        }
        for count in [0, 1, 8, 9, 32768, 32769, u32::MAX] {
            for flags in [0, 1, 2, u32::MAX] {
                let range = vec![Range { sector, sectors: count, flags }];
                all.push(Request::Discard(range.clone()));
                all.push(Request::WriteZeroes(range));
            }
        }
    }
    for kind in (0..40).chain([BARRIER, BARRIER | 1, BARRIER | 8, u32::MAX]) {
        // IN, OUT and their like of no data, and types that nobody knows.
        all.push(raw(kind, 0, 0, 0));
    }
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 77] {
        all.push(raw(kind, 3, 512, 512));
    }
    for room in [0, 1, 5, 19, 20, 21, 64] {
        all.push(raw(request_type::GET_ID, 0, 0, room));
    }
    for kind in [request_type::DISCARD, request_type::WRITE_ZEROES] {
        for len in [0, 1, 15, 17, 31, 32, 48] {
            all.push(raw(kind, 0, len, 0));
        }
    }
    all.push(Request::Flush);
    all
}

#[test]
fn every_edge_of_every_request_ends_as_it_does_there() {
    let image = pattern(1 << 20, 1);
    for (blockdev, export, features) in [
        ("driver=file,node-name=d0,filename=DIR/disk.img,discard=unmap", "writable=on", ""),
        (
            "driver=file,node-name=d0,filename=DIR/disk.img,discard=unmap",
            "writable=on,logical-block-size=4096",
            "",
        ),
        ("driver=file,node-name=d0,filename=DIR/disk.img,read-only=on", "writable=off", "ro"),
    ] {
        let daemons = both(&image, blockdev, export);
        let script: Vec<_> =
            edges(2048).into_iter().map(|request| (request, Shape::default())).collect();
        println!("{export} {features}");
        compare(&daemons, &script);
    }
}

#[test]
fn random_scripts_leave_the_same_image_and_the_same_answers() {
    let mut random = fastrand::Rng::with_seed(seed());
    let image: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(1 << 20).collect();
    let blockdev = "driver=file,node-name=d0,filename=DIR/disk.img,discard=unmap";
    let daemons = both(&image, blockdev, "writable=on");
    let script: Vec<_> = (0..600)
        .map(|_| {
            let sectors = random.u64(1..64);
            let sector = random.u64(0..2048 + 8 - sectors);
            let range = Range { sector, sectors: sectors as u32, flags: random.u32(0..2) };
            let request = match random.u8(0..8) {
                0..=2 => Request::In { sector, len: sectors as usize * 512 },
                3..=5 => {
                    Request::Out { sector, data: pattern(sectors as usize * 512, random.u8(..)) }
                }
                6 => Request::WriteZeroes(vec![range]),
                _ => Request::Discard(vec![Range { flags: 0, ..range }]),
            };
            let cut = |random: &mut fastrand::Rng| match random.u8(0..4) {
                0 => Cut::Natural,
                1 => Cut::Joined,
                2 => Cut::Each(random.usize(500..5000)),
                _ => Cut::Sizes(vec![random.usize(1..20), random.usize(1..600)]),
            };
            let indirect = random.bool();
            let shape = Shape {
                readable: cut(&mut random),
                writable: cut(&mut random),
                indirect,
                // 7.2 takes a buffer in two regions inside an indirect table for a loop.
                placement: match random.bool() && !indirect {
                    true => Placement::Straddling,
                    false => Placement::Spread,
                },
            };
            (request, shape)
        })
        .collect();
    compare(&daemons, &script);
}

#[test]
fn the_offered_features_and_the_configuration_differ_only_where_they_should() {
    let image = pattern(1 << 20, 1);
    for (blockdev, export) in [
        ("driver=file,node-name=d0,filename=DIR/disk.img,discard=unmap", "writable=on"),
        ("driver=file,node-name=d0,filename=DIR/disk.img", "writable=on,num-queues=4"),
        ("driver=file,node-name=d0,filename=DIR/disk.img", "writable=on,logical-block-size=4096"),
        ("driver=file,node-name=d0,filename=DIR/disk.img,read-only=on", ""),
    ] {
        let daemons = both(&image, blockdev, export);
        let mut disks: Vec<Disk> = daemons.iter().map(|daemon| daemon.open(&options())).collect();
        let [ours, theirs] = [0, 1].map(|i| disks[i].connection().offered());
        let on_purpose = feature::DISCARD | feature::WRITE_ZEROES | feature::CONFIG_WCE;
        let transport = NOTIFY_ON_EMPTY | feature::SIZE_MAX;
        assert_eq!(ours & !theirs & !feature::CONFIG_WCE, 0, "{ours:#x} {theirs:#x} {export}");
        let missing = theirs & !ours & !transport;
        assert_eq!(missing & !on_purpose, 0, "{ours:#x} {theirs:#x} {export}");
        let [ours, theirs] = [0, 1].map(|i| *disks[i].config());
        let neutral = |config: BlkConfig| BlkConfig {
            wce: 0,
            min_io_size: 0,
            opt_io_size: 0,
            physical_block_exp: 0,
            max_discard_sectors: 0,
            max_discard_seg: 0,
            discard_sector_alignment: 0,
            max_write_zeroes_sectors: 0,
            max_write_zeroes_seg: 0,
            write_zeroes_may_unmap: 0,
            ..config
        };
        assert_eq!(neutral(ours), neutral(theirs), "{export}");
        if export.contains("writable=on") && blockdev.contains("unmap") {
            assert_eq!(
                (ours.max_discard_sectors, ours.max_discard_seg, ours.max_write_zeroes_sectors),
                (
                    theirs.max_discard_sectors,
                    theirs.max_discard_seg,
                    theirs.max_write_zeroes_sectors
                )
            );
        }
    }
}
