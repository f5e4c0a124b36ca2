//! What is special about qed images that are open: the mark that they need a check.

use crate::disks::{REGISTRY, new_image, open};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use vublk::block::*;
use vublk::io::{self, IoVec, Worker, WorkerOptions};

/// Whether an image's file says that it needs a check.
fn is_marked(file: &std::fs::File) -> bool {
    let mut features = [0];
    file.read_exact_at(&mut features, 16).unwrap();
    features[0] & 2 != 0
}

#[test]
fn an_image_that_is_left_alone_needs_no_check_any_more() {
    let (file, options) = new_image(REGISTRY.get("qed").unwrap(), 1 << 20);
    let worker = Worker::start("qed", WorkerOptions::default()).unwrap();
    worker.block_on(move || async move {
        let opened = open(&options).await;
        let file = file.as_file();
        assert!(!is_marked(file), "nothing was written");
        let ones = vec![1; 4096];
        let write = async |at| {
            let list = IoVec::from_ref(&ones);
            opened.node.write(at, &list, WriteFlags::empty()).await.unwrap();
        };
        for at in [0, 512 << 10] {
            write(at).await;
            assert!(is_marked(file), "a cluster was allocated");
            let end = Instant::now() + Duration::from_secs(120);
            while is_marked(file) {
                assert!(Instant::now() < end, "it is never taken back");
                io::sleep(Duration::from_millis(50)).await;
            }
            write(at + 4096).await;
            assert!(!is_marked(file), "no cluster was allocated");
        }
        let len = file.metadata().unwrap().len();
        assert_eq!(len, (1 + 4 + 4 + 2) << 16, "the unused end of the file is cut off");
    });
}
