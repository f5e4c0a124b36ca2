//! A disk as a virtio block device: what guests are told of it besides its data.

use super::config;
use super::queue::Queue;
use crate::export::core::Disk;
use crate::io::sync::Mutex;
use crate::io::{SourceId, Worker};
use std::sync::Arc;

/// What only this type of export is configured with.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Virtqueues to offer.
    pub num_queues: u16,
    /// Up to 20 bytes, read by GET_ID.
    pub serial: String,
}

/// A disk, and what is common to the queues of its guest.
pub struct Device {
    pub disk: Arc<Disk>,
    pub options: DeviceOptions,
    /// The virtio features that guests are offered, which may not change under them.
    pub features: u64,
    /// The queues that run: worker and source. For what is to be said to all of them.
    pub running: Mutex<Vec<(usize, SourceId)>>,
}

impl Device {
    /// The device that `disk` is to guests.
    pub fn new(disk: Disk, options: DeviceOptions) -> Device {
        let features = config::features(&disk.node(), &disk.options);
        Device { disk: Arc::new(disk), options, features, running: Mutex::default() }
    }

    /// Has every queue that runs do something, soon. Waits for nobody.
    pub fn to_queues(&self, workers: &[Arc<Worker>], work: fn(&mut Queue)) {
        let running = self.running.lock().clone();
        for (worker, source) in running {
            let disk = self.disk.clone();
            workers[worker].send(move |local| {
                // By now the number may be that of another source.
                if let Some(queue) = local.source::<Queue>(source)
                    && queue.serves(&disk)
                {
                    work(queue);
                }
            });
        }
    }
}
