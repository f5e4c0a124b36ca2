//! An export other than vhost-user-blk on the same core, whose front end is a test in this process.
//!
//! The service, changes of the graph, failure policies and counters need nothing of a transport.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::Duration;
use vublk::block::graph::User;
use vublk::block::{Error, LocalFuture, Node, OpenPolicy, WriteFlags};
use vublk::export::core::disk::Request;
use vublk::export::core::failure::{Action, Failure, FailureOptions, Operation, WriteErrors};
use vublk::export::core::metrics::Recorder;
use vublk::export::core::{Disk, DiskOptions, Export, Parts, Transport};
use vublk::io::{self, IoVec, Worker, WorkerOptions};
use vublk::options::{Map, keyval};
use vublk::service::{NewExport, Service};

/// Tells the test of the export that is made.
struct Direct(mpsc::Sender<Arc<FrontEnd>>);

/// What the test sends requests to.
struct FrontEnd {
    disk: Arc<Disk>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    paused: u32,
    in_flight: usize,
    /// Times that held requests were told to try again.
    retries: usize,
    recorder: Option<Recorder>,
    ended: bool,
}

struct DirectExport(Arc<FrontEnd>);

impl Transport for Direct {
    fn check(&self, _: &str) -> Result<(), Error> {
        Ok(())
    }

    fn queues(&self) -> u16 {
        1
    }

    fn socket(&self) -> Option<&Path> {
        None
    }

    fn create(self: Box<Self>, parts: Parts) -> Result<Box<dyn Export>, Error> {
        let recorder = parts.metrics.as_ref().and_then(|metrics| metrics.recorder(0));
        let state = Mutex::new(State { recorder, ..State::default() });
        let disk = Arc::new(Disk::new(&parts.name, parts.node, parts.disk, 512, parts.metrics));
        let front_end = Arc::new(FrontEnd { disk, state });
        self.0.send(front_end.clone()).unwrap();
        Ok(Box::new(DirectExport(front_end)))
    }
}

impl Export for DirectExport {
    fn type_name(&self) -> &'static str {
        "direct"
    }

    fn disk(&self) -> &Arc<Disk> {
        &self.0.disk
    }

    fn user(&self) -> Arc<dyn User> {
        self.0.clone()
    }

    fn start(&mut self, _: Box<dyn FnOnce() + Send>) -> Result<(), Error> {
        Ok(())
    }

    fn retry_held(&self) {
        self.0.state().retries += 1;
    }

    fn fail_held(&self) {}
}

impl Drop for DirectExport {
    fn drop(&mut self) {
        self.0.state().ended = true;
    }
}

impl User for FrontEnd {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        self.hold();
        Box::pin(async {
            while self.state().in_flight > 0 {
                io::sleep(Duration::from_millis(1)).await;
            }
        })
    }

    fn hold(&self) {
        self.state().paused += 1;
    }

    fn resume(&self) {
        self.state().paused -= 1;
    }

    fn can_move(&self) -> bool {
        true
    }

    fn moved<'a>(&'a self, node: &'a Arc<Node>) -> LocalFuture<'a, ()> {
        self.disk.change_node(node);
        Box::pin(std::future::ready(()))
    }

    fn resized(&self) {
        self.disk.take_size();
    }
}

impl FrontEnd {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    async fn begin(&self) {
        loop {
            {
                let mut state = self.state();
                if state.paused == 0 {
                    state.in_flight += 1;
                    return;
                }
            }
            io::sleep(Duration::from_millis(1)).await;
        }
    }

    /// One request. Runs on a worker.
    async fn run(
        &self,
        operation: Operation,
        mut make: impl FnMut() -> Request<'static>,
        bytes: u32,
    ) -> Result<(), Failure> {
        loop {
            self.begin().await;
            let taken_at = self.state().recorder.as_mut().map(|recorder| {
                recorder.poll(&io::current());
                recorder.begin(&io::current());
                recorder.taken_at(None)
            });
            let result = self.disk.run(make()).await;
            let retries = {
                let mut state = self.state();
                state.in_flight -= 1;
                if let (Some(recorder), Some(at)) = (&mut state.recorder, taken_at) {
                    recorder.end(&io::current());
                    recorder.ended(Some(operation), result.is_ok(), at, bytes);
                    recorder.settle(io::current().now());
                }
                state.retries
            };
            let Err(failure) = result else { return Ok(()) };
            match self.disk.failed(failure) {
                Action::Report => return Err(failure),
                Action::Ignore => return Ok(()),
                Action::Stop => {}
            }
            self.disk.failures.hold(1);
            while self.state().retries == retries {
                io::sleep(Duration::from_millis(1)).await;
            }
            self.disk.failures.let_go(1);
        }
    }
}

/// Leaks a few bytes, so that requests can name them.
fn memory(byte: u8, len: usize) -> &'static mut [u8] {
    Vec::leak(vec![byte; len])
}

fn write(
    worker: &Worker,
    to: &Arc<FrontEnd>,
    at: u64,
    byte: u8,
) -> mpsc::Receiver<Result<(), Failure>> {
    let to = to.clone();
    worker.spawn(move || async move {
        let data: &[u8] = memory(byte, 512);
        let make =
            || Request::Write { at, from: IoVec::from_ref(data), flags: WriteFlags::empty() };
        to.run(Operation::Write, make, 512).await
    })
}

fn read(worker: &Worker, from: &Arc<FrontEnd>, at: u64) -> u8 {
    let from = from.clone();
    let result = worker.block_on(move || async move {
        let place = memory(0, 512).as_mut_ptr() as usize;
        let make = || {
            // SAFETY: leaked memory, which nobody else looks at until the request has ended.
            let into = unsafe { std::slice::from_raw_parts_mut(place as *mut u8, 512) };
            Request::Read { at, into: IoVec::from_mut(into) }
        };
        from.run(Operation::Read, make, 512).await.map(|()| {
            // SAFETY: as above; the request has ended.
            unsafe { *(place as *const u8) }
        })
    });
    result.unwrap()
}

fn options(text: &str) -> Map {
    keyval::parse(text, None).unwrap().options
}

fn export(service: &Service, node: &Arc<Node>, worker: &Arc<Worker>) -> Arc<FrontEnd> {
    let (sender, made) = mpsc::channel();
    let failures = FailureOptions { werror: WriteErrors::Stop, ..FailureOptions::default() };
    let new = NewExport {
        id: "e".into(),
        node: node.clone(),
        disk: DiskOptions { writable: true, write_through: false, failures },
        transport: Box::new(Direct(sender)),
        workers: vec![worker.clone()],
        allow_inactive: false,
        accept_loss: false,
    };
    service.wait(async move |service| service.export(new).await).unwrap();
    made.recv().unwrap()
}

#[test]
fn an_export_of_another_type_is_served_drained_watched_and_ended() {
    let service = Service::start(vublk::drivers::registry(), OpenPolicy::default()).unwrap();
    let observed = service.observe();
    let worker = Arc::new(Worker::start("front end", WorkerOptions::default()).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let text = format!(
        "driver=blkdebug,node-name=n,image.driver=file,image.filename={},\
         inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=5,\
         inject-error.0.sector=8,inject-error.0.once=on",
        image.display()
    );
    let node =
        service.wait(async move |service| service.blockdev_add(options(&text)).await).unwrap();
    let front_end = export(&service, &node, &worker);
    let info = service.exports().remove(0);
    assert_eq!((&*info.id, info.type_name, &*info.node_name), ("e", "direct", "n"));

    // Data, and what is counted of it.
    write(&worker, &front_end, 0, 7).recv().unwrap().unwrap();
    assert_eq!(read(&worker, &front_end, 0), 7);
    let counted = observed.exports().remove(0);
    let bytes: Vec<u64> = counted.queues().next().unwrap().1.operations[..2]
        .iter()
        .map(|operation| operation.bytes.load(std::sync::atomic::Ordering::Relaxed))
        .collect();
    assert_eq!(bytes, [512, 512]);

    // A change of the graph waits for it, and it waits for the change.
    let (at_rest, sender) = mpsc::channel();
    let (go_on, gate) = mpsc::channel::<()>();
    let clone = node.clone();
    let change = service.spawn("change", async move |service| {
        let drained = service.graph().drain(&clone).await.unwrap();
        at_rest.send(()).unwrap();
        io::offload(move || gate.recv().unwrap()).await;
        drop(drained);
    });
    sender.recv().unwrap();
    let waits = write(&worker, &front_end, 512, 8);
    assert_eq!(worker.call(|_| 1), 1);
    assert!(waits.try_recv().is_err() && front_end.state().in_flight == 0);
    go_on.send(()).unwrap();
    change.wait();
    waits.recv().unwrap().unwrap();

    // Another size.
    let clone = node.clone();
    service.wait(async move |service| service.resize(&clone, 2 << 20).await).unwrap();
    assert_eq!(front_end.disk.transfer_range(4095, 512), Some(4095 * 512));

    // A write that fails is held until it works.
    let held = write(&worker, &front_end, 8 * 512, 9);
    while service.exports()[0].held == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let info = service.exports().remove(0);
    assert_eq!((info.errors, info.last_failure.unwrap().offset), (1, 8 * 512));
    let errors = service.take_io_errors();
    assert_eq!(errors.len(), 1);
    service.retry_held("e").unwrap();
    held.recv().unwrap().unwrap();
    assert_eq!(read(&worker, &front_end, 8 * 512), 9);

    service.wait(async |service| service.export_del("e", true).await).unwrap();
    let mut ended = Vec::new();
    while ended.is_empty() {
        std::thread::sleep(Duration::from_millis(1));
        ended = service.take_ended();
    }
    assert_eq!(ended, ["e"]);
    assert!(service.exports().is_empty() && front_end.state().ended);
}
