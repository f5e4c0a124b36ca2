//! Tests in a process of their own, which confines itself and tries what must fail.
//!
//! The process is this very program, started again for one test.

use super::*;
use std::fs::{self, File};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

const WHERE: &str = "VUBLK_CONFINED_IN";

/// Runs a test again as a process of its own, in which `WHERE` is set.
fn alone(name: &str, dir: &Path) {
    let test = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("sandbox::tests::{name}"), "--test-threads=1", "--nocapture"])
        .env(WHERE, dir)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&test.stdout);
    let complaints = String::from_utf8_lossy(&test.stderr);
    assert!(test.status.success(), "{said}{complaints}");
    assert!(said.contains("1 passed"), "{said}");
}

fn error<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// What a confined process tries on any of its threads.
fn try_all(dir: &Path, listener: &std::net::SocketAddr) {
    let eacces = Some(libc::EACCES);
    let eperm = Some(libc::EPERM);
    assert!(File::options().read(true).write(true).open(dir.join("disk.img")).is_ok());
    assert!(File::open(dir.join("base.img")).is_ok());
    assert_eq!(error(File::options().write(true).open(dir.join("base.img"))), eacces);
    assert_eq!(error(File::open(dir.join("other.img"))), eacces);
    assert_eq!(error(File::open("/etc/passwd")), eacces);
    assert_eq!(error(File::create(dir.join("new"))), eacces);
    assert_eq!(error(fs::remove_file(dir.join("disk.img"))), eacces);
    assert_eq!(error(fs::create_dir(dir.join("folder"))), eperm);
    assert_eq!(error(fs::rename(dir.join("disk.img"), dir.join("b"))), eperm);
    assert_eq!(error(TcpStream::connect(listener)), eperm);
    assert_eq!(error(UdpSocket::bind("127.0.0.1:0")), eperm);
    assert_eq!(error(UnixStream::connect(dir.join("socket"))), eperm);
    assert_eq!(error(Command::new("/bin/true").status()), eperm);
    // SAFETY: none of these names memory of this process.
    unsafe {
        let failed = |result: i64| (result < 0).then(crate::io::Errno::last).map(|errno| errno.0);
        assert_eq!(failed(libc::fork().into()), eperm);
        assert_eq!(failed(libc::syscall(libc::SYS_ptrace, 0, 0, 0, 0)), eperm);
        assert_eq!(failed(libc::syscall(libc::SYS_io_uring_setup, 1, 0)), eperm);
        assert_eq!(failed(libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER)), eperm);
        assert_eq!(failed(libc::kill(1, 0).into()), eperm);
        assert_eq!(failed(libc::ioctl(-1, libc::TIOCSTI, 0).into()), eperm);
        let ebadf = Some(libc::EBADF);
        assert_eq!(failed(libc::ioctl(-1, libc::BLKSSZGET, 0).into()), ebadf);
        let vfio_iommu_map_dma = libc::_IO(b';'.into(), 100 + 13);
        assert_eq!(failed(libc::ioctl(-1, vfio_iommu_map_dma, 0).into()), ebadf);
        assert_eq!(failed(libc::prctl(libc::PR_SET_DUMPABLE, 1).into()), eperm);
        let (size, prot) = (4096, libc::PROT_READ | libc::PROT_EXEC);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let map = libc::mmap(std::ptr::null_mut(), size, prot, flags, -1, 0);
        assert_eq!(map, libc::MAP_FAILED, "memory is not made executable");
    }
}

#[test]
fn a_confined_process_can_neither_open_other_files_nor_connect_nor_execute() {
    if let Some(dir) = std::env::var_os(WHERE) {
        let dir = Path::new(&dir);
        // What /proc/self tells is looked at from without the sandbox.
        let status_file = File::open("/proc/self/status").unwrap();
        let _listener = UnixListener::bind(dir.join("socket")).unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        // A thread that is there before, and is asleep meanwhile.
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let before = std::thread::spawn({
            let dir = dir.to_owned();
            move || {
                wait.recv().unwrap();
                try_all(&dir, &address);
            }
        });
        let place = |name: &str, writable| Place { path: dir.join(name), writable };
        let files = vec![place("disk.img", true), place("base.img", false)];
        let plan = Plan { files, ..Plan::default() };
        assert_eq!(confine(&plan), Ok(Vec::new()));
        go.send(()).unwrap();
        before.join().unwrap();
        std::thread::spawn({
            let dir = dir.to_owned();
            move || try_all(&dir, &address)
        })
        .join()
        .unwrap();
        try_all(dir, &address);
        let mut text = String::new();
        std::io::Read::read_to_string(&mut &status_file, &mut text).unwrap();
        assert!(text.contains("NoNewPrivs:\t1") && text.contains("Seccomp:\t2"), "{text}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["disk.img", "base.img", "other.img"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    alone("a_confined_process_can_neither_open_other_files_nor_connect_nor_execute", dir.path());
}

#[test]
fn a_process_whose_drivers_use_the_network_connects_and_does_no_more_with_it() {
    if let Some(dir) = std::env::var_os(WHERE) {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let unix = Path::new(&dir).join("socket");
        let _listener = UnixListener::bind(&unix).unwrap();
        let files = vec![Place { path: unix.clone(), writable: true }];
        assert_eq!(confine(&Plan { files, network: true, ..Plan::default() }), Ok(Vec::new()));
        assert_eq!(error(TcpStream::connect(address)), None);
        assert_eq!(error(UnixStream::connect(&unix)), None);
        assert_eq!(error(std::net::TcpListener::bind("127.0.0.1:0")), Some(libc::EPERM));
        assert_eq!(error(File::open("/etc/passwd")), Some(libc::EACCES));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let name = "a_process_whose_drivers_use_the_network_connects_and_does_no_more_with_it";
    alone(name, dir.path());
}

#[test]
fn a_process_that_grows_opens_what_lies_beside_its_images_and_makes_sockets_beside_its_own() {
    if let Some(dir) = std::env::var_os(WHERE) {
        let dir = Path::new(&dir);
        let place = |name: &str, writable| Place { path: dir.join(name), writable };
        let plan = Plan {
            files: vec![place("rw/disk.img", true), place("ro/base.img", false)],
            folders: vec![place("more", true), place("less", false), place("missing", true)],
            own: vec![dir.join("sockets/a")],
            grows: true,
            ..Plan::default()
        };
        assert_eq!(confine(&plan), Ok(Vec::new()));
        let write = |name: &str| error(File::options().write(true).open(dir.join(name)));
        let read = |name: &str| error(File::open(dir.join(name)));
        let eacces = Some(libc::EACCES);
        assert_eq!((read("rw/b"), write("rw/b")), (None, None));
        assert_eq!((read("ro/b"), write("ro/b")), (None, eacces));
        assert_eq!((read("more/b"), write("more/b")), (None, None));
        assert_eq!((read("less/b"), write("less/b")), (None, eacces));
        assert_eq!((read("other/b"), write("other/b")), (eacces, eacces));
        assert_eq!(error(UnixListener::bind(dir.join("sockets/s"))), None);
        assert_eq!(error(fs::remove_file(dir.join("sockets/s"))), None);
        assert!(UnixListener::bind(dir.join("more/s")).is_ok());
        assert_eq!(error(UnixListener::bind(dir.join("ro/s"))), eacces);
        assert_eq!(error(TcpStream::connect("127.0.0.1:1")), Some(libc::EPERM));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["rw", "ro", "more", "less", "other", "sockets"] {
        fs::create_dir(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name).join("b"), name).unwrap();
    }
    fs::write(dir.path().join("rw/disk.img"), "").unwrap();
    fs::write(dir.path().join("ro/base.img"), "").unwrap();
    let name =
        "a_process_that_grows_opens_what_lies_beside_its_images_and_makes_sockets_beside_its_own";
    alone(name, dir.path());
}
