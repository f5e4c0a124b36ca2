//! The lengths of disks, set by `resize` and by qemu-io's `truncate`, beside QEMU's tools.

use super::{Place, assert_same_disks};
use crate::file::{Loop, tool};

/// Runs lines, in which `LOOP` is the device, with both sets of tools. None of them changes it.
fn assert_same_words(device: &Loop, lines: &[String]) {
    let mut wrong = String::new();
    for line in lines {
        let line = line.replace("LOOP", &device.0);
        let [ours, theirs] = [true, false].map(|ours| Place::new(ours).run(&line));
        if ours != theirs {
            wrong += &format!("\n{line}\n  ours:   {ours:?}\n  theirs: {theirs:?}\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn a_device_has_the_length_that_it_has_in_the_same_words() {
    let place = Place::new(true);
    let under = std::fs::File::create(place.path().join("under.bin")).unwrap();
    under.set_len(4 << 20).unwrap();
    let device = Loop::new(&place.path().join("under.bin"), &[]);
    let mut lines = Vec::new();
    for shrink in ["", "--shrink "] {
        for size in ["4M", "8M", "2M", "5M", "+1M", "-1M", "+0", "+1", "-1", "0"] {
            for format in ["-f raw ", "-f host_device ", ""] {
                lines.push(format!("qemu-img resize {shrink}{format}LOOP {size}"));
            }
        }
        for mode in ["off", "metadata", "falloc", "full"] {
            for size in ["4M", "8M", "2M"] {
                let options = format!("{shrink}-f raw --preallocation={mode}");
                lines.push(format!("qemu-img resize {options} LOOP {size}"));
            }
        }
        for (window, size) in [("size=2M", "1M"), ("offset=1M", "3M"), ("offset=1M", "2M")] {
            let image = format!("driver=raw,{window},file.driver=host_device,file.filename=LOOP");
            lines.push(format!("qemu-img resize {shrink}--image-opts {image} {size}"));
        }
    }
    for mode in ["off", "metadata", "falloc", "full"] {
        for size in ["4M", "8M"] {
            lines.push(format!("qemu-io -f raw -c 'truncate -m {mode} {size}' LOOP"));
        }
    }
    assert_same_words(&device, &lines);
    under.set_len(6 << 20).unwrap();
    tool("losetup", &["--set-capacity", &device.0]);
    // QEMU's qemu-io says nothing of a device that it does not shorten.
    lines.retain(|line| line != "qemu-io -f raw -c 'truncate -m off 4M' LOOP");
    assert_same_words(&device, &lines);
}

#[test]
fn preallocation_is_for_new_space_alone_and_goes_through_filters() {
    let mut lines = Vec::new();
    for mode in ["off", "metadata", "falloc", "full"] {
        for size in ["512k", "1M", "2M"] {
            for (format, image) in [("raw", "a.raw"), ("qcow2", "q.qcow2")] {
                lines.push(format!("qemu-io -f {format} -c 'truncate -m {mode} {size}' {image}"));
            }
        }
        for filter in [
            "driver=blkdebug,file.image.driver=file,file.image.filename=a.raw",
            "driver=copy-on-read,file.file.driver=file,file.file.filename=a.raw",
            "driver=preallocate,file.file.driver=file,file.file.filename=a.raw",
        ] {
            let image = format!("driver=raw,file.{filter}");
            lines.push(format!("qemu-img resize --preallocation={mode} --image-opts {image} +1M"));
        }
    }
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    assert_same_disks(&["qemu-img create -q -f qcow2 q.qcow2 1M"], &lines);
}
