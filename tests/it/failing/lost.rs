//! A failed fsync, and daemons that are started after it: flushes fail until an operator accepts the loss.

use super::{Stage, block, options};
use crate::file::durability::FullDevice;
use crate::file::tool;
use crate::monitor::{Client, MONITOR};
use crate::vhost_user::inflight::qemu;
use crate::vhost_user::{Daemon, LIMIT, export_of, new_image, pattern};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vublk::block::flush_record;
use vublk::protocol::sim::Kinds;
use vublk_testkit::request::Request;
use vublk_testkit::spec::status;
use vublk_testkit::{Disk, Options, Server};

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

/// A device that has less room than its length says, the place of its record, and a daemon that serves it.
fn served(format: &str) -> (FullDevice, Record, Daemon) {
    let full = FullDevice::new();
    let device = full.device.0.clone();
    let record = Record(format!("{device}.flush-failed").into());
    if format != "raw" {
        tool("qemu-img", &["create", "-q", "-f", format, &device, "12M"]);
    }
    let node =
        format!("driver={format},node-name=d0,file.driver=host_device,file.filename={device}");
    let export = format!("{},writable=on,num-queues=2", export_of("d0", 0));
    // The record is among the devices: the monitor needs that folder to remove it.
    let rest = ["--sandbox-path", "/dev", "--blockdev", &node, "--export", &export];
    let arguments = [&MONITOR[..], &rest].concat();
    (full, record, Daemon::start(&arguments))
}

/// A daemon on a device whose first fsync fails, after which the device works.
fn failed(tracked: bool) -> (FullDevice, Record, Daemon, Disk) {
    let (full, record, daemon) = served("raw");
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

/// `vublk serve` of a raw image, and a front end of it.
fn serve(folder: &Path, image: &str, more: &[&str]) -> (Server, Disk) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.args(["serve", "-f", "raw", "--socket", "s", image]).args(more).current_dir(folder);
    let mut server = Server::spawn(command).unwrap();
    let until = Instant::now() + LIMIT;
    let disk = loop {
        match Disk::open(&folder.join("s"), &Options { limit: LIMIT, ..Options::default() }) {
            Ok(disk) => break disk,
            Err(_) if Instant::now() < until => {
                assert!(server.try_wait().unwrap().is_none(), "{}", server.stderr());
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}: {}", server.stderr()),
        }
    };
    (server, disk)
}

fn stop(mut server: Server) {
    server.signal(libc::SIGTERM).unwrap();
    server.wait_exit(LIMIT).unwrap();
}

/// What `query-block-exports` says of a failed flush.
fn is_reported(client: &mut Client) -> bool {
    let export = client.run("query-block-exports", json!({}))[0].clone();
    let reported = export.get("x-flush-failed");
    assert!(reported.is_none_or(|reported| *reported == json!(true)), "{export}");
    reported.is_some()
}

#[test]
fn a_qcow2_image_is_right_again_when_the_guest_has_written_once_more_what_a_failed_fsync_lost() {
    for (tracked, killed) in [(true, true), (true, false), (false, true), (false, false)] {
        let (full, record, mut daemon) = served("qcow2");
        let mut disk = daemon.open(&options(tracked));
        disk.write(0, &pattern(64 << 10, 1)).unwrap();
        assert_eq!(flush(&mut disk), 0);
        let mut client = Client::connect(&daemon.path("m.sock"));
        assert!(!is_reported(&mut client));
        let lost = |number: u64| pattern(1 << 20, number as u8 + 2);
        for number in 1..10 {
            // Some need a flush of the image's own, and fail, too.
            let _ = disk.write(number << 11, &lost(number));
        }
        assert_eq!(flush(&mut disk), status::IOERR);
        assert!(is_reported(&mut client) && record.exists());
        full.grow();
        if killed {
            end(&mut daemon, libc::SIGKILL);
            daemon.restart();
            disk.reconnect().unwrap();
            client = Client::connect(&daemon.path("m.sock"));
        }
        assert!(is_reported(&mut client));
        let _ = disk.write(2048, &lost(1));
        assert_eq!([flush(&mut disk), flush(&mut disk)], [status::IOERR; 2]);
        client.run("x-block-export-accept-loss", json!({"id": "e0"}));
        assert!(!is_reported(&mut client) && !record.exists());
        for number in 1..10 {
            disk.write(number << 11, &lost(number)).unwrap();
        }
        assert_eq!(flush(&mut disk), 0);
        end(&mut daemon, libc::SIGKILL);
        // What the device has, not what is remembered of it.
        tool("blockdev", &["--flushbufs", &full.device.0]);
        // The killed daemon has leaked what it held in reserve.
        qemu("qemu-img", &["check", "-q", "-f", "qcow2"], Path::new(&full.device.0), &[0, 3]);
        daemon.restart();
        disk.reconnect().unwrap();
        let mut found = vec![0; 1 << 20];
        disk.read(0, &mut found[..64 << 10]).unwrap();
        assert!(found[..64 << 10] == pattern(64 << 10, 1));
        for number in 1..10 {
            disk.read(number << 11, &mut found).unwrap();
            assert!(found == lost(number), "{number}");
        }
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
fn an_overlay_of_an_image_whose_flush_failed_is_recorded_too() {
    let (_full, record, mut daemon, mut disk) = failed(false);
    // The next daemon can flush it, and knows from the record alone what that is worth.
    end(&mut daemon, libc::SIGKILL);
    daemon.restart();
    disk.reconnect().unwrap();
    let mut client = Client::connect(&daemon.path("m.sock"));
    let over = Record(daemon.path("over.qcow2.flush-failed"));
    let arguments = json!({
        "node-name": "d0", "snapshot-node-name": "over",
        "snapshot-file": daemon.path("over.qcow2"), "format": "qcow2",
    });
    client.run("blockdev-snapshot-sync", arguments);
    assert!(over.exists() && record.exists());
    assert_eq!(flush(&mut disk), status::IOERR);
    client.run("x-block-export-accept-loss", json!({"id": "e0"}));
    assert!(!over.exists());
    assert_eq!(flush(&mut disk), 0);
}

#[test]
fn tools_report_a_failed_flush_that_is_recorded_beside_an_image_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path("base"), "1M"]);
    let over = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &path("base"), &path("over")];
    tool("qemu-img", &over);
    let image = [PathBuf::from(path("base"))];
    flush_record::make(&image[0]).unwrap();
    let warnings = |line: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        let output = command.args(line).current_dir(dir.path()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{line:?}: {said}");
        let lines: Vec<_> = said.lines().map(str::to_owned).collect();
        assert!(lines.iter().all(|line| line.contains("base.flush-failed' says")), "{said}");
        lines.len()
    };
    for line in [
        &["check", "base"][..],
        &["info", "base"],
        &["info", "--output=json", "--backing-chain", "over"],
        &["convert", "-O", "raw", "over", "copy"],
        &["compare", "base", "over"],
        &["io", "-c", "write 0 64k", "base"],
        &["io", "-r", "-c", "read 0 64k", "over"],
        &["map", "over"],
        &["commit", "over"],
    ] {
        assert_eq!(warnings(line), 1, "{line:?}");
    }
    // Where it is beside an image that is not opened it is of no interest.
    assert_eq!(warnings(&["info", "over"]), 0);
    for record in flush_record::find(&image) {
        std::fs::remove_file(record).unwrap();
    }
    assert_eq!(warnings(&["check", "base"]), 0);
}

#[test]
fn an_image_that_is_renamed_keeps_what_was_recorded_of_its_failed_flush() {
    let dir = tempfile::tempdir().unwrap();
    let serve = |image: &str| {
        let (server, mut disk) = serve(dir.path(), image, &[]);
        let found = flush(&mut disk);
        stop(server);
        found
    };
    let path = |name: &str| dir.path().join(name);
    new_image(&path("old"), 1 << 20);
    flush_record::make(&path("old")).unwrap();
    std::fs::rename(path("old"), path("new")).unwrap();
    new_image(&path("old"), 1 << 20);
    assert_eq!([serve("new"), serve("old")], [status::IOERR, 0]);
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
    stage.service().wait(async |service| service.accept_loss("e0").await).unwrap();
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
        let (reported, file) = disk.inflight().unwrap();
        let trailer = reported.mmap_size - BEHIND_TRAILER - 64;
        file.write_all_at(&[value], reported.mmap_offset + trailer + 9).unwrap();
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
        let serve = |more: &[&str]| serve(dir.path(), "disk.img", more);
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
