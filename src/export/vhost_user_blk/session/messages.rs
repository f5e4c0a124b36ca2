//! The handlers of vhost-user messages (QEMU's vhost-user protocol text).

use super::super::config::{self, CONFIG_SIZE, F_LOG_ALL, WCE_OFFSET};
use super::super::dirty_log::DirtyLog;
use super::super::inflight;
use super::super::memory::{MAX_REGIONS, Region};
use super::super::ring::{Addresses, MAX_SIZE};
use super::rings::Kick;
use super::{Session, refuse, set_nonblocking};
use crate::export::core::kept::Kept;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::*;
use vhost::vhost_user::{Backend, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;

/// Cloud Hypervisor asks for the configuration space at this offset, where the transport's own
/// registers would end on PCI; QEMU asks at 0.
const CONFIG_BASE: u32 = VHOST_USER_CONFIG_OFFSET;

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        self.begin();
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.device.features;
        if unknown != 0 {
            return refuse(format!("virtio features {unknown:#x} were not offered"));
        }
        let logged = self.has(F_LOG_ALL);
        self.features = Some(features);
        self.apply_write_cache();
        if self.has(F_LOG_ALL) != logged {
            self.apply_log(0..self.rings.len());
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        // I/O that a killed daemon had started continues without it, and must have ended before it is done again.
        features.set(VhostUserProtocolFeatures::INFLIGHT_SHMFD, self.disk.node().fence().holds());
        Ok(features)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        // The `vhost` crate checks each message against what was acknowledged.
        self.has_channel = features & VhostUserProtocolFeatures::BACKEND_REQ.bits() != 0;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.num_queues() as u64)
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
        // A front end that starts from the beginning may add what is there already: its new file counts.
        regions.retain(|known| !known.is(region));
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
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let ring = self.ring(index)?;
        let at = Addresses { descriptors, available, used };
        if ring.running.is_some() && ring.at != Some(at) {
            return refuse(format!("queue {index}: its addresses were changed while it runs"));
        }
        ring.at = Some(at);
        let log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        if std::mem::replace(&mut ring.log_used, log) != log {
            self.apply_log(std::iter::once(index as usize));
        }
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
        self.stop_rings(std::iter::once(index as usize), self.at_stop())?;
        let ring = self.ring(index)?;
        // A stopped ring starts again only with a new kick descriptor.
        ring.kick = Kick::Unset;
        ring.call = None;
        let base = ring.base as u32;
        self.moved = self.has_moved();
        Ok(VhostUserVringState::new(index, base))
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
        let call = file.map(set_nonblocking).transpose()?;
        self.ring(index as u32)?.call = call.clone();
        let clone = call.clone();
        self.notify(index as u32, move |queue| queue.set_call(clone));
        // What was completed before had nobody to tell, or told a descriptor that nobody reads any
        // more. One word too many does no harm.
        if let Some(call) = call {
            let _ = (&*call).write(&1u64.to_ne_bytes());
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let err = file.map(set_nonblocking).transpose()?;
        self.ring(index as u32)?.err = err.clone();
        self.notify(index as u32, move |queue| queue.set_err(err));
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        if enable {
            self.start_ring(index as usize)
        } else {
            self.stop_rings(std::iter::once(index as usize), self.at_stop())
        }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let write_cache = !self.disk.write_through.load(Ordering::Relaxed);
        let space = config::space(&self.disk, self.device.options.num_queues, write_cache);
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
        let features = self.features.unwrap_or(self.device.features);
        let switches = features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0;
        if offset != WCE_OFFSET || wce > 1 || !switches {
            return refuse(format!("configuration byte {offset} set to {wce}"));
        }
        self.set_write_cache(wce == 1);
        if wce == 0 { self.flush() } else { Ok(()) }
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {
        // `channel` has a descriptor of its own, and sends what the crate cannot.
    }

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
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        let (region, announced, file) =
            inflight::Region::for_any_ring(queues, size).or_else(refuse)?;
        region.set_write_cache(self.disk.write_cache.is_on());
        // Used from now on, whether it is sent back or not: the next connection may send it.
        self.track_in(region)?;
        Ok((announced, file))
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

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::map(&self.disk.name, log, file).or_else(refuse)?;
        // The old one stays mapped until no queue marks in it any more.
        let _old = self.log.replace(Arc::new(log));
        if self.has(F_LOG_ALL) {
            self.apply_log(0..self.rings.len());
        }
        Ok(())
    }
}
