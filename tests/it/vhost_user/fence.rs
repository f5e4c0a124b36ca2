//! I/O of a killed daemon on unlocked storage: the locks of its overlay last until it has ended.

use super::daemon::{LIMIT, export_of};
use super::inflight::{options, wait_in_flight};
use super::{Daemon, pattern};
use crate::file::{Loop, on_disk, tool};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use vublk_testkit::Disk;
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::status;

/// Most of what one read of the test takes.
const LEN: usize = 256 << 10;

/// A control group whose processes read a block device slowly.
struct SlowReads(PathBuf);

impl SlowReads {
    fn new(device: &str, per_second: usize) -> SlowReads {
        let name = format!("vublk-test-{}", std::process::id());
        let number = tool("lsblk", &["-dno", "MAJ:MIN", device]);
        let old = Path::new("/sys/fs/cgroup/blkio");
        let (group, file, line) = if old.is_dir() {
            let line = format!("{} {per_second}", number.trim());
            (old.join(name), "blkio.throttle.read_bps_device", line)
        } else {
            let root = Path::new("/sys/fs/cgroup");
            std::fs::write(root.join("cgroup.subtree_control"), "+io").unwrap();
            (root.join(name), "io.max", format!("{} rbps={per_second}", number.trim()))
        };
        std::fs::create_dir(&group).unwrap();
        std::fs::write(group.join(file), line).unwrap();
        SlowReads(group)
    }

    fn add(&self, process: u32) {
        std::fs::write(self.0.join("cgroup.procs"), process.to_string()).unwrap();
    }
}

impl Drop for SlowReads {
    fn drop(&mut self) {
        // Those that were in it have ended, and may not be gone quite yet.
        while std::fs::remove_dir(&self.0).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY)) {
            std::thread::yield_now();
        }
    }
}

/// Whether somebody holds what keeps others from writing to an image.
fn is_locked(image: &File) -> bool {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 201,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the kernel reads and writes one such structure.
    assert_eq!(unsafe { libc::fcntl(image.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) }, 0);
    lock.l_type != libc::F_UNLCK as i16
}

/// How many sectors of the guest's memory are those of `data`, somewhere.
fn landed(disk: &Disk, data: &[u8]) -> usize {
    let region = &disk.memory().regions()[0];
    let mut all = vec![0; region.size() as usize];
    disk.memory().read(region.guest_addr(), &mut all);
    let known: std::collections::HashSet<&[u8]> = data.chunks(512).collect();
    all.chunks(512).filter(|sector| known.contains(sector)).count()
}

#[test]
fn the_locks_of_a_killed_daemons_overlay_outlive_its_reads_of_the_backing_file() {
    let dir = on_disk();
    let data: Vec<u8> =
        pattern(LEN, 7).iter().enumerate().map(|(i, b)| b ^ (i >> 9) as u8).collect();
    std::fs::write(dir.path().join("base.img"), &data).unwrap();
    let base = Loop::new(&dir.path().join("base.img"), &[]);
    let top = dir.path().join("top.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &base.0, top.to_str().unwrap()];
    tool("qemu-img", &create);
    let slow = SlowReads::new(&base.0, LEN);
    let node = format!(
        "driver=qcow2,node-name=d0,file.driver=file,file.filename=DIR/top.qcow2,\
         backing.driver=raw,backing.file.driver=host_device,backing.file.filename={},\
         backing.file.cache.direct=on",
        base.0
    );
    let export = format!("{},writable=on", export_of("d0", 0));
    let program = [env!("CARGO_BIN_EXE_vublk"), "daemon"];
    let mut daemon = Daemon::start_in(dir, &program, &["--blockdev", &node, "--export", &export]);
    let mut disk = daemon.open(&options(1));
    slow.add(daemon.server.pid());
    let queue = disk.queue(0);
    queue.add(&Request::In { sector: 0, len: LEN }, &Shape::indirect()).unwrap();
    queue.publish().unwrap();
    wait_in_flight(&disk, 1);
    let image = File::open(&top).unwrap();
    daemon.server.signal(libc::SIGKILL).unwrap();
    assert!(landed(&disk, &data) < LEN / 512, "the read was too quick to show anything");
    while is_locked(&image) {
        std::thread::yield_now();
    }
    // Nothing comes later than this.
    assert_eq!(landed(&disk, &data), LEN / 512);
    daemon.server.wait_exit(LIMIT).unwrap();
    daemon.restart();
    disk.reconnect().unwrap();
    let done = disk.queue(0).drain().unwrap();
    assert_eq!((done.len(), done[0].status), (1, status::OK));
    assert!(done[0].data == data);
    drop(disk);
    daemon.end();
}
