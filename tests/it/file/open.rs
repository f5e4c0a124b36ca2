//! Opening files: what is accepted, what is refused, and the messages.

use super::*;
use vublk::block::{Abilities, Driver, NodeOptions};
use vublk::protocol::file::{FileDriver, FileOptions, Flavour};

fn refusal(options: &str) -> String {
    Bench::new().disk(options).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn refusals_are_worded_as_qemu_words_them() {
    let dir = on_disk();
    let image = sparse(dir.path(), "a.img", 1 << 20);
    let (image, dir) = (image.display(), dir.path().display());
    for (options, wanted) in [
        (format!("driver=file,filename={dir}/no"), {
            format!("Could not open '{dir}/no': No such file or directory")
        }),
        (format!("driver=file,filename={dir}"), format!("Could not open '{dir}': Is a directory")),
        (format!("driver=file,read-only=on,filename={dir}"), {
            format!("'file' driver requires '{dir}' to be a regular file")
        }),
        ("driver=file,filename=/dev/zero".into(), {
            "'file' driver requires '/dev/zero' to be a regular file".into()
        }),
        (format!("driver=host_device,filename={image}"), {
            format!(
                "'host_device' driver requires '{image}' to be either a character or block device"
            )
        }),
        (format!("driver=file,filename={image},aio=native"), {
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
                .into()
        }),
        (format!("driver=file,filename={image},pr-manager=pr0"), {
            "pr-manager=pr0: persistent reservations are not supported".into()
        }),
    ] {
        assert_eq!(refusal(&options), wanted, "{options}");
    }
    assert!(refusal("driver=file,filename=/dev/fdset/1").contains("not supported"));
    assert!(refusal(&format!("driver=file,filename={image},nonsense=1")).contains("nonsense"));
    assert!(refusal(&format!("driver=file,filename={image},aio=magic")).contains("magic"));
}

#[test]
fn every_option_of_qemu_that_has_no_meaning_here_is_taken() {
    let dir = on_disk();
    let image = sparse(dir.path(), "a.img", 1 << 20);
    let options = format!(
        "driver=file,filename={},aio=native,cache.direct=on,aio-max-batch=32,drop-cache=off,\
         locking=on,x-check-cache-dropped=off",
        image.display()
    );
    Bench::new().disk(&options).unwrap();
}

#[test]
fn a_fifo_is_refused_and_does_not_stop_the_opener() {
    let dir = on_tmpfs();
    let fifo = dir.path().join("fifo");
    tool("mkfifo", &[fifo.to_str().unwrap()]);
    let text = refusal(&format!("driver=file,read-only=on,filename={}", fifo.display()));
    assert!(text.ends_with("to be a regular file"), "{text}");
}

#[test]
fn auto_read_only_takes_a_file_that_cannot_be_written() {
    let dir = on_tmpfs();
    let mount = Mount::small(&dir.path().join("ro"), 1 << 20);
    let image = sparse(&mount.0, "a.img", 4096).display().to_string();
    tool("mount", &["-o", "remount,ro", mount.0.to_str().unwrap()]);
    let options = format!("driver=file,filename={image}");
    let wanted = format!("Could not open '{image}': Read-only file system");
    assert_eq!(refusal(&options), wanted);
    let bench = Bench::new();
    let node = bench.node(&format!("{options},auto-read-only=on,node-name=a")).unwrap();
    assert!(node.traits().abilities.contains(Abilities::READ_ONLY));
    bench.write_to(node).map(|_| ()).unwrap_err();
}

#[test]
fn a_writable_file_is_opened_for_writing_even_with_auto_read_only() {
    let dir = on_tmpfs();
    let image = sparse(dir.path(), "a.img", 4096);
    let options = format!("driver=file,filename={},auto-read-only=on", image.display());
    let bench = Bench::new();
    let disk = bench.disk(&options).unwrap();
    bench.write(&disk, 0, pattern(512), WriteFlags::empty()).unwrap();
}

#[test]
fn the_descriptor_is_not_left_to_child_processes() {
    let dir = on_tmpfs();
    let image = sparse(dir.path(), "a.img", 4096).canonicalize().unwrap();
    let options = FileOptions::new(image.to_str().unwrap());
    let node = NodeOptions::default();
    let driver = FileDriver::open(Flavour::File, &options, &node, false).unwrap();
    let listing = tool("sh", &["-c", "ls -l /proc/$$/fd"]);
    assert!(!listing.contains(image.to_str().unwrap()), "{listing}");
    assert_eq!(driver.len(), 4096);
}

#[test]
fn direct_io_is_aligned_as_the_file_system_wants_it_and_buffered_io_not_at_all() {
    let dir = on_disk();
    let image = sparse(dir.path(), "a.img", 1 << 20);
    let bench = Bench::new();
    let buffered = bench.disk(&format!("driver=file,filename={}", image.display())).unwrap();
    let traits = buffered.node.traits();
    assert_eq!((traits.request_align, traits.buffer_align), (1, 1));
    drop(buffered);
    let bench = Bench::new();
    let options = format!("driver=file,filename={},cache.direct=on", image.display());
    let direct = bench.disk(&options).unwrap();
    let traits = direct.node.traits();
    assert!(traits.request_align >= 512, "{traits:?}");
    assert!(traits.zero_align >= traits.request_align, "{traits:?}");
    assert!(traits.discard_align >= traits.request_align, "{traits:?}");
}
