//! Daemons that are killed under load with a qcow2 image open.
//!
//! All that was written is right, and the image does not grow by what each of them had reserved.

use std::time::{Duration, Instant};

use vublk_testkit::Disk;
use vublk_testkit::request::{Range, Request, Shape};

use super::daemon::{LIMIT, SIZE, export_of};
use super::inflight::{Load, options, qemu};
use super::{Daemon, seed};

const KILLS: u32 = 20;
/// The part of the disk that is written and discarded without a look at what it holds, in sectors.
const CHURNED: std::ops::Range<u64> = SIZE / 1024..SIZE / 512;

fn qcow2_disk() -> Daemon {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "disk.qcow2"])
        .arg(SIZE.to_string())
        .current_dir(dir.path())
        .status();
    assert!(made.unwrap().success());
    let file = "file.driver=file,file.discard=unmap,file.filename=DIR/disk.qcow2";
    let node = format!("driver=qcow2,node-name=d0,discard=unmap,{file}");
    let export = format!("{},writable=on,num-queues=4", export_of("d0", 0));
    let program = [env!("CARGO_BIN_EXE_vublk"), "daemon"];
    Daemon::start_in(dir, &program, &["--blockdev", &node, "--export", &export])
}

/// Begins requests that change the mapping on the last queue, and takes what has come back there.
fn churn(disk: &mut Disk, random: &mut fastrand::Rng) {
    let queue = disk.queue(3);
    while queue.reap().unwrap().is_some() {}
    while queue.in_flight() < 8 {
        let sectors = random.u32(1..32) * 8;
        let sector = random.u64(CHURNED.start / 8..(CHURNED.end - u64::from(sectors)) / 8) * 8;
        let range = Range { sector, sectors, flags: 0 };
        let request = match random.u8(0..8) {
            0..4 => Request::Out { sector, data: vec![random.u8(..); sectors as usize * 512] },
            4..6 => Request::Discard(vec![range]),
            6 => Request::WriteZeroes(vec![Range { flags: 1, ..range }]),
            _ => Request::Flush,
        };
        queue.add(&request, &Shape::indirect()).unwrap();
    }
    queue.publish().unwrap();
}

#[test]
fn kills_under_load_leave_no_clusters_leaked_behind_the_next_daemon() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut daemon = qcow2_disk();
    let path = daemon.path("disk.qcow2");
    let mut disk = daemon.open(&options(4));
    let mut loads: Vec<Load> = (0..3).map(Load::new).collect();
    for _ in 0..KILLS {
        for _ in 0..random.u32(1..20) {
            churn(&mut disk, &mut random);
            for load in &mut loads {
                load.submit(&mut disk, &mut random);
                load.reap(&mut disk);
            }
        }
        let until = Instant::now() + Duration::from_micros(random.u64(..2000));
        while Instant::now() < until {}
        daemon.server.signal(libc::SIGKILL).unwrap();
        daemon.server.wait_exit(LIMIT).unwrap();
        daemon.restart();
        disk.reconnect().unwrap();
    }
    for load in &mut loads {
        while load.slots.iter().any(|slot| slot.pending.is_some()) {
            disk.queue(load.queue).ring().wait(LIMIT).unwrap();
            load.reap(&mut disk);
        }
    }
    disk.queue(3).drain().unwrap();
    drop(disk);
    daemon.server.signal(libc::SIGTERM).unwrap();
    assert!(daemon.server.wait_exit(LIMIT).unwrap().success());
    let said = qemu("qemu-img", &["check", "-f", "qcow2"], &path, &[0]);
    assert!(said.contains("No errors were found"), "{said}");
    let len = std::fs::metadata(&path).unwrap().len();
    assert!(len < 2 * SIZE, "a file of {len} bytes for a disk of {SIZE}");
}
