//! Servers that go while a guest's disk is served over them, and come again.

use super::{LIMIT, by_hand};
use crate::vhost_user::{Daemon, export_of};
use std::time::Instant;
use vublk_testkit::nbd::{MULTI_CONN, Setup, Style};
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::status;
use vublk_testkit::{Options, Server};

fn daemon(blockdev: &str, queues: usize, more: &[&str]) -> Daemon {
    let blockdev = format!("{blockdev},node-name=d0");
    let export = format!("{},writable=on,num-queues={queues}", export_of("d0", 0));
    Daemon::start(&[more, &["--blockdev", &blockdev, "--export", &export]].concat())
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

fn write_of(block: u64) -> Request {
    Request::Out { sector: block * 8, data: vec![block as u8 + 1; 4096] }
}

#[test]
fn requests_in_flight_survive_a_lost_connection() {
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let place = by_hand(Setup::new(style));
        let daemon = daemon(&place.options(",reconnect-delay=20"), 1, &[]);
        let mut disk = daemon.open(&Options::default());
        for round in 0..5 {
            for block in 0..32 {
                disk.queue(0).submit(&write_of(round * 32 + block), &Shape::default()).unwrap();
                if block == 16 {
                    place.server.hang_up();
                }
            }
            let done = disk.queue(0).drain().unwrap();
            assert_eq!(done.len(), 32);
            assert!(done.iter().all(|one| one.status == status::OK), "{style:?}");
        }
        for block in 0..160 {
            let mut found = [0; 4096];
            disk.read(block * 8, &mut found).unwrap();
            assert!(found == [block as u8 + 1; 4096], "{style:?}: block {block}");
        }
    }
}

#[test]
fn a_server_that_is_killed_and_started_again_costs_a_flush_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::File::create(dir.path().join("a.raw")).unwrap().set_len(1 << 20).unwrap();
    let line = "nbdkit -f -U SOCKET file DIR/a.raw";
    let mut server = super::begin(&dir, line);
    let options = format!(
        "driver=nbd,path={},reconnect-delay=20,node-name=d0",
        dir.path().join("s").display()
    );
    let daemon = daemon(&options.replace(",node-name=d0", ""), 1, &[]);
    let mut disk = daemon.open(&Options::default());
    disk.write(0, &[1; 4096]).unwrap();
    server.kill();
    std::fs::remove_file(dir.path().join("s")).unwrap();
    for block in 1..32 {
        disk.queue(0).submit(&write_of(block), &Shape::default()).unwrap();
    }
    let _server: Server = super::begin(&dir, line);
    assert!(disk.queue(0).drain().unwrap().iter().all(|one| one.status == status::OK));
    // The first write was answered before, and the server took what it had with it.
    assert!(disk.flush().is_err());
    disk.flush().unwrap();
    for block in 1..32 {
        let mut found = [0; 4096];
        disk.read(block * 8, &mut found).unwrap();
        assert!(found == [block as u8 + 1; 4096], "block {block}");
    }
}

#[test]
fn a_disk_whose_server_does_not_come_again_fails_and_works_when_it_does() {
    let dir = tempfile::tempdir().unwrap();
    let line = "nbdkit -f -U SOCKET memory 1M";
    let mut server = super::begin(&dir, line);
    let options = format!("driver=nbd,path={}", dir.path().join("s").display());
    let daemon = daemon(&options, 1, &[]);
    let mut disk = daemon.open(&Options::default());
    disk.write(0, &[1; 4096]).unwrap();
    server.kill();
    std::fs::remove_file(dir.path().join("s")).unwrap();
    wait_until("reads still succeed", || disk.read(0, &mut [0; 512]).is_err());
    let _server = super::begin(&dir, line);
    wait_until("reads still fail", || disk.read(0, &mut [0; 512]).is_ok());
    daemon.end();
}

#[test]
fn workers_share_a_connection_or_have_their_own() {
    for (flags, connections, most) in
        [(0, "", 1), (MULTI_CONN, "", 2), (MULTI_CONN, ",connections=1", 1)]
    {
        let setup = Setup::new(Style::Structured);
        let place = by_hand(Setup { flags: setup.flags | flags, ..setup });
        let blockdev = place.options(&format!("{connections},reconnect-delay=20,node-name=d0"));
        let export =
            format!("{},writable=on,num-queues=2,iothread.0=t0,iothread.1=t1", export_of("d0", 0));
        let daemon = Daemon::start(&[
            "--object",
            "iothread,id=t0",
            "--object",
            "iothread,id=t1",
            "--blockdev",
            &blockdev,
            "--export",
            &export,
        ]);
        let mut disk = daemon.open(&Options { num_queues: 2, ..Options::default() });
        for round in 0..4 {
            for block in 0..32 {
                let queue = disk.queue(block as usize % 2);
                queue.submit(&write_of(round * 32 + block), &Shape::default()).unwrap();
            }
            for queue in 0..2 {
                let done = disk.queue(queue).drain().unwrap();
                assert!(done.iter().all(|one| one.status == status::OK));
            }
        }
        let data = place.server.data();
        let is_there = |block: usize| data[block * 4096..][..4096] == [block as u8 + 1; 4096];
        assert!((0..128).all(is_there));
        assert_eq!(place.server.connections(), most);
        drop(disk);
        daemon.end();
    }
}
