//! Namespaces that images are made on, or that are taken for raw ones.

use super::{hold, is_fast, worker, write};
use crate::disks::{REGISTRY, nvme_disk};
use vublk::block::OpenPolicy;
use vublk::block::create::Made;
use vublk::drivers;
use vublk::options::{Map, keyval};
use vublk::service::Service;
use vublk_vfio::fake::Config;

/// What copies rely on that leave zeroes out.
#[test]
fn what_is_made_on_a_namespace_reports_whether_what_was_there_before_shows() {
    for (format, preallocation, size, wanted) in [
        ("raw", None, 64, Ok(Made { reads_zeroes: false })),
        ("qcow2", None, 32, Ok(Made { reads_zeroes: true })),
        ("qcow2", Some("metadata"), 32, Ok(Made { reads_zeroes: false })),
        ("raw", None, 65, Err("Cannot grow device files")),
        ("qcow2", Some("metadata"), 65, Err("Cannot grow device files")),
    ] {
        let (fake, options) = nvme_disk(Config::default());
        let address = options.rsplit_once("device=").unwrap().1;
        let name = format!("nvme://{address}/1");
        let mut given = Map::new();
        preallocation.and_then(|mode| given.insert("preallocation", mode));
        let creation = drivers::creation(format, &name, given, Some(size << 20)).unwrap();
        let worker = worker("nvme");
        let made = worker.block_on(move || async move { creation.run().await });
        match (made, wanted) {
            (Ok(made), Ok(wanted)) => assert_eq!(made, wanted, "{format} {preallocation:?}"),
            (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{error}"),
            (made, wanted) => panic!("{format} {preallocation:?}: {made:?}, not {wanted:?}"),
        }
        assert!(!fake.has_mappings(), "the controller is free again");
        assert_eq!(fake.complaints(), Vec::<String>::new());
    }
}

#[test]
fn a_look_at_a_new_raw_node_leaves_the_only_queue_to_the_worker_that_serves_guests() {
    let (fake, options) = nvme_disk(Config { pairs: 1, ..Config::default() });
    let service = Service::start(&REGISTRY, OpenPolicy::default()).unwrap();
    let options = format!("driver=raw,node-name=d,file.{}", options.replace(",", ",file."));
    let options = keyval::parse(&options, None).unwrap().options;
    let node = service.wait(async move |service| service.blockdev_add(options).await).unwrap();
    assert_ne!(fake.counts().commands, 0, "it was looked at");
    let worker = worker("nvme");
    let held = hold(service.graph(), &node);
    write(&worker, &node, 0, 1).unwrap();
    assert!(is_fast(&worker, &node));
    drop((held, node, worker));
    drop(service);
    assert_eq!(fake.complaints(), Vec::<String>::new());
}
