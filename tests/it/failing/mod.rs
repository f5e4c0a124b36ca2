//! Failing storage, as the guest and an operator see it.
//!
//! Most of it runs in this process: the real service, its workers and sockets, over a simulated disk
//! that fails when the test says so.

mod full;
mod growing;
mod hangs;
pub mod held;
mod limit;
mod lost;
mod policies;
mod room;
pub mod small;

use std::time::{Duration, Instant};

use vublk::block::OpenPolicy;
use vublk::options::keyval;
use vublk::protocol::sim::{Effect, Fault, Kinds, SimDisk, SimOptions};
use vublk::service::{ExportInfo, Owned, Service};
use vublk_testkit::request::{Request, Shape};
use vublk_testkit::spec::protocol;
use vublk_testkit::{Disk, Options};

use crate::disks::{REGISTRY, unique};
use crate::vhost_user::LIMIT;

/// A service with the export `e0` of a simulated disk.
pub struct Stage {
    pub service: Option<Owned>,
    pub sim: SimDisk,
    /// Of the disk's node.
    options: String,
    export: String,
    dir: tempfile::TempDir,
}

impl Stage {
    /// `export`: more options of it, such as its policies.
    pub fn new(export: &str) -> Stage {
        let sim = SimDisk::new(SimOptions { max_len: 2 << 20, ..SimOptions::new(1 << 20) });
        Stage::on(sim, export, |disk| format!("driver=sim,disk={disk}"))
    }

    /// The same with a new qcow2 image on the disk.
    pub fn with_image(export: &str) -> Stage {
        let image = crate::qcow2::sim::image(1 << 20, "cluster_size=4k");
        let options = SimOptions { max_len: 2 << 20, ..SimOptions::new(image.len() as u64) };
        let sim = SimDisk::holding(options, &image);
        Stage::on(sim, export, |disk| format!("driver=qcow2,file.driver=sim,file.disk={disk}"))
    }

    fn on(sim: SimDisk, export: &str, node: impl Fn(&str) -> String) -> Stage {
        let name = unique();
        sim.publish(&name);
        let dir = tempfile::tempdir().unwrap();
        let (options, export) = (node(&name), export.to_owned());
        let mut stage = Stage { service: None, sim, options, export, dir };
        stage.start();
        stage
    }

    /// Ends the service, if there is one, and starts another on the same disk, as a daemon that ends
    /// and is started again.
    pub fn start(&mut self) {
        self.service = None;
        let parse = |text: &str| keyval::parse(text, None).unwrap().options;
        let service = Service::start(&REGISTRY, OpenPolicy::default()).unwrap();
        let object = parse("qom-type=iothread,id=io0");
        let disk = parse(&format!("{},node-name=d0,discard=unmap", self.options));
        let path = self.dir.path().join("e0.sock");
        let export = format!(
            "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={},writable=on,\
             iothread=io0,num-queues=2,{}",
            path.display(),
            self.export
        );
        let export = parse(export.trim_end_matches(','));
        let begun = service.wait(async move |service| {
            service.object_add(object).await?;
            service.blockdev_add(disk).await?;
            service.export_add(export).await
        });
        begun.unwrap();
        self.service = Some(service);
    }

    pub fn service(&self) -> &Service {
        self.service.as_ref().unwrap()
    }

    /// A front end, that has requests in flight tracked if `tracked`.
    pub fn open(&self, tracked: bool) -> Disk {
        self.open_with(&options(tracked))
    }

    pub fn open_with(&self, options: &Options) -> Disk {
        Disk::open(&self.dir.path().join("e0.sock"), options).unwrap()
    }

    /// From now on operations of these kinds fail, until [`SimDisk::heal`].
    pub fn fails(&self, kinds: Kinds, errno: i32) {
        self.sim.inject(Fault::new(kinds, Effect::Fail(vublk::io::Errno(errno))));
    }

    pub fn info(&mut self) -> ExportInfo {
        self.service().exports().remove(0)
    }

    /// Waits until this many requests are held.
    pub fn wait_held(&mut self, held: usize) {
        let end = Instant::now() + LIMIT;
        while self.info().held != held {
            assert!(Instant::now() < end, "{:?}", self.info());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub fn options(tracked: bool) -> Options {
    let more = if tracked { protocol::INFLIGHT_SHMFD } else { 0 };
    Options {
        num_queues: 2,
        queue_size: 16,
        protocol: protocol::DEFAULT | protocol::RESET_DEVICE | more,
        limit: LIMIT,
        ..Options::default()
    }
}

/// A block of 4 KiB, told from others by its number.
pub fn block(number: u64) -> Vec<u8> {
    crate::vhost_user::pattern(4096, number as u8)
}

pub fn write_of(number: u64) -> Request {
    Request::Out { sector: number * 8, data: block(number) }
}

/// Sends a write of that block.
pub fn submit_write(disk: &mut Disk, number: u64) {
    disk.queue(0).submit(&write_of(number), &Shape::indirect()).unwrap();
}
