//! A controller in memory, for testing, fuzzing and measuring the driver.
//!
//! It does its work in the thread that rings the doorbell, at once or when it is told to
//! ([`Fake::release`]); delays, faults, removal and misbehaviour are set from outside. It is strict where
//! real devices are lenient: what it is not allowed to reach it does not reach, and a driver that breaks
//! a rule of the specification finds it in [`Fake::complaints`].

#![forbid(unsafe_code)]

mod admin;
mod device;
mod media;
mod rogue;

pub use media::{Media, MediaKind};

use crate::Error;
use crate::dma::HostRange;
use crate::function::{PciFunction, Registers};
use crate::iova::LIMIT;
use crate::spec::{Command, Status};
use device::Device;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// What the controller is like. Fields are as registers and Identify have them.
#[derive(Clone, Debug)]
pub struct Config {
    pub serial: String,
    /// Entries of an I/O queue.
    pub max_entries: u32,
    /// CAP.TO, half seconds.
    pub timeout: u8,
    /// CAP.DSTRD.
    pub doorbell_stride: u32,
    /// CAP.MPSMIN, above 4 KiB.
    pub page_shift: u32,
    pub vectors: u32,
    /// I/O queue pairs that are granted.
    pub pairs: u16,
    /// Maximum Data Transfer Size, as a power of two of the smallest page; held by the fake too.
    pub mdts: u8,
    /// ONCS.
    pub optional_commands: u16,
    pub write_cache: bool,
    /// SGLS.
    pub sgls: u32,
    /// WZSL, DMRSL; `None` for a controller that does not know the structure.
    pub limits: Option<(u8, u32)>,
    /// The SMART / health log page.
    pub health: Vec<u8>,
    /// The error log, whole entries.
    pub errors: Vec<u8>,
    /// From number 1 on.
    pub namespaces: Vec<Media>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            serial: "FAKE".into(),
            max_entries: 256,
            timeout: 1,
            doorbell_stride: 0,
            page_shift: 0,
            vectors: 9,
            pairs: 8,
            mdts: 0,
            optional_commands: 1 << 2 | 1 << 3,
            write_cache: true,
            sgls: 0,
            // 300 K, all of the spare.
            health: vec![0, 0x2c, 0x01, 100],
            errors: Vec::new(),
            limits: Some((0, 0)),
            namespaces: vec![Media::new(64 << 20, 9)],
        }
    }
}

/// Ends I/O commands with a status.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Of this opcode, or of all.
    pub opcode: Option<u8>,
    /// That touch these blocks, or all.
    pub blocks: Option<Range<u64>>,
    pub status: Status,
    /// So many times, then no more.
    pub times: u32,
}

/// How the controller is broken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Broken {
    /// Registers read as this, and writes do nothing: the device is gone.
    pub registers: Option<u32>,
    /// CSTS.RDY does not follow CC.EN when it is cleared. A reset of the function helps.
    pub stays_ready: bool,
    /// CSTS.RDY does not follow CC.EN when it is set.
    pub never_ready: bool,
    /// CSTS.CFS.
    pub fatal: bool,
    /// A reset of the function fails.
    pub no_reset: bool,
    /// Admin commands are taken and never answered.
    pub mute_admin: bool,
    /// Abort commands are answered, but abort nothing.
    pub no_abort: bool,
}

/// What happened, in order: for tests of the order of things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    BusMaster(bool),
    Vectors(usize),
    Enabled,
    Disabled,
    Shutdown,
    FunctionReset,
    /// An admin command's opcode.
    Admin(u8),
    /// Queue and command identifier.
    Aborted(u16, u16),
    /// Something was unmapped: its address.
    Unmapped(u64),
}

/// What was counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// I/O commands fetched.
    pub commands: u64,
    pub submission_doorbells: u64,
    pub completion_doorbells: u64,
    pub interrupts: u64,
    pub maps: u64,
    pub unmaps: u64,
}

/// The controller. Clones are the same one.
#[derive(Clone)]
pub struct Fake(Arc<Shared>);

struct Shared {
    device: Mutex<Device>,
    request: EventFd,
}

impl Fake {
    pub fn new(config: Config) -> Fake {
        let request = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).expect("an eventfd");
        Fake(Arc::new(Shared { device: Mutex::new(Device::new(config)), request }))
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.0.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The controller as the driver takes it.
    pub fn function(&self) -> Arc<dyn PciFunction> {
        Arc::new(self.clone())
    }

    /// I/O commands are taken and not done until [`Fake::release`].
    pub fn hold(&self) {
        self.device().holding = true;
    }

    /// Does one of the commands that are held, the `n`th modulo how many there are; the rest stays
    /// held. False if there is none.
    pub fn release_one(&self, n: usize) -> bool {
        self.device().release_one(n)
    }

    /// Does all that is held, and holds no more.
    pub fn release(&self) {
        let mut device = self.device();
        device.holding = false;
        while device.release_one(0) {}
    }

    /// How many commands are held.
    pub fn held(&self) -> usize {
        self.device().held.len()
    }

    pub fn fail(&self, fault: Fault) {
        self.device().faults.push(fault);
    }

    pub fn break_down(&self, broken: Broken) {
        self.device().broken = broken;
    }

    /// The controller as a user left it that never stopped it: enabled, and with bus mastering on.
    pub fn leave_running(&self) {
        let mut device = self.device();
        device.leave_running();
        device.events.clear();
        device.complaints.clear();
    }

    /// Resets the function behind the driver's back, as somebody with `sysfs` can.
    pub fn reset_from_outside(&self) {
        let mut device = self.device();
        let bus_master = device.bus_master;
        device.reset_function();
        device.bus_master = bus_master;
    }

    /// Changes the length of a namespace, in blocks, and reports it.
    pub fn resize(&self, namespace: u32, blocks: u64) {
        self.device().resize(namespace, blocks);
    }

    /// The same of a controller that tells nobody.
    pub fn resize_silently(&self, namespace: u32, blocks: u64) {
        if let Some(media) = self.device().media(namespace) {
            media.set_blocks(blocks);
        }
    }

    /// Asks for the device back.
    pub fn request_back(&self) {
        let _ = self.0.request.write(1);
    }

    /// From now on, as long as `script` has bytes to decide by: completions of commands that were not
    /// given, twice, in any order, with any status or never, events without end.
    pub fn go_rogue(&self, script: &[u8]) {
        self.device().rogue = Some(rogue::Rogue::new(script));
    }

    /// Bytes of a namespace.
    pub fn bytes(&self, namespace: u32, at: usize, len: usize) -> Vec<u8> {
        self.device().bytes(namespace, at, len)
    }

    /// How often a namespace was flushed.
    pub fn flushes(&self, namespace: u32) -> u64 {
        self.device().media(namespace).map_or(0, |media| media.flushes)
    }

    pub fn events(&self) -> Vec<Event> {
        self.device().events.clone()
    }

    pub fn counts(&self) -> Counts {
        self.device().counts
    }

    /// The rules that the driver broke.
    pub fn complaints(&self) -> Vec<String> {
        self.device().complaints.clone()
    }

    /// The commands that are held: for tests that look at what they name.
    pub fn held_commands(&self) -> Vec<Command> {
        self.device().held.iter().map(|held| held.command).collect()
    }

    /// The length of the mapping that an address of the device's is in.
    pub fn mapping_len(&self, iova: u64) -> Option<usize> {
        let device = self.device();
        let mut mappings = device.mappings.iter();
        let inside = |at: u64, len: usize| iova.checked_sub(at).is_some_and(|n| n < len as u64);
        mappings.find(|(at, memory)| inside(*at, memory.len())).map(|(_, memory)| memory.len())
    }

    /// Whether the device reaches anything.
    pub fn has_mappings(&self) -> bool {
        !self.device().mappings.is_empty()
    }
}

impl Registers for Fake {
    fn len(&self) -> usize {
        0x4000
    }

    fn read(&self, offset: usize) -> u32 {
        self.device().read(offset)
    }

    fn write(&self, offset: usize, value: u32) {
        self.device().write(offset, value);
    }
}

impl PciFunction for Fake {
    fn name(&self) -> String {
        "fake".into()
    }

    fn registers(&self, _: u32) -> Result<Arc<dyn Registers>, Error> {
        Ok(Arc::new(self.clone()))
    }

    fn iova_ranges(&self) -> Result<Vec<Range<u64>>, Error> {
        // A hole in the middle, as where interrupts are.
        Ok(vec![0..0x4000_0000, 0x5000_0000..LIMIT])
    }

    fn map(&self, iova: u64, memory: HostRange) -> Result<(), Error> {
        self.device().map(iova, memory)
    }

    fn unmap(&self, iova: u64, len: usize) -> Result<(), Error> {
        self.device().unmap(iova, len)
    }

    fn vectors(&self) -> u32 {
        self.device().config.vectors
    }

    fn set_vectors(&self, events: &[&EventFd]) -> Result<(), Error> {
        let events = events.iter().map(|event| event.try_clone());
        let events = events.collect::<Result<Vec<_>, _>>();
        let events = events.map_err(|error| Error::os("an eventfd", &error))?;
        self.device().set_vectors(events);
        Ok(())
    }

    fn set_bus_master(&self, on: bool) -> Result<(), Error> {
        let mut device = self.device();
        device.bus_master = on;
        device.events.push(Event::BusMaster(on));
        Ok(())
    }

    fn reset(&self) -> Result<(), Error> {
        let mut device = self.device();
        if device.broken.no_reset {
            return Err(Error::new("resetting the function: it cannot be"));
        }
        device.events.push(Event::FunctionReset);
        device.broken.stays_ready = false;
        device.reset_function();
        Ok(())
    }

    fn request_event(&self) -> Option<&EventFd> {
        Some(&self.0.request)
    }
}
