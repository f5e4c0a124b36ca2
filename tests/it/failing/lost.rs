//! A failed fsync, and daemons that are started after it: flushes fail until an operator accepts the loss.

use super::{Stage, block, options};
use crate::file::durability::FullDevice;
use crate::monitor::{Client, MONITOR};
use crate::vhost_user::{Daemon, LIMIT, export_of, new_image};
use serde_json::json;
use std::path::PathBuf;
use vublk::protocol::sim::Kinds;
use vublk_testkit::request::Request;
use vublk_testkit::spec::status;
use vublk_testkit::{Disk, Options};

const BEHIND_TRAILER: u64 = 160 << 10;

fn flush(disk: &mut Disk) -> u8 {
    disk.run(&Request::Flush).unwrap().status
}

/// Removed when the test ends, however it does.
struct Record(PathBuf);

impl Record {
    fn exists(&self) -> bool {
        std::fs::symlink_metadata(&self.0).is_ok()
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A daemon on a device whose first fsync fails, after which the device works.
fn failed(tracked: bool) -> (FullDevice, Record, Daemon, Disk) {
    let full = FullDevice::new();
    let device = full.device.0.clone();
    let record = Record(format!("{device}.flush-failed").into());
    let node = format!("driver=raw,node-name=d0,file.driver=host_device,file.filename={device}");
    let export = format!("{},writable=on,num-queues=2", export_of("d0", 0));
    // The record lies among the devices: the monitor needs that folder to remove it.
    let rest = ["--sandbox-path", "/dev", "--blockdev", &node, "--export", &export];
    let arguments = [&MONITOR[..], &rest].concat();
    let daemon = Daemon::start(&arguments);
    let mut disk = daemon.open(&options(tracked));
    for number in 0..8 {
        disk.write(number << 11, &vec![7; 1 << 20]).unwrap();
    }
    assert_eq!(flush(&mut disk), status::IOERR);
    full.grow();
    (full, record, daemon, disk)
}

fn end(daemon: &mut Daemon, signal: i32) {
    daemon.server.signal(signal).unwrap();
    daemon.server.wait_exit(LIMIT).unwrap();
}

#[test]
fn flushes_fail_over_kills_and_restarts_until_an_operator_accepts_the_loss() {
    for (tracked, has_record) in [(true, true), (true, false), (false, true)] {
        let (_full, record, mut daemon, mut disk) = failed(tracked);
        assert!(record.exists());
        if !has_record {
            // As if the folder could not be written: the front end's memory is enough.
            std::fs::remove_file(&record.0).unwrap();
        }
        for signal in [libc::SIGKILL, libc::SIGTERM] {
            assert_eq!(flush(&mut disk), status::IOERR);
            end(&mut daemon, signal);
            daemon.restart();
            disk.reconnect().unwrap();
            disk.write(0, &block(1)).unwrap();
            assert_eq!([flush(&mut disk), flush(&mut disk)], [status::IOERR; 2]);
        }
        let mut client = Client::connect(&daemon.path("m.sock"));
        client.run("x-block-export-accept-loss", json!({"id": "e0"}));
        daemon.wait_log("loss accepted", 1);
        assert!(!record.exists());
        assert_eq!(flush(&mut disk), 0);
        end(&mut daemon, libc::SIGKILL);
        daemon.restart();
        disk.reconnect().unwrap();
        assert_eq!(flush(&mut disk), 0);
    }
}

#[test]
fn the_daemon_whose_fsync_failed_goes_on_when_the_loss_is_accepted() {
    let (_full, record, daemon, mut disk) = failed(false);
    let mut client = Client::connect(&daemon.path("m.sock"));
    client.run("x-block-export-accept-loss", json!({"id": "e0"}));
    assert_eq!(flush(&mut disk), 0);
    assert!(!record.exists());
    let refused = client.refusal("x-block-export-accept-loss", json!({"id": "zz"}));
    assert_eq!(refused, "Export 'zz' is not found");
}

#[test]
fn the_memory_of_a_front_end_remembers_a_failed_flush_whatever_the_storage() {
    let mut stage = Stage::new("");
    let mut disk = stage.open(true);
    stage.fails(Kinds::FLUSH, libc::EIO);
    assert_eq!(flush(&mut disk), status::IOERR);
    stage.sim.heal();
    assert_eq!(flush(&mut disk), status::IOERR);
    stage.start();
    disk.reconnect().unwrap();
    assert_eq!(flush(&mut disk), status::IOERR);
    stage.service().accept_loss("e0").unwrap();
    assert_eq!(flush(&mut disk), 0);
    // Accepted for this export, also where memory of before comes back.
    stage.start();
    disk.reconnect().unwrap();
    assert_eq!(flush(&mut disk), 0);
}

#[test]
fn whatever_lies_in_the_memory_s_place_of_a_loss_is_a_loss_and_nothing_more() {
    use std::os::unix::fs::FileExt;
    for value in [1, 2, 0x80, 0xff] {
        let mut stage = Stage::new("");
        let mut disk = stage.open(true);
        disk.write(0, &block(1)).unwrap();
        stage.service = None;
        let (told, file) = disk.inflight().unwrap();
        let trailer = told.mmap_size - BEHIND_TRAILER - 64;
        file.write_all_at(&[value], told.mmap_offset + trailer + 9).unwrap();
        stage.start();
        disk.reconnect().unwrap();
        assert_eq!(flush(&mut disk), status::IOERR);
        disk.write(0, &block(2)).unwrap();
        let mut found = vec![0; 4096];
        disk.read(0, &mut found).unwrap();
        assert!(found == block(2));
    }
}

#[test]
fn serve_refuses_to_call_durable_what_a_record_beside_the_image_calls_lost() {
    let make: [fn(&std::path::Path); 3] = [
        |at| std::os::unix::fs::symlink("/dev/zero", at).unwrap(),
        |at| std::fs::write(at, [0xff; 1 << 16]).unwrap(),
        |at| std::os::unix::fs::symlink("disk.img.flush-failed", at).unwrap(),
    ];
    for make in make {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = dir.path().join("disk.img");
        new_image(&image, 1 << 20);
        let record = dir.path().join("disk.img.flush-failed");
        make(&record);
        let socket = dir.path().join("s");
        let serve = |more: &[&str]| {
            let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vublk"));
            command.args(["serve", "-f", "raw", "--socket"]).arg(&socket).arg(&image).args(more);
            let mut server = vublk_testkit::Server::spawn(command).unwrap();
            let until = std::time::Instant::now() + LIMIT;
            let disk = loop {
                match Disk::open(&socket, &Options { limit: LIMIT, ..Options::default() }) {
                    Ok(disk) => break disk,
                    Err(_) if std::time::Instant::now() < until => {
                        assert!(server.try_wait().unwrap().is_none(), "{}", server.stderr());
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                    Err(error) => panic!("{error}: {}", server.stderr()),
                }
            };
            (server, disk)
        };
        let stop = |mut server: vublk_testkit::Server| {
            server.signal(libc::SIGTERM).unwrap();
            server.wait_exit(LIMIT).unwrap();
        };
        let (server, mut disk) = serve(&[]);
        assert_eq!(flush(&mut disk), status::IOERR);
        assert!(server.stderr().contains("disk.img.flush-failed' says that a flush failed"));
        stop(server);
        let (server, mut disk) = serve(&["--accept-loss"]);
        assert_eq!(flush(&mut disk), 0);
        assert!(std::fs::symlink_metadata(&record).is_err());
        stop(server);
        let (server, mut disk) = serve(&[]);
        assert_eq!(flush(&mut disk), 0);
        stop(server);
    }
}
