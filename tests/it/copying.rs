//! The copy engine under control: it pauses and ends between any two pieces.

use crate::disks::open;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vublk::copy::{Control, Copy, Disk, Hooks, Part, Source, Trouble, copy};
use vublk::io::{Worker, WorkerOptions, current};

const LEN: u64 = 16 << 20;

/// Runs QEMU's tool in a directory.
fn qemu_img(place: &Path, line: &str) {
    let run = Command::new("qemu-img").args(line.split(' ')).current_dir(place).status().unwrap();
    assert!(run.success(), "{line}");
}

/// An image that stands on `old.raw`, full of data, and `new.raw`, which is empty.
fn place() -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("old.raw"), vec![7; LEN as usize]).unwrap();
    std::fs::write(place.path().join("new.raw"), []).unwrap();
    qemu_img(place.path(), "create -q -f qcow2 -b old.raw -F raw top.qcow2");
    place
}

/// Rebases the image in `place`. `steer` is called when the first of eight pieces is done.
async fn rebase(
    place: &Path,
    control: Arc<Control>,
    steer: impl Fn(&Control) + Send + Sync + 'static,
) -> (Result<(), Trouble>, u64) {
    let path = |name: &str| place.join(name).display().to_string();
    let options = format!(
        "driver=qcow2,file.driver=file,file.filename={},backing.driver=raw,backing.file.driver=file,\
         backing.file.filename={}",
        path("top.qcow2"),
        path("old.raw")
    );
    let image = open(&options).await;
    let new = open(&format!("driver=file,filename={}", path("new.raw"))).await;
    let disk = Disk::new(image.node.clone());
    let work = Copy {
        sources: vec![Source::whole(disk.clone())],
        target: disk,
        parallel: 1,
        in_order: true,
        compress: false,
        sparse: None,
        keeps_data: true,
        zero_from: u64::MAX,
        part: Part::Rebased(Some(Disk::new(new.node.clone()))),
        salvage: false,
    };
    let pieces = Arc::new(AtomicU64::new(0));
    let (count, clone) = (pieces.clone(), control.clone());
    let progress = Box::new(move |_, _| {
        if count.fetch_add(1, Ordering::Relaxed) == 0 {
            steer(&clone);
        }
    });
    let hooks = Hooks { control, progress, salvaged: Box::new(|_, _| {}) };
    let ended = copy(work, &[], hooks).await;
    image.node.flush().await.unwrap();
    (ended, pieces.load(Ordering::Relaxed))
}

#[test]
fn a_rebase_that_is_paused_rests_between_two_pieces_and_then_goes_on() {
    let place = place();
    let path = place.path().to_owned();
    let worker = Worker::start("copying", WorkerOptions::default()).unwrap();
    let (ended, pieces) = worker.block_on(|| async move {
        let control = Arc::new(Control::default());
        let clone = control.clone();
        current().spawn(async move {
            clone.until(Control::is_resting).await;
            clone.resume();
        });
        rebase(&path, control, Control::pause).await
    });
    assert_eq!((ended, pieces), (Ok(()), LEN / vublk::copy::STEP));
    qemu_img(place.path(), "rebase -u -b new.raw -F raw top.qcow2");
    qemu_img(place.path(), "compare -q -f qcow2 -F raw top.qcow2 old.raw");
}

#[test]
fn a_rebase_that_is_cancelled_ends_between_two_pieces_and_the_image_shows_the_same() {
    let place = place();
    let path = place.path().to_owned();
    let worker = Worker::start("copying", WorkerOptions::default()).unwrap();
    let (ended, pieces) =
        worker.block_on(|| async move { rebase(&path, Arc::default(), Control::cancel).await });
    assert_eq!((ended, pieces), (Err(Trouble::Cancelled), 1));
    qemu_img(place.path(), "compare -q -f qcow2 -F raw top.qcow2 old.raw");
}
