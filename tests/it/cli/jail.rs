//! Root directories that hold only the program, its libraries and images.
//!
//! There is no /proc, /sys, /dev, /tmp or /etc. Commands that serve disks or work on images work there.

use super::process::EndPid;
use super::{VUBLK, directory, end, run, stderr, use_disk};
use crate::monitor::Client;
use crate::namespace;
use crate::vhost_user::LIMIT;
use serde_json::json;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use vublk_testkit::Server;

/// A root of its own, with `disk.img` of 1 MiB.
struct Jail(tempfile::TempDir);

impl Jail {
    fn new() -> Jail {
        let dir = directory();
        let libraries = Command::new("ldd").arg(VUBLK).output().unwrap().stdout;
        let libraries = String::from_utf8(libraries).unwrap();
        let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
        for file in libraries {
            let copy = dir.path().join(file.trim_start_matches('/'));
            std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
            std::fs::copy(file, copy).unwrap();
        }
        std::fs::copy(VUBLK, dir.path().join("vublk")).unwrap();
        Jail(dir)
    }

    /// The program in there.
    fn vublk(&self, arguments: &[&str]) -> Command {
        let mut root = std::ffi::OsString::from("--root=");
        root.push(self.0.path());
        let unshare = namespace::unshare();
        let mut command = Command::new(unshare[0]);
        command.args(&unshare[1..]).arg(root).arg("/vublk").args(arguments);
        command.env_remove("RUST_LOG").env("LC_ALL", "C").env("TMPDIR", "/");
        command
    }

    /// A tool that works there.
    fn tool(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{arguments:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn output(&self, arguments: &[&str]) -> Output {
        self.vublk(arguments).stdin(Stdio::null()).output().unwrap()
    }

    /// A file in there, as it is called outside.
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn start(&self, arguments: &[&str], socket: &str) -> Server {
        let mut command = self.vublk(arguments);
        command.stdout(Stdio::null());
        let mut server = Server::spawn(command).unwrap();
        server.wait_socket(&self.path(socket), LIMIT).unwrap();
        server
    }
}

/// What cannot be had without /proc, which names the other threads.
const MISSING: &str = "files are not confined (/proc/self/task: No such file or directory)";

#[test]
fn a_disk_is_served_where_there_is_nothing_but_the_program_and_the_image() {
    let jail = Jail::new();
    let serve = ["serve", "-f", "raw", "/disk.img", "--socket", "/s", "--metrics", "unix:/m"];
    let server = jail.start(&serve, "s");
    use_disk(&jail.path("s"));
    use_disk(&jail.path("s"));
    let page = crate::metrics::page(crate::metrics::connect(&jail.path("m")));
    assert!(page.contains("vublk_export_size_bytes"), "{page}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    assert!(status.contains("Seccomp:\t2"), "system calls are confined all the same: {status}");
    let said = end(server);
    assert!(said.ends_with(&format!("sandbox: {MISSING}\n")), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(!jail.path("s").exists() && !jail.path("m").exists());

    let output = jail.output(&[&serve[..], &["--sandbox", "on"]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), format!("vublk: --sandbox on: {MISSING}\n"));

    jail.tool(&["create", "-q", "-f", "qcow2", "/disk.qcow2", "1M"]);
    for more in [&[][..], &["--snapshot"], &["--sandbox", "off"]] {
        let serve = ["serve", "-f", "qcow2", "/disk.qcow2", "--socket", "/s"];
        let server = jail.start(&[&serve[..], more].concat(), "s");
        use_disk(&jail.path("s"));
        end(server);
    }
    assert!(jail.tool(&["check", "/disk.qcow2"]).starts_with("No errors were found"));
}

#[test]
fn a_daemon_goes_to_the_background_and_has_a_monitor_where_there_is_nothing_else() {
    let jail = Jail::new();
    jail.tool(&[
        "daemon",
        "--daemonize",
        "--pidfile=/pid",
        "--blockdev=driver=file,filename=/disk.img,node-name=d0",
        "--export=type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=/s,writable=on",
        "--chardev=socket,id=c,path=/m.sock,server=on,wait=off",
        "--monitor=chardev=c",
    ]);
    let pid = std::fs::read_to_string(jail.path("pid")).unwrap();
    let daemon = EndPid(pid.trim().parse().unwrap());
    use_disk(&jail.path("s"));
    let mut client = Client::connect(&jail.path("m.sock"));
    let done = json!({"return": {}});
    assert_eq!(client.ask("block_resize", json!({"node-name": "d0", "size": 2 << 20})), done);
    let more = json!({"driver": "file", "filename": "/disk.img", "node-name": "d1",
        "read-only": true, "force-share": true});
    assert_eq!(client.ask("blockdev-add", more), done);
    assert_eq!(client.ask("quit", json!({})), done);
    let began = std::time::Instant::now();
    while jail.path("pid").exists() {
        assert!(began.elapsed() < LIMIT);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    drop(daemon);
}

#[test]
fn tools_work_where_there_is_nothing_but_the_program_and_the_images() {
    let jail = Jail::new();
    jail.tool(&["io", "-f", "raw", "-c", "write -P 7 64k 64k", "/disk.img"]);
    jail.tool(&["io", "-s", "-f", "raw", "-c", "write -P 8 64k 64k", "/disk.img"]);
    jail.tool(&["convert", "-p", "-f", "raw", "-O", "qcow2", "/disk.img", "/a.qcow2"]);
    jail.tool(&["convert", "-c", "-O", "qcow2", "/a.qcow2", "/c.qcow2"]);
    jail.tool(&["compare", "-f", "raw", "/disk.img", "/c.qcow2"]);
    jail.tool(&["create", "-q", "-f", "qcow2", "-b", "/a.qcow2", "-F", "qcow2", "/b.qcow2"]);
    jail.tool(&["snapshot", "-c", "s", "/a.qcow2"]);
    jail.tool(&["resize", "-q", "/a.qcow2", "2M"]);
    jail.tool(&["io", "-c", "write -P 9 0 64k", "/b.qcow2"]);
    jail.tool(&["rebase", "-b", "/c.qcow2", "-F", "qcow2", "/b.qcow2"]);
    jail.tool(&["commit", "-q", "/b.qcow2"]);
    for image in ["/a.qcow2", "/b.qcow2", "/c.qcow2"] {
        assert!(jail.tool(&["check", image]).starts_with("No errors were found"));
        assert!(jail.tool(&["info", image]).contains("file format: qcow2"));
        jail.tool(&["map", "--output=json", image]);
        jail.tool(&["measure", "-O", "raw", image]);
    }
    jail.tool(&["dd", "if=/c.qcow2", "of=/d.img", "bs=64k", "count=2"]);
    let copied = std::fs::read(jail.path("d.img")).unwrap();
    assert!(copied == [[9; 65536], [7; 65536]].concat(), "the bytes that were written");
}

/// With /proc of another PID namespace the threads' numbers are wrong ones.
#[test]
fn threads_are_not_looked_for_in_the_list_of_another_namespace() {
    let dir = directory();
    let program = [namespace::unshare(), vec!["--pid", "--fork", "--kill-child", VUBLK]].concat();
    let serve = ["serve", "-f", "raw", "disk.img", "--socket", "s", "--sandbox", "on"];
    let output = run(dir.path(), &program, &serve);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    let words = "--sandbox on: files are not confined (/proc is of other processes)\n";
    assert!(said.ends_with(words) && said.lines().count() == 1, "{said}");
}

/// A real-time signal is refused when too many wait already: then no thread can be asked.
#[test]
fn a_first_thread_that_cannot_be_asked_leaves_files_unconfined_and_reported() {
    let dir = directory();
    let program = ["prlimit", "--sigpending=0", VUBLK];
    let serve = ["serve", "-f", "raw", "disk.img", "--socket", "s", "--sandbox", "on"];
    let output = run(dir.path(), &program, &serve);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let words = "--sandbox on: files are not confined (Resource temporarily unavailable)\n";
    assert!(said.ends_with(words) && said.lines().count() == 1, "{said}");
}
