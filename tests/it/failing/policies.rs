//! `werror` and `rerror`: the guest's status and the monitor's events for each kind of failure.

use super::{Stage, block, write_of};
use crate::vhost_user::Daemon;
use vublk::export::core::failure::{Action, Operation};
use vublk::protocol::sim::Kinds;
use vublk_testkit::Options;
use vublk_testkit::request::{Range, Request};
use vublk_testkit::spec::status;

const EIO: i32 = libc::EIO;
const ENOSPC: i32 = libc::ENOSPC;

/// One request of each kind that may fail.
fn requests() -> [(Kinds, Request); 5] {
    let range = vec![Range { sector: 0, sectors: 8, flags: 0 }];
    [
        (Kinds::READ, Request::In { sector: 0, len: 4096 }),
        (Kinds::WRITE, write_of(0)),
        (Kinds::FLUSH, Request::Flush),
        (Kinds::DISCARD, Request::Discard(range.clone())),
        (Kinds::ZERO, Request::WriteZeroes(range)),
    ]
}

/// The statuses of all kinds of requests when they fail with `errno`.
fn statuses(export: &str, errno: i32) -> Vec<u8> {
    let stage = Stage::new(export);
    let mut disk = stage.open(false);
    disk.write(0, &block(9)).unwrap();
    let mut statuses = Vec::new();
    for (kind, request) in requests() {
        stage.fails(kind, errno);
        statuses.push(disk.run(&request).unwrap().status);
        stage.sim.heal();
    }
    statuses
}

#[test]
fn failures_are_reported_unless_a_policy_says_otherwise() {
    const BAD: u8 = status::IOERR;
    assert_eq!(statuses("", EIO), [BAD; 5]);
    assert_eq!(statuses("werror=report,rerror=report", ENOSPC), [BAD; 5]);
    assert_eq!(statuses("werror=enospc", EIO), [BAD; 5]);
    assert_eq!(statuses("werror=ignore", EIO), [BAD, 0, 0, 0, 0]);
    assert_eq!(statuses("rerror=ignore", EIO), [0, BAD, BAD, BAD, BAD]);
    // What the storage does not know it never will; zeroes are then written, discards left out.
    const NOT: u8 = status::UNSUPP;
    assert_eq!(statuses("werror=stop,rerror=stop", libc::ENOTSUP), [NOT, NOT, NOT, 0, 0]);
}

#[test]
fn a_read_that_is_ignored_leaves_the_guest_s_memory_as_it_was() {
    let stage = Stage::new("rerror=ignore");
    let mut disk = stage.open(false);
    disk.write(0, &block(9)).unwrap();
    stage.fails(Kinds::READ, EIO);
    let done = disk.run(&Request::In { sector: 0, len: 4096 }).unwrap();
    assert_eq!(done.data, vec![status::UNTOUCHED; 4096]);
}

#[test]
fn a_failed_flush_is_reported_whatever_the_policy_says_of_holding() {
    for (policy, errno) in [("werror=stop", EIO), ("werror=enospc", ENOSPC)] {
        let mut stage = Stage::new(policy);
        let mut disk = stage.open(true);
        disk.write(0, &block(1)).unwrap();
        stage.fails(Kinds::FLUSH, errno);
        assert_eq!(disk.run(&Request::Flush).unwrap().status, status::IOERR);
        assert_eq!(stage.info().held, 0);
    }
}

#[test]
fn the_log_says_why_a_failed_flush_is_not_held() {
    let node = "driver=blkdebug,node-name=d0,image.driver=file,image.filename=DIR/disk.img,\
                inject-error.0.event=none,inject-error.0.iotype=flush,inject-error.0.errno=28,inject-error.0.once=on";
    let mut daemon = Daemon::serve(node, "writable=on,werror=stop");
    let mut disk = daemon.open(&Options::default());
    disk.write(0, &block(1)).unwrap();
    assert_eq!(disk.run(&Request::Flush).unwrap().status, status::IOERR);
    daemon.wait_log(
        "flush of 0 bytes at 0 failed: No space left on device (error 1); it is reported",
        1,
    );
    disk.flush().unwrap();
}

#[test]
fn a_write_of_a_disk_without_write_cache_is_held_where_no_fsync_has_failed() {
    let mut stage = Stage::new("werror=stop,writethrough=on");
    let mut disk = stage.open(false);
    stage.fails(Kinds::WRITE, EIO);
    super::submit_write(&mut disk, 3);
    stage.wait_held(1);
    stage.sim.heal();
    stage.service().retry_held("e0").unwrap();
    assert_eq!(disk.queue(0).wait().unwrap().status, status::OK);
}

#[test]
fn failures_are_reported_in_qemus_event_and_in_the_status() {
    let mut stage = Stage::new("werror=enospc,rerror=ignore");
    let mut disk = stage.open(false);
    disk.write(0, &block(9)).unwrap();
    assert_eq!((stage.info().errors, stage.info().last_failure), (0, None));
    for (kind, request) in requests() {
        stage.fails(kind, EIO);
        disk.run(&request).unwrap();
        stage.sim.heal();
    }
    stage.fails(Kinds::WRITE, ENOSPC);
    super::submit_write(&mut disk, 5);
    stage.wait_held(1);
    let reported: Vec<_> = stage
        .service()
        .take_io_errors()
        .into_iter()
        .map(|e| (e.export, e.node, e.failure.operation.kind(), e.action))
        .collect();
    for (operation, action) in
        [("read", Action::Ignore), ("write", Action::Report), ("write", Action::Stop)]
    {
        let wanted = ("e0".to_owned(), "d0".to_owned(), operation, action);
        assert!(reported.contains(&wanted), "{reported:?}");
    }
    let info = stage.info();
    let last = info.last_failure.unwrap();
    assert_eq!((info.held, info.errors, last.errno.0), (1, 6, ENOSPC));
    assert_eq!((last.operation, last.offset, last.len), (Operation::Write, 5 * 4096, 4096));
}

#[test]
fn wrong_policies_are_refused_in_qemus_words() {
    let daemon = |policy: &str| {
        let dir = crate::cli::directory();
        let export = format!(
            "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=e0.sock,{policy}"
        );
        let line = ["--blockdev", "driver=null-co,node-name=d0", "--export", &export];
        crate::cli::stderr(&crate::cli::run(dir.path(), &[crate::cli::VUBLK, "daemon"], &line))
    };
    for (policy, says) in [
        ("rerror=enospc", "Parameter 'rerror' does not accept value 'enospc'"),
        ("werror=hold", "Parameter 'werror' does not accept value 'hold'"),
    ] {
        let said = daemon(policy);
        assert!(said.trim_end().ends_with(says), "{said}");
    }
}
