//! A disk as a virtio block device: its features and configuration.

use super::config;
use super::queues::Queues;
use crate::export::core::Disk;
use crate::io::Worker;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

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
    pub queues: Queues,
}

impl Device {
    /// The device that `disk` is to guests.
    pub fn new(disk: Disk, options: DeviceOptions) -> Device {
        let features = config::features(&disk.node(), &disk.options);
        Device { disk: Arc::new(disk), options, features, queues: Queues::default() }
    }

    /// Makes the image hand over what it keeps in the front end's memory, which is reported through the channel; none
    /// if it keeps nothing.
    pub fn detach_journal(self: &Arc<Device>, worker: &Worker) -> Option<Receiver<()>> {
        if self.disk.journal.is_unused() {
            return None;
        }
        let device = self.clone();
        Some(worker.spawn(move || async move {
            let _busy = device.begin().await;
            device.disk.journal.detach(&device.disk.name).await;
        }))
    }
}
