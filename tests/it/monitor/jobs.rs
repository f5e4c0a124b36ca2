//! Jobs, and images that `blockdev-create` makes: as `qemu-storage-daemon` says and does it.

use super::beside_qsd::both;
use super::{Client, MONITOR};
use crate::vhost_user::{Daemon, LIMIT};
use serde_json::{Value, json};
use std::process::Command;
use std::time::{Duration, Instant};

/// What comes of one `blockdev-create`: the reply, what the job becomes until it is concluded, its listings
/// then, and the reply to its dismissal.
fn create(client: &mut Client, options: &Value) -> Vec<Value> {
    let mut said = vec![client.ask("blockdev-create", json!({"job-id": "j", "options": options}))];
    if said[0].get("error").is_some() {
        return said;
    }
    said.extend(statuses(client, "concluded"));
    said.push(client.run("query-jobs", json!({})));
    said.push(client.ask("job-dismiss", json!({"id": "j"})));
    said.extend(statuses(client, "null"));
    said.push(client.run("query-jobs", json!({})));
    said
}

/// The states of the job `j` up to this one.
fn statuses(client: &mut Client, last: &str) -> Vec<Value> {
    let mut all = Vec::new();
    while all.last() != Some(&json!(last)) {
        let event = client.event();
        assert_eq!(
            (&event["event"], &event["data"]["id"]),
            (&"JOB_STATUS_CHANGE".into(), &"j".into())
        );
        all.push(event["data"]["status"].clone());
    }
    all
}

#[test]
fn images_are_created_and_refused_by_jobs_as_qemu_does_it() {
    let daemons = both();
    let mut clients = [0, 1].map(|i| Client::connect(&daemons[i].path("m.sock")));
    let file = |more: Value| {
        let mut options = json!({"driver": "file", "filename": "DIR/new.img", "size": 1 << 20});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    let qcow2 = |more: Value| {
        let mut options = json!({"driver": "qcow2", "file": "f", "size": 1 << 20});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    let all = [
        file(json!({})),
        file(json!({"size": 1048577})),
        file(json!({"size": 0, "preallocation": "falloc", "nocow": true})),
        file(json!({"preallocation": "full", "extent-size-hint": 4096})),
        file(json!({"filename": "/nonexistent/x"})),
        file(json!({"size": "1M"})),
        file(json!({"foo": 1})),
        json!({"driver": "file", "size": 1}),
        json!({"driver": "file", "filename": "x"}),
        json!({"size": 1}),
        json!(7),
        json!({"driver": "nosuch"}),
        json!({"driver": "raw"}),
        json!({"driver": "raw", "size": 1}),
        json!({"driver": "host_device"}),
        json!({"driver": "copy-on-read"}),
        qcow2(json!({})),
        qcow2(json!({"cluster-size": 4096, "refcount-bits": 1, "lazy-refcounts": true})),
        qcow2(json!({"extended-l2": true, "compression-type": "zstd", "version": "v3"})),
        qcow2(json!({"preallocation": "metadata"})),
        qcow2(json!({"version": "v2"})),
        qcow2(json!({"backing-file": "/nonexistent/x", "backing-fmt": "raw"})),
        qcow2(json!({"backing-file": "/nonexistent/x"})),
        qcow2(json!({"backing-fmt": "raw"})),
        qcow2(json!({"backing-file": "x", "backing-fmt": "nosuch"})),
        qcow2(json!({"cluster-size": 1000})),
        qcow2(json!({"refcount-bits": 7})),
        qcow2(json!({"version": "v2", "refcount-bits": 1})),
        qcow2(json!({"version": "v2", "lazy-refcounts": true})),
        qcow2(json!({"version": "v4"})),
        qcow2(json!({"compression-type": "bzip"})),
        qcow2(json!({"cluster-size": 4096, "extended-l2": true})),
        qcow2(json!({"data-file-raw": true})),
        qcow2(json!({"data-file": "g"})),
        qcow2(json!({"data-file": "nonode"})),
        qcow2(json!({"size": 1048577})),
        qcow2(json!({"file": "nonode"})),
        qcow2(json!({"file": "ro"})),
        qcow2(json!({"file": {"driver": "file", "filename": "DIR/b.img"}})),
        qcow2(json!({"file": {"driver": "file", "filename": "/nonexistent/x"}})),
        json!({"driver": "qcow2", "size": 1}),
        json!({"driver": "qcow2", "file": "f"}),
    ];
    for (client, daemon) in clients.iter_mut().zip(&daemons) {
        let add = |name: &str, file: &str, read_only: bool| json!({"driver": "file", "node-name": name, "filename": daemon.path(file), "read-only": read_only});
        client.run("blockdev-add", add("f", "a.img", false));
        client.run("blockdev-add", add("ro", "a.img", true));
        std::fs::write(daemon.path("data.img"), [7; 4096]).unwrap();
        client.run("blockdev-add", add("g", "data.img", false));
    }
    let mut differences = Vec::new();
    for options in all {
        let [(ours, info), (theirs, their_info)] = [0, 1].map(|i| {
            let dir = daemons[i].path("").to_str().unwrap().trim_end_matches('/').to_owned();
            let options = serde_json::from_str(&options.to_string().replace("DIR", &dir)).unwrap();
            let said = create(&mut clients[i], &options);
            let said = Value::from(said).to_string().replace(&dir, "DIR");
            (said, info(&daemons[i]).replace(&dir, "DIR"))
        });
        if ours != theirs || info != their_info {
            differences.push(format!(
                "{options}\n  ours:   {ours}\n  theirs: {theirs}\n{info}\n{their_info}"
            ));
        }
    }
    assert!(differences.is_empty(), "\n{}", differences.join("\n"));
}

/// What QEMU finds in the image that was made last on the node `f`, and that it finds nothing wrong.
fn info(daemon: &Daemon) -> String {
    let path = daemon.path("a.img");
    let run = |arguments: &[&str]| {
        let output =
            Command::new("qemu-img").args(arguments).arg("-U").arg(&path).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(&["info"]);
    // A backing file that is not there keeps QEMU from opening the image.
    if text.contains("file format: qcow2") && !text.contains("backing file") {
        run(&["check", "-q"]);
    }
    // Theirs may have put other bytes behind the tables.
    text.lines().filter(|line| !line.starts_with("disk size")).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_a_job_does_not_allow_in_its_state_is_refused_as_qemu_does_it() {
    let daemons = both();
    let mut said = [0, 1].map(|i| {
        let mut client = Client::connect(&daemons[i].path("m.sock"));
        let options =
            json!({"driver": "file", "filename": daemons[i].path("new.img"), "size": 512});
        client.run("blockdev-create", json!({"job-id": "j", "options": options}));
        statuses(&mut client, "concluded");
        let mut said = Vec::new();
        for (command, arguments) in [
            ("job-pause", json!({"id": "j"})),
            ("job-resume", json!({"id": "j"})),
            ("job-cancel", json!({"id": "j"})),
            ("job-complete", json!({"id": "j"})),
            ("job-finalize", json!({"id": "j"})),
            ("job-pause", json!({"id": "nope"})),
            ("job-dismiss", json!({"id": "nope"})),
            ("job-pause", json!({})),
            ("job-pause", json!({"id": "j", "foo": 1})),
            ("query-jobs", json!({"foo": 1})),
            ("blockdev-create", json!({"job-id": "j", "options": options})),
            ("blockdev-create", json!({"job-id": "1 x", "options": options})),
            ("blockdev-create", json!({"job-id": "", "options": options})),
            ("blockdev-create", json!({"job-id": 7, "options": options})),
            ("blockdev-create", json!({"options": options})),
            ("blockdev-create", json!({"job-id": "k"})),
            ("job-dismiss", json!({"id": "j"})),
            ("job-dismiss", json!({"id": "j"})),
        ] {
            said.push((command, client.ask(command, arguments)));
        }
        said
    });
    let theirs = said[1].split_off(0);
    assert_eq!(said[0], theirs);
}

#[test]
fn clusters_that_have_their_place_from_the_start_read_as_zeroes_whatever_the_file_had() {
    let daemon = Daemon::start(&MONITOR);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let stale = daemon.path("stale.img");
    for mode in ["metadata", "falloc", "full"] {
        std::fs::write(&stale, vec![7; 4 << 20]).unwrap();
        let options = json!({
            "driver": "qcow2", "size": 1 << 20, "preallocation": mode,
            "file": {"driver": "file", "filename": stale},
        });
        let said = create(&mut client, &options);
        assert_eq!(said.last(), Some(&json!([])), "{said:?}");
        assert_eq!(client.run("query-named-block-nodes", json!({})), json!([]));
        let read = ["-r", "-c", "read -P 0 0 1M"];
        let output = Command::new("qemu-io").args(read).arg(&stale).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && !text.contains("failed"), "{mode}: {text}");
    }
}

#[test]
fn a_second_signal_ends_a_daemon_whose_job_has_hung() {
    let mut daemon = super::daemon(&[]);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let hour = 3_600_000_000_000u64;
    client.run(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "f", "size": 8 << 20, "latency-ns": hour}),
    );
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"}));
    let options = json!({"driver": "qcow2", "file": "f", "size": 1 << 20});
    client.run("blockdev-create", json!({"job-id": "j", "options": options}));
    statuses(&mut client, "running");
    daemon.server.signal(libc::SIGTERM).unwrap();
    let limit = Instant::now() + LIMIT;
    while !daemon.server.stderr().contains("another signal ends the program") {
        assert!(Instant::now() < limit, "{}", daemon.server.stderr());
        std::thread::sleep(Duration::from_millis(10));
    }
    daemon.server.signal(libc::SIGTERM).unwrap();
    assert!(daemon.server.wait_exit(LIMIT).unwrap().success());
    assert!(daemon.server.stderr().contains("ended while the storage has not answered"));
}
