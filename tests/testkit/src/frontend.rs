//! The front end's half of the vhost-user conversation, in the order QEMU's device holds it.
//!
//! Every call waits for the server's acknowledgement where REPLY_ACK was negotiated, so that an error
//! shows at the message that caused it, and no call waits longer than the connection's limit.

use std::fs::File;
use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVringAddrFlags,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::dirty_log::DirtyLog;
use crate::error::{Error, Result};
use crate::memory::{Memory, Region};
use crate::spec::{self, BlkConfig, feature, protocol};
use crate::watchdog::Watchdog;

/// How the memory is announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryMessages {
    /// One SET_MEM_TABLE.
    Table,
    /// One ADD_MEM_REG per region, as QEMU does when CONFIGURE_MEM_SLOTS is negotiated.
    Slots,
}

/// What SET_VRING_NUM, BASE, ADDR, KICK and CALL say of one queue. Addresses are guest-physical.
pub struct QueueSetup<'a> {
    pub size: u16,
    /// Index of the next available entry the device is to take.
    pub base: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    /// Its used ring is logged, at its own address.
    pub logged: bool,
    pub kick: &'a EventFd,
    pub call: &'a EventFd,
}

/// One connection to a server's socket.
pub struct Connection {
    vhost: Frontend,
    stream: UnixStream,
    watchdog: Watchdog,
    offered: u64,
    features: u64,
    offered_protocol: u64,
    protocol: u64,
    max_queues: u64,
}

impl Connection {
    /// Connects to the socket at `path`, waiting up to `limit` for the server to listen; `limit`
    /// then bounds every message.
    pub fn connect(path: &Path, limit: Duration) -> Result<Connection> {
        let end = Instant::now() + limit;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Connection::from_stream(stream, limit),
                Err(e)
                    if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
                        && Instant::now() < end =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(Error::Io(format!("connect to {}", path.display()), e)),
            }
        }
    }

    /// Speaks over a stream that is connected already.
    pub fn from_stream(stream: UnixStream, limit: Duration) -> Result<Connection> {
        let clone = || stream.try_clone().map_err(Error::io("dup of the socket"));
        Ok(Connection {
            vhost: Frontend::from_stream(clone()?, 1024),
            watchdog: Watchdog::new(clone()?, limit),
            stream,
            offered: 0,
            features: 0,
            offered_protocol: 0,
            protocol: 0,
            max_queues: 1,
        })
    }

    /// The socket, for [`crate::message`].
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The crate's front end, for messages that have no method here. Its waits have no bound.
    pub fn vhost(&mut self) -> &mut Frontend {
        &mut self.vhost
    }

    /// Ends the connection at once, as a front end that is killed does.
    pub fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Virtio features the server offers (after [`Connection::negotiate`]).
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Virtio features acknowledged.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Was this feature (a mask of [`feature`]) acknowledged?
    pub fn has(&self, mask: u64) -> bool {
        self.features & mask == mask
    }

    /// Protocol features the server offers.
    pub fn offered_protocol(&self) -> u64 {
        self.offered_protocol
    }

    /// Protocol features negotiated.
    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    /// Queues the server can serve; 1 without the MQ protocol feature.
    pub fn max_queues(&self) -> u64 {
        self.max_queues
    }

    fn plain<T>(
        &mut self,
        what: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        let vhost = &mut self.vhost;
        self.watchdog.bound(|| call(vhost)).map_err(|e| Error::Message(what, e))
    }

    /// A message that has no answer of its own: asks for an acknowledgement where that is negotiated.
    fn acked<T>(
        &mut self,
        what: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        if self.protocol & protocol::REPLY_ACK != 0 {
            self.vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let result = self.plain(what, call);
        self.vhost.set_hdr_flags(VhostUserHeaderFlag::empty());
        result
    }

    /// From GET_FEATURES to SET_OWNER. `wanted` and `wanted_protocol` are cut down to what is
    /// offered; the virtio features are acknowledged later, by [`Connection::set_features`].
    pub fn negotiate(&mut self, wanted: u64, wanted_protocol: u64) -> Result<()> {
        self.offered = self.plain("GET_FEATURES", |v| v.get_features())?;
        self.features = wanted & self.offered;
        if self.has(feature::PROTOCOL_FEATURES) {
            let offered = self.plain("GET_PROTOCOL_FEATURES", |v| v.get_protocol_features())?;
            self.offered_protocol = offered.bits();
            self.protocol = wanted_protocol & self.offered_protocol;
            let chosen = VhostUserProtocolFeatures::from_bits_retain(self.protocol);
            self.plain("SET_PROTOCOL_FEATURES", |v| v.set_protocol_features(chosen))?;
        }
        if self.protocol & protocol::MQ != 0 {
            self.max_queues = self.plain("GET_QUEUE_NUM", |v| v.get_queue_num())?;
        }
        if self.protocol & protocol::CONFIGURE_MEM_SLOTS != 0 {
            self.plain("GET_MAX_MEM_SLOTS", |v| v.get_max_mem_slots())?;
        }
        self.acked("SET_OWNER", |v| v.set_owner())?;
        self.plain("GET_FEATURES", |v| v.get_features())?;
        Ok(())
    }

    /// SET_FEATURES with what [`Connection::negotiate`] settled on.
    pub fn set_features(&mut self) -> Result<()> {
        let features = self.features;
        self.acked("SET_FEATURES", |v| v.set_features(features))
    }

    /// SET_FEATURES with exactly these bits, offered or not.
    pub fn set_exact_features(&mut self, features: u64) -> Result<()> {
        self.features = features;
        self.set_features()
    }

    /// Announces the first `count` regions of `memory`.
    pub fn share_memory(
        &mut self,
        memory: &Memory,
        count: usize,
        messages: MemoryMessages,
    ) -> Result<()> {
        let regions = &memory.regions()[..count];
        match messages {
            MemoryMessages::Table => {
                let table: Vec<_> = regions.iter().map(describe).collect();
                self.acked("SET_MEM_TABLE", |v| v.set_mem_table(&table))?;
            }
            MemoryMessages::Slots => {
                for region in regions {
                    self.add_region(region)?;
                }
            }
        }
        memory.set_usable_regions(count);
        Ok(())
    }

    /// ADD_MEM_REG.
    pub fn add_region(&mut self, region: &Region) -> Result<()> {
        self.acked("ADD_MEM_REG", |v| v.add_mem_region(&describe(region)))?;
        Ok(())
    }

    /// REM_MEM_REG.
    pub fn remove_region(&mut self, region: &Region) -> Result<()> {
        self.acked("REM_MEM_REG", |v| v.remove_mem_region(&describe(region)))
    }

    /// SET_VRING_NUM, BASE, ADDR, KICK and CALL, in QEMU's order. The queue still has to be enabled.
    pub fn start_queue(
        &mut self,
        index: usize,
        memory: &Memory,
        setup: &QueueSetup<'_>,
    ) -> Result<()> {
        self.acked("SET_VRING_NUM", |v| v.set_vring_num(index, setup.size))?;
        self.acked("SET_VRING_BASE", |v| v.set_vring_base(index, setup.base))?;
        self.set_ring_addresses(index, memory, setup)?;
        self.acked("SET_VRING_KICK", |v| v.set_vring_kick(index, setup.kick))?;
        self.acked("SET_VRING_CALL", |v| v.set_vring_call(index, setup.call))
    }

    /// SET_VRING_ADDR. Also for a queue that runs, to begin or end the logging of its used ring.
    pub fn set_ring_addresses(
        &mut self,
        index: usize,
        memory: &Memory,
        setup: &QueueSetup<'_>,
    ) -> Result<()> {
        let user = |addr: u64| {
            memory
                .user_addr(addr)
                .ok_or_else(|| Error::Peer(format!("queue {index}: {addr:#x} is in no region")))
        };
        let logged = VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits();
        let addresses = VringConfigData {
            queue_max_size: setup.size,
            queue_size: setup.size,
            flags: if setup.logged { logged } else { 0 },
            desc_table_addr: user(setup.desc)?,
            used_ring_addr: user(setup.used)?,
            avail_ring_addr: user(setup.avail)?,
            log_addr: setup.logged.then_some(setup.used),
        };
        self.acked("SET_VRING_ADDR", |v| v.set_vring_addr(index, &addresses))
    }

    /// SET_LOG_BASE, with all of `log`.
    pub fn set_log_base(&mut self, log: &DirtyLog) -> Result<()> {
        let region = VhostUserDirtyLogRegion {
            mmap_size: log.size(),
            mmap_offset: 0,
            mmap_handle: log.fd(),
        };
        self.plain("SET_LOG_BASE", |v| v.set_log_base(0, Some(region)))
    }

    /// SET_VRING_ENABLE. Does nothing without PROTOCOL_FEATURES: there a started queue is enabled.
    pub fn enable_queue(&mut self, index: usize, on: bool) -> Result<()> {
        if !self.has(feature::PROTOCOL_FEATURES) {
            return Ok(());
        }
        self.acked("SET_VRING_ENABLE", |v| v.set_vring_enable(index, on))
    }

    /// GET_VRING_BASE: the queue is stopped, its requests are done, and the device would continue at the available
    /// index returned.
    pub fn stop_queue(&mut self, index: usize) -> Result<u16> {
        Ok(self.plain("GET_VRING_BASE", |v| v.get_vring_base(index))? as u16)
    }

    /// GET_CONFIG of `len` bytes from `offset`.
    pub fn config_bytes(&mut self, offset: u32, len: usize) -> Result<Vec<u8>> {
        let zeroes = vec![0u8; len];
        let (_, bytes) = self.plain("GET_CONFIG", |v| {
            v.get_config(offset, len as u32, VhostUserConfigFlags::empty(), &zeroes)
        })?;
        Ok(bytes)
    }

    /// The configuration, read as QEMU reads it: 60 bytes from offset 0.
    pub fn config(&mut self) -> Result<BlkConfig> {
        let bytes = self.config_bytes(0, spec::CONFIG_SIZE)?;
        let raw = bytes
            .try_into()
            .map_err(|b: Vec<u8>| Error::Peer(format!("{} bytes of configuration", b.len())))?;
        Ok(BlkConfig::parse(&raw))
    }

    /// SET_CONFIG of `bytes` at `offset`, by the guest's hand (flags: writable).
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        self.acked("SET_CONFIG", |v| v.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes))
    }

    /// Sets the write cache mode as a guest does: true is write-back.
    pub fn set_write_cache(&mut self, on: bool) -> Result<()> {
        self.set_config(spec::CONFIG_WCE_OFFSET, &[u8::from(on)])
    }

    /// GET_INFLIGHT_FD: memory in which the server tracks what is in flight.
    pub fn get_inflight(&mut self, queues: u16, size: u16) -> Result<(VhostUserInflight, File)> {
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        self.plain("GET_INFLIGHT_FD", |v| v.get_inflight_fd(&wanted))
    }

    /// SET_INFLIGHT_FD.
    pub fn set_inflight(&mut self, announced: &VhostUserInflight, file: &File) -> Result<()> {
        let fd = file.as_raw_fd();
        self.acked("SET_INFLIGHT_FD", |v| v.set_inflight_fd(announced, fd))
    }

    /// RESET_DEVICE.
    pub fn reset_device(&mut self) -> Result<()> {
        self.acked("RESET_DEVICE", |v| v.reset_device())
    }
}

fn describe(region: &Region) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.guest_addr(),
        memory_size: region.size(),
        userspace_addr: region.host_addr(),
        mmap_offset: 0,
        mmap_handle: region.fd(),
    }
}
