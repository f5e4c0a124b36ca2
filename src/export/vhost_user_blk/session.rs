//! One connection of a front end: the state set by its messages, and its rings.
//!
//! A bad message ends the connection, never the daemon. Whatever ends it, the rings are stopped as
//! GET_VRING_BASE stops them: popping ends, I/O in flight ends, its completions are published, and
//! only then may the next session begin.

mod messages;
mod rings;
mod stops;

use super::device::Device;
use super::dirty_log::DirtyLog;
use super::inflight;
use super::memory::{Memory, Region};
use super::queue::{AtStop, Queue};
use crate::export::core::Disk;
use crate::export::core::cut_off::CutOff;
use crate::export::core::kept::Kept;
use crate::io::{Errno, Worker};
use rings::{Kick, RingState};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vhost::vhost_user::{Error, Result};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

/// The state of one connection.
pub struct Session {
    device: Arc<Device>,
    disk: Arc<Disk>,
    workers: Vec<Arc<Worker>>,
    /// The worker of the first queue; the others follow in turn.
    first_worker: usize,
    /// What the front end has acknowledged; `None` until it says.
    features: Option<u64>,
    memory: Arc<Memory>,
    /// Up to the last one that the front end has spoken of.
    rings: Vec<RingState>,
    /// Where requests in flight are tracked, if the front end wants it.
    inflight: Option<Arc<inflight::Region>>,
    /// The front end's dirty log; in use while [`F_LOG_ALL`] is acknowledged.
    log: Option<Arc<DirtyLog>>,
    /// The front end has acknowledged the back-end channel.
    has_channel: bool,
    /// How its queues end the connection.
    cut_off: Option<Arc<CutOff>>,
    /// A request of one of its queues does not end.
    hung: Arc<AtomicBool>,
    /// A ring is to run, and cannot yet.
    is_kept_back: bool,
    /// Nothing begins any more.
    ended: bool,
    /// The guest has gone from here ([`Session::has_moved`]).
    moved: bool,
}

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::ReqHandlerError(io::Error::other(why.into())))
}

/// Makes an eventfd of the front end non-blocking. A write to a full one would otherwise block the worker, and with
/// it every disk that the worker serves.
fn set_nonblocking(file: File) -> Result<Arc<File>> {
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
    pub fn new(device: Arc<Device>, workers: Vec<Arc<Worker>>, first_worker: usize) -> Session {
        let session = Session {
            rings: Vec::new(),
            disk: device.disk.clone(),
            device,
            workers,
            first_worker,
            features: None,
            memory: Arc::default(),
            inflight: None,
            log: None,
            has_channel: false,
            cut_off: None,
            hung: Arc::default(),
            is_kept_back: false,
            ended: false,
            moved: false,
        };
        session.apply_write_cache();
        session
    }

    /// Lets the queues end the connection.
    pub fn set_cut_off(&mut self, cut_off: CutOff) {
        self.cut_off = Some(Arc::new(cut_off));
    }

    /// Queues that the disk offers.
    fn num_queues(&self) -> usize {
        self.device.options.num_queues.into()
    }

    /// A ring that the front end speaks of. One that it never does takes no memory.
    fn ring(&mut self, index: u32) -> Result<&mut RingState> {
        let (index, count) = (index as usize, self.num_queues());
        if index >= count {
            return refuse(format!("queue {index} of {count}"));
        }
        if index >= self.rings.len() {
            self.rings.resize_with(index + 1, RingState::new);
        }
        Ok(&mut self.rings[index])
    }

    fn has(&self, bit: u32) -> bool {
        self.features.is_some_and(|features| features & 1 << bit != 0)
    }

    /// Whether writes must be durable before they complete: because the export says so, because the guest cannot
    /// flush, or because it has switched the write cache off. That choice outlives the connection: front ends do not
    /// repeat it when a stopped machine continues or when they reconnect, and a guest that relies on it sends no
    /// flushes.
    fn apply_write_cache(&self) {
        let flushes = self.features.is_none() || self.has(VIRTIO_BLK_F_FLUSH);
        let off = !self.disk.write_cache.is_on();
        let through = self.disk.options.write_through || !flushes || off;
        self.disk.write_through.store(through, Ordering::SeqCst);
    }

    fn set_write_cache(&self, on: bool) {
        let kept = self.inflight.as_deref().map(|region| region as &dyn Kept);
        self.disk.write_cache.set(on, kept);
        self.apply_write_cache();
    }

    /// The front end takes the device. QEMU does so once for each device that it plugs in, all of them on
    /// one connection if they have one chardev, and says everything about the new device afterwards: so
    /// what was said of the one before it, whose rings have stopped, ends here.
    ///
    /// Cloud Hypervisor plays a recorded session again while rings run. Those continue.
    fn begin(&mut self) {
        if self.rings.iter().any(|ring| !matches!(ring.kick, Kick::Unset)) {
            return;
        }
        self.let_journal_go();
        self.features = None;
        self.memory = Arc::default();
        self.rings = Vec::new();
        self.inflight = None;
        self.log = None;
        self.apply_write_cache();
    }

    /// Resets to the state before a guest has negotiated anything. What it had under way is of no more use. The
    /// memory stays: front ends do not share it again.
    fn reset(&mut self) -> Result<()> {
        self.stop_rings(0..self.rings.len(), AtStop::Fail)?;
        self.features = None;
        self.rings = Vec::new();
        self.set_write_cache(true);
        Ok(())
    }

    /// Whether the guest has gone from here since this was last asked.
    pub fn take_moved(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }

    /// Makes rings that run mark what is to be marked now, and nothing else. Returns once all of them do.
    fn apply_log(&self, indices: impl Iterator<Item = usize>) {
        for index in indices {
            let log = self.log_of(index);
            self.notify(index as u32, move |queue| queue.set_log(log));
        }
    }

    /// Whether the front end has a back-end channel.
    pub fn has_channel(&self) -> bool {
        self.has_channel
    }

    /// Whether the device serves a ring.
    pub fn is_running(&self) -> bool {
        self.rings.iter().any(|ring| ring.running.is_some())
    }

    /// Descriptors of the front end's that its rings have.
    pub fn descriptors(&self) -> usize {
        let of = |ring: &RingState| {
            let kick = matches!(ring.kick, Kick::Fd(_));
            [kick, ring.call.is_some(), ring.err.is_some()].map(usize::from).iter().sum::<usize>()
        };
        self.rings.iter().map(of).sum()
    }

    /// Rings that start from now on track their requests there.
    fn track_in(&mut self, region: inflight::Region) -> Result<()> {
        if let Some(index) = self.rings.iter().position(|ring| ring.running.is_some()) {
            return refuse(format!("inflight region: queue {index} is running"));
        }
        let (has, most) = (region.num_queues() as usize, self.num_queues());
        if has > most {
            return refuse(format!("inflight region for {has} queues: the disk has {most}"));
        }
        self.disk.write_cache.meet(&region);
        self.apply_write_cache();
        let region = Arc::new(region);
        let kept: Arc<dyn Kept> = region.clone();
        self.disk.losses.meet(&self.disk.name, &kept);
        self.inflight = Some(region);
        Ok(())
    }

    /// Goes over to another table of memory: rings that run are stopped, and started again with
    /// their addresses looked up again.
    fn change_memory(&mut self, regions: Vec<Arc<Region>>) -> Result<()> {
        let memory = Memory::new(regions).or_else(refuse)?;
        let running = self.running();
        self.stop_rings(running.iter().copied(), AtStop::Leave)?;
        self.memory = Arc::new(memory);
        let node = self.disk.node();
        self.memory.regions().iter().for_each(|region| region.admit(&node));
        running.into_iter().try_for_each(|index| self.start_ring(index))
    }

    fn running(&self) -> Vec<usize> {
        (0..self.rings.len()).filter(|&i| self.rings[i].running.is_some()).collect()
    }

    /// Runs `work` on a ring's queue, if it is running.
    fn notify(&self, index: u32, work: impl FnOnce(&mut Queue) + Send + 'static) {
        if let Some((worker, source)) = self.rings[index as usize].running {
            self.workers[worker].call(move |local| {
                if let Some(queue) = local.source::<Queue>(source) {
                    work(queue);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::{FromRawFd, IntoRawFd};

    #[test]
    fn a_full_descriptor_of_the_front_end_s_does_not_hold_up_who_writes_to_it() {
        let full = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        full.write(u64::MAX - 1).unwrap();
        // SAFETY: the descriptor is taken from its only owner.
        let file = unsafe { File::from_raw_fd(full.into_raw_fd()) };
        let call = set_nonblocking(file).unwrap();
        let error = (&*call).write(&1u64.to_ne_bytes()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
