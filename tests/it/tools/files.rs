//! The files that the tools make: contents and allocation of copies, read by both implementations.

use super::{Place, assert_same};
use std::io::Write;
use std::process::{Command, Stdio};

/// A disk of 4 MiB with data, written zeroes and holes of many lengths, at many offsets.
const WRITES: &str = "qemu-io -f raw -c 'write -P 1 0 64k' -c 'write -P 0 64k 64k' \
    -c 'write -P 2 128k 1k' -c 'write -P 3 200k 512' -c 'write -P 4 210000 3' \
    -c 'write -P 0 1M 1M' -c 'write -P 5 1500k 4k' -c 'write -P 6 1510k 4k' \
    -c 'write -P 9 3000k 100k' -c 'write -P 9 4194303 1' disk.raw";

#[test]
fn copies_have_the_contents_and_the_holes_of_qemu_imgs() {
    let prepare = ["qemu-img create -q -f raw disk.raw 4M", WRITES];
    assert_same(
        &prepare,
        &[
            "qemu-img convert disk.raw copy.raw",
            "qemu-img convert -S 0 disk.raw copy.raw",
            "qemu-img convert -S 512 disk.raw copy.raw",
            "qemu-img convert -S 64k disk.raw copy.raw",
            "qemu-img convert -W -m 16 disk.raw copy.raw",
            "qemu-img convert -m 1 disk.raw copy.raw",
            "qemu-img convert -C disk.raw copy.raw",
            "qemu-img convert -t none -T none disk.raw copy.raw",
            "qemu-img convert -t writethrough disk.raw copy.raw",
            "qemu-img convert a.raw disk.raw a.raw copy.raw",
            "qemu-img convert -n disk.raw longer.raw",
            "qemu-img convert -n disk.raw disk.raw",
            "qemu-img convert -n small.raw disk.raw",
            "qemu-img convert -r 100M disk.raw copy.raw",
            "qemu-img convert empty.raw copy.raw",
            "qemu-img convert -o preallocation=falloc disk.raw copy.raw",
            "qemu-img dd if=disk.raw of=copy.raw bs=64k",
            "qemu-img dd if=disk.raw of=copy.raw bs=7 skip=1000 count=300000",
            "qemu-img convert disk.raw copy.raw && qemu-img compare -s disk.raw copy.raw",
            "qemu-img convert disk.raw copy.raw && qemu-img map --output=json copy.raw",
            "qemu-img convert -O qcow2 --bitmaps a.raw copy.qcow2",
            "qemu-img bench -w -c 100 -d 8 -s 8k --pattern 7 -f raw disk.raw",
            "qemu-img bench -w -c 10 -S 100 -s 50 --pattern 7 -o 33 -d 1 -f raw disk.raw",
            "qemu-img resize -f raw disk.raw +1M && qemu-io -f raw -c 'write -P 1 4M 1M' disk.raw",
        ],
    );
}

#[test]
fn what_cannot_be_read_fails_or_becomes_zeroes() {
    let broken = "--image-opts driver=raw,file.driver=blkdebug,file.image.driver=file,\
                  file.image.filename=a.raw,file.inject-error.0.event=none,\
                  file.inject-error.0.iotype=read,file.inject-error.0.errno=5,\
                  file.inject-error.0.sector=129";
    let lines: Vec<String> = [
        "qemu-img convert --salvage BROKEN copy.raw",
        "qemu-img convert --salvage -q BROKEN copy.raw",
        "qemu-img compare BROKEN driver=raw,file.filename=b.raw",
        "qemu-io BROKEN -c 'read 64k 4k' -c 'read 0 512'",
        "qemu-io BROKEN -c 'aio_read 64k 4k' -c 'aio_flush' -c 'readv 66048 100 412'",
    ]
    .map(|line| line.replace("BROKEN", broken))
    .into();
    let lines: Vec<&str> = lines.iter().map(|line| &**line).collect();
    assert_same(&[], &lines);
    // To nowhere, for what was in flight before the failure may have reached a target.
    let failing = format!("qemu-img convert -n {broken} null-co://").replace("129", "1");
    assert_same(&[], &[&failing]);
}

/// Runs qemu-io with commands on its standard input.
fn interact(place: &Place, input: &str) -> (Option<i32>, String) {
    let mut command = Command::new(place.program("qemu-io"));
    command.args(["-f", "raw", "a.raw"]).current_dir(place.path());
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let reported = super::mask(&String::from_utf8_lossy(&output.stdout))
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), reported)
}

#[test]
fn commands_on_standard_input_are_asked_for() {
    for input in ["length\n", "length\nbogus\n\nmap\nquit\nlength\n", "length", ""] {
        let both = [true, false].map(|ours| {
            let place = Place::new(ours);
            super::fixture(place.path());
            interact(&place, input)
        });
        assert_eq!(both[0], both[1], "{input:?}");
    }
}
