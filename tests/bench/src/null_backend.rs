//! The yardstick: a null disk on the stock `vhost-user-backend` crate, written as its users write one.
//!
//! Reads leave the guest's buffer alone, writes are dropped, every request succeeds. One daemon object
//! serves one connection (the crate allows no more), so the listener outlives it and a new one is
//! made for the next front end.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_OK};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueOwnedT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

const CAPACITY_SECTORS: u64 = 1 << 21;
const SEG_MAX: u32 = 126;
const HEADER: usize = 16;

type Guest = GuestMemoryAtomic<GuestMemoryMmap>;

#[derive(Default)]
struct NullDisk {
    memory: OnceLock<Guest>,
    event_idx: AtomicBool,
}

impl NullDisk {
    /// Serves what is available. True if anything was.
    fn process(
        &self,
        vring: &VringRwLock,
        memory: &GuestMemoryLoadGuard<GuestMemoryMmap>,
    ) -> std::io::Result<bool> {
        let chains: Vec<_> = vring
            .get_mut()
            .get_queue_mut()
            .iter(memory.clone())
            .map_err(std::io::Error::other)?
            .collect();
        if chains.is_empty() {
            return Ok(false);
        }
        for chain in chains {
            let head = chain.head_index();
            let mut reader = chain.clone().reader(memory).map_err(std::io::Error::other)?;
            let mut header = [0u8; HEADER];
            reader.read_exact(&mut header)?;
            let mut data = chain.writer(memory).map_err(std::io::Error::other)?;
            let len = data.available_bytes();
            let mut status = data.split_at(len.saturating_sub(1)).map_err(std::io::Error::other)?;
            status.write_all(&[VIRTIO_BLK_S_OK as u8])?;
            vring.add_used(head, len as u32).map_err(std::io::Error::other)?;
            if vring.needs_notification().map_err(std::io::Error::other)? {
                vring.signal_used_queue()?;
            }
        }
        Ok(true)
    }
}

impl VhostUserBackend for NullDisk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        4
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            30, // VHOST_USER_F_PROTOCOL_FEATURES
        ]
        .iter()
        .fold(0, |mask, bit| mask | 1u64 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; 60];
        config[0..8].copy_from_slice(&CAPACITY_SECTORS.to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        let end = (offset as usize).saturating_add(size as usize);
        config.get(offset as usize..end).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, memory: Guest) -> std::io::Result<()> {
        // The same object each time: its contents are what is swapped.
        let _ = self.memory.set(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> std::io::Result<()> {
        let (Some(vring), Some(memory)) = (vrings.get(usize::from(queue)), self.memory.get())
        else {
            return Ok(());
        };
        let memory = memory.memory();
        if !self.event_idx.load(Ordering::Relaxed) {
            return self.process(vring, &memory).map(drop);
        }
        loop {
            vring.disable_notification().map_err(std::io::Error::other)?;
            self.process(vring, &memory)?;
            if !vring.enable_notification().map_err(std::io::Error::other)? {
                return Ok(());
            }
        }
    }
}

/// Serves one front end after another at `socket`, until killed.
pub fn serve(socket: &Path) -> Result<(), String> {
    let mut listener = Listener::new(socket, true).map_err(|e| format!("listen: {e}"))?;
    loop {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let disk = Arc::new(NullDisk::default());
        let mut daemon = VhostUserDaemon::new("null".into(), disk, memory)
            .map_err(|e| format!("daemon: {e}"))?;
        daemon.start(&mut listener).map_err(|e| format!("accept: {e}"))?;
        // A front end that hangs up is the ordinary end of a session.
        let _ = daemon.wait();
    }
}
