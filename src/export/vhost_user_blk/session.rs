//! One connection of a front end: the vhost-user messages (QEMU's vhost-user protocol text) and the
//! state that they build up.
//!
//! A bad message ends the connection, never the daemon. Whatever ends it, the rings are stopped as
//! GET_VRING_BASE stops them: popping ends, I/O in flight ends, its completions are published, and
//! only then may the next session begin.

use super::config::{self, CONFIG_SIZE, F_PROTOCOL_FEATURES, WCE_OFFSET};
use super::inflight;
use super::memory::{MAX_REGIONS, Memory, Region};
use super::queue::{Queue, QueueStart};
use super::request::Disk;
use super::ring::{Addresses, MAX_SIZE, SplitRing};
use crate::io::{Errno, SourceId, Worker};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::*;
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// How long a ring may take to stop before the log says that it is still waited for.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Cloud Hypervisor asks for the configuration space at this offset, where the transport's own
/// registers would end on PCI; QEMU asks at 0.
const CONFIG_BASE: u32 = VHOST_USER_CONFIG_OFFSET;

/// The state of one connection.
pub struct Session {
    name: String,
    disk: Arc<Disk>,
    workers: Vec<Arc<Worker>>,
    /// The worker of the first queue; the others follow in turn.
    first_worker: usize,
    /// What the front end has acknowledged; `None` until it says.
    features: Option<u64>,
    /// Rings that start meanwhile take nothing either.
    paused: u32,
    memory: Arc<Memory>,
    rings: Vec<RingState>,
    /// Where requests in flight are tracked, if the front end wants it.
    inflight: Option<Arc<inflight::Region>>,
}

/// What the front end has said of a ring.
struct RingState {
    size: u16,
    at: Option<Addresses>,
    base: u16,
    kick: Kick,
    call: Option<Arc<File>>,
    err: Option<Arc<File>>,
    enabled: bool,
    running: Option<(usize, SourceId)>,
}

enum Kick {
    /// None was set yet: the ring is not started.
    Unset,
    /// The ring is to be polled.
    Poll,
    Fd(File),
}

impl RingState {
    fn new() -> RingState {
        RingState {
            size: 0,
            at: None,
            base: 0,
            kick: Kick::Unset,
            call: None,
            err: None,
            enabled: false,
            running: None,
        }
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::ReqHandlerError(io::Error::other(why.into())))
}

/// Makes sure that no write to a descriptor of the front end's waits: one that is full would hold
/// up a worker, and with it the disks of others.
fn for_words(file: File) -> Result<Arc<File>> {
    let fd = file.as_raw_fd();
    // SAFETY: names no memory, and the descriptor is open.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return refuse(format!("a descriptor that cannot be written to: {}", Errno::last()));
    }
    Ok(Arc::new(file))
}

impl Session {
    pub fn new(
        name: String,
        disk: Arc<Disk>,
        workers: Vec<Arc<Worker>>,
        first_worker: usize,
    ) -> Session {
        let rings = std::iter::repeat_with(RingState::new);
        let rings = rings.take(disk.options.num_queues as usize).collect();
        let session = Session {
            name,
            disk,
            workers,
            first_worker,
            features: None,
            paused: 0,
            memory: Arc::default(),
            rings,
            inflight: None,
        };
        session.apply_write_cache();
        session
    }

    fn ring(&mut self, index: u32) -> Result<&mut RingState> {
        let count = self.rings.len();
        match self.rings.get_mut(index as usize) {
            Some(ring) => Ok(ring),
            None => refuse(format!("queue {index} of {count}")),
        }
    }

    fn has(&self, bit: u32) -> bool {
        self.features.is_some_and(|features| features & 1 << bit != 0)
    }

    /// Whether writes must be durable before they complete: because the export says so, because the
    /// guest cannot flush, or because it has switched the write cache off. That choice outlives the
    /// connection: front ends do not repeat it when a stopped machine goes on or when they
    /// reconnect, and a guest that relies on it sends no flushes.
    fn apply_write_cache(&self) {
        let flushes = self.features.is_none() || self.has(VIRTIO_BLK_F_FLUSH);
        let off = !self.disk.write_cache.load(Ordering::Relaxed);
        let through = self.disk.options.write_through || !flushes || off;
        self.disk.write_through.store(through, Ordering::SeqCst);
    }

    /// Back to what a guest finds that has said nothing.
    fn reset(&mut self) {
        self.features = None;
        self.disk.write_cache.store(true, Ordering::Relaxed);
        self.apply_write_cache();
    }

    /// Starts a ring if all that it needs has been said.
    fn start_ring(&mut self, index: usize) -> Result<()> {
        let protocol = self.features.unwrap_or(0) & F_PROTOCOL_FEATURES != 0;
        let ring = &self.rings[index];
        // Without the protocol features a ring is enabled from the start.
        let enabled = ring.enabled || !protocol;
        let (Some(at), false, true) = (ring.at, matches!(ring.kick, Kick::Unset), enabled) else {
            return Ok(());
        };
        if ring.running.is_some() {
            return Ok(());
        }
        let size = if ring.size == 0 { MAX_SIZE } else { ring.size };
        let event_index = self.has(VIRTIO_RING_F_EVENT_IDX);
        let mut split = SplitRing::new(&self.memory, size, at, ring.base, event_index)
            .or_else(|why| refuse(format!("queue {index}: {why}")))?;
        let inflight = match &self.inflight {
            None => None,
            Some(region) => {
                let tracker = inflight::Tracker::recover(region, index, size, split.published())
                    .or_else(|why| refuse(format!("queue {index}: {why}")))?;
                // The base that the front end knows may be that of a daemon which died.
                let again = tracker.to_replay();
                split.go_on_behind(again);
                if again > 0 {
                    log::info!("{}: queue {index}: {again} requests are begun again", self.name);
                }
                Some(tracker)
            }
        };
        let start = QueueStart {
            name: format!("{}: queue {index}", self.name),
            disk: self.disk.clone(),
            memory: self.memory.clone(),
            ring: split,
            inflight,
            size,
            call: ring.call.clone(),
            err: ring.err.clone(),
            paused: self.paused,
        };
        let kick = match &ring.kick {
            Kick::Fd(file) => Some(file.as_raw_fd()),
            _ => None,
        };
        let worker = (self.first_worker + index) % self.workers.len();
        // Every start scans the ring unprompted: a source is polled as it is attached.
        let source =
            self.workers[worker].call(move |local| local.attach(Box::new(Queue::new(start)), kick));
        self.rings[index].running = Some((worker, source));
        Ok(())
    }

    /// Rings that start from now on track their requests there.
    fn track_in(&mut self, region: inflight::Region) -> Result<()> {
        if let Some(index) = self.rings.iter().position(|ring| ring.running.is_some()) {
            return refuse(format!("inflight region: queue {index} is running"));
        }
        let (has, most) = (region.num_queues() as usize, self.rings.len());
        if has > most {
            return refuse(format!("inflight region for {has} queues: the disk has {most}"));
        }
        self.inflight = Some(Arc::new(region));
        Ok(())
    }

    /// Stops rings, all at once, and waits until nothing of them is in flight.
    fn stop_rings(&mut self, indices: impl Iterator<Item = usize>) {
        let mut stopping = Vec::new();
        for index in indices {
            let Some((worker, source)) = self.rings[index].running.take() else { continue };
            let (sender, receiver) = mpsc::channel();
            self.workers[worker].send(move |local| {
                if let Some(queue) = local.source::<Queue>(source) {
                    queue.stop(sender);
                }
            });
            stopping.push((index, receiver));
        }
        for (index, receiver) in stopping {
            let mut waited = Duration::ZERO;
            self.rings[index].base = loop {
                match receiver.recv_timeout(STOP_PATIENCE) {
                    Ok(base) => break base,
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        waited += STOP_PATIENCE;
                        log::warn!(
                            "{}: queue {index}: I/O in flight has not ended for {} s",
                            self.name,
                            waited.as_secs()
                        );
                    }
                    Err(mpsc::RecvTimeoutError::Disconnected) => break self.rings[index].base,
                }
            };
            // Until the queue is gone: the last to hold a guest's memory unmaps it, which takes long
            // and must not be the worker, whose other disks would wait.
            while receiver.recv().is_ok() {}
        }
    }

    /// Stops every ring. The end of each session.
    pub fn stop_all(&mut self) {
        self.stop_rings(0..self.rings.len());
    }

    /// Takes no more requests, and returns once none is in flight.
    pub fn pause(&mut self) {
        self.paused += 1;
        let (sender, receiver) = mpsc::channel();
        for (worker, source) in self.rings.iter().filter_map(|ring| ring.running) {
            let sender = sender.clone();
            self.workers[worker].send(move |local| {
                if let Some(queue) = local.source::<Queue>(source) {
                    queue.pause(Box::new(move || {
                        let _ = sender.send(());
                    }));
                }
            });
        }
        drop(sender);
        // Ends when every queue has sent its word and dropped its sender.
        while receiver.recv().is_ok() {}
    }

    /// Undoes one `pause`.
    pub fn resume(&mut self) {
        self.paused = self.paused.saturating_sub(1);
        for (worker, source) in self.rings.iter().filter_map(|ring| ring.running) {
            self.workers[worker].send(move |local| {
                if let Some(queue) = local.source::<Queue>(source) {
                    queue.resume();
                }
            });
        }
    }

    /// Goes over to another table of memory: rings that run are stopped, and started again with
    /// their addresses looked up anew.
    fn change_memory(&mut self, regions: Vec<Arc<Region>>) -> Result<()> {
        let memory = Memory::new(regions).or_else(refuse)?;
        let running: Vec<usize> =
            (0..self.rings.len()).filter(|&i| self.rings[i].running.is_some()).collect();
        self.stop_rings(running.iter().copied());
        self.memory = Arc::new(memory);
        running.into_iter().try_for_each(|index| self.start_ring(index))
    }

    /// Runs `work` on a ring's queue, if it is running.
    fn tell(&self, index: u32, work: impl FnOnce(&mut Queue) + Send + 'static) {
        if let Some((worker, source)) = self.rings[index as usize].running {
            self.workers[worker].call(move |local| {
                if let Some(queue) = local.source::<Queue>(source) {
                    work(queue);
                }
            });
        }
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        // Cloud Hypervisor plays a recorded session again on the same connection; it does no harm.
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop_all();
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all();
        for ring in &mut self.rings {
            *ring = RingState::new();
        }
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(&self.disk.node, &self.disk.options))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !config::features(&self.disk.node, &self.disk.options);
        if unknown != 0 {
            return refuse(format!("virtio features {unknown:#x} were not offered"));
        }
        self.features = Some(features);
        self.apply_write_cache();
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        // What a killed daemon had given to the kernel goes on without it, and must have ended before
        // it is done again.
        features
            .set(VhostUserProtocolFeatures::INFLIGHT_SHMFD, self.disk.node.driver().is_fenced());
        Ok(features)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        // The `vhost` crate checks each message against what was acknowledged.
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = regions
            .iter()
            .zip(files)
            .map(|(region, file)| Region::map(region, file).map(Arc::new).or_else(refuse))
            .collect::<Result<Vec<_>>>()?;
        self.change_memory(regions)?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let mut regions = self.memory.regions().to_vec();
        regions.push(Arc::new(Region::map(region, file).or_else(refuse)?));
        self.change_memory(regions)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let mut regions = self.memory.regions().to_vec();
        let before = regions.len();
        regions.retain(|r| !r.is(region));
        if regions.len() == before {
            return refuse("the memory region to remove is not there");
        }
        self.change_memory(regions)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        if !num.is_power_of_two() || num > MAX_SIZE as u32 {
            return refuse(format!("queue {index}: a size of {num}"));
        }
        self.ring(index)?.size = num as u16;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let ring = self.ring(index)?;
        let at = Addresses { descriptors, available, used };
        if ring.running.is_some() && ring.at != Some(at) {
            return refuse(format!("queue {index}: its addresses were changed while it runs"));
        }
        ring.at = Some(at);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let ring = self.ring(index)?;
        if ring.running.is_some() {
            return refuse(format!("queue {index}: its base was set while it runs"));
        }
        ring.base = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.ring(index)?;
        self.stop_rings(std::iter::once(index as usize));
        let ring = self.ring(index)?;
        // A stopped ring starts again only with a new kick descriptor.
        ring.kick = Kick::Unset;
        ring.call = None;
        Ok(VhostUserVringState::new(index, ring.base as u32))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let kick = file.map_or(Kick::Poll, Kick::Fd);
        let ring = self.ring(index as u32)?;
        let fd = match &kick {
            Kick::Fd(file) => Some(file.as_raw_fd()),
            _ => None,
        };
        // The old descriptor stays open until the worker watches the new one.
        let _old = std::mem::replace(&mut ring.kick, kick);
        match ring.running {
            Some((worker, source)) => {
                self.workers[worker].call(move |local| local.watch(source, fd));
                Ok(())
            }
            None => self.start_ring(index as usize),
        }
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let call = file.map(for_words).transpose()?;
        self.ring(index as u32)?.call = call.clone();
        let theirs = call.clone();
        self.tell(index as u32, move |queue| queue.set_call(theirs));
        // What was completed before had nobody to tell, or told a descriptor that nobody reads any
        // more. One word too many does no harm.
        if let Some(call) = call {
            let _ = (&*call).write(&1u64.to_ne_bytes());
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let err = file.map(for_words).transpose()?;
        self.ring(index as u32)?.err = err.clone();
        self.tell(index as u32, move |queue| queue.set_err(err));
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        if enable {
            self.start_ring(index as usize)
        } else {
            self.stop_rings(std::iter::once(index as usize));
            Ok(())
        }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let write_cache = !self.disk.write_through.load(Ordering::Relaxed);
        let space = config::space(&self.disk.node, &self.disk.options, write_cache);
        let offset = if offset >= CONFIG_BASE { offset - CONFIG_BASE } else { offset } as usize;
        match offset.checked_add(size as usize) {
            Some(end) if end <= CONFIG_SIZE => Ok(space[offset..end].to_vec()),
            _ => refuse(format!("{size} bytes at {offset} of the configuration space")),
        }
    }

    /// Only the write-cache byte can be written. Switching it off makes durable what was written
    /// before, so that from then on everything acknowledged is.
    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let offset = if offset >= CONFIG_BASE { offset - CONFIG_BASE } else { offset } as usize;
        let &[wce] = buf else { return refuse(format!("{} bytes of configuration", buf.len())) };
        // A driver may write before it is ready, and so before we know what it has negotiated.
        let features =
            self.features.unwrap_or_else(|| config::features(&self.disk.node, &self.disk.options));
        let switches = features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0;
        if offset != WCE_OFFSET || wce > 1 || !switches {
            return refuse(format!("configuration byte {offset} set to {wce}"));
        }
        self.disk.write_cache.store(wce == 1, Ordering::Relaxed);
        self.apply_write_cache();
        if wce == 0 {
            // Writes that began under the old rule end before the flush that covers them.
            self.pause();
            let node = self.disk.node.clone();
            let flushed = self.workers[0].block_on(move || async move { node.flush().await });
            self.resume();
            if let Err(errno) = flushed {
                self.disk.failed("flush", 0, 0, errno);
            }
        }
        Ok(())
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {}

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        refuse("a disk has no display")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        refuse("a disk shares no objects")
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let (region, told, file) =
            inflight::Region::new(inflight.num_queues, inflight.queue_size).or_else(refuse)?;
        // Used from now on, whether it is sent back or not: the next connection may send it.
        self.track_in(region)?;
        Ok((told, file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let region = inflight::Region::map(inflight, file).or_else(refuse)?;
        self.track_in(region)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        refuse("device state was not offered")
    }

    fn check_device_state(&mut self) -> Result<()> {
        refuse("device state was not offered")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        refuse("shared memory was not offered")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        refuse("the dirty log was not offered")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{FromRawFd, IntoRawFd};

    #[test]
    fn a_full_descriptor_of_the_front_end_s_does_not_hold_up_who_writes_to_it() {
        let full = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        full.write(u64::MAX - 1).unwrap();
        // SAFETY: the descriptor is taken from its only owner.
        let file = unsafe { File::from_raw_fd(full.into_raw_fd()) };
        let call = for_words(file).unwrap();
        let error = (&*call).write(&1u64.to_ne_bytes()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
