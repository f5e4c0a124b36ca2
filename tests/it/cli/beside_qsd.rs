//! Wrong command lines to `vublk daemon` and to the real `qemu-storage-daemon`.
//!
//! Exit codes and words are the same, the program's name apart. Skipped, with a message, where that program is not
//! installed.

use super::{VUBLK, directory, run, stderr};

const THEIRS: &str = "qemu-storage-daemon";

/// The node that most lines need, and the fixed part of its export.
const NODE: &str = "driver=file,node-name=d0,filename=disk.img";
const EXPORT: &str = "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=s.sock";

/// Runs both; gives exit code and standard error of each, without the program's name.
fn both(arguments: &[&str]) -> [(Option<i32>, String); 2] {
    [(&[VUBLK, "daemon"][..], "vublk: "), (&[THEIRS][..], "qemu-storage-daemon: ")].map(
        |(program, name)| {
            let dir = directory();
            let output = run(dir.path(), program, arguments);
            let said = stderr(&output);
            (output.status.code(), said.strip_prefix(name).unwrap_or(&said).to_owned())
        },
    )
}

#[test]
fn wrong_command_lines_are_refused_in_the_same_words() {
    let export = |more: &str| format!("{EXPORT},{more}");
    let lines: Vec<Vec<String>> = [
        // The options themselves.
        vec!["--bogus"],
        vec!["-x"],
        vec!["--blockdev"],
        vec!["--export"],
        vec!["--object"],
        vec!["--pidfile"],
        vec!["--daemonize=1"],
        vec!["foo"],
        vec!["--blockdev", "driver=null-co,node-name=a", "foo"],
        vec!["--blockdev", "driver=bogus,node-name=a", "foo"],
        // The order.
        vec!["--export", EXPORT, "--blockdev", NODE],
        // Nodes.
        vec!["--blockdev", NODE, "--blockdev", NODE],
        vec!["--blockdev", "driver=bogus,node-name=d0"],
        vec!["--blockdev", "node-name=d0"],
        vec!["--blockdev", "driver=file,filename=disk.img"],
        vec!["--blockdev", "driver=file,node-name=d0"],
        vec!["--blockdev", "driver=file,node-name=1bad,filename=disk.img"],
        vec!["--blockdev", "driver=file,node-name=d0,filename=nothere"],
        vec!["--blockdev", "driver=file,node-name=d0,filename=disk.img,bogus=1"],
        vec!["--blockdev", "driver=file,node-name=d0,filename=disk.img,aio=bogus"],
        vec!["--blockdev", "driver=file,node-name=d0,filename=disk.img,read-only=perhaps"],
        vec!["--blockdev", "driver=raw,node-name=d0,file=nope"],
        vec!["--blockdev", "driver=raw,node-name=d0"],
        vec!["--blockdev", "driver=file,node-name=d0,filename=/"],
        vec!["--blockdev", "driver=blkdebug,node-name=d0"],
        vec!["--blockdev", "driver=blkdebug,node-name=d0,image=nope"],
        vec!["--blockdev", "driver=blkdebug,node-name=d0,image.driver=null-co,bogus=1"],
        vec!["--blockdev", "driver=blkdebug,node-name=d0,image.driver=null-co,filename=a"],
        vec!["--blockdev", "driver=blkdebug,node-name=d0,image.driver=null-co,align=1000"],
        vec!["--blockdev", "driver=blkdebug,node-name=d0,image.driver=null-co,align=4k"],
        vec![
            "--blockdev",
            "driver=blkdebug,node-name=d0,image.driver=null-co,align=4096,max-transfer=1024",
        ],
        vec![
            "--blockdev",
            "driver=blkdebug,node-name=d0,image.driver=null-co,opt-write-zero=8192,max-write-zero=1",
        ],
        vec!["--blockdev", "driver=blkdebug,node-name=d0,image.driver=null-co,config=nope"],
        vec!["--blockdev", "driver=blkdebug,node-name=d0,image.driver=null-co,inject-error=x"],
        vec![
            "--blockdev",
            "driver=blkdebug,node-name=d0,image.driver=null-co,inject-error.0.event=bogus",
        ],
        vec![
            "--blockdev",
            "driver=blkdebug,node-name=d0,image.driver=null-co,inject-error.0.iotype=read",
        ],
        vec![
            "--blockdev",
            "driver=blkdebug,node-name=d0,image.driver=null-co,set-state.0.event=none",
        ],
        vec![
            "--blockdev",
            "driver=blkdebug,node-name=d0,read-only=on,image.driver=null-co,take-child-perms.0=write",
        ],
        vec!["--blockdev", "driver=copy-on-read,node-name=d0"],
        vec!["--blockdev", "driver=copy-on-read,node-name=d0,file.driver=null-co,bogus=1"],
        vec!["--blockdev", "driver=copy-on-read,node-name=d0,file.driver=null-co,bottom=nope"],
        vec!["--blockdev", "driver=copy-on-read,node-name=d0,file.driver=null-co,bottom=d0"],
        vec!["--blockdev", "driver=copy-on-read,node-name=d0,file.driver=null-co,read-only=on"],
        vec!["--blockdev", "driver=preallocate,node-name=d0"],
        vec!["--blockdev", "driver=preallocate,node-name=d0,file=nope"],
        vec!["--blockdev", "driver=preallocate,node-name=d0,file.driver=null-co,bogus=1"],
        vec!["--blockdev", "driver=preallocate,node-name=d0,file.driver=null-co,prealloc-size=1M"],
        vec!["--blockdev", "driver=preallocate,node-name=d0,file.driver=null-co,prealloc-align=1000"],
        vec!["--blockdev", "{"],
        vec!["--blockdev", "{\"driver\":\"null-co\"}"],
        vec!["--blockdev", "{\"driver\":\"null-co\",\"node-name\":1}"],
        vec!["--blockdev", ""],
        vec!["--blockdev", "a.b=1,a=2"],
        // Objects.
        vec!["--object", "bogus,id=a"],
        vec!["--object", "iothread"],
        vec!["--object", "id=a"],
        vec!["--object", "iothread,id=1x"],
        vec!["--object", "iothread,id=a,bogus=1"],
        vec!["--object", "iothread,id=a,poll-max-ns=x"],
        vec!["--object", "iothread,id=a", "--object", "iothread,id=a"],
        vec!["--object", "{\"qom-type\":\"iothread\"}"],
        // The process.
        vec!["--blockdev", NODE, "--pidfile", "nodir/pid"],
        vec!["--blockdev", NODE, "--pidfile", "/"],
        vec!["--blockdev", "driver=bogus,node-name=a", "--daemonize"],
    ]
    .into_iter()
    .map(|line| line.into_iter().map(str::to_owned).collect())
    .chain(
        // Exports of a good node.
        [
            EXPORT.replace("node-name=d0", "node-name=zz"),
            EXPORT.replace("id=e0", "id=1bad"),
            EXPORT.replace("id=e0,", ""),
            EXPORT.replace("node-name=d0,", ""),
            EXPORT.replace("type=vhost-user-blk", "type=bogus"),
            EXPORT.replace("type=vhost-user-blk,", ""),
            EXPORT.replace(",addr.path=s.sock", ""),
            EXPORT.replace("addr.type=unix", "addr.type=bogus"),
            EXPORT.replace("addr.type=unix,", ""),
            EXPORT.replace("s.sock", "nodir/s.sock"),
            EXPORT.replace("s.sock", &"x".repeat(120)),
            EXPORT.replace(",addr.type=unix,addr.path=s.sock", ""),
            EXPORT.replace("addr.type=unix,addr.path=s.sock", "addr=x"),
            EXPORT.replace("addr.type=unix,addr.path=s.sock", "addr.type=fd,addr.str=99"),
            EXPORT.replace("addr.type=unix,addr.path=s.sock", "addr.type=fd,addr.str=0"),
            EXPORT.replace("addr.type=unix,addr.path=s.sock", "addr.type=fd,addr.str=abc"),
            EXPORT.replace(
                "addr.type=unix,addr.path=s.sock",
                "addr.type=inet,addr.host=::1,addr.port=1",
            ),
            export("num-queues=0"),
            export("num-queues=-1"),
            export("num-queues=x"),
            export("num-queues=100000"),
            export("logical-block-size=1000"),
            export("logical-block-size=256"),
            export("logical-block-size=4M"),
            export("iothread=nope"),
            export("writable=maybe"),
            export("bogus=1"),
        ]
        .into_iter()
        .map(|export| ["--blockdev", NODE, "--export", &export].map(str::to_owned).to_vec()),
    )
    .chain([
        ["--blockdev", NODE, "--export", EXPORT, "--export", EXPORT].map(str::to_owned).to_vec(),
        ["--blockdev", &format!("{NODE},read-only=on"), "--export", &export("writable=on")]
            .map(str::to_owned)
            .to_vec(),
    ])
    .collect();
    let mut differences = Vec::new();
    for line in &lines {
        let arguments: Vec<&str> = line.iter().map(String::as_str).collect();
        let [ours, theirs] = both(&arguments);
        assert_eq!(theirs.0, Some(1), "{line:?} was meant to be wrong: {}", theirs.1);
        if ours != theirs {
            differences.push(format!("{line:?}\n  ours   {ours:?}\n  theirs {theirs:?}"));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Where we differ on purpose: what we lack says so, and what they crash on is refused.
#[test]
fn what_is_not_available_says_so_and_exits_with_one() {
    for (line, words) in [
        (["--trace", "enable=*"], "this option is not available"),
        (["--chardev", "null,id=a"], "character devices of type 'null' are not available"),
        (["--nbd-server", "addr.type=unix,addr.path=x,tls-creds=t"], "TLS is not available"),
        (["--object", "throttle-group,id=a"], "objects of type 'throttle-group' are not available"),
        (["--blockdev", "driver=null-co,node-name=a,size=-1"], "Parameter 'size' expects"),
    ] {
        let dir = directory();
        let output = run(dir.path(), &[VUBLK, "daemon"], &line);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with(&format!("vublk: {} {}: ", line[0], line[1])), "{said}");
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn help_goes_to_standard_output_and_is_a_success() {
    for (line, words) in [
        (&["--help"][..], "--blockdev"),
        (&["-h"], "--export"),
        (&["--version"], "qemu-storage-daemon version 7.2"),
        (&["-V"], "vublk"),
        (&["--blockdev", "help"], "  file\n"),
        (&["--blockdev", "driver=file,help"], "filename="),
        (&["--blockdev", "null-co,help"], "latency-ns="),
        (&["--export", "help"], "vhost-user-blk"),
        (&["--object", "help"], "iothread"),
        (&["--object", "iothread,help"], "poll-max-ns"),
    ] {
        let output = run(std::path::Path::new("/"), &[VUBLK, "daemon"], line);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()), "{line:?}");
        assert!(text.contains(words), "{line:?}: {text}");
    }
}

#[test]
fn right_command_lines_serve_in_both_forms_of_options() {
    use crate::vhost_user::Daemon;
    let file = "DIR/disk.img";
    let keyval = format!("driver=raw,node-name=d0,file.driver=file,file.filename={file}");
    let json = format!(
        r#"{{"driver":"raw","node-name":"d0","file":{{"driver":"file","filename":"{file}"}}}}"#
    );
    let implied = format!("raw,node-name=d0,file.driver=file,file.filename={file}");
    let export = |more: &str| {
        format!("type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=DIR/e0.sock{more}")
    };
    let json_export = r#"{"type":"vhost-user-blk","id":"e0","node-name":"d0","writable":true,
        "addr":{"type":"unix","path":"DIR/e0.sock"},"num-queues":4,"iothread":"io0"}"#;
    for (node, export) in [
        (&keyval, export("")),
        (&json, export(",writable=on,iothread=io0")),
        (&implied, export(",writable=yes,num-queues=2,logical-block-size=4k")),
        (&keyval, json_export.to_owned()),
        (&keyval, export(",logical-block-size=0")),
    ] {
        let mut daemon = Daemon::start(&[
            "--object",
            "iothread,id=io0",
            "--blockdev",
            node,
            "--export",
            &export,
        ]);
        daemon.assert_serves(0);
        daemon.end();
    }
}
