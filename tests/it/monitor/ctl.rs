//! `vublk ctl`, and the command lines of monitors.

use super::daemon;
use crate::cli::{VUBLK, directory, run, stderr};
use crate::vhost_user::Daemon;
use vublk_testkit::Options;

#[test]
fn ctl_prints_the_result_or_one_line_and_exits_with_one() {
    let daemon = daemon(&[]);
    let socket = daemon.path("m.sock");
    let ctl = |arguments: &[&str]| {
        let dir = directory();
        let all = [&["ctl", "--socket", socket.to_str().unwrap()], arguments].concat();
        let output = run(dir.path(), &[VUBLK], &all);
        (output.status.code(), String::from_utf8(output.stdout.clone()).unwrap(), stderr(&output))
    };
    let ok = |text: &str| (Some(0), format!("{text}\n"), String::new());
    assert_eq!(ctl(&["query-block"]), ok("[]"));
    assert_eq!(
        ctl(&["blockdev-add", "driver=null-co,node-name=n,size=1M,read-zeroes=on"]),
        ok("{}")
    );
    let (_, nodes, _) = ctl(&["query-named-block-nodes", r#"{"flat": true}"#]);
    assert!(nodes.contains("\n        \"node-name\": \"n\",\n"), "{nodes}");
    assert!(nodes.contains("\"virtual-size\": 1048576"), "{nodes}");
    let failed = |text: &str| (Some(1), String::new(), format!("vublk: {text}\n"));
    let refused = ctl(&["blockdev-del", "node-name=zz"]);
    assert_eq!(refused, failed("Failed to find node with node-name='zz'"));
    assert_eq!(ctl(&["nosuch"]), failed("The command nosuch has not been found"));
    let meant = "The command query-blok has not been found. Did you mean 'query-block'?";
    assert_eq!(ctl(&["query-blok"]), failed(meant));
    let meant = "Parameter 'node-name' is missing. Did you mean 'node-name' by 'nodename'?";
    assert_eq!(ctl(&["blockdev-del", "nodename=n"]), failed(meant));
    assert_eq!(ctl(&["quit"]), ok("{}"));
}

#[test]
fn ctl_leaves_an_exports_socket_and_says_that_it_is_no_monitor() {
    let daemon = Daemon::null("size=1048576", "");
    let mut ctl = std::process::Command::new(VUBLK);
    let socket = daemon.socket(0);
    let output = ctl.arg("ctl").arg("--socket").arg(&socket).arg("query-block").output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let reported =
        format!("vublk: {} is not a monitor: is it an export's socket?\n", socket.display());
    assert!(said.contains(&reported), "{said}");
    // A guest can connect now.
    daemon.open(&Options::default()).read(0, &mut [0; 512]).unwrap();
}

#[test]
fn ctl_does_not_wait_longer_than_it_is_reported_to() {
    // It greets, and says no more.
    let dir = directory();
    let monitor = std::os::unix::net::UnixListener::bind(dir.path().join("m.sock")).unwrap();
    let greets = std::thread::spawn(move || {
        let (mut stream, _) = monitor.accept().unwrap();
        std::io::Write::write_all(&mut stream, b"{\"QMP\": {}}\r\n").unwrap();
        stream
    });
    let arguments = ["ctl", "--socket", "m.sock", "--timeout", "0.5", "query-block"];
    let output = run(dir.path(), &[VUBLK], &arguments);
    let reported =
        "vublk: m.sock: no reply within 0.5 seconds; the daemon may still do what it was told\n";
    assert_eq!((output.status.code(), &*stderr(&output)), (Some(1), reported));
    drop(greets.join());
}

#[test]
fn ctl_does_not_mind_that_nobody_reads_what_it_prints() {
    let daemon = daemon(&[]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut ctl = std::process::Command::new(VUBLK);
    ctl.args(["ctl", "--socket"]).arg(daemon.path("m.sock")).arg("query-named-block-nodes");
    let output = ctl.stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
}

#[test]
fn wrong_monitors_are_refused_in_qemus_words() {
    const CHARDEV: &str = "socket,id=m,path=m.sock,server=on,wait=off";
    for (line, words) in [
        (vec!["--monitor", "chardev=zz"], "--monitor chardev=zz: chardev \"zz\" not found"),
        (vec!["--monitor", "m", "--chardev", CHARDEV], "--monitor m: chardev \"m\" not found"),
        (vec!["--chardev", CHARDEV, "--monitor", "m,mode=readline"], "Only QMP is supported"),
        (
            vec!["--chardev", CHARDEV, "--monitor", "m,mode=x"],
            "Parameter 'mode' does not accept value 'x'",
        ),
        (
            vec!["--chardev", CHARDEV, "--monitor", "m,pretty=x"],
            "Parameter 'pretty' expects 'on' or 'off'",
        ),
        (vec!["--chardev", CHARDEV, "--monitor", "m,bogus=1"], "Parameter 'bogus' is unexpected"),
        (vec!["--chardev", CHARDEV, "--monitor", "mode=control"], "Parameter 'chardev' is missing"),
        (vec!["--chardev", CHARDEV, "--monitor", "m", "--monitor", "m"], "Device 'm' is in use"),
        (vec!["--chardev", "socket,path=m.sock"], "chardev: no id specified"),
        (vec!["--chardev", "bogus,id=m"], "'bogus' is not a valid char driver name"),
        (vec!["--chardev", "stdio,id=m"], "character devices of type 'stdio' are not available"),
        (vec!["--chardev", "id=m"], "chardev: \"m\" missing backend"),
        (vec!["--chardev", "socket,id=m,path=x,bogus=1"], "Invalid parameter 'bogus'"),
        (
            vec!["--chardev", "socket,id=m,path=x,wait=off"],
            "'wait' option is incompatible with socket in client connect mode",
        ),
        (
            vec!["--chardev", "socket,id=m,host=localhost,server=on"],
            "chardev: socket: no port given",
        ),
        (
            vec!["--chardev", "socket,id=m,host=0.0.0.0,port=1,server=on,wait=off"],
            "is not an address of the loopback interface",
        ),
        (
            vec!["--chardev", "socket,id=m,fd=0,server=on,wait=off"],
            "File descriptor '0' is not a socket",
        ),
        (
            vec!["--chardev", "socket,id=m,path=nothere/m.sock,server=on,wait=off"],
            "Failed to bind socket to nothere/m.sock: No such file or directory",
        ),
        (
            vec!["--chardev", "socket,id=m,path=nothere"],
            "Failed to connect to 'nothere': No such file or directory",
        ),
    ] {
        let dir = directory();
        let output = run(dir.path(), &[VUBLK, "daemon"], &line);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{line:?}: {said}");
        assert!(said.starts_with("vublk: --") && said.lines().count() == 1, "{said}");
        assert!(said.trim_end().ends_with(words) || said.contains(words), "{line:?}: {said}");
    }
}
