//! Writing past the end, with and without preallocate.
//!
//! Sizes are compared with the real program's, contents with a model.

use crate::disks::{open_holding, seed, sim_disk, simulated, suspend_once};
use crate::file::{Bench, on_disk, on_tmpfs, sparse, tool};
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, Errno, IoVec};
use vublk::protocol::sim::{Change, Effect, Fault, Kinds, SimOptions};

const MIB: u64 = 1 << 20;
const GROWER: Perm = Perm::CONSISTENT_READ.union(Perm::WRITE).union(Perm::RESIZE);

/// A user that may make the disk longer.
fn grower(bench: &Bench, node: &Arc<Node>) -> Attachment {
    let shared = Perm::all() - Perm::WRITE - Perm::RESIZE;
    bench.graph.attach(node, "a test", Perms { held: GROWER, shared }, None).unwrap()
}

fn write(bench: &Bench, node: &Arc<Node>, at: u64, len: usize, byte: u8) -> Result<(), Errno> {
    let node = node.clone();
    bench.run(move || async move {
        node.write(at, &IoVec::from_ref(&vec![byte; len]), WriteFlags::empty()).await
    })
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

/// The length of the file while a qcow2 image over preallocate is open and has been written to, and
/// afterwards, where QEMU does it.
fn theirs(path: &Path, options: &str) -> (u64, u64) {
    let options = options.replace(',', ",file.");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1G"]);
    let options = format!(
        "driver=qcow2,file.driver=preallocate,file.file.driver=file,file.file.filename={}{options}",
        path.display()
    );
    let mut child = Command::new("qemu-io")
        .args(["--image-opts", &options])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-io (tests/setup.sh installs it)");
    let (mut stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    stdin.write_all(b"write 0 64k\n").unwrap();
    let written =
        BufReader::new(stdout).lines().find(|line| line.as_ref().unwrap().contains("wrote"));
    assert!(written.is_some(), "{options}");
    let open = size(path);
    stdin.write_all(b"quit\n").unwrap();
    assert!(child.wait().unwrap().success());
    (open, size(path))
}

/// The same for the writes that qcow2 makes past the end: its first L2 table, and the data.
fn ours(path: &Path, options: &str) -> (u64, u64) {
    let bench = Bench::new();
    let options = format!(
        "driver=preallocate,node-name=p,file.driver=file,file.filename={}{options}",
        path.display()
    );
    let node = bench.node(&options).unwrap();
    let attachment = grower(&bench, &node);
    write(&bench, &node, 256 << 10, 64 << 10, 1).unwrap();
    write(&bench, &node, 320 << 10, 64 << 10, 2).unwrap();
    let open = size(path);
    let graph = bench.graph.clone();
    bench.run(move || async move {
        drop(attachment);
        graph.close().await;
    });
    (open, size(path))
}

#[test]
fn the_file_grows_in_the_steps_of_the_real_program_and_ends_with_its_data() {
    let dir = on_disk();
    for options in [
        "",
        ",prealloc-size=0",
        ",prealloc-align=0",
        ",prealloc-align=512",
        ",prealloc-size=3000000",
        ",prealloc-size=1048576,prealloc-align=3145728",
        ",prealloc-size=0,prealloc-align=0",
    ] {
        let (a, b) = (dir.path().join("theirs"), sparse(dir.path(), "ours", 196624));
        let wanted = theirs(&a, options);
        assert_eq!(ours(&b, options), wanted, "{options}");
        let written = std::fs::read(&b).unwrap();
        assert!(written[..262144].iter().all(|&byte| byte == 0));
        assert!(written[262144..327680].iter().all(|&byte| byte == 1));
        assert!(written[327680..].iter().all(|&byte| byte == 2));
    }
}

#[test]
fn the_file_is_cut_to_its_data_when_the_last_writer_leaves_and_locked_until_then() {
    let dir = on_disk();
    for place in [dir.path(), on_tmpfs().path()] {
        let path = sparse(place, "disk", MIB);
        let bench = Bench::new();
        let options = format!(
            "driver=preallocate,node-name=p,file.driver=file,file.filename={}",
            path.display()
        );
        let node = bench.node(&options).unwrap();
        let reader = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
        let reader = bench.graph.attach(&node, "a reader", reader, None).unwrap();
        let attachment = grower(&bench, &node);
        write(&bench, &node, MIB, 4096, 1).unwrap();
        assert_eq!((node.len(), size(&path)), (MIB + 4096, 130 * MIB));

        let qemu_io = || {
            let options = format!("driver=file,filename={}", path.display());
            let arguments = ["--image-opts", &options, "-c", "write 0 512"];
            Command::new("qemu-io").args(arguments).output().unwrap().status.success()
        };
        assert!(!qemu_io(), "somebody else could write");
        bench.run(move || attachment.detach());
        assert_eq!((node.len(), size(&path)), (MIB + 4096, MIB + 4096));
        assert!(qemu_io(), "nobody writes here");

        // A user that may not make it longer stays inside.
        let attachment = bench.write_to(node.clone()).unwrap();
        assert_eq!(write(&bench, &node, MIB + 4096, 1, 1), Err(Errno::EIO));
        drop(attachment);
        let attachment = grower(&bench, &node);
        write(&bench, &node, MIB + 4096, 1, 1).unwrap();
        assert!(size(&path) > 128 * MIB);
        drop((attachment, reader));
        let graph = bench.graph.clone();
        bench.run(move || async move { graph.delete("p").await }).unwrap();
        assert_eq!(size(&path), MIB + 4097);
    }
}

#[test]
fn a_resize_inside_what_is_preallocated_needs_no_more_and_a_smaller_one_gives_it_back() {
    let dir = on_disk();
    let path = sparse(dir.path(), "disk", MIB);
    let bench = Bench::new();
    let options = format!(
        "driver=preallocate,node-name=p,prealloc-size=4194304,file.driver=file,file.filename={}",
        path.display()
    );
    let node = bench.node(&options).unwrap();
    let attachment = grower(&bench, &node);
    write(&bench, &node, MIB, 4096, 1).unwrap();
    assert_eq!(size(&path), 6 * MIB);
    let resize = |len| {
        let node = node.clone();
        bench.run(move || async move {
            node.driver().image().unwrap().resize(len, true).await.map_err(|e| e.to_string())
        })
    };
    for (len, file) in [(2 * MIB, 6 * MIB), (8 * MIB, 8 * MIB), (MIB, MIB), (3 * MIB, 3 * MIB)] {
        resize(len).unwrap();
        assert_eq!((node.len(), size(&path)), (len, file));
    }
    write(&bench, &node, 3 * MIB, 1, 1).unwrap();
    assert_eq!(size(&path), 8 * MIB);
    drop(attachment);
    let bytes = bench.run({
        let node = node.clone();
        move || async move {
            let mut bytes = vec![1; 2 << 20];
            node.read(MIB, &IoVec::from_mut(&mut bytes)).await.unwrap();
            bytes
        }
    });
    assert!(bytes.iter().all(|&byte| byte == 0), "what was cut off came back");
}

#[test]
fn where_nothing_can_be_preallocated_writes_make_the_file_longer_by_themselves() {
    simulated(Disorder::wild(1), |_| async {
        for abilities in [Abilities::GROW, Abilities::GROW | Abilities::ZERO] {
            let mut sim = SimOptions { max_len: 2 * MIB, ..SimOptions::new(MIB) };
            sim.traits.abilities = abilities;
            let (disk, options) = sim_disk(sim);
            // Far more than the disk has.
            let options = format!("driver=preallocate,file.{}", options.replace(",", ",file."));
            let opened = open_holding(&options, GROWER).await.unwrap();
            let ones = vec![1; 8192];
            for at in [MIB + 4096, MIB, 2 * MIB - 8192] {
                let list = IoVec::from_ref(&ones);
                opened.node.write(at, &list, WriteFlags::empty()).await.unwrap();
            }
            opened.node.zero(2 * MIB - 4096, 4096, ZeroFlags::empty()).await.unwrap();
            assert_eq!(opened.node.len(), 2 * MIB);
            let bytes = disk.bytes();
            assert!(bytes[MIB as usize..][..12288].iter().all(|&byte| byte == 1));
            assert_eq!(bytes.iter().filter(|&&byte| byte == 1).count(), 12288 + 4096);
            let list = IoVec::from_ref(&ones);
            let result = opened.node.write(2 * MIB, &list, WriteFlags::empty()).await;
            assert_eq!((result, opened.node.len()), (Err(Errno::ENOSPC), 2 * MIB));
        }
    });
}

#[test]
fn what_a_failed_write_has_left_behind_the_data_is_zeroed_when_that_is_asked_for() {
    simulated(Disorder::wild(1), |_| async {
        let sim = SimOptions { max_len: 2 * MIB, ..SimOptions::new(MIB) };
        let (disk, options) = sim_disk(sim);
        let options = format!(
            "driver=preallocate,prealloc-size=65536,file.{}",
            options.replace(",", ",file.")
        );
        let opened = open_holding(&options, GROWER).await.unwrap();
        disk.inject(Fault::new(Kinds::WRITE, Effect::Tear(Errno::EIO)).once());
        let ones = vec![1; 65536];
        let torn = opened.node.write(MIB, &IoVec::from_ref(&ones), WriteFlags::empty()).await;
        assert_eq!(torn, Err(Errno::EIO));
        opened.node.zero(MIB, 65536, ZeroFlags::empty()).await.unwrap();
        opened.node.write(MIB + 65536, &IoVec::from_ref(&ones), WriteFlags::empty()).await.unwrap();
        let mut found = vec![2; 65536];
        opened.node.read(MIB, &IoVec::from_mut(&mut found)).await.unwrap();
        assert!(found.iter().all(|&byte| byte == 0));
    });
}

/// Random writes and zeroing in and past the end, several at once that do not overlap, against the
/// bytes that they should leave.
async fn grow_at_random(options: String, seed: u64) {
    const START: u64 = 64 << 10;
    const MOST: u64 = 768 << 10;
    let unit = SECTOR;
    let opened = open_holding(&options, GROWER).await.unwrap();
    let node = opened.node.clone();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut expected = vec![0; START as usize];
    for round in 0..24u8 {
        let mut at = rng.u64(0..=node.len() / unit) * unit;
        let left = Rc::new(RefCell::new(0));
        let mut end = node.len();
        for n in 0..rng.u64(1..5) {
            let len = rng.u64(1..=40) * unit;
            if at + len > MOST {
                break;
            }
            let byte = if rng.u8(0..4) == 0 { 0 } else { round | 0x80 };
            end = end.max(at + len);
            expected.resize(expected.len().max((at + len) as usize), 0);
            expected[at as usize..(at + len) as usize].fill(byte);
            let (node, left) = (node.clone(), left.clone());
            *left.borrow_mut() += 1;
            io::current().spawn(async move {
                let bytes = vec![byte; len as usize];
                let result = match byte {
                    0 if n % 2 == 0 => node.zero(at, len, ZeroFlags::UNMAP).await,
                    0 => node.zero(at, len, ZeroFlags::FUA).await,
                    _ => node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await,
                };
                result.unwrap();
                *left.borrow_mut() -= 1;
            });
            at += len + rng.u64(0..20) * unit;
        }
        while *left.borrow() > 0 {
            io::sleep(std::time::Duration::from_micros(50)).await;
            suspend_once().await;
        }
        let align = node.traits().request_align as u64;
        let grown = end.next_multiple_of(align);
        assert!((end..=grown).contains(&node.len()), "{options}: {} of {end}", node.len());
        expected.resize(node.len() as usize, 0);
        let mut found = vec![0xaa; expected.len()];
        node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        let wrong = (0..found.len()).find(|&at| found[at] != expected[at]);
        assert_eq!(wrong, None, "seed {seed}, round {round}: {options}");
        let mut at = 0;
        while at < node.len() {
            let extent = node.status(at, node.len() - at, Precision::Zeroes).await.unwrap();
            let said = &expected[at as usize..(at + extent.len) as usize];
            assert!(!extent.status.contains(Status::ZERO) || said.iter().all(|&byte| byte == 0));
            at += extent.len;
        }
    }
}

#[test]
fn growing_disks_of_all_kinds_hold_what_was_written() {
    let seed = seed();
    let over = |steps: &str, bottom: &str| match steps {
        "" => bottom.to_owned(),
        steps => format!("driver=preallocate{steps},file.{}", bottom.replace(",", ",file.")),
    };
    let some = ",prealloc-size=65536,prealloc-align=16384";
    for steps in ["", some, ",prealloc-size=0,prealloc-align=0", ",prealloc-size=134217728"] {
        for align in [1, 512, 4096] {
            let mut sim = SimOptions { max_len: MIB, ..SimOptions::new(64 << 10) };
            sim.traits.request_align = align;
            (sim.traits.zero_align, sim.traits.discard_align) = (align.max(512), align.max(512));
            (sim.traits.max_transfer, sim.traits.max_zero) = (32 << 10, 64 << 10);
            let (disk, bottom) = sim_disk(sim);
            let options = over(steps, &bottom);
            simulated(Disorder::wild(seed), move |_| async move {
                grow_at_random(options, seed).await;
                drop(disk);
            });
        }
    }
    let (dir, memory) = (on_disk(), on_tmpfs());
    for steps in ["", some] {
        for (place, direct) in [(&dir, "off"), (&dir, "on"), (&memory, "off")] {
            let path = sparse(place.path(), "disk", 64 << 10);
            let file = format!("driver=file,filename={}", path.display());
            let options = format!("{},cache.direct={direct}", over(steps, &file));
            simulated(Disorder::wild(seed), move |_| grow_at_random(options, seed));
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn whatever_a_crash_leaves_of_a_growing_disk_what_was_flushed_is_there() {
    let seed = seed();
    const START: u64 = 16 << 10;
    simulated(Disorder::wild(seed), |_| async move {
        let mut sim = SimOptions { log: true, max_len: 512 << 10, ..SimOptions::new(START) };
        // Also of what is torn.
        sim.traits.request_align = 512;
        sim.traits.zero_align = 512;
        let (disk, options) = sim_disk(sim);
        let options = format!(
            "driver=preallocate,prealloc-size=16384,prealloc-align=8192,file.{}",
            options.replace(",", ",file.")
        );
        let opened = open_holding(&options, GROWER).await.unwrap();
        let mut rng = fastrand::Rng::with_seed(seed);
        // What each sector was given last, and for each flush the log's length and what was there.
        let mut sectors = vec![vec![0u8]; (512 << 10) / 512];
        let mut flushed = vec![(0, sectors.clone())];
        for number in 1..60u8 {
            let at = rng.u64(0..=opened.node.len() / 512) * 512;
            let len = rng.u64(1..16) * 512;
            let byte = if number % 5 == 0 { 0 } else { number };
            for sector in &mut sectors[(at / 512) as usize..((at + len) / 512) as usize] {
                sector.push(byte);
            }
            flushed.push((disk.log().changes().len(), sectors.clone()));
            if byte == 0 {
                opened.node.zero(at, len, ZeroFlags::empty()).await.unwrap();
            } else {
                let bytes = vec![byte; len as usize];
                opened.node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
            }
            if rng.u8(0..4) == 0 {
                opened.node.flush().await.unwrap();
                sectors.iter_mut().for_each(|all| *all = vec![*all.last().unwrap()]);
                flushed.push((disk.log().changes().len(), sectors.clone()));
            }
        }
        let log = disk.log();
        let ahead = log.changes().iter().filter(|change| matches!(change, Change::Zero { .. }));
        assert!(ahead.count() > 3, "nothing was preallocated");
        for crash in log.crashes(seed, crate::disks::crashes(16)) {
            let known = flushed.iter().rev().find(|(from, _)| *from <= crash.prefix);
            let (_, allowed) = known.expect("the first holds from the beginning");
            for (n, sector) in log.image(&crash).chunks(512).enumerate() {
                let whole = sector.iter().all(|&byte| byte == sector[0]);
                assert!(
                    whole && allowed[n].contains(&sector[0]),
                    "seed {seed}, after {} changes: sector {n} holds {}, not one of {:?}",
                    crash.prefix,
                    sector[0],
                    allowed[n]
                );
            }
        }
    });
}
