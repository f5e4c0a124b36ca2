//! The counters, compared with what a front end knows that it has done.

use vublk_testkit::request::{Range, Request};
use vublk_testkit::spec::status;
use vublk_testkit::{Options, Shape};

use super::{Scrape, daemon};
use crate::monitor::Client;
use crate::vhost_user::{LIMIT, export_of};
use serde_json::json;
use std::process::Command;
use vublk::metrics::Sample;

const FILE: &str = "driver=file,node-name=d0,filename=DIR/disk.img,discard=unmap";

fn options(num_queues: usize) -> Options {
    Options { num_queues, limit: LIMIT, ..Options::default() }
}

#[test]
fn a_scrape_tells_what_a_guest_has_done() {
    let export = format!("{},writable=on,num-queues=2", export_of("d0", 0));
    let daemon = daemon(&["--blockdev", FILE, "--export", &export]);
    let before = Scrape::of(&daemon);
    assert_eq!(before.sum("vublk_export_connected", &[("export", "e0")]), 0.0);
    assert_eq!(before.sum("vublk_export_size_bytes", &[]), (8 << 20) as f64);
    let mut disk = daemon.open(&options(2));
    for sector in 0..10 {
        disk.queue(0).read(sector, &mut [0; 512]).unwrap();
        disk.queue(1).write(sector, &[7; 1024]).unwrap();
    }
    disk.queue(1).write(100, &[7; 4096]).unwrap();
    disk.flush().unwrap();
    disk.discard(0, 16, 0).unwrap();
    disk.write_zeroes(0, 8, false).unwrap();
    disk.get_id().unwrap();
    // Past the end: failed to the guest, and no failure of the storage.
    let outside = Request::In { sector: 1 << 30, len: 512 };
    assert_eq!(disk.run(&outside).unwrap().status, status::IOERR);
    let two = vec![Range { sector: 0, sectors: 8, flags: 0 }; 2];
    assert_eq!(disk.run(&Request::Discard(two)).unwrap().status, status::UNSUPP);

    let all = |s: &Scrape| s.sum("vublk_queue_requests_total", &[("export", "e0")]) == 27.0;
    let scrape = Scrape::until(&daemon, all);
    let operations = ["read", "write", "flush", "discard", "write_zeroes", "other"];
    let figures = |figure| operations.map(|operation| scrape.operations(figure, operation));
    assert_eq!(figures("requests_total"), [11.0, 11.0, 1.0, 2.0, 1.0, 1.0]);
    assert_eq!(figures("bytes_total"), [5120.0, 14336.0, 0.0, 8192.0, 4096.0, 0.0]);
    assert_eq!(figures("errors_total"), [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]);
    assert_eq!(figures("storage_errors_total"), [0.0; 6]);
    assert_eq!(figures("latency_seconds_count"), [11.0, 11.0, 1.0, 2.0, 1.0, 1.0]);
    for operation in operations {
        let labels = [("export", "e0"), ("operation", operation), ("le", "+Inf")];
        let all = scrape.sum("vublk_queue_latency_seconds_bucket", &labels);
        assert_eq!(all, scrape.operations("latency_seconds_count", operation));
        let seconds = scrape.operations("latency_seconds_sum", operation);
        assert!(seconds > 0.0 && seconds < LIMIT.as_secs_f64(), "{operation}: {seconds} s");
    }
    // By queue.
    let queue = |name: &str, queue| scrape.sum(&format!("vublk_queue_{name}"), &[("queue", queue)]);
    assert_eq!([queue("requests_total", "0"), queue("requests_total", "1")], [16.0, 11.0]);
    for index in ["0", "1"] {
        assert_eq!(queue("in_flight", index), 0.0);
        assert_eq!(queue("held", index), 0.0);
        for name in ["kicks_total", "notifications_total", "batches_total"] {
            let n = queue(name, index);
            assert!(n >= 1.0 && n <= queue("requests_total", index), "{name}: {n}");
        }
        assert!(queue("polls_total", index) >= queue("batches_total", index));
    }
    assert_eq!(scrape.sum("vublk_export_connected", &[("export", "e0")]), 1.0);
    let path = |name| daemon.path(name).display().to_string();
    let (image, socket) = (path("disk.img"), path("e0.sock"));
    let info = [("export", "e0"), ("node", "d0"), ("writable", "on"), ("socket", &*socket)];
    let info =
        |image: &str| scrape.sum("vublk_export_info", &[&info[..], &[("image", image)]].concat());
    assert_eq!(info(&image), 1.0);
    assert!(scrape.sum("process_resident_memory_bytes", &[]) > 1e6);
    assert!(scrape.sum("process_cpu_seconds_total", &[]) > 0.0);
    assert!(scrape.sum("process_start_time_seconds", &[]) > 1.6e9);
}

#[test]
fn counters_go_on_when_a_front_end_comes_back_and_end_with_their_export() {
    let export = |number| format!("{},writable=on", export_of("d0", number));
    let daemon = daemon(&["--blockdev", FILE, "--export", &export(0), "--export", &export(1)]);
    for times in 1..=3 {
        let mut disk = daemon.open(&options(1));
        disk.read(0, &mut [0; 4096]).unwrap();
        drop(disk);
        let of_e0 = [("export", "e0")];
        let scrape = Scrape::until(&daemon, |s| {
            let read = s.operations("requests_total", "read") == f64::from(times);
            read && s.sum("vublk_export_connected", &of_e0) == 0.0
        });
        assert_eq!(scrape.sum("vublk_export_connections_total", &of_e0), f64::from(times));
        assert_eq!(scrape.operations("bytes_total", "read"), f64::from(times * 4096));
    }
    let mut client = Client::connect(&daemon.path("m.sock"));
    client.run("block-export-del", json!({"id": "e0"}));
    let of_e0 = |s: &Scrape| s.0.iter().any(|sample| sample.label("export") == Some("e0"));
    let scrape = Scrape::until(&daemon, |s| !of_e0(s));
    assert_eq!(scrape.sum("vublk_export_size_bytes", &[("export", "e1")]), (8 << 20) as f64);
}

#[test]
fn what_the_storage_fails_and_what_is_held_shows() {
    let node = "driver=blkdebug,node-name=d0,image.driver=file,image.filename=DIR/disk.img,\
                inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=5";
    let export = format!("{},writable=on,werror=stop", export_of("d0", 0));
    let daemon = daemon(&["--blockdev", node, "--export", &export]);
    let mut disk = daemon.open(&options(1));
    for sector in [0, 8, 16] {
        let request = Request::Out { sector, data: vec![1; 512] };
        disk.queue(0).submit(&request, &Shape::indirect()).unwrap();
    }
    let held = |s: &Scrape| s.sum("vublk_queue_held", &[("export", "e0")]);
    // A request is held before the worker's turn ends, in which the error is counted.
    let scrape = Scrape::until(&daemon, |s| {
        s.0.iter().any(|sample| sample.name == "vublk_queue_held")
            && held(s) == 3.0
            && s.operations("storage_errors_total", "write") >= 3.0
    });
    assert_eq!(scrape.operations("requests_total", "write"), 0.0);
    assert_eq!(scrape.sum("vublk_queue_in_flight", &[("export", "e0")]), 0.0);
    let mut client = Client::connect(&daemon.path("m.sock"));
    client.run("x-block-export-fail", json!({"id": "e0"}));
    for _ in 0..3 {
        assert_eq!(disk.queue(0).wait().unwrap().status, status::IOERR);
    }
    let scrape = Scrape::until(&daemon, |s| held(s) == 0.0);
    assert_eq!(scrape.operations("errors_total", "write"), 3.0);
}

#[test]
fn the_image_is_the_one_that_is_written_now() {
    let export = format!("{},writable=on", export_of("d0", 0));
    let daemon = daemon(&["--blockdev", FILE, "--export", &export]);
    let image = || {
        let info = |sample: &&Sample| sample.name == "vublk_export_info";
        let Scrape(samples) = Scrape::of(&daemon);
        samples.iter().find(info).and_then(|info| info.label("image")).map(str::to_owned)
    };
    let path = |name| Some(daemon.path(name).display().to_string());
    assert_eq!(image(), path("disk.img"));
    let top = daemon.path("top.qcow2");
    let mut client = Client::connect(&daemon.path("m.sock"));
    let mut made = Command::new("qemu-img");
    made.args(["create", "-q", "-f", "qcow2"]);
    made.arg(&top).arg("8M");
    assert!(made.status().unwrap().success());
    let file = json!({"driver": "file", "filename": top});
    let top = json!({"driver": "qcow2", "node-name": "top", "file": file, "backing": null});
    client.run("blockdev-add", top);
    client.run("blockdev-snapshot", json!({"node": "d0", "overlay": "top"}));
    assert_eq!(image(), path("top.qcow2"));
}
