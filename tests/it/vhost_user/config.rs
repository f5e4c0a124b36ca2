//! The configuration space: its contents, reads of any part, and the one writable byte.

use vublk_testkit::message;
use vublk_testkit::spec::{self, feature, protocol};
use vublk_testkit::{Connection, Error, Options};

use super::daemon::LIMIT;
use super::{Daemon, SIZE};

/// Where Cloud Hypervisor asks for the configuration.
const CLOUD_HYPERVISOR_BASE: u32 = 0x100;

/// A connection with its features settled, so that the configuration can be written.
fn connect(daemon: &Daemon) -> Connection {
    let mut connection = Connection::connect(&daemon.socket(0), LIMIT).unwrap();
    connection.negotiate(feature::QEMU, protocol::DEFAULT).unwrap();
    connection.set_features().unwrap();
    connection
}

#[test]
fn every_field_of_the_configuration_says_what_the_disk_is() {
    let daemon = Daemon::file("num-queues=4");
    let config = connect(&daemon).config().unwrap();
    assert_eq!(config.capacity_sectors, SIZE / 512);
    assert_eq!((config.size_max, config.seg_max), (0, 126));
    assert_eq!((config.blk_size, config.alignment_offset), (512, 0));
    assert_eq!(config.num_queues, 4);
    assert_eq!(config.wce, 1, "a write-back disk says so");
    assert_eq!((config.max_discard_sectors, config.max_discard_seg), (32768, 1));
    assert!(config.discard_sector_alignment >= 1);
    assert_eq!((config.max_write_zeroes_sectors, config.max_write_zeroes_seg), (32768, 1));
    assert_eq!(config.write_zeroes_may_unmap, 1);
}

#[test]
fn a_block_size_shows_in_every_field_that_counts_in_blocks() {
    let daemon = Daemon::file("logical-block-size=4096");
    let config = connect(&daemon).config().unwrap();
    assert_eq!((config.blk_size, config.physical_block_exp), (4096, 0));
    assert_eq!(config.capacity_sectors, SIZE / 512);
    assert_eq!(config.min_io_size, 1);
    assert_eq!(config.discard_sector_alignment % 8, 0);
}

#[test]
fn a_last_incomplete_block_is_not_part_of_the_capacity() {
    let dir = tempfile::tempdir().unwrap();
    super::daemon::new_image(&dir.path().join("disk.img"), SIZE + 1024);
    let export =
        format!("{},writable=on,logical-block-size=4096", super::daemon::export_of("d0", 0));
    let daemon = Daemon::start_in(
        dir,
        &[env!("CARGO_BIN_EXE_vublk"), "daemon"],
        &["--blockdev", "driver=file,node-name=d0,filename=DIR/disk.img", "--export", &export],
    );
    assert_eq!(connect(&daemon).config().unwrap().capacity_sectors, SIZE / 512);
}

#[test]
fn the_configuration_reads_the_same_where_qemu_and_where_cloud_hypervisor_asks() {
    let daemon = Daemon::file("num-queues=3");
    let mut connection = connect(&daemon);
    let whole = connection.config_bytes(0, spec::CONFIG_SIZE).unwrap();
    let there = connection.config_bytes(CLOUD_HYPERVISOR_BASE, spec::CONFIG_SIZE).unwrap();
    assert_eq!(there, whole);
    for base in [0, CLOUD_HYPERVISOR_BASE] {
        for (at, len) in [(0, 1), (0, 8), (7, 2), (20, 4), (32, 1), (34, 26), (59, 1), (60, 4)] {
            let part = connection.config_bytes(base + at as u32, len).unwrap();
            let mut padded = whole.clone();
            padded.resize(256, 0);
            assert_eq!(part, padded[at..at + len], "{len} bytes at {at} of {base:#x}");
        }
    }
}

#[test]
fn a_read_past_the_end_of_the_configuration_is_answered_with_no_bytes() {
    let daemon = Daemon::file("");
    let mut connection = connect(&daemon);
    for (offset, len) in [(0u32, 257u32), (250, 7), (256 + 255, 2), (4000, 60)] {
        let mut request = [offset, len, 0].map(u32::to_le_bytes).concat();
        request.resize(12 + len as usize, 0);
        let stream = connection.stream();
        // GET_CONFIG.
        message::send(stream, 24, message::VERSION, None, &request, &[]).unwrap();
        let answer = message::receive(stream, LIMIT).unwrap().unwrap();
        assert_eq!(answer.payload, [offset, 0, 0].map(u32::to_le_bytes).concat());
    }
    connection.config().unwrap();
}

#[test]
fn the_write_cache_byte_can_be_written_and_stays_as_the_guest_left_it() {
    let daemon = Daemon::file("");
    let mut connection = connect(&daemon);
    for on in [false, false, true, false] {
        connection.set_write_cache(on).unwrap();
        assert_eq!(connection.config().unwrap().wce, u8::from(on));
    }
    let at = CLOUD_HYPERVISOR_BASE + spec::CONFIG_WCE_OFFSET;
    connection.set_config(at, &[1]).unwrap();
    assert_eq!(connection.config().unwrap().wce, 1);
    connection.set_write_cache(false).unwrap();
    drop(connection);
    assert_eq!(connect(&daemon).config().unwrap().wce, 0);
}

#[test]
fn nothing_else_in_the_configuration_can_be_written() {
    let mut daemon = Daemon::file("");
    let before = connect(&daemon).config().unwrap();
    let writes: [(u32, &[u8]); 6] =
        [(0, &[0]), (0, &[0; 8]), (31, &[0, 0]), (32, &[1, 0]), (32, &[2]), (33, &[1])];
    for (offset, bytes) in writes {
        let refused = connect(&daemon).set_config(offset, bytes);
        assert!(matches!(refused, Err(Error::Message(..))), "{offset} {bytes:?}");
    }
    assert_eq!(connect(&daemon).config().unwrap(), before);
    daemon.assert_serves(0);
}

#[test]
fn a_write_through_export_has_no_write_cache_to_switch() {
    let daemon = Daemon::file("writethrough=on");
    let mut connection = connect(&daemon);
    assert_eq!(connection.config().unwrap().wce, 0);
    assert!(!connection.has(feature::CONFIG_WCE));
    connection.set_write_cache(true).unwrap_err();
}

#[test]
fn a_guest_that_cannot_flush_is_given_write_through() {
    let daemon = Daemon::file("");
    let disk =
        daemon.open(&Options { features: feature::QEMU & !feature::FLUSH, ..Options::default() });
    drop(disk);
    let mut connection = Connection::connect(&daemon.socket(0), LIMIT).unwrap();
    connection.negotiate(feature::QEMU & !feature::FLUSH, protocol::DEFAULT).unwrap();
    connection.set_features().unwrap();
    assert_eq!(connection.config().unwrap().wce, 0);
}
