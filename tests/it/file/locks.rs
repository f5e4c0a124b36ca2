//! Our locks and QEMU's: each program refuses images that the other uses.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Output, Stdio};

/// A running qemu-io that has opened an image and waits.
struct QemuIo(Child);

impl QemuIo {
    fn open(arguments: &[&str], image: &str) -> QemuIo {
        let mut child = Command::new("qemu-io")
            .args(arguments)
            .args(["--image-opts", image])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io runs (tests/setup.sh installs it)");
        // Its answer to a command says that the image is open.
        writeln!(child.stdin.as_mut().unwrap(), "length").unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let answer = lines.find_map(|line| line.ok().filter(|l| l.contains("MiB")));
        assert!(answer.is_some(), "qemu-io did not open {image}");
        QemuIo(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qemu_io(arguments: &[&str], image: &str) -> Output {
    let mut command = Command::new("qemu-io");
    command.args(arguments).args(["-c", "read 0 512", "--image-opts", image]);
    command.env("LC_ALL", "C").output().expect("qemu-io runs")
}

/// What is used by one is refused to the other in both directions, on this image.
fn exclude_each_other(driver: &str, path: &str) {
    let options = format!("driver={driver},filename={path}");
    let in_use = format!("Is another process using the image [{path}]?");
    // A format lets nobody else write to what holds it; a bare file does.
    tool("qemu-img", &["create", "-q", "-f", "qcow2", path, "1M"]);
    let qcow2 = format!("driver=qcow2,file.driver={driver},file.filename={path}");
    let bench = Bench::new();

    let disk = bench.disk(&options).unwrap();
    let output = qemu_io(&[], &options);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("Failed to get \"write\" lock"), "{stderr}");
    assert!(stderr.contains(&in_use), "{stderr}");
    // A reader that lets others write is let in; one that does not is refused.
    assert!(qemu_io(&["-r"], &options).status.success());
    let output = qemu_io(&["-r"], &qcow2);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("Failed to get shared \"write\" lock"), "{stderr}");
    assert!(qemu_io(&["-r", "-U"], &qcow2).status.success());
    drop(disk);

    let theirs = QemuIo::open(&[], &qcow2);
    let node = bench.node(&format!("{options},node-name=again")).unwrap();
    let error = bench.write_to(node.clone()).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "Failed to get \"write\" lock");
    assert_eq!(error.hint(), Some(&*in_use));
    let reader = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() - Perm::WRITE };
    let error = bench.graph.attach(&node, "test", reader, None).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "Failed to get shared \"write\" lock");
    drop(theirs);
    drop(bench.write_to(node).unwrap());
}

#[test]
fn a_file_written_by_one_is_refused_to_the_other() {
    let dir = on_disk();
    let image = sparse(dir.path(), "a.img", 1 << 20);
    exclude_each_other("file", image.to_str().unwrap());
}

#[test]
fn a_device_written_by_one_is_refused_to_the_other() {
    let dir = on_tmpfs();
    let device = Loop::new(&sparse(dir.path(), "backing", 1 << 20), &[]);
    exclude_each_other("host_device", &device.0);
}

#[test]
fn a_storage_daemon_and_this_one_refuse_each_others_disk() {
    let dir = on_disk();
    let image = sparse(dir.path(), "a.img", 1 << 20);
    let (socket, pid) = (dir.path().join("nbd.sock"), dir.path().join("pid"));
    let daemon = || {
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--blockdev", &format!("file,node-name=f,filename={}", image.display())])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--export", "nbd,id=e,node-name=f,writable=on"])
            .arg("--pidfile")
            .arg(&pid)
            .stderr(Stdio::piped());
        command
    };
    let options = format!("driver=file,filename={}", image.display());
    let bench = Bench::new();
    let disk = bench.disk(&options).unwrap();
    let refused = daemon().output().expect("qemu-storage-daemon runs");
    assert!(!refused.status.success());
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(stderr.contains("Failed to get"), "{stderr}");
    drop(disk);

    let mut running = daemon().spawn().unwrap();
    while !pid.exists() {
        assert!(running.try_wait().unwrap().is_none(), "qemu-storage-daemon ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    let bench = Bench::new();
    let result = bench.disk(&options).map(|_| ());
    running.kill().unwrap();
    running.wait().unwrap();
    // It writes, and would let others write; we would not.
    assert_eq!(result.unwrap_err().to_string(), "Failed to get shared \"write\" lock");
}

#[test]
fn without_locking_nobody_is_refused_and_nobody_refuses() {
    let dir = on_disk();
    let image = sparse(dir.path(), "a.img", 1 << 20);
    let options = format!("driver=file,filename={}", image.display());
    let _theirs = QemuIo::open(
        &[],
        &format!("driver=raw,file.driver=file,file.filename={}", image.display()),
    );
    let bench = Bench::new();
    bench.disk(&options).map(|_| ()).unwrap_err();
    let bench = Bench::new();
    let _disk = bench.disk(&format!("{options},locking=off")).unwrap();
}

#[test]
fn a_forced_share_reads_beside_a_writer() {
    let dir = on_disk();
    let image = sparse(dir.path(), "a.img", 1 << 20);
    let raw = format!("driver=raw,file.driver=file,file.filename={}", image.display());
    let _theirs = QemuIo::open(&[], &raw);
    let bench = Bench::new();
    let options =
        format!("driver=file,filename={},read-only=on,force-share=on,node-name=a", image.display());
    let node = bench.node(&options).unwrap();
    let perms = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
    let _attachment = bench.graph.attach(&node, "test", perms, None).unwrap();
    let bytes = bench.run(move || async move { read(&node, 0, 512).await });
    assert_eq!(bytes, Ok(vec![0; 512]));
}
