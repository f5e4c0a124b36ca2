//! Starting and stopping a controller (section 3.5).
//!
//! The order is fixed: disable and see that it is not ready, so that nothing of an earlier user is
//! going on; interrupts; the admin queue; enable. Interrupts come before CC.EN because a controller may
//! remember whether they were there when it was enabled.

#![forbid(unsafe_code)]

use super::admin::{self, Admin, Data};
use super::link::State;
use super::{DEAD, Failure, Inner, Options, Pairs, RUNNING, STARTING, lock, watch};
use crate::Error;
use crate::function::PciFunction;
use crate::space::Space;
use crate::spec::identify::{CommandLimits, ControllerIdentity, cns, csi};
use crate::spec::registers::{self, Capabilities, ENABLE, READY};
use crate::spec::{AdminOpcode, Command, feature};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Registers that are mapped at least: up to the doorbells of the admin queue.
const LEAST: usize = registers::DOORBELLS + 8;
/// The largest memory page that is worked with, as a power of two of bytes.
const LARGEST_PAGE: u32 = 16;
/// How long a controller may take that does not say how long it takes.
const LEAST_TIMEOUT: Duration = Duration::from_millis(500);

/// Starts a device, and the thread that looks after it.
pub fn open(function: Arc<dyn PciFunction>, options: &Options) -> Result<Arc<Inner>, Error> {
    let inner = open_unwatched(function, options)?;
    let watcher = watch::spawn(&inner)?;
    *lock(&inner.watcher) = Some(watcher);
    Ok(inner)
}

pub fn open_unwatched(
    function: Arc<dyn PciFunction>,
    options: &Options,
) -> Result<Arc<Inner>, Error> {
    let registers = function.registers(0)?;
    if registers.len() < LEAST {
        let text = format!("{} bytes of registers, too few for NVMe", registers.len());
        return Err(Error::new(text));
    }
    let capabilities = Capabilities(registers.read64(registers::CAP));
    check(capabilities)?;
    let (page_shift, _) = capabilities.page_shifts();
    let space = Space::new(function.clone())?;
    let admin = Admin::new(&space, 1 << page_shift, capabilities.doorbell_stride())?;
    let vectors = function.vectors();
    if vectors < 2 {
        let text = format!("it has {vectors} MSI-X interrupts, and at least 2 are needed");
        return Err(Error::new(text));
    }
    let event = || {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|error| Error::os("an eventfd", &error))
    };
    let wanted = vectors.min(u32::from(options.max_pairs.max(1)) + 1);
    let events = (0..wanted).map(|_| event()).collect::<Result<Vec<_>, _>>()?;
    let inner = Arc::new(Inner {
        name: function.name(),
        registers,
        space,
        options: *options,
        capabilities,
        page_shift,
        events,
        admin: Mutex::new(admin),
        identity: OnceLock::new(),
        limits: OnceLock::new(),
        pairs: Mutex::new(Pairs::default()),
        life: AtomicU8::new(STARTING),
        wants: Mutex::default(),
        sample: Mutex::default(),
        watcher: Mutex::default(),
        wake: event()?,
        namespaces: Mutex::default(),
        listeners: Mutex::default(),
        resets: Default::default(),
        wanted_back: Default::default(),
        function,
    });
    inner.disable()?;
    inner.start()?;
    inner.life.store(RUNNING, Ordering::Release);
    Ok(inner)
}

/// Refuses what no NVMe controller says.
fn check(capabilities: Capabilities) -> Result<(), Error> {
    if capabilities.0 == 0 || capabilities.0 == u64::MAX {
        return Err(Error::new(format!(
            "its registers read as {:#x}: the device is gone or powered down",
            capabilities.0 as u32
        ))
        .with_errno(libc::ENODEV));
    }
    if !capabilities.has_nvm_commands() && !capabilities.has_command_sets() {
        return Err(Error::new("the controller does not have the NVM command set"));
    }
    let (smallest, largest) = capabilities.page_shifts();
    if smallest > LARGEST_PAGE || largest < smallest {
        let text = format!("memory pages of 2^{smallest} to 2^{largest} bytes are not supported");
        return Err(Error::new(text));
    }
    if capabilities.max_entries() < 2 {
        return Err(Error::new("its queues have fewer than 2 entries"));
    }
    Ok(())
}

impl Inner {
    /// How long becoming ready or not ready may take.
    fn ready_timeout(&self) -> Duration {
        let mut timeout = self.capabilities.timeout();
        if self.capabilities.has_ready_timeouts() {
            let halves = self.registers.read(registers::CRTO) & 0xffff;
            timeout = timeout.max(Duration::from_millis(500 * u64::from(halves)));
        }
        timeout.max(LEAST_TIMEOUT)
    }

    /// Whether what the registers say can be believed. A device that is gone reads as ones, or, behind
    /// some bridges, as zeroes: CSTS.RDY = 0 then proves nothing.
    pub(super) fn is_there(&self) -> bool {
        self.registers.read64(registers::CAP) == self.capabilities.0
    }

    /// Whether it takes commands.
    pub(super) fn is_ready(&self) -> bool {
        let status = self.registers.read(registers::CSTS);
        status != registers::GONE && status & READY != 0
    }

    fn wait(&self, mask: u32, value: u32, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut pause = Duration::from_micros(50);
        loop {
            let status = self.registers.read(registers::CSTS);
            if status != registers::GONE && status & mask == value {
                return self.is_there();
            }
            // Disabled by somebody else it never gets ready.
            let is_lost = value == READY && self.registers.read(registers::CC) & ENABLE == 0;
            if status == registers::GONE || is_lost || Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    /// Stops the controller. When this returns it reads and writes no memory: it was seen not to be
    /// ready, or bus mastering is off and the function was reset.
    pub(super) fn disable(&self) -> Result<(), Error> {
        let configuration = self.registers.read(registers::CC);
        self.registers.write(registers::CC, configuration & !ENABLE);
        if self.wait(READY, 0, self.ready_timeout()) {
            return Ok(());
        }
        if !self.is_there() {
            return Err(Error::new("the device is gone").with_errno(libc::ENODEV));
        }
        log::warn!("{}: the controller does not stop: resetting the function", self.name);
        self.function.set_bus_master(false)?;
        self.function.reset()?;
        if !self.wait(READY, 0, self.ready_timeout()) {
            return Err(Error::new("the controller is still ready after a reset of the function"));
        }
        Ok(())
    }

    /// Starts a controller that is disabled, and asks it what it is.
    pub(super) fn start(&self) -> Result<(), Error> {
        self.function.set_bus_master(true)?;
        self.function.set_vectors(&self.events.iter().collect::<Vec<_>>())?;
        {
            let mut admin = lock(&self.admin);
            admin.reset();
            let (submissions, completions) = admin.addresses();
            let entries = admin::ENTRIES - 1;
            self.registers.write(registers::AQA, entries | entries << 16);
            self.registers.write64(registers::ASQ, submissions);
            self.registers.write64(registers::ACQ, completions);
        }
        let all_sets = self.capabilities.has_command_sets();
        self.registers.write(registers::CC, registers::enabled(self.page_shift, all_sets));
        let timeout = self.ready_timeout();
        if !self.wait(READY, READY, timeout) {
            if self.registers.read(registers::CC) & ENABLE == 0 {
                return Err(Error::new("the controller was reset while it was started"));
            }
            let status = self.registers.read(registers::CSTS);
            return Err(Error::new(format!(
                "the controller is not ready after {} s (CSTS {status:#x})",
                timeout.as_secs_f32()
            )));
        }
        self.identify_controller()
    }

    /// Identifies a controller that has just become ready, and asks it for queues.
    fn identify_controller(&self) -> Result<(), Error> {
        let data =
            self.identify(0, cns::CONTROLLER, 0, true).map_err(|f| f.error("identifying it"))?;
        let identity = ControllerIdentity::parse(&data);
        if let Some(before) = self.identity.get()
            && before.serial != identity.serial
        {
            return Err(Error::new(format!(
                "its serial number was '{}' and is now '{}': it is another device",
                before.serial, identity.serial
            )));
        }
        let identity = self.identity.get_or_init(|| identity);
        // Older controllers do not know it; what it would say is then taken from MDTS.
        self.limits.get_or_init(|| {
            let data = self.identify(0, cns::CONTROLLER_OF_SET, csi::NVM, true).ok()?;
            Some(CommandLimits::parse(&data))
        });
        let granted = self.ask_for_queues().map_err(|f| f.error("asking for queues"))?;
        let mut pairs = lock(&self.pairs);
        if usize::from(granted) < pairs.links.len() {
            let text = format!("{granted} queues are granted, fewer than before");
            return Err(Error::new(text));
        }
        pairs.granted = granted.max(pairs.granted);
        drop(pairs);
        if identity.reports_namespaces() {
            let command = Command::admin(AdminOpcode::SetFeatures)
                .with_dword(10, feature::ASYNC_EVENTS)
                // Critical warnings of the device's health, and namespaces that change.
                .with_dword(11, 0x1f | 1 << 8);
            if let Err(failure) = self.execute(command, Data::None, true) {
                log::warn!("{}: {}", self.name, failure.error("enabling asynchronous events"));
            }
        }
        lock(&self.admin).ask_for_event(self);
        Ok(())
    }

    /// How many queue pairs the controller grants, as far as there are interrupts for them.
    fn ask_for_queues(&self) -> Result<u16, Failure> {
        // The first vector is the admin queue's.
        let most = self.events.len() as u16 - 1;
        let wanted = u32::from(most) - 1;
        let command = Command::admin(AdminOpcode::SetFeatures)
            .with_dword(10, feature::NUMBER_OF_QUEUES)
            .with_dword(11, wanted | wanted << 16);
        let granted = self.execute(command, Data::None, true)?.result;
        let (submissions, completions) = (granted & 0xffff, granted >> 16);
        // Both are counted from zero.
        Ok((submissions.min(completions) + 1).min(u32::from(most)) as u16)
    }

    /// Resumes with a controller that was reset: queue pairs are created again.
    pub(super) fn restart(&self) -> Result<(), Error> {
        self.start()?;
        for link in self.links() {
            link.completions().zero();
            let what = || format!("making queue {} again", link.id());
            self.create_queues(&link, true).map_err(|failure| failure.error(&what()))?;
        }
        self.life.store(RUNNING, Ordering::Release);
        self.links().iter().for_each(|link| link.notify(State::Restart));
        Ok(())
    }

    /// Makes the controller write its cache and stop (section 3.6.1).
    fn shut_down(&self) {
        let configuration = self.registers.read(registers::CC) & !registers::SHUTDOWN_MASK;
        self.registers.write(registers::CC, configuration | registers::SHUTDOWN);
        let mask = registers::SHUTDOWN_STATUS_MASK;
        // RTD3E would say how long it may take; controllers that have it stay below this.
        if !self.wait(mask, registers::SHUTDOWN_COMPLETE, Duration::from_secs(10)) {
            log::warn!("{}: the controller does not shut down", self.name);
        }
        let stopped = self.disable().and_then(|()| self.function.set_bus_master(false));
        if let Err(error) = stopped {
            log::error!("{}: {error}", self.name);
            // Nobody knows what it still writes to.
            if let Err(error) = self.space.cut() {
                log::error!("{}: taking its memory away: {error}", self.name);
            }
        }
    }
}

impl Inner {
    /// Shuts the controller down and takes its memory away, once. Blocks.
    pub(super) fn end(&self) {
        let before = self.life.swap(DEAD, Ordering::AcqRel);
        let _ = self.wake.write(1);
        // The thread may be in the middle of something, a reset even. It may also be the last that has
        // this.
        let watcher = lock(&self.watcher).take();
        if let Some(watcher) = watcher
            && watcher.thread().id() != std::thread::current().id()
        {
            let _ = watcher.join();
        }
        let life = match self.life.swap(DEAD, Ordering::AcqRel) {
            DEAD => before,
            after_reset => after_reset,
        };
        match life {
            RUNNING => {
                self.shut_down();
                // The owner of memory that is still registered need not keep it locked.
                if let Err(error) = self.space.cut() {
                    log::error!("{}: taking its memory away: {error}", self.name);
                }
            }
            // What was begun is stopped, so that no memory is freed under the device's hands.
            STARTING if self.disable().is_err() => {
                let _ = self.function.set_bus_master(false);
                let _ = self.space.cut();
            }
            _ => {}
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.end();
    }
}
