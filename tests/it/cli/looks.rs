//! Messages about the likely format of an image, where none is named or the wrong one.

use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};
use vublk_testkit::Server;

use super::end;
use super::serve::{assert_refused, serve};
use super::{VUBLK, run, stderr};
use crate::monitor::Client;
use crate::vhost_user::LIMIT;

/// Images by name: what each looks like, as QEMU's tools make them.
const LOOKS: [(&str, &str); 6] = [
    ("q.qcow2", "qemu-img create -q -f qcow2 q.qcow2 1M"),
    ("v.vmdk", "qemu-img create -q -f vmdk v.vmdk 1M"),
    ("v.vdi", "qemu-img create -q -f vdi v.vdi 1M"),
    ("luks", "printf 'LUKS\\272\\276\\0\\001' > luks; truncate -s 1M luks"),
    ("plain", "truncate -s 1M plain"),
    ("empty", "touch empty"),
];

fn directory_of_looks() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (_, made) in LOOKS {
        assert!(run(dir.path(), &["sh", "-c", made], &[]).status.success(), "{made}");
    }
    dir
}

/// Ends a server: what it said until then, `wanted` among it.
fn said_by(mut server: Server, wanted: &str) -> String {
    server.signal(libc::SIGTERM).unwrap();
    assert!(server.wait_exit(LIMIT).unwrap().success(), "{}", server.stderr());
    // The last lines may come through after the end is known.
    let began = Instant::now();
    while !server.stderr().contains(wanted) {
        assert!(began.elapsed() < LIMIT, "{wanted}: {}", server.stderr());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    server.stderr()
}

#[test]
fn an_image_whose_format_is_not_given_is_refused_with_what_it_looks_like() {
    let dir = directory_of_looks();
    for (image, wanted) in [
        ("q.qcow2", "q.qcow2 looks like qcow2: use -f qcow2 (never guessed, because a guest can"),
        ("v.vmdk", "v.vmdk looks like vmdk: use -f vmdk (never guessed, because a guest can"),
        ("v.vdi", "v.vdi looks like vdi: use -f vdi (never guessed, because a guest can"),
        ("luks", "luks looks like luks: use -f luks (never guessed, because a guest can"),
        ("plain", "plain looks like no format but plain bytes: use -f raw (never guessed"),
        ("empty", "empty is empty: make an image first"),
        ("nothere", "nothere: Could not open 'nothere': No such file"),
    ] {
        let before = std::fs::read(dir.path().join(image)).ok();
        let output = run(dir.path(), &[VUBLK, "serve"], &[image, "--socket", "s"]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{image}: {said}");
        assert!(said.starts_with(&format!("vublk: {wanted}")), "{image}: {said}");
        assert_eq!(said.lines().count(), 1, "{image}: {said}");
        assert_eq!(said.contains("-f raw"), image == "plain", "{image}: {said}");
        assert_eq!(std::fs::read(dir.path().join(image)).ok(), before, "{image}");
    }
}

#[test]
fn an_image_that_another_process_has_locked_is_looked_at_all_the_same() {
    let dir = directory_of_looks();
    let server = serve(dir.path(), &["-f", "qcow2", "q.qcow2", "--socket", "s"]);
    assert_refused(dir.path(), &["q.qcow2", "--socket", "t"], "use -f qcow2");
    end(server);
}

#[test]
fn serving_as_raw_what_looks_like_a_format_or_is_empty_is_warned_of() {
    let dir = directory_of_looks();
    for (image, wanted) in [
        ("q.qcow2", Some("q.qcow2 looks like qcow2 but is served as raw")),
        ("v.vmdk", Some("v.vmdk looks like vmdk but is served as raw")),
        ("v.vdi", Some("v.vdi looks like vdi but is served as raw")),
        ("luks", Some("luks looks like luks but is served as raw")),
        ("plain", None),
        ("empty", Some("empty is empty: the guest finds a disk of no bytes")),
    ] {
        for mode in [&[][..], &["--snapshot"], &["--read-only"], &["--incoming"]] {
            let arguments = [&["-f", "raw", image, "--socket", "s"], mode].concat();
            let said = said_by(serve(dir.path(), &arguments), wanted.unwrap_or_default());
            assert_eq!(said.lines().count(), usize::from(wanted.is_some()), "{image}: {said}");
        }
    }
    let right = serve(dir.path(), &["-f", "qcow2", "q.qcow2", "--socket", "s"]);
    assert_eq!(said_by(right, ""), "");
}

/// Nodes by the file that they stand on, and whether its bytes are a guest's disk there.
fn nodes(image: &str) -> Vec<(Value, bool)> {
    let file = json!({"driver": "file", "filename": image});
    let raw = json!({"driver": "raw", "file": file});
    let blkdebug = json!({"driver": "blkdebug", "image": file});
    let mut nodes = vec![
        (raw.clone(), true),
        (json!({"driver": "raw", "read-only": true, "file": file}), true),
        (json!({"driver": "raw", "file": "f"}), true),
        (json!({"driver": "copy-on-read", "file": raw}), true),
        (json!({"driver": "raw", "offset": 0, "size": 0, "file": file}), false),
        (json!({"driver": "raw", "file": blkdebug}), false),
        (file, false),
    ];
    if image.ends_with("qcow2") {
        nodes.push((json!({"driver": "qcow2", "file": raw}), false));
    }
    for (node, _) in &mut nodes {
        node["node-name"] = "n".into();
    }
    nodes
}

#[test]
fn a_daemon_warns_of_each_raw_node_once_whether_it_is_there_at_the_start_or_added() {
    let dir = directory_of_looks();
    let socket = dir.path().join("m");
    let cases = [
        ("q.qcow2", "q.qcow2 looks like qcow2 but is served as raw"),
        ("empty", "empty is empty: the guest finds a disk of no bytes"),
    ];
    for (image, words) in cases {
        for (node, is_disk) in nodes(image) {
            for at_start in [true, false] {
                let mut command = Command::new(VUBLK);
                command.current_dir(dir.path());
                command.args(["daemon", "--chardev", "socket,id=m,path=m,server=on,wait=off"]);
                let file = format!("driver=file,node-name=f,filename={image}");
                command.args(["--monitor", "chardev=m", "--blockdev", &file]);
                if at_start {
                    command.args(["--blockdev", &node.to_string()]);
                }
                let mut server = Server::spawn(command).unwrap();
                server.wait_socket(&socket, LIMIT).unwrap();
                if !at_start {
                    let added = Client::connect(&socket).ask("blockdev-add", node.clone());
                    assert_eq!(added, json!({"return": {}}), "{node}");
                }
                let said = said_by(server, if is_disk { words } else { "" });
                assert_eq!(said.matches(words).count(), usize::from(is_disk), "{node}: {said}");
            }
        }
    }
}
