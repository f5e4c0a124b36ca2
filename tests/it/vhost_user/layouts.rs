//! Every division of a request into descriptors carries its bytes.
//!
//! (virtio 1.2, sections 2.7.4 and 5.2.6.)

use vublk_testkit::request::{Cut, Placement, Request, Segment, Shape};
use vublk_testkit::ring::{Desc, DriverRing};
use vublk_testkit::spec::{desc_flag, feature, request_type, status};
use vublk_testkit::{Disk, Memory, MemoryLayout, Options};

use super::daemon::LIMIT;
use super::{Daemon, SIZE, pattern, seed};

fn adjacent(event_idx: bool) -> Options {
    Options {
        features: feature::QEMU & !feature::EVENT_IDX
            | if event_idx { feature::EVENT_IDX } else { 0 },
        queue_size: 256,
        layout: MemoryLayout::adjacent(4, 2 << 20),
        ..Options::default()
    }
}

#[test]
fn header_data_and_status_may_be_cut_anywhere_and_lie_anywhere() {
    let daemon = Daemon::file("");
    let cuts = [
        Cut::Natural,
        Cut::Joined,
        Cut::Each(1000),
        Cut::Each(61),
        Cut::Sizes(vec![1; 16]),
        Cut::Sizes(vec![7, 9, 512]),
        Cut::Sizes(vec![15, 2]),
        Cut::Sizes(vec![8, 8, 1]),
        Cut::Sizes(vec![4096]),
        Cut::Sizes(vec![4095, 1]),
    ];
    for event_idx in [false, true] {
        let mut disk = daemon.open(&adjacent(event_idx));
        let mut salt = 0u8;
        for readable in &cuts {
            for writable in &cuts {
                for indirect in [false, true] {
                    for placement in [Placement::Packed, Placement::Spread, Placement::Straddling] {
                        salt = salt.wrapping_add(1);
                        let queue = disk.queue(0);
                        queue.shape = Shape {
                            readable: readable.clone(),
                            writable: writable.clone(),
                            indirect,
                            placement,
                        };
                        let data = pattern(4096, salt);
                        let sector = 8 * u64::from(salt);
                        let reported = |e| {
                            panic!(
                                "{e}: {:?}",
                                queue_shape(readable, writable, indirect, placement)
                            )
                        };
                        queue.write(sector, &data).unwrap_or_else(reported);
                        let mut back = vec![0; data.len()];
                        queue.read(sector, &mut back).unwrap_or_else(reported);
                        assert_eq!(back, data, "{:?}", queue.shape);
                    }
                }
            }
        }
    }
}

fn queue_shape(readable: &Cut, writable: &Cut, indirect: bool, placement: Placement) -> Shape {
    Shape { readable: readable.clone(), writable: writable.clone(), indirect, placement }
}

#[test]
fn small_requests_too_may_be_cut_anywhere() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options { queue_size: 1024, ..adjacent(true) });
    for cut in [Cut::Joined, Cut::Each(1), Cut::Each(3), Cut::Sizes(vec![16, 5])] {
        for indirect in [false, true] {
            disk.queue(0).shape = queue_shape(&cut, &cut, indirect, Placement::Spread);
            assert_eq!(disk.get_id().unwrap(), "vhost_user_blk");
            disk.flush().unwrap();
            disk.write(0, &pattern(512, 7)).unwrap_or_else(|e| panic!("{e} {cut:?}"));
            disk.write_zeroes(0, 1, true).unwrap();
            disk.discard(0, 1, 0).unwrap();
        }
    }
}

#[test]
fn a_chain_may_have_as_many_descriptors_as_the_ring_has_entries() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options { queue_size: 1024, ..Options::default() });
    // Header, 1022 pieces, status: 1024.
    let len = 1022 * 512;
    let data = pattern(len, 3);
    for indirect in [false, true] {
        let mut readable = vec![16];
        readable.extend(vec![512; 1021]);
        disk.queue(0).shape = Shape {
            readable: Cut::Sizes(readable),
            writable: Cut::Each(512),
            indirect,
            placement: Placement::Packed,
        };
        disk.write(8, &data).unwrap();
        let mut back = vec![0; len];
        disk.read(8, &mut back).unwrap();
        assert!(back == data, "indirect: {indirect}");
    }
    assert!(daemon.image()[4096..4096 + len] == data);
}

#[test]
fn an_indirect_table_may_be_longer_than_the_ring() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options { queue_size: 2, ..Options::default() });
    let len = 1022 * 512;
    disk.queue(0).shape = Shape {
        readable: Cut::Natural,
        writable: Cut::Each(512),
        indirect: true,
        placement: Placement::Packed,
    };
    disk.write(0, &pattern(len, 5)).unwrap();
    let mut back = vec![0; len];
    disk.read(0, &mut back).unwrap();
    assert!(back == pattern(len, 5));
}

#[test]
fn descriptors_without_bytes_carry_nothing_and_harm_nothing() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    let memory = disk.memory().clone();
    let data = pattern(1024, 8);
    let header = memory.alloc(16, 16).unwrap();
    let body = memory.alloc(1024, 512).unwrap();
    let end = memory.alloc(1, 1).unwrap();
    let piece = |addr, len, device_writes| Segment { addr, len, device_writes };
    let mut send = |kind: u32, chain: &[Segment]| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        header.write(&bytes);
        end.write(&[status::UNTOUCHED]);
        let ring = disk.queue(0).ring();
        ring.add(chain, false).unwrap();
        ring.publish().unwrap();
        ring.wait(LIMIT).unwrap();
        let used = ring.pop().unwrap().unwrap();
        (used.len, end.to_vec()[0])
    };
    body.write(&data);
    let write = [
        piece(header.addr(), 0, false),
        piece(header.addr(), 16, false),
        piece(body.addr(), 0, false),
        piece(body.addr(), 1024, false),
        piece(body.addr(), 0, false),
        piece(end.addr(), 0, true),
        piece(end.addr(), 1, true),
        piece(end.addr(), 0, true),
    ];
    assert_eq!(send(request_type::OUT, &write), (1, status::OK));
    assert_eq!(daemon.image()[..1024], data);
    body.write(&[0; 1024]);
    let read = [
        piece(header.addr(), 16, false),
        piece(body.addr(), 0, true),
        piece(body.addr(), 512, true),
        piece(body.addr() + 512, 512, true),
        piece(end.addr(), 1, true),
        piece(header.addr(), 0, true),
    ];
    assert_eq!(send(request_type::IN, &read), (1025, status::OK));
    assert_eq!(body.to_vec(), data);
}

#[test]
fn tables_and_data_may_lie_at_odd_addresses() {
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options::default());
    let memory = disk.memory().clone();
    let area = memory.alloc(8192, 4096).unwrap();
    let (header, data, end, table) =
        (area.addr() + 1, area.addr() + 33, area.addr() + 4095, area.addr() + 5001);
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&request_type::OUT.to_le_bytes());
    memory.write(header, &bytes);
    memory.write(data, &pattern(512, 4));
    let chain = [
        Desc { addr: header, len: 16, flags: desc_flag::NEXT, next: 2 },
        Desc { addr: end, len: 1, flags: desc_flag::WRITE, next: 0 },
        Desc { addr: data, len: 512, flags: desc_flag::NEXT, next: 1 },
    ];
    let ring: &mut DriverRing = disk.queue(0).ring();
    let layout = ring.layout();
    for (index, desc) in chain.into_iter().enumerate() {
        layout.write_desc(&memory, table, index as u16, desc);
    }
    let pointer = Desc { addr: table, len: 48, flags: desc_flag::INDIRECT, next: 0 };
    layout.write_desc(&memory, layout.desc, 0, pointer);
    ring.add_head(0);
    ring.publish().unwrap();
    ring.wait(LIMIT).unwrap();
    assert_eq!(layout.used_entry(&memory, 0), (0, 1));
    let mut got = [status::UNTOUCHED];
    memory.read(end, &mut got);
    assert_eq!(got, [status::OK]);
    assert_eq!(daemon.image()[..512], pattern(512, 4));
}

#[test]
fn one_transfer_may_lie_in_many_small_regions() {
    // One region for the rings, and 24 of a page each that touch.
    let mut regions = vec![(0, 1 << 20)];
    regions.extend((0..24).map(|i| ((1 << 20) + i * 4096, 4096)));
    let daemon = Daemon::file("");
    let mut disk = daemon.open(&Options { layout: MemoryLayout(regions), ..Options::default() });
    let memory: std::sync::Arc<Memory> = disk.memory().clone();
    let at = (1 << 20) + 100;
    let len = 22 * 4096;
    let data = pattern(len as usize, 6);
    memory.write(at, &data);
    let small = memory.alloc(32, 16).unwrap();
    let mut transfer = |kind: u32, device_writes: bool| {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        small.write(&bytes);
        let ring = disk.queue(0).ring();
        let chain = [
            Segment { addr: small.addr(), len: 16, device_writes: false },
            Segment { addr: at, len, device_writes },
            Segment { addr: small.addr() + 16, len: 1, device_writes: true },
        ];
        ring.add(&chain, true).unwrap();
        ring.publish().unwrap();
        ring.wait(LIMIT).unwrap();
        ring.pop().unwrap().unwrap();
        assert_eq!(small.to_vec()[16], status::OK);
    };
    transfer(request_type::OUT, false);
    assert!(daemon.image()[..len as usize] == data);
    memory.write(at, &vec![0; len as usize]);
    transfer(request_type::IN, true);
    let mut back = vec![0; len as usize];
    memory.read(at, &mut back);
    assert!(back == data);
}

#[test]
fn random_requests_in_random_shapes_do_what_a_byte_array_does() {
    let mut random = fastrand::Rng::with_seed(seed());
    let daemon = Daemon::file("");
    for round in 0..4 {
        let mut disk = daemon
            .open(&Options { queue_size: [16, 64, 256, 1024][round], ..adjacent(round % 2 == 0) });
        let mut model = daemon.image();
        for _ in 0..150 {
            batch(&mut disk, &mut model, &mut random);
        }
        assert!(daemon.image() == model);
    }
}

fn cut(random: &mut fastrand::Rng) -> Cut {
    match random.u8(0..5) {
        0 => Cut::Natural,
        1 => Cut::Joined,
        2 => Cut::Each(random.usize(600..3000)),
        3 => Cut::Sizes((0..random.usize(1..8)).map(|_| random.usize(1..600)).collect()),
        _ => Cut::Sizes(vec![16, random.usize(1..4096)]),
    }
}

/// Requests that do not touch each other, in flight together.
fn batch(disk: &mut Disk, model: &mut [u8], random: &mut fastrand::Rng) {
    let queue = disk.queue(0);
    let mut expected = Vec::new();
    let mut touched: Vec<(u64, u64)> = Vec::new();
    for _ in 0..random.usize(1..12) {
        let sectors = random.u64(1..24);
        let sector = random.u64(0..SIZE / 512 - sectors);
        if touched.iter().any(|&(at, n)| sector < at + n && at < sector + sectors) {
            continue;
        }
        let range = sector as usize * 512..(sector + sectors) as usize * 512;
        let len = range.len();
        let request = match random.u8(0..6) {
            0 | 1 => Request::In { sector, len },
            2 | 3 => {
                let data = std::iter::repeat_with(|| random.u8(..)).take(len).collect();
                Request::Out { sector, data }
            }
            n => {
                let range = vublk_testkit::request::Range {
                    sector,
                    sectors: sectors as u32,
                    flags: u32::from(n == 4),
                };
                Request::WriteZeroes(vec![range])
            }
        };
        let shape = queue_shape(
            &cut(random),
            &cut(random),
            random.bool(),
            [Placement::Packed, Placement::Spread, Placement::Straddling][random.usize(0..3)],
        );
        // No room in the ring, or across a border: the next batch will have it.
        let Ok(token) = queue.add(&request, &shape) else { continue };
        touched.push((sector, sectors));
        match &request {
            Request::Out { data, .. } => model[range.clone()].copy_from_slice(data),
            Request::WriteZeroes(_) => model[range.clone()].fill(0),
            _ => {}
        }
        expected.push((token, request, range, shape));
    }
    queue.publish().unwrap();
    for done in queue.drain().unwrap() {
        let at = expected.iter().position(|e| e.0 == done.token).unwrap();
        let (_, request, range, shape) = expected.swap_remove(at);
        assert_eq!(done.status, status::OK, "{shape:?}");
        if let Request::In { .. } = request {
            assert!(done.data == model[range], "{shape:?}");
        }
    }
    assert!(expected.is_empty());
}
