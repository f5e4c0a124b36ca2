//! Logs that are too small or cannot be right.

use super::*;

#[test]
fn a_log_that_is_too_small_costs_one_line_and_no_byte_behind_it() {
    let mut daemon = Daemon::file("");
    let layout = MemoryLayout(vec![(0, 4 << 20), (1 << 30, 4 << 20)]);
    let mut disk = daemon.open(&Options { layout, ..options() });
    // Enough for the first region, in a file that continues.
    let log = DirtyLog::new(8192).unwrap();
    let size = (4 << 20) / PAGE / 8;
    let region = vhost::VhostUserDirtyLogRegion {
        mmap_size: size,
        mmap_offset: 4096,
        mmap_handle: log.fd(),
    };
    use vhost::VhostBackend;
    disk.connection().vhost().set_log_base(0, Some(region)).unwrap();
    let features = disk.connection().features() | feature::LOG_ALL;
    disk.connection().set_exact_features(features).unwrap();
    let bits = 4096 * 8..(4096 + size) * 8;
    for placement in [Placement::Packed, Placement::Spread, Placement::Spread] {
        let queue = disk.queue(0);
        let shape = Shape { placement, ..Shape::default() };
        let token = queue.add(&Request::In { sector: 0, len: 8192 }, &shape).unwrap();
        let chain = queue.chain(token).unwrap();
        queue.publish().unwrap();
        assert_eq!(queue.wait().unwrap().status, status::OK);
        let wanted: Pages = written(&chain).into_iter().map(|page| page + bits.start).collect();
        let inside: Pages = wanted.into_iter().filter(|bit| bits.contains(bit)).collect();
        assert_eq!(log.take(), inside);
    }
    drop(disk);
    let text = daemon.wait_log("the dirty log's 128 bytes end before", 1);
    assert_eq!(text.matches("the dirty log's").count(), 1, "{text}");
    daemon.assert_serves(0);
}

#[test]
fn a_log_that_cannot_be_right_costs_the_connection_alone() {
    let mut daemon = Daemon::file("");
    let log = DirtyLog::new(4096).unwrap();
    let unsealed = tempfile::tempfile().unwrap();
    unsealed.set_len(4096).unwrap();
    use std::os::fd::AsRawFd;
    for (what, size, offset, fd) in [
        ("longer than its file", 4097, 0, log.fd()),
        ("beyond its file", 4096, 4096, log.fd()),
        ("past the end of numbers", 4096, u64::MAX - 4095, log.fd()),
        ("of no bytes", 0, 0, log.fd()),
        ("inside a page", 8, 8, log.fd()),
        ("that can be shrunk", 4096, 0, unsealed.as_raw_fd()),
    ] {
        let mut connection = Connection::connect(&daemon.socket(0), LIMIT).unwrap();
        connection.negotiate(feature::QEMU, options().protocol).unwrap();
        let payload = [size, offset].map(|word: u64| word.to_le_bytes()).concat();
        let stream = connection.stream();
        // SET_LOG_BASE.
        message::send(stream, 6, VERSION | NEED_REPLY, None, &payload, &[fd]).unwrap();
        assert_eq!(message::receive(stream, LIMIT).unwrap(), None, "a log {what} was taken");
    }
    daemon.assert_serves(0);
}
