//! Exhausted descriptors: connected front ends are served in full, others wait, and the log names the limit.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

use vublk_testkit::{Disk, Options};

use super::Daemon;
use super::daemon::{LIMIT, export_of};
use crate::metrics::Scrape;

/// A daemon with null disks that is started with a soft and a hard limit on descriptors.
fn limited(limits: &str, disks: usize, queues: usize) -> Daemon {
    // This process has the other ends of the descriptors.
    vublk::io::descriptors::raise_limit();
    let mut arguments: Vec<String> =
        ["--sandbox", "on", "--sandbox-path", "DIR", "--metrics", "unix:DIR/metrics.sock"]
            .map(str::to_owned)
            .into();
    for number in 0..disks {
        arguments.push("--blockdev".into());
        arguments.push(format!("null-co,node-name=d{number},size=1048576,read-zeroes=on"));
        arguments.push("--export".into());
        let export = export_of(&format!("d{number}"), number);
        arguments.push(format!("{export},writable=on,num-queues={queues}"));
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let limits = format!("--nofile={limits}");
    let program = ["prlimit", &limits, env!("CARGO_BIN_EXE_vublk"), "daemon"];
    Daemon::start_in(tempfile::tempdir().unwrap(), &program, &arguments)
}

fn options(num_queues: usize) -> Options {
    Options { num_queues, queue_size: 16, limit: LIMIT, ..Options::default() }
}

/// Opens a disk on a thread, for it may have to wait.
fn open(socket: &Path, queues: usize) -> JoinHandle<Disk> {
    let socket = socket.to_owned();
    std::thread::spawn(move || Disk::open(&socket, &options(queues)).unwrap())
}

fn assert_works(disk: &mut Disk) {
    for queue in &mut disk.queues {
        queue.read(0, &mut [0; 512]).unwrap();
    }
}

#[test]
fn disks_of_many_queues_are_served_beyond_the_soft_limit() {
    let daemon = limited("128:4096", 12, 16);
    let mut disks: Vec<Disk> =
        (0..12).map(|number| daemon.open_number(number, &options(16))).collect();
    disks.iter_mut().for_each(assert_works);
    drop(disks);
    let log = daemon.end();
    assert!(!log.contains("RLIMIT_NOFILE"), "{log}");
}

#[test]
fn a_front_end_for_which_no_descriptors_are_left_waits_and_is_served_when_another_one_goes() {
    let daemon = limited("200:200", 8, 16);
    let mut served = Vec::new();
    let waiting = loop {
        let opening = open(&daemon.socket(served.len()), 16);
        let is_full = loop {
            if daemon.server.stderr().contains("a front end waits") {
                break true;
            }
            if opening.is_finished() {
                break false;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        };
        if is_full {
            break opening;
        }
        served.push(opening.join().unwrap());
        assert!(served.len() < 8, "there is room for all: {}", daemon.server.stderr());
    };
    assert!(served.len() > 1, "only {} were served", served.len());
    let log = daemon.server.stderr();
    assert!(log.contains("are not left (RLIMIT_NOFILE = 200: raise the hard limit"), "{log}");
    let connected = Scrape::of(&daemon).sum("vublk_export_connected", &[]);
    assert_eq!(connected, served.len() as f64);
    served.iter_mut().for_each(assert_works);
    drop(served.pop());
    assert_works(&mut waiting.join().unwrap());
    served.iter_mut().for_each(assert_works);
    drop(served);
    let log = daemon.end();
    assert!(!log.contains("invalid message"), "{log}");
    assert_eq!(log.matches("a front end waits").count(), 1, "{log}");
}

#[test]
fn a_daemon_whose_front_ends_wait_for_descriptors_ends_when_it_is_reported_to() {
    let mut daemon = limited("100:100", 4, 16);
    let waiting: Vec<UnixStream> =
        (0..4).map(|number| UnixStream::connect(daemon.socket(number)).unwrap()).collect();
    daemon.wait_log("a front end waits", 1);
    daemon.end();
    drop(waiting);
}

#[test]
fn a_message_whose_descriptor_finds_no_room_ends_the_connection_with_a_line_that_names_the_limit() {
    let mut daemon = limited("128:128", 1, 256);
    assert!(Disk::open(&daemon.socket(0), &options(100)).is_err(), "200 descriptors do not fit");
    daemon.wait_log("no descriptor is left for one that a message brings (RLIMIT_NOFILE = 128:", 1);
    // Fewer queues fit, and everything was given back.
    let mut disk = daemon.open(&options(8));
    assert_works(&mut disk);
    drop(disk);
    let log = daemon.end();
    assert!(!log.contains("invalid message"), "{log}");
}
