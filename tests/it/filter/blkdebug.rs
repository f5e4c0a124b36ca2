//! blkdebug: the same rules and requests here and in the real qemu-io.

use crate::disks::{open, open_holding, sim_disk, simulated};
use crate::file::{Bench, on_disk, sparse, tool};
use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, Errno, IoResult, IoVec};
use vublk::protocol::sim::SimOptions;

/// A request as qemu-io takes it.
#[derive(Clone, Copy, Debug)]
enum Request {
    Read(u64, u64),
    Write(u64, u64),
    DurableWrite(u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
    Map,
    Grow(u64),
}

use Request::*;

impl Request {
    fn as_text(self) -> String {
        match self {
            Read(at, len) => format!("read {at} {len}"),
            Write(at, len) => format!("write {at} {len}"),
            DurableWrite(at, len) => format!("write -f {at} {len}"),
            Zero(at, len) => format!("write -z {at} {len}"),
            Discard(at, len) => format!("discard {at} {len}"),
            Flush => "flush".to_owned(),
            Map => "map".to_owned(),
            Grow(len) => format!("truncate {len}"),
        }
    }

    async fn run(self, node: &Node) -> IoResult {
        match self {
            Read(at, len) => {
                let mut bytes = vec![0; len as usize];
                node.read(at, &IoVec::from_mut(&mut bytes)).await
            }
            Write(at, len) | DurableWrite(at, len) => {
                let bytes = vec![1; len as usize];
                let mut flags = WriteFlags::empty();
                flags.set(WriteFlags::FUA, matches!(self, DurableWrite(..)));
                node.write(at, &IoVec::from_ref(&bytes), flags).await
            }
            Zero(at, len) => node.zero(at, len, ZeroFlags::empty()).await,
            Discard(at, len) => node.discard(at, len).await,
            Flush => node.flush().await,
            Map => node.status(0, node.len(), Precision::Zeroes).await.map(drop),
            Grow(len) => {
                let grown = node.grow(len, Preallocation::Off).await;
                grown.map_err(|error| error.errno().unwrap_or(Errno::EIO))
            }
        }
    }
}

const ALL: [Request; 12] = [
    Read(0, 4096),
    Read(1024, 1024),
    Write(0, 4096),
    Read(0, 512),
    Write(1, 1),
    Zero(0, 8192),
    Read(4096, 512),
    Discard(0, 131072),
    Map,
    Read(1536, 512),
    Write(1024, 512),
    Read(0, 4096),
];

/// Each request's error here, one after the other.
fn ours(options: &str, requests: &[Request]) -> Result<Vec<Option<String>>, String> {
    let bench = Bench::new();
    let node = bench.node(&format!("{options},node-name=top,discard=unmap"));
    let disk = node.and_then(|node| bench.write_to(node)).map_err(|e| e.to_string())?;
    let (node, requests) = (disk.node.clone(), requests.to_vec());
    Ok(bench.run(move || async move {
        let mut errors = Vec::new();
        for request in requests {
            errors.push(request.run(&node).await.err().map(|errno| errno.to_string()));
        }
        errors
    }))
}

/// What qemu-io says of them; its errors of `map` and `flush` are not told in words.
fn theirs(options: &str, requests: &[Request]) -> Vec<Option<String>> {
    let mut command = Command::new("qemu-io");
    command.args(["--image-opts", options, "-d", "unmap", "-t", "writeback"]).env("LC_ALL", "C");
    for request in requests {
        // A mark after each, because some print nothing.
        command.args(["-c", &request.as_text(), "-c", "help quit"]);
    }
    let output = command.output().expect("qemu-io (tests/setup.sh installs it)");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut parts: Vec<&str> = text.split("quit -- exit the program").collect();
    parts.pop();
    parts
        .into_iter()
        .map(|part| {
            let failed = part.lines().find_map(|line| line.split_once(" failed: "));
            failed.map(|(_, error)| error.to_owned())
        })
        .collect()
}

fn compare(rules: &str, requests: &[Request]) {
    let dir = on_disk();
    let path = sparse(dir.path(), "disk", 1 << 20);
    let path = path.display();
    let file = format!("driver=file,filename={path}");
    let below = |prefix: &str, options: &str| {
        options.split(',').map(|one| format!(",{prefix}.{one}")).collect::<String>()
    };
    let alone = format!("driver=blkdebug{}{rules}", below("image", &file));
    let under_raw = format!("driver=raw{}", below("file", &alone));
    for options in [alone, under_raw] {
        let wanted = theirs(&options, requests);
        let found = ours(&options, requests).unwrap();
        assert_eq!(wanted.len(), requests.len(), "{options}");
        for ((request, wanted), found) in requests.iter().zip(&wanted).zip(&found) {
            // qemu-io tells of `map` and `flush` another way, or not at all.
            if !matches!(request, Flush | Map) {
                assert_eq!(found, wanted, "{request:?} of {options}");
            }
        }
    }
}

#[test]
fn rules_strike_the_requests_that_they_strike_in_qemu() {
    let rule = |more: &str| format!(",inject-error.0.event={more}");
    let none = |more: &str| rule(&format!("none,inject-error.0.{more}"));
    for rules in [
        String::new(),
        rule("none"),
        none("errno=28"),
        none("errno=0"),
        none("once=on"),
        none("immediately=on"),
        none("iotype=read"),
        none("iotype=write"),
        none("iotype=write-zeroes"),
        none("iotype=discard"),
        none("iotype=flush"),
        none("iotype=block-status"),
        none("errno=95,inject-error.0.iotype=write-zeroes"),
        none("sector=3"),
        none("sector=3,inject-error.0.iotype=read"),
        none("sector=3,inject-error.0.once=on"),
        none("sector=-1"),
        none("sector=-2"),
        none("state=1"),
        none("state=2"),
        rule("pwritev"),
        rule("pwritev,inject-error.0.iotype=read"),
        rule("pwritev,inject-error.0.once=on"),
        rule("pwritev_zero"),
        rule("pwritev_done"),
        rule("read_aio"),
        rule("read_aio,inject-error.0.iotype=write"),
        rule("read_aio,inject-error.0.once=on"),
        rule("write_aio"),
        rule("l2_load"),
        rule("pwritev_rmw_after_head,align=4096"),
        rule("pwritev_rmw_after_head,align=4096,inject-error.0.once=on"),
        rule("pwritev,align=4096,inject-error.0.once=on"),
        rule("none,inject-error.1.event=none,inject-error.1.errno=28"),
        rule("none,inject-error.0.once=on,inject-error.1.event=none,inject-error.1.errno=28"),
        rule(
            "none,inject-error.0.iotype=write,inject-error.1.event=read_aio,\
             inject-error.1.iotype=discard,inject-error.1.errno=28",
        ),
        rule(
            "read_aio,inject-error.0.iotype=write,inject-error.1.event=write_aio,\
             inject-error.1.iotype=discard,inject-error.1.errno=28",
        ),
        rule(
            "write_aio,inject-error.0.state=2,set-state.0.event=read_aio,set-state.0.state=1,\
             set-state.0.new_state=2",
        ),
        rule(
            "read_aio,inject-error.0.state=3,set-state.0.event=read_aio,set-state.0.state=1,\
             set-state.0.new_state=2,set-state.1.event=read_aio,set-state.1.state=2,\
             set-state.1.new_state=3",
        ),
        rule(
            "write_aio,inject-error.0.state=2,set-state.0.event=read_aio,set-state.0.new_state=2,\
             set-state.1.event=read_aio,set-state.1.new_state=3",
        ),
        ",align=4096,max-transfer=8192,opt-write-zero=12288,max-discard=65536".to_owned(),
    ] {
        compare(&rules, &ALL);
    }
    let flushes = [Read(0, 512), Flush, Read(0, 512), Write(0, 512), Flush, Zero(0, 4096), Flush];
    compare(&rule("flush_to_os"), &flushes[..3]);
    compare(&rule("flush_to_disk"), &flushes[3..]);
}

#[test]
fn a_flush_has_something_to_do_after_each_request_that_was_to_change_the_disk_as_in_qemu() {
    // Once a flush has gone on to the storage, reads fail.
    let seen = ",set-state.0.event=flush_to_disk,set-state.0.new_state=2,\
                inject-error.0.event=read_aio,inject-error.0.state=2";
    let fails = |kind: &str| {
        let rule = "inject-error.1.event=none,inject-error.1.once=on,inject-error.1.iotype=";
        format!("{seen},{rule}{kind}")
    };
    for changed in [Write(0, 512), Zero(0, 4096), Discard(0, 4096), Grow(2 << 20)] {
        compare(seen, &[Read(0, 512), Flush, Read(0, 512), changed, Flush, Read(0, 512)]);
    }
    // The flush that makes one write durable is none of its own.
    let durable = [DurableWrite(0, 512), Read(0, 512), Flush, Read(0, 512)];
    compare(seen, &durable);
    for (kind, request) in [("write", Write(0, 512)), ("discard", Discard(0, 4096))] {
        compare(&fails(kind), &[request, Read(0, 512), Flush, Read(0, 512)]);
    }
}

#[test]
fn constraints_that_do_not_fit_are_refused_as_in_qemu() {
    let dir = on_disk();
    let path = sparse(dir.path(), "disk", 1 << 20);
    let blkdebug = format!("driver=blkdebug,image.driver=file,image.filename={}", path.display());
    for limits in [
        "align=1000",
        "align=4194305",
        "align=4096,max-transfer=1024",
        "align=4096,opt-write-zero=2048",
        "align=4096,max-write-zero=1000",
        "opt-write-zero=8192,max-write-zero=4096",
        "align=4096,opt-discard=2048",
        "opt-discard=8192,max-discard=4096",
        "max-transfer=4294967296",
        "align=0",
        "align=4096",
        "opt-write-zero=5000",
        "opt-write-zero=12288,max-write-zero=24576",
        "max-transfer=0,opt-discard=0",
    ] {
        let options = format!("{blkdebug},{limits}");
        let output = Command::new("qemu-io")
            .args(["--image-opts", &options, "-c", "length"])
            .output()
            .expect("qemu-io (tests/setup.sh installs it)");
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let wanted = match said.strip_prefix("qemu-io: can't open: ") {
            Some(error) => Err(error.to_owned()),
            None => Ok(()),
        };
        assert_eq!(ours(&options, &[Write(0, 8192)]).map(drop), wanted, "{limits}");
    }
}

/// Opens what a file name stands for, raw over it.
fn by_name(bench: &Bench, name: &str) -> Result<Arc<Node>, String> {
    let registry = vublk::drivers::registry();
    let mut options = vublk::options::Map::new();
    options.insert("driver", "raw");
    options.insert("node-name", "top");
    let file = registry.file_options(name).map_err(|e| e.to_string())?;
    options.insert("file", vublk::options::Value::Map(file));
    bench.graph.open_on(&bench.worker, options).map_err(|e| e.to_string())
}

#[test]
fn a_name_gives_the_configuration_and_the_image() {
    let dir = on_disk();
    let path = |name: &str| dir.path().join(name).display().to_string();
    sparse(dir.path(), "disk", 1 << 20);
    std::fs::write(
        path("conf"),
        "[inject-error]\nevent = \"read_aio\"\nerrno = \"28\"\nonce = \"on\"\n",
    )
    .unwrap();
    std::fs::write(path("wrong"), "[bogus]\n").unwrap();
    let (conf, disk) = (path("conf"), path("disk"));
    for name in [
        format!("blkdebug:{conf}:{disk}"),
        format!(
            "json:{{\"driver\":\"blkdebug\",\"config\":\"{conf}\",\"image\":{{\"driver\":\"file\",\"filename\":\"{disk}\"}}}}"
        ),
        format!("blkdebug::blkdebug:{conf}:{disk}"),
    ] {
        let bench = Bench::new();
        let disk = bench.write_to(by_name(&bench, &name).unwrap()).unwrap();
        let node = disk.node.clone();
        let results = bench.run(move || async move {
            [Read(0, 4096).run(&node).await, Read(0, 4096).run(&node).await]
        });
        // The outer of two hears the events.
        let first = if name.contains(":blkdebug:") { Ok(()) } else { Err(Errno::ENOSPC) };
        assert_eq!(results, [first, Ok(())], "{name}");
    }
    for name in [
        format!("blkdebug:{disk}"),
        "blkdebug:".to_owned(),
        format!("blkdebug:{}:{disk}", path("none")),
        format!("blkdebug:{}:{disk}", path("wrong")),
        format!("blkdebug:{conf}:{}", path("none")),
    ] {
        let output = Command::new("qemu-io").args(["-f", "raw", "-c", "length", &name]).output();
        let said = output.expect("qemu-io (tests/setup.sh installs it)").stderr;
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        let wanted = said.strip_prefix(&format!("qemu-io: can't open device {name}: "));
        let wanted = wanted.unwrap_or_else(|| panic!("{said}"));
        assert_eq!(by_name(&Bench::new(), &name).map(drop), Err(wanted.to_owned()), "{name}");
    }
}

#[test]
fn requests_stop_at_a_breakpoint_and_go_on_when_they_are_resumed() {
    simulated(Disorder::wild(1), |_| async {
        let (_disk, options) = sim_disk(SimOptions::new(64 << 10));
        let image = options.replace("driver=", "file.image.driver=");
        let image = image.replace("disk=", "file.image.disk=");
        let opened = open(&format!("driver=raw,file.driver=blkdebug,{image}")).await;
        let debugged = opened.node.debugged().expect("blkdebug is below");
        let debugger = debugged.driver().debugger().expect("it is");
        debugger.break_at(Event::WriteAio, "first", Box::new(|_| ()));
        let done = Rc::new(RefCell::new(Vec::new()));
        for (name, request) in [("write", Write(0, 4096)), ("other", Write(8192, 4096))] {
            let (node, done) = (opened.node.clone(), done.clone());
            io::current().spawn(async move {
                request.run(&node).await.unwrap();
                done.borrow_mut().push(name);
            });
            io::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(*done.borrow(), ["other"]);
        assert!(debugger.has_stopped("first"));
        assert!(debugger.resume("first"));
        io::sleep(Duration::from_millis(10)).await;
        assert_eq!(*done.borrow(), ["other", "write"]);
    });
}

#[test]
fn permissions_are_taken_and_refused_as_reported() {
    let bench = Bench::new();
    bench.node("driver=null-co,node-name=bottom").unwrap();
    let taking = "driver=blkdebug,image=bottom,take-child-perms.0=write,node-name=taking";
    bench.node(taking).unwrap();
    let error = bench.node(
        "driver=blkdebug,image=bottom,unshare-child-perms.0=write,\
         unshare-child-perms.1=resize,node-name=other",
    );
    assert_eq!(
        error.map(drop).unwrap_err().to_string(),
        "Permission conflict on node 'bottom': permissions 'write' are both required by node \
         'taking' (uses node 'bottom' as 'image' child) and unshared by node 'other' (uses node \
         'bottom' as 'image' child)."
    );
}

#[test]
fn a_disk_over_the_image_tells_no_more_and_no_less_than_the_image() {
    let dir = on_disk();
    let path = dir.path().join("disk");
    tool("qemu-img", &["create", "-f", "raw", path.to_str().unwrap(), "1M"]);
    // An odd length, and an alignment beyond it.
    std::fs::File::options().write(true).open(&path).unwrap().set_len((1 << 20) - 1000).unwrap();
    check_ends(&path);
}

fn check_ends(path: &Path) {
    let options =
        format!("driver=blkdebug,align=4096,image.driver=file,image.filename={}", path.display());
    let len = std::fs::metadata(path).unwrap().len();
    let rounded = len.next_multiple_of(512);
    let requests = [Write(rounded - 600, 600), Read(rounded - 4096, 4096), Read(rounded, 1)];
    let eio = Some(Errno::EIO.to_string());
    assert_eq!(ours(&options, &requests).unwrap(), [None, None, eio]);
    assert_eq!(std::fs::metadata(path).unwrap().len(), rounded, "not a block more");
}

#[test]
fn resizing_and_what_is_allocated_are_the_image_s() {
    simulated(Disorder::wild(1), |_| async {
        let sim = SimOptions { max_len: 128 << 10, ..SimOptions::new(64 << 10) };
        let (disk, options) = sim_disk(sim);
        let image = options.replace("driver=", "image.driver=").replace("disk=", "image.disk=");
        let held = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
        let opened = open_holding(&format!("driver=blkdebug,{image}"), held).await.unwrap();
        Write(0, 4096).run(&opened.node).await.unwrap();
        let image = opened.node.driver().image().unwrap();
        assert_eq!(image.allocated().await, Ok(4096));
        image.resize(128 << 10, false).await.unwrap();
        assert_eq!((opened.node.len(), disk.bytes().len()), (128 << 10, 128 << 10));
    });
}
