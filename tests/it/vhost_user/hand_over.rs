//! Handing an image from one daemon to another in a migration, and back when it fails.

use std::fs::File;
use std::path::Path;

use vublk_testkit::dirty_log::PAGE;
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::{protocol, status};
use vublk_testkit::{DirtyLog, Disk, MemoryLayout, Options};

use super::daemon::{LIMIT, export_of, new_image};
use super::{Daemon, SIZE, pattern};
use crate::disks::judge;
use crate::monitor::client::Client;

const ACTIVE: bool = true;
const INACTIVE: bool = false;

/// A daemon that serves an image by a node of its format, and a null disk; with a monitor.
fn daemon(image: &Path, active: bool) -> Daemon {
    let (node, export) = if active { ("", "") } else { (",active=off", ",allow-inactive=on") };
    let file = format!("file.driver=file,file.filename={}", image.display());
    let format = match image.extension().and_then(|end| end.to_str()) {
        Some("img") | None => "raw",
        Some(format) => format,
    };
    let node = format!("driver={format},node-name=d0,{file}{node}");
    let export = format!("{},writable=on,num-queues=2{export}", export_of("d0", 0));
    let null = format!("{},writable=on", export_of("d1", 1));
    let monitor = "socket,id=m,path=DIR/m.sock,server=on,wait=off";
    let dir = tempfile::tempdir().unwrap();
    let arguments = [
        &["--chardev", monitor, "--monitor", "m"][..],
        &["--blockdev", &node, "--export", &export],
        &["--blockdev", "driver=null-co,node-name=d1,read-zeroes=on", "--export", &null],
    ];
    Daemon::start_in(dir, &[env!("CARGO_BIN_EXE_vublk"), "daemon"], &arguments.concat())
}

fn options() -> Options {
    let protocol = protocol::DEFAULT | protocol::LOG_SHMFD;
    let layout = MemoryLayout::single(4 << 20);
    Options { num_queues: 2, protocol, layout, limit: LIMIT, ..Options::default() }
}

fn new_log() -> DirtyLog {
    DirtyLog::new((4 << 20) / PAGE / 8).unwrap()
}

/// Whether anybody else has locked the image's write permission (byte 101) or refuses it (201).
fn is_locked(image: &Path) -> bool {
    let file = File::options().read(true).write(true).open(image).unwrap();
    use std::os::fd::AsRawFd;
    [101, 201].iter().any(|&byte| {
        // SAFETY: all zeroes are a valid flock, which is what the call takes and fills.
        let lock = unsafe {
            let mut lock: libc::flock = std::mem::zeroed();
            lock.l_type = libc::F_WRLCK as libc::c_short;
            lock.l_whence = libc::SEEK_SET as libc::c_short;
            (lock.l_start, lock.l_len) = (byte, 1);
            assert_eq!(libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock), 0);
            lock
        };
        lock.l_type != libc::F_UNLCK as libc::c_short
    })
}

/// What the monitor says of the node `d0`.
fn is_active(daemon: &Daemon) -> bool {
    let nodes = Client::connect(&daemon.path("m.sock"))
        .run("query-named-block-nodes", serde_json::json!({}));
    let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "d0").unwrap();
    node["active"] != false
}

/// What QEMU does when a machine stops.
fn stop(disk: &mut Disk) -> Vec<u16> {
    disk.stop().unwrap()
}

/// What QEMU does when it continues.
fn go_on(disk: &mut Disk, bases: &[u16]) {
    for (index, &base) in bases.iter().enumerate() {
        disk.start_queue(index, base).unwrap();
    }
    for index in 0..bases.len() {
        disk.connection().enable_queue(index, true).unwrap();
    }
}

fn image(dir: &tempfile::TempDir) -> std::path::PathBuf {
    let image = dir.path().join("disk.img");
    new_image(&image, SIZE);
    image
}

#[test]
fn the_image_goes_with_the_guest_and_comes_back_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir);
    let mut here = daemon(&image, ACTIVE);
    let mut there = daemon(&image, INACTIVE);
    assert!(is_active(&here) && !is_active(&there));
    let mut source = here.open(&options());
    source.write(0, &pattern(4096, 1)).unwrap();
    // The destination's front end is there from the beginning, and has started no ring.
    let memory = source.memory().clone();
    let log = new_log();
    source.start_logging(&log).unwrap();
    source.write(8, &pattern(4096, 2)).unwrap();
    let bases = source.connection().stop_queue(0).unwrap();
    assert!(is_active(&here), "the other queue runs");
    assert_eq!(bases, 2);
    source.connection().stop_queue(1).unwrap();
    here.wait_log("the disk is given up", 1);
    assert!(!is_locked(&image) && !is_active(&here));
    let mut moved = Disk::open_with_memory(&there.socket(0), &options(), memory.clone()).unwrap();
    let mut data = vec![0; 8192];
    moved.read(0, &mut data).unwrap();
    assert!(data == [pattern(4096, 1), pattern(4096, 2)].concat());
    moved.write(16, &pattern(4096, 3)).unwrap();
    assert!(is_locked(&image) && is_active(&there));
    // And back: the first front end's connection is still there.
    moved.start_logging(&log).unwrap();
    stop(&mut moved);
    there.wait_log("the disk is given up", 1);
    source.stop_logging().unwrap();
    go_on(&mut source, &[2, 0]);
    source.read(16, &mut data[..4096]).unwrap();
    assert!(data[..4096] == pattern(4096, 3));
    assert!(is_locked(&image) && is_active(&here) && !is_active(&there));
    here.assert_serves(1);
    there.assert_serves(1);
}

#[test]
fn a_guest_that_is_stopped_or_whose_front_end_dies_keeps_its_image() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir);
    let here = daemon(&image, ACTIVE);
    let mut disk = here.open(&options());
    let log = new_log();
    for turn in 0..3 {
        // Stopped while nobody asks for a log; with one that is not in use; with one that was.
        let bases = stop(&mut disk);
        assert!(is_locked(&image) && is_active(&here), "turn {turn}");
        go_on(&mut disk, &bases);
        match turn {
            0 => disk.connection().set_log_base(&log).unwrap(),
            _ => {
                disk.start_logging(&log).unwrap();
                disk.stop_logging().unwrap();
            }
        }
        disk.read(0, &mut [0; 512]).unwrap();
    }
    // Disabled rings are not stopped ones.
    disk.start_logging(&log).unwrap();
    for queue in 0..2 {
        disk.connection().enable_queue(queue, false).unwrap();
    }
    assert!(is_locked(&image) && is_active(&here));
    disk.connection().hang_up();
    drop(disk);
    let mut next = here.open(&options());
    next.read(0, &mut [0; 512]).unwrap();
    assert!(is_locked(&image) && is_active(&here));
}

#[test]
fn a_migration_that_fails_after_the_guest_was_stopped_gives_the_image_back() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir);
    let mut here = daemon(&image, ACTIVE);
    let mut disk = here.open(&options());
    let log = new_log();
    for turn in 1..=3u8 {
        disk.start_logging(&log).unwrap();
        let bases = stop(&mut disk);
        here.wait_log("the disk is given up", usize::from(turn));
        // The front end continues with its memory as it was, and without the log.
        disk.stop_logging().unwrap();
        go_on(&mut disk, &bases);
        disk.write(0, &pattern(512, turn)).unwrap();
        assert!(is_locked(&image) && is_active(&here));
    }
    assert!(std::fs::read(&image).unwrap()[..512] == pattern(512, 3));
}

#[test]
fn rings_wait_for_the_image_and_nothing_else_does() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir);
    let mut here = daemon(&image, ACTIVE);
    let mut there = daemon(&image, INACTIVE);
    let mut source = here.open(&options());
    // Here the guest still runs, and there its rings start already.
    let mut moved = there.open(&options());
    moved.queue(0).submit(&Request::In { sector: 0, len: 512 }, &Shape::default()).unwrap();
    there.wait_log("no ring starts while another process has the disk", 1);
    assert_eq!(moved.queue(0).reap().unwrap(), None);
    assert!(!is_active(&there));
    // Messages are answered meanwhile, other disks work, the monitor too.
    assert_eq!(moved.connection().config().unwrap().capacity_sectors, SIZE / 512);
    there.assert_serves(1);
    // A ring that is stopped while it waits is where it was.
    assert_eq!(moved.connection().stop_queue(1).unwrap(), 0);
    // The image grows before it goes over.
    source.write(0, &pattern(512, 7)).unwrap();
    let grown = SIZE + (1 << 20);
    let size = serde_json::json!({"node-name": "d0", "size": grown});
    Client::connect(&here.path("m.sock")).run("block_resize", size.clone());
    let refusal = Client::connect(&there.path("m.sock")).refusal("block_resize", size);
    assert_eq!(refusal, "Node 'd0' is inactive");
    source.start_logging(&new_log()).unwrap();
    stop(&mut source);
    here.wait_log("the disk is given up", 1);
    let done = moved.queue(0).wait().unwrap();
    assert!(done.status == status::OK && done.data == pattern(512, 7));
    assert_eq!(moved.connection().config().unwrap().capacity_sectors, grown / 512);
    moved.write(SIZE / 512, &pattern(512, 8)).unwrap();
    assert!(is_locked(&image) && is_active(&there));
}

#[test]
fn a_daemon_that_waits_for_an_image_ends_at_once_and_one_that_has_given_it_up_leaves_it_alone() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir);
    let here = daemon(&image, ACTIVE);
    let mut source = here.open(&options());
    let mut there = daemon(&image, INACTIVE);
    let moved = there.open(&options());
    there.wait_log("no ring starts while another process has the disk", 1);
    there.end();
    drop(moved);
    // Nor does a front end that goes while it waits leave anything.
    let there = daemon(&image, INACTIVE);
    drop(there.open(&options()));
    source.start_logging(&new_log()).unwrap();
    stop(&mut source);
    assert!(!is_active(&there));
    drop(source);
    let mut moved = there.open(&options());
    moved.write(0, &pattern(512, 5)).unwrap();
    here.end();
    assert!(is_locked(&image));
    assert!(std::fs::read(&image).unwrap()[..512] == pattern(512, 5));
}

#[test]
fn a_daemon_without_the_option_takes_its_image_when_it_starts() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir);
    let node = format!(
        "driver=raw,node-name=d0,active=off,file.driver=file,file.filename={}",
        image.display()
    );
    // An export that does not allow it activates its node.
    let export = format!("{},writable=on", export_of("d0", 0));
    let serve = ["--blockdev", &node, "--export", &export];
    let here = Daemon::start(&serve);
    assert!(is_locked(&image));
    drop(here);
    let here = Daemon::start(&["--blockdev", &node]);
    assert!(!is_locked(&image));
    drop(here);
    for (options, said) in [
        ("driver=null-co,node-name=n,active=off", None),
        (
            "driver=raw,node-name=r,file=f",
            Some("Active node 'r' cannot stand on inactive node 'f'"),
        ),
        ("driver=raw,node-name=s,active=off,file=f", None),
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vublk"));
        let file = format!("driver=file,node-name=f,active=off,filename={}", image.display());
        command.args(["daemon", "--blockdev", &file, "--blockdev", options]);
        // Ends by itself either way.
        let output = command.arg("--object").arg("help").output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), said.is_none(), "{options}: {text}");
        assert!(text.contains(said.unwrap_or_default()), "{options}: {text}");
    }
}

#[test]
fn requests_in_flight_are_tracked_at_the_destination_too() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir);
    let there = daemon(&image, INACTIVE);
    let protocol = protocol::DEFAULT | protocol::INFLIGHT_SHMFD;
    let mut disk = there.open(&Options { protocol, ..options() });
    assert_ne!(disk.connection().offered_protocol() & protocol::INFLIGHT_SHMFD, 0);
    disk.write(0, &pattern(512, 1)).unwrap();
}

/// Runs one of QEMU's tools.
fn qemu_img(arguments: &[&str]) -> String {
    output_of("qemu-img", arguments)
}

fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {text}{error}");
    text
}

#[test]
fn an_image_goes_with_the_guest_and_each_finds_what_the_other_wrote() {
    goes_and_comes("qcow2", "cluster_size=4k", true);
    goes_and_comes("qed", "cluster_size=4k", true);
    goes_and_comes("vdi", "static=off", false);
    goes_and_comes("parallels", "cluster_size=64k", false);
    goes_and_comes("vpc", "force_size=on", false);
    goes_and_comes("vmdk", "zeroed_grain=on", false);
}

/// An image of a format goes from one daemon to another again and again. `grows`: its disk gets longer on the way.
fn goes_and_comes(format: &str, options_of_image: &str, grows: bool) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join(format!("disk.{format}"));
    let (name, len) = (image.to_str().unwrap(), SIZE.to_string());
    qemu_img(&["create", "-q", "-f", format, "-o", options_of_image, name, &len]);
    let mut daemons = [daemon(&image, ACTIVE), daemon(&image, INACTIVE)];
    let mut disk = daemons[0].open(&options());
    let memory = disk.memory().clone();
    let mut expected = vec![0; 256 << 10];
    for round in 0..6u8 {
        let (here, there) = (usize::from(round) % 2, 1 - usize::from(round) % 2);
        // New clusters, and some of those that the other one has made.
        for n in 0..10 {
            let at = (n * 7 + usize::from(round) * 3) % 64 * 4096;
            let data = pattern(4096, round * 20 + n as u8);
            disk.write(at as u64 / 512, &data).unwrap();
            expected[at..at + 4096].copy_from_slice(&data);
        }
        let log = new_log();
        disk.start_logging(&log).unwrap();
        disk.stop().unwrap();
        daemons[here].wait_log("the disk is given up", usize::from(round) / 2 + 1);
        assert!(!is_locked(&image));
        let said = output_of(judge(format), &["check", "-f", format, name]);
        assert!(said.contains("No errors were found"), "{said}");
        if round == 3 && grows {
            let vublk = std::process::Command::new(env!("CARGO_BIN_EXE_vublk"))
                .args(["resize", "-q", "-f", format, name, "+64M"])
                .status();
            assert!(vublk.unwrap().success());
        }
        let socket = daemons[there].socket(0);
        disk = Disk::open_with_memory(&socket, &options(), memory.clone()).unwrap();
        let mut data = vec![0; expected.len()];
        disk.read(0, &mut data).unwrap();
        assert!(data == expected, "{format}, round {round}");
    }
    let len = if grows { SIZE + (64 << 20) } else { SIZE };
    assert_eq!(disk.connection().config().unwrap().capacity_sectors * 512, len, "{format}");
}
