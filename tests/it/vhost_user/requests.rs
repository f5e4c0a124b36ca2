//! Every request type and the status it ends with, right or wrong (virtio 1.2, section 5.2.6).

use vublk_testkit::request::{Range, Request, Shape};
use vublk_testkit::spec::status::{IOERR, OK, UNSUPP};
use vublk_testkit::spec::{feature, request_type};
use vublk_testkit::{Disk, Options};

use super::{Daemon, SIZE, pattern};

const SECTORS: u64 = SIZE / 512;
/// Sectors in one discard or write-zeroes request.
const MAX: u32 = 32768;
const BARRIER: u32 = 1 << 31;

fn raw(request_type: u32, sector: u64, data: usize, writable: usize) -> Request {
    Request::Raw { request_type, sector, data: vec![0x5a; data], writable }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<Range> {
    vec![Range { sector, sectors, flags }]
}

/// Sends each request alone, direct and indirect, and compares its status.
fn expect(disk: &mut Disk, table: &[(Request, u8)]) {
    for (request, want) in table {
        for shape in [Shape::default(), Shape::indirect()] {
            disk.queue(0).shape = shape;
            let got = disk.run(request).unwrap();
            assert_eq!(got.status, *want, "{request:?}");
            if *want != OK {
                assert_eq!(got.used_len, 1, "only the status was written: {request:?}");
            }
        }
    }
}

#[test]
fn transfers_outside_the_disk_or_off_its_blocks_fail_and_touch_nothing() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    let both = |sector, len| {
        [
            (raw(request_type::IN, sector, 0, len), IOERR),
            (raw(request_type::OUT, sector, len, 0), IOERR),
        ]
    };
    for table in [
        both(SECTORS, 512),
        both(SECTORS - 1, 1024),
        both(SECTORS - 8, 8192),
        both(u64::MAX, 512),
        both(u64::MAX / 512, 512),
        both(u64::MAX / 512 + 1, 512),
        both(1 << 55, 512),
        both((1 << 55) - 1, 1024),
        both(0, 511),
        both(0, 513),
        both(0, 1),
        both(SECTORS - 1, 100),
    ] {
        expect(&mut disk, &table);
    }
    expect(
        &mut disk,
        &[(raw(request_type::IN, SECTORS - 1, 0, 512), OK), (raw(request_type::IN, 0, 0, 512), OK)],
    );
    assert!(daemon.image().iter().all(|&byte| byte == 0));
}

#[test]
fn transfers_begin_at_a_logical_block() {
    let daemon = Daemon::file("logical-block-size=4096");
    let mut disk = daemon.open(&Options::default());
    for kind in [request_type::IN, request_type::OUT] {
        for (sector, len, want) in [
            (0, 4096, OK),
            (8, 8192, OK),
            (1, 4096, IOERR),
            (4, 4096, IOERR),
            (0, 512, OK),
            (8, 4096 + 512, OK),
            (8, 4096 + 100, IOERR),
            (SECTORS - 8, 4096, OK),
            (SECTORS, 4096, IOERR),
        ] {
            let request = match kind {
                request_type::IN => raw(kind, sector, 0, len),
                _ => raw(kind, sector, len, 0),
            };
            expect(&mut disk, &[(request, want)]);
        }
    }
    for (sector, sectors, want) in [(8, 8, OK), (1, 8, IOERR), (8, 4, OK)] {
        expect(
            &mut disk,
            &[
                (Request::Discard(range(sector, sectors, 0)), want),
                (Request::WriteZeroes(range(sector, sectors, 0)), want),
            ],
        );
    }
}

#[test]
fn unknown_types_are_not_supported_and_the_barrier_bit_is_ignored() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    // 2 and 3 are SCSI commands, 15 and above the lifetime, secure erase and zone requests.
    for unknown in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 24, 77, 0x7fff_ffff, u32::MAX] {
        expect(&mut disk, &[(raw(unknown, 0, 0, 0), UNSUPP), (raw(unknown, 0, 512, 512), UNSUPP)]);
    }
    let mut data = disk.run(&raw(BARRIER | request_type::OUT, 3, 512, 0)).unwrap();
    assert_eq!(data.status, OK);
    data = disk.run(&raw(BARRIER | request_type::IN, 3, 0, 512)).unwrap();
    assert_eq!((data.status, data.data), (OK, vec![0x5a; 512]));
}

#[test]
fn discard_and_write_zeroes_check_their_one_segment() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    assert!(disk.has(feature::DISCARD | feature::WRITE_ZEROES));
    disk.write(0, &pattern(64 << 10, 1)).unwrap();
    let before = daemon.image();
    let two = [range(0, 1, 0), range(8, 1, 0)].concat();
    for (make, kind) in [
        (Request::Discard as fn(Vec<Range>) -> Request, request_type::DISCARD),
        (Request::WriteZeroes, request_type::WRITE_ZEROES),
    ] {
        expect(
            &mut disk,
            &[
                (make(two.clone()), UNSUPP),
                (make(range(0, 1, 2)), UNSUPP),
                (make(range(0, 1, 0x8000_0000)), UNSUPP),
                (make(range(0, MAX + 1, 0)), IOERR),
                (make(range(0, u32::MAX, 0)), IOERR),
                (make(range(SECTORS, 1, 0)), IOERR),
                (make(range(SECTORS - 1, 2, 0)), IOERR),
                (make(range(u64::MAX, 1, 0)), IOERR),
                (make(range(u64::MAX / 512, 8, 0)), IOERR),
                (make(vec![]), IOERR),
                (raw(kind, 0, 15, 0), IOERR),
                (raw(kind, 0, 17, 0), UNSUPP),
                (make(range(0, 0, 0)), OK),
            ],
        );
    }
    expect(&mut disk, &[(Request::Discard(range(0, 1, 1)), UNSUPP)]);
    assert_eq!(daemon.image(), before, "nothing that failed did anything");
    expect(&mut disk, &[(Request::WriteZeroes(range(2, 1, 1)), OK)]);
    expect(&mut disk, &[(Request::WriteZeroes(range(4, 1, 0)), OK)]);
    let mut want = before;
    want[2 * 512..3 * 512].fill(0);
    want[4 * 512..5 * 512].fill(0);
    assert_eq!(daemon.image(), want);
}

#[test]
fn a_discard_gives_its_blocks_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    let blocks = || std::fs::metadata(daemon.path("disk.img")).unwrap().blocks();
    disk.write(0, &pattern(1 << 20, 9)).unwrap();
    disk.flush().unwrap();
    let full = blocks();
    disk.discard(0, 2048, 0).unwrap();
    assert!(blocks() + 1024 < full, "{full} blocks before, {} after", blocks());
    let mut back = vec![1; 4096];
    disk.read(0, &mut back).unwrap();
    assert_eq!(back, vec![0; 4096]);
}

#[test]
fn write_zeroes_without_unmap_keeps_the_blocks_that_it_zeroes() {
    use std::os::unix::fs::MetadataExt;
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    let blocks = || std::fs::metadata(daemon.path("disk.img")).unwrap().blocks();
    disk.write(0, &pattern(1 << 20, 9)).unwrap();
    disk.flush().unwrap();
    let full = blocks();
    disk.write_zeroes(0, 2048, false).unwrap();
    assert!(blocks() >= full, "{full} blocks before, {} after", blocks());
    disk.write_zeroes(0, 2048, true).unwrap();
    assert!(blocks() + 1024 < full, "{full} blocks before, {} after", blocks());
    assert!(daemon.image().iter().all(|&byte| byte == 0));
}

#[test]
fn a_read_only_disk_refuses_what_writes_and_takes_flushes() {
    let mut daemon = Daemon::serve(
        "driver=file,node-name=d0,filename=DIR/disk.img,read-only=on,discard=unmap",
        "",
    );
    let mut disk = daemon.open(&Options::default());
    assert!(disk.has(feature::RO));
    expect(
        &mut disk,
        &[
            (raw(request_type::OUT, 0, 512, 0), IOERR),
            (raw(request_type::OUT, 0, 0, 0), IOERR),
            (Request::Discard(range(0, 8, 0)), IOERR),
            (Request::WriteZeroes(range(0, 8, 0)), IOERR),
            (Request::Flush, OK),
            (raw(request_type::IN, 0, 0, 4096), OK),
            (Request::GetId, OK),
        ],
    );
    drop(disk);
    daemon.assert_serves(0);
    assert!(daemon.image().iter().all(|&byte| byte == 0));
}

#[test]
fn the_identity_is_twenty_bytes_cut_to_the_room_there_is() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    let mut full = b"vhost_user_blk".to_vec();
    full.resize(20, 0);
    for room in [20, 5, 14, 15, 1, 0, 21, 512] {
        let got = disk.run(&raw(request_type::GET_ID, 0, 0, room)).unwrap();
        let n = room.min(20);
        assert_eq!((got.status, &got.data[..n]), (OK, &full[..n]), "{room} bytes");
        assert!(got.data[n..].iter().all(|&byte| byte == 0xee), "no more than 20 are written");
    }
}

#[test]
fn the_used_length_counts_the_bytes_read_and_the_status() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    let mut used = |request: Request| disk.run(&request).unwrap().used_len;
    assert_eq!(used(Request::In { sector: 0, len: 4096 }), 4097);
    assert_eq!(used(Request::Out { sector: 0, data: vec![1; 4096] }), 1);
    assert_eq!(used(Request::Flush), 1);
    assert_eq!(used(Request::GetId), 21);
}

#[test]
fn an_error_of_the_disk_is_an_error_of_the_request_and_no_more() {
    let mut daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    disk.write(0, &pattern(4096, 1)).unwrap();
    // What is behind a file that was cut off elsewhere reads as zeroes and can be written.
    std::fs::File::options()
        .write(true)
        .open(daemon.path("disk.img"))
        .unwrap()
        .set_len(4096)
        .unwrap();
    let mut back = vec![1; 8192];
    disk.read(0, &mut back).unwrap();
    assert_eq!(back[..4096], pattern(4096, 1));
    assert_eq!(back[4096..], [0; 4096]);
    disk.write(64, &pattern(512, 2)).unwrap();
    disk.read(64, &mut back[..512]).unwrap();
    assert_eq!(back[..512], pattern(512, 2));
    drop(disk);
    daemon.assert_serves(0);
}
