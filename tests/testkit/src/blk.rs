//! A disk as a driver sees it: a connection, its queues, and requests that are sent, awaited and checked.
//!
//! `disk.read(sector, &mut buf)` and its like use queue 0 and wait; [`Queue::submit`] and
//! [`Queue::reap`] keep many requests in flight. Sectors are 512 bytes.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserInflight;

use crate::dirty_log::DirtyLog;
use crate::error::{Error, Result};
use crate::frontend::{Connection, MemoryMessages, QueueSetup};
use crate::memory::{Memory, MemoryLayout};
use crate::request::{Laid, Range, Request, Segment, Shape};
use crate::ring::DriverRing;
use crate::spec::{self, BlkConfig, feature, protocol, status};

/// How to open a disk.
#[derive(Debug, Clone)]
pub struct Options {
    /// Virtio features wanted; what is not offered is dropped.
    pub features: u64,
    /// Protocol features wanted; what is not offered is dropped.
    pub protocol: u64,
    pub num_queues: usize,
    /// Entries per queue, a power of two up to 1024.
    pub queue_size: u16,
    pub layout: MemoryLayout,
    /// Announce only so many of the regions at first.
    pub regions: Option<usize>,
    pub memory_messages: MemoryMessages,
    /// Bound of every wait, for messages and for requests.
    pub limit: Duration,
}

impl Default for Options {
    /// One queue of 128 entries, 16 MiB in one region, and the features QEMU takes.
    fn default() -> Self {
        Options {
            features: feature::QEMU,
            protocol: protocol::DEFAULT,
            num_queues: 1,
            queue_size: 128,
            layout: MemoryLayout::single(16 << 20),
            regions: None,
            memory_messages: MemoryMessages::Table,
            limit: Duration::from_secs(30),
        }
    }
}

/// A finished request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// What [`Queue::submit`] returned for it.
    pub token: u64,
    pub status: u8,
    /// Bytes the device says it wrote, status included.
    pub used_len: u32,
    /// What it wrote before the status.
    pub data: Vec<u8>,
}

struct Pending {
    token: u64,
    laid: Laid,
}

/// One queue, for one thread.
pub struct Queue {
    ring: DriverRing,
    pending: Vec<Option<Pending>>,
    next_token: u64,
    limit: Duration,
    /// How the convenience calls lay requests out.
    pub shape: Shape,
}

impl Queue {
    fn new(memory: &Arc<Memory>, options: &Options, event_idx: bool) -> Result<Queue> {
        Ok(Queue {
            ring: DriverRing::new(memory, options.queue_size, event_idx)?,
            pending: (0..options.queue_size).map(|_| None).collect(),
            next_token: 0,
            limit: options.limit,
            shape: Shape::default(),
        })
    }

    /// The ring, for tests that go below requests.
    pub fn ring(&mut self) -> &mut DriverRing {
        &mut self.ring
    }

    /// Lays a request out and enters it, without telling the device. Returns its token.
    pub fn add(&mut self, request: &Request, shape: &Shape) -> Result<u64> {
        let laid = Laid::new(self.ring.memory(), request, shape)?;
        let head = self.ring.add(&laid.segments(), shape.indirect)?;
        let token = self.next_token;
        self.next_token += 1;
        self.pending[usize::from(head)] = Some(Pending { token, laid });
        Ok(token)
    }

    /// Publishes what was added and kicks if need be.
    pub fn publish(&mut self) -> Result<()> {
        self.ring.publish().map(drop)
    }

    /// Sends one request. Returns its token.
    pub fn submit(&mut self, request: &Request, shape: &Shape) -> Result<u64> {
        let token = self.add(request, shape)?;
        self.publish()?;
        Ok(token)
    }

    /// The chain of a request in flight.
    pub fn chain(&self, token: u64) -> Option<Vec<Segment>> {
        let found = self.pending.iter().flatten().find(|pending| pending.token == token);
        found.map(|pending| pending.laid.segments())
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.pending.iter().flatten().count()
    }

    /// Takes a finished request, if there is one, in the order the device finished them.
    pub fn reap(&mut self) -> Result<Option<Completion>> {
        let Some(used) = self.ring.pop()? else {
            return Ok(None);
        };
        let pending = self.pending[usize::from(used.head)]
            .take()
            .ok_or_else(|| Error::BadUsed(format!("head {} is not a request", used.head)))?;
        let (data, status) = pending.laid.outcome()?;
        Ok(Some(Completion { token: pending.token, status, used_len: used.len, data }))
    }

    /// Waits for the next finished request.
    pub fn wait(&mut self) -> Result<Completion> {
        let end = Instant::now() + self.limit;
        loop {
            if let Some(completion) = self.reap()? {
                return Ok(completion);
            }
            self.ring.wait(end.saturating_duration_since(Instant::now()))?;
        }
    }

    /// Waits for everything in flight; completions in the order the device finished them.
    pub fn drain(&mut self) -> Result<Vec<Completion>> {
        let mut all = Vec::new();
        while self.in_flight() > 0 {
            all.push(self.wait()?);
        }
        Ok(all)
    }

    /// Sends a request in the queue's shape and waits for it alone. Nothing else may be in flight.
    pub fn run(&mut self, request: &Request) -> Result<Completion> {
        let shape = self.shape.clone();
        let token = self.submit(request, &shape)?;
        let completion = self.wait()?;
        if completion.token != token {
            return Err(Error::BadUsed(format!(
                "request {} came back, {token} was awaited",
                completion.token
            )));
        }
        Ok(completion)
    }

    fn run_ok(&mut self, request: &Request) -> Result<Completion> {
        let completion = self.run(request)?;
        match completion.status {
            status::OK => Ok(completion),
            other => Err(Error::Status(other)),
        }
    }

    /// Reads whole sectors.
    pub fn read(&mut self, sector: u64, out: &mut [u8]) -> Result<()> {
        let len = out.len();
        let completion = self.run_ok(&Request::In { sector, len })?;
        out.copy_from_slice(&completion.data);
        Ok(())
    }

    /// Writes whole sectors.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<()> {
        let data = data.to_vec();
        self.run_ok(&Request::Out { sector, data }).map(drop)
    }

    pub fn flush(&mut self) -> Result<()> {
        self.run_ok(&Request::Flush).map(drop)
    }

    pub fn discard(&mut self, sector: u64, sectors: u32, flags: u32) -> Result<()> {
        let range = Range { sector, sectors, flags };
        self.run_ok(&Request::Discard(vec![range])).map(drop)
    }

    /// Zeroes a range; `unmap` lets the device deallocate it.
    pub fn write_zeroes(&mut self, sector: u64, sectors: u32, unmap: bool) -> Result<()> {
        let range =
            Range { sector, sectors, flags: if unmap { spec::WRITE_ZEROES_UNMAP } else { 0 } };
        self.run_ok(&Request::WriteZeroes(vec![range])).map(drop)
    }

    /// The disk's identity, without the padding.
    pub fn get_id(&mut self) -> Result<String> {
        let bytes = self.run_ok(&Request::GetId)?.data;
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }
}

/// A connected disk with running queues.
pub struct Disk {
    path: PathBuf,
    options: Options,
    memory: Arc<Memory>,
    connection: Connection,
    config: BlkConfig,
    /// Kept between connections where INFLIGHT_SHMFD is negotiated.
    inflight: Option<(VhostUserInflight, File)>,
    /// Used rings are logged.
    logged: bool,
    /// The queues; a test may move them to threads, as long as the disk stays.
    pub queues: Vec<Queue>,
}

impl Disk {
    /// Connects to the socket at `path`, negotiates, shares memory, and starts and enables the queues.
    pub fn open(path: &Path, options: &Options) -> Result<Disk> {
        let memory = Memory::new(&options.layout)?;
        Disk::open_with_memory(path, options, memory)
    }

    /// The same with memory that exists already.
    pub fn open_with_memory(path: &Path, options: &Options, memory: Arc<Memory>) -> Result<Disk> {
        Disk::with(Connection::connect(path, options.limit)?, path, options, memory)
    }

    /// The same over a connection that is there already. It cannot be made again.
    pub fn from_stream(stream: UnixStream, options: &Options) -> Result<Disk> {
        let memory = Memory::new(&options.layout)?;
        let connection = Connection::from_stream(stream, options.limit)?;
        Disk::with(connection, Path::new(""), options, memory)
    }

    fn with(
        mut connection: Connection,
        path: &Path,
        options: &Options,
        memory: Arc<Memory>,
    ) -> Result<Disk> {
        let config = greet(&mut connection, options)?;
        memory.set_usable_regions(options.regions.unwrap_or(memory.regions().len()));
        let event_idx = connection.has(feature::EVENT_IDX);
        let queues = (0..options.num_queues)
            .map(|_| Queue::new(&memory, options, event_idx))
            .collect::<Result<Vec<_>>>()?;
        let mut disk = Disk {
            path: path.to_owned(),
            options: options.clone(),
            memory,
            connection,
            config,
            inflight: None,
            logged: false,
            queues,
        };
        disk.start()?;
        Ok(disk)
    }

    /// What QEMU does when the guest's driver says DRIVER_OK.
    fn start(&mut self) -> Result<()> {
        let count = self.options.regions.unwrap_or(self.memory.regions().len());
        self.connection.set_features()?;
        self.connection.share_memory(&self.memory, count, self.options.memory_messages)?;
        if self.connection.protocol() & protocol::INFLIGHT_SHMFD != 0 {
            if self.inflight.is_none() {
                let (queues, size) = (self.options.num_queues as u16, self.inflight_size());
                self.inflight = Some(self.connection.get_inflight(queues, size)?);
            }
            if let Some((announced, file)) = &self.inflight {
                let mut announced = *announced;
                announced.queue_size = self.inflight_size();
                self.connection.set_inflight(&announced, file)?;
            }
        }
        for index in 0..self.queues.len() {
            let base = self.queues[index].ring.resume_base();
            self.start_queue(index, base)?;
        }
        for index in 0..self.queues.len() {
            self.connection.enable_queue(index, true)?;
        }
        Ok(())
    }

    /// The size that QEMU 10 asks for and announces: that of its option `queue-size`, though rings may have 1,024 entries.
    fn inflight_size(&self) -> u16 {
        self.options.queue_size.min(128)
    }

    /// Hands queue `index` to the device, which is to continue at available index `base`; not yet enabled.
    pub fn start_queue(&mut self, index: usize, base: u16) -> Result<()> {
        let setup = setup(&self.queues[index].ring, base, self.logged);
        self.connection.start_queue(index, &self.memory, &setup)
    }

    /// Begins dirty logging while the queues run, in QEMU's order.
    pub fn start_logging(&mut self, log: &DirtyLog) -> Result<()> {
        self.connection.set_log_base(log)?;
        self.switch_logging(true)
    }

    /// Ends it.
    pub fn stop_logging(&mut self) -> Result<()> {
        self.switch_logging(false)
    }

    fn switch_logging(&mut self, on: bool) -> Result<()> {
        let others = self.connection.features() & !feature::LOG_ALL;
        let features = if on { others | feature::LOG_ALL } else { others };
        self.connection.set_exact_features(features)?;
        self.logged = on;
        for (index, queue) in self.queues.iter().enumerate() {
            let setup = setup(&queue.ring, 0, on);
            self.connection.set_ring_addresses(index, &self.memory, &setup)?;
        }
        Ok(())
    }

    /// Disables and stops every queue, as QEMU does on a guest's reset. Returns the bases.
    pub fn stop(&mut self) -> Result<Vec<u16>> {
        for index in 0..self.queues.len() {
            self.connection.enable_queue(index, false)?;
        }
        (0..self.queues.len()).map(|index| self.connection.stop_queue(index)).collect()
    }

    /// Connects again (the old connection ends first) with the same memory and rings; each queue continues at its
    /// used index, so that what was not finished is done again.
    pub fn reconnect(&mut self) -> Result<()> {
        self.connection.hang_up();
        let mut connection = Connection::connect(&self.path, self.options.limit)?;
        let config = greet(&mut connection, &self.options)?;
        self.connection = connection;
        self.config = config;
        self.start()
    }

    pub fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// The memory in which the server tracks what is in flight, if it does.
    pub fn inflight(&self) -> Option<&(VhostUserInflight, File)> {
        self.inflight.as_ref()
    }

    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The configuration read when the connection was made.
    pub fn config(&self) -> &BlkConfig {
        &self.config
    }

    /// Was this feature (a mask of [`feature`]) negotiated?
    pub fn has(&self, mask: u64) -> bool {
        self.connection.has(mask)
    }

    pub fn queue(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    /// [`Queue::read`] on queue 0; so the others below.
    pub fn read(&mut self, sector: u64, out: &mut [u8]) -> Result<()> {
        self.queues[0].read(sector, out)
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<()> {
        self.queues[0].write(sector, data)
    }

    pub fn flush(&mut self) -> Result<()> {
        self.queues[0].flush()
    }

    pub fn discard(&mut self, sector: u64, sectors: u32, flags: u32) -> Result<()> {
        self.queues[0].discard(sector, sectors, flags)
    }

    pub fn write_zeroes(&mut self, sector: u64, sectors: u32, unmap: bool) -> Result<()> {
        self.queues[0].write_zeroes(sector, sectors, unmap)
    }

    pub fn get_id(&mut self) -> Result<String> {
        self.queues[0].get_id()
    }

    /// Sends any request on queue 0 and waits: for tests that look at statuses.
    pub fn run(&mut self, request: &Request) -> Result<Completion> {
        self.queues[0].run(request)
    }
}

fn setup(ring: &DriverRing, base: u16, logged: bool) -> QueueSetup<'_> {
    let layout = ring.layout();
    QueueSetup {
        size: layout.size,
        base,
        desc: layout.desc,
        avail: layout.avail,
        used: layout.used,
        logged,
        kick: ring.kick_fd(),
        call: ring.call_fd(),
    }
}

/// From connect to the configuration: what QEMU does when the device is realized.
fn greet(connection: &mut Connection, options: &Options) -> Result<BlkConfig> {
    connection.negotiate(options.features, options.protocol)?;
    if connection.max_queues() < options.num_queues as u64 {
        return Err(Error::Peer(format!(
            "offers {} queues, {} are wanted",
            connection.max_queues(),
            options.num_queues
        )));
    }
    connection.config()
}
