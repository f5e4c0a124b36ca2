//! A controller: one device, everything that is done to it as a whole, and what its queue pairs share.
//!
//! | file | it holds |
//! |---|---|
//! | `start` | enabling, disabling, shutdown; what is asked of the controller first |
//! | `admin` | the admin queue |
//! | `health` | what it says of its health |
//! | `namespaces` | what namespaces there are, and their limits |
//! | `link` | how queue pairs stop and go on when the controller is reset |
//! | `watch` | the thread that resets it, aborts commands, hears events, notices that it is gone |

#![forbid(unsafe_code)]

pub(crate) mod admin;
mod health;
pub(crate) mod link;
mod namespaces;
mod start;
mod watch;

pub use watch::Watch;

use crate::function::{PciFunction, Registers};
use crate::namespace::{Limits, Namespace};
use crate::queue_pair::QueuePair;
use crate::space::Space;
use crate::spec::identify::{self, CommandLimits, ControllerIdentity, NamespaceIdentity, cns, csi};
use crate::spec::registers::{self, Capabilities};
use crate::spec::{AdminOpcode, Command, Status};
use crate::{Error, HostRange, Registration};
use admin::{Admin, Data, Reply};
use link::{Link, State};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Entries of an I/O queue at most; a controller may have fewer (CAP.MQES).
const ENTRIES: u32 = 1024;
/// Bytes of one transfer at most; a controller may take fewer (MDTS). What is longer is not quicker,
/// and a command's list of pages stays on one page.
const TRANSFER: u64 = 1 << 20;
/// Blocks of one command: sixteen bits.
const BLOCKS: u64 = 1 << 16;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a controller is driven.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// After which an I/O command is aborted. Twice that, and the controller is reset.
    pub io_timeout: Duration,
    /// After which an admin command has failed, and the controller is reset.
    pub admin_timeout: Duration,
    /// The most queue pairs to ask for.
    pub max_pairs: u16,
    /// How often it is looked whether the controller is still there.
    pub check_interval: Duration,
    /// How long it may seem to be gone before it is: while the host resets the function, its registers
    /// are not to be read.
    pub absence: Duration,
}

impl Default for Options {
    fn default() -> Options {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Options {
            io_timeout: Duration::from_secs(30),
            admin_timeout: Duration::from_secs(30),
            // Usually one for each worker, and those that do the work of the control plane.
            max_pairs: (threads + 2).min(64) as u16,
            check_interval: Duration::from_secs(1),
            absence: Duration::from_secs(3),
        }
    }
}

/// How an admin command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    Status(Status),
    Timeout,
    Gone,
}

impl Failure {
    fn error(self, what: &str) -> Error {
        match self {
            Failure::Status(status) => {
                Error::new(format!("{what}: {status}")).with_errno(status.errno())
            }
            Failure::Timeout => {
                Error::new(format!("{what}: no answer in time")).with_errno(libc::ETIMEDOUT)
            }
            Failure::Gone => {
                Error::new(format!("{what}: the controller is gone")).with_errno(libc::ENODEV)
            }
        }
    }
}

/// A controller that is driven by this process. Cheap to clone; shut down when the last clone and the
/// last queue pair are dropped.
#[derive(Clone)]
pub struct Controller(Arc<Inner>);

/// What the controller's users, its queue pairs and its thread share.
pub(crate) struct Inner {
    name: String,
    function: Arc<dyn PciFunction>,
    registers: Arc<dyn Registers>,
    space: Arc<Space>,
    options: Options,
    capabilities: Capabilities,
    page_shift: u32,
    /// The first is the admin queue's, the others are I/O queues' in the order of their identifiers.
    events: Vec<EventFd>,
    admin: Mutex<Admin>,
    identity: OnceLock<ControllerIdentity>,
    limits: OnceLock<Option<CommandLimits>>,
    pairs: Mutex<Pairs>,
    life: AtomicU8,
    wants: Mutex<Wants>,
    sample: Mutex<health::Sample>,
    /// The thread that looks after it, until it is waited for.
    watcher: Mutex<Option<JoinHandle<()>>>,
    /// Wakes the thread.
    wake: EventFd,
    /// Open namespaces, and how many blocks they have.
    namespaces: Mutex<BTreeMap<u32, Open>>,
    listeners: Mutex<Vec<Weak<dyn Fn() + Send + Sync>>>,
    resets: AtomicU64,
    /// The host wants the device back.
    wanted_back: AtomicBool,
}

struct Open {
    identity: NamespaceIdentity,
    blocks: Arc<AtomicU64>,
}

#[derive(Default)]
struct Pairs {
    /// How many the controller grants.
    granted: u16,
    /// By identifier less one.
    links: Vec<Option<Arc<Link>>>,
}

#[derive(Default)]
struct Wants {
    reset: bool,
    health: bool,
    /// Queue and command identifiers.
    aborts: Vec<(u16, u16)>,
}

const STARTING: u8 = 0;
const RUNNING: u8 = 1;
const DEAD: u8 = 2;

impl Inner {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn registers(&self) -> &Arc<dyn Registers> {
        &self.registers
    }

    pub fn space(&self) -> &Arc<Space> {
        &self.space
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    pub fn io_timeout(&self) -> Duration {
        self.options.io_timeout
    }

    pub fn page(&self) -> usize {
        1 << self.page_shift
    }

    pub fn doorbells(&self, id: u16) -> (usize, usize) {
        registers::doorbells(id, self.capabilities.doorbell_stride())
    }

    pub fn is_running(&self) -> bool {
        self.life.load(Ordering::Acquire) == RUNNING
    }

    pub fn is_dead(&self) -> bool {
        self.life.load(Ordering::Acquire) == DEAD
    }

    fn admin_queue(&self) -> &Mutex<Admin> {
        &self.admin
    }

    pub fn identity(&self) -> &ControllerIdentity {
        self.identity.get_or_init(|| ControllerIdentity::parse(&[]))
    }

    /// Asks for a reset.
    pub fn want_reset(&self) {
        lock(&self.wants).reset = true;
        let _ = self.wake.write(1);
    }

    /// Asks for an abort, which may come too late or not be done.
    pub fn want_abort(&self, queue: u16, command: u16) {
        lock(&self.wants).aborts.push((queue, command));
        let _ = self.wake.write(1);
    }

    /// `set` is a command set, for the structures that each has; `starting` as for
    /// [`Inner::execute`].
    fn identify(
        &self,
        namespace: u32,
        dword10: u32,
        set: u8,
        starting: bool,
    ) -> Result<Vec<u8>, Failure> {
        let command = Command::admin(AdminOpcode::Identify)
            .with_namespace(namespace)
            .with_dword(10, dword10)
            .with_dword(11, u32::from(set) << 24);
        self.execute(command, Data::In(identify::LEN), starting).map(|reply| reply.data)
    }

    fn log_page(&self, page: u8, len: usize) -> Result<Vec<u8>, Failure> {
        let dwords = (len / 4 - 1) as u32;
        let command = Command::admin(AdminOpcode::GetLogPage)
            .with_namespace(u32::MAX)
            .with_dword(10, u32::from(page) | dwords << 16);
        self.admin(command, Data::In(len)).map(|Reply { data, .. }| data)
    }

    fn links(&self) -> Vec<Arc<Link>> {
        lock(&self.pairs).links.iter().flatten().cloned().collect()
    }

    /// Makes a pair's queues: first where completions go, then what is completed there (3.3.1.1).
    fn create_queues(&self, link: &Link, starting: bool) -> Result<(), Failure> {
        let (id, size) = (u32::from(link.id()), link.entries() - 1);
        let (submissions, completions) = link.addresses();
        let contiguous = 1;
        let interrupts = 1 << 1;
        let command = Command::admin(AdminOpcode::CreateCompletionQueue)
            .with_data(completions, 0)
            .with_dword(10, id | size << 16)
            .with_dword(11, contiguous | interrupts | id << 16);
        self.execute(command, Data::None, starting)?;
        let command = Command::admin(AdminOpcode::CreateSubmissionQueue)
            .with_data(submissions, 0)
            .with_dword(10, id | size << 16)
            .with_dword(11, contiguous | id << 16);
        self.execute(command, Data::None, starting).map(drop)
    }

    /// Deletes a pair's queues. When that fails the pair's memory stays with the controller.
    pub fn delete_pair(&self, link: &Arc<Link>) {
        let delete = |opcode| {
            let command = Command::admin(opcode).with_dword(10, u32::from(link.id()));
            self.admin(command, Data::None).map(drop)
        };
        // A reset in the middle deletes the queues, too, and makes them again unless the link is gone.
        if lock(&self.pairs).links[usize::from(link.id()) - 1].take().is_none() {
            return;
        }
        link.notify(State::Halted);
        let deleted = delete(AdminOpcode::DeleteSubmissionQueue)
            .and_then(|()| delete(AdminOpcode::DeleteCompletionQueue));
        match deleted {
            Ok(()) | Err(Failure::Gone) => link.set_deleted(),
            Err(failure) => {
                let what = format!("deleting queue {}", link.id());
                log::error!("{}: {}: its memory is lost", self.name, failure.error(&what));
                link.leak();
            }
        }
    }
}

impl Controller {
    /// Takes a device over: stops whatever it was doing, and starts it.
    ///
    /// # Errors
    /// One line that begins with the device's name.
    pub fn open(function: Arc<dyn PciFunction>, options: &Options) -> Result<Controller, Error> {
        let name = function.name();
        start::open(function, options).map(Controller).map_err(|error| error.at(name))
    }

    /// The same without a thread that looks after the device: for tests and fuzz targets that do everything
    /// on one. [`Controller::poll`] does that thread's work.
    ///
    /// # Errors
    /// As of [`Controller::open`].
    pub fn open_unwatched(
        function: Arc<dyn PciFunction>,
        options: &Options,
    ) -> Result<Controller, Error> {
        let name = function.name();
        let opened = start::open_unwatched(function, options);
        opened.map(Controller).map_err(|error| error.at(name))
    }

    /// Resets the controller, aborts commands, takes events: whatever is due. May be called from time to time, and
    /// not while a thread of the controller's does it.
    pub fn poll(&self, watch: &mut Watch) {
        if !self.0.is_dead() {
            watch.work(&self.0);
        }
    }

    /// How it is named in messages.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub fn identity(&self) -> &ControllerIdentity {
        self.0.identity()
    }

    /// As it was opened with.
    pub fn io_timeout(&self) -> Duration {
        self.0.io_timeout()
    }

    /// Memory that the device reaches.
    pub fn space(&self) -> &Arc<Space> {
        &self.0.space
    }

    /// Lets the device reach memory of others ([`Space::register`]).
    pub fn register(&self, memory: HostRange) -> Result<Registration, Error> {
        self.0.space.register(memory).map_err(|error| error.at(&self.0.name))
    }

    /// Shuts the controller down, although clones may exist; the queue pairs are gone. What is asked of it afterwards
    /// fails. Blocks.
    pub fn close(&self) {
        self.0.end();
    }

    /// How many queue pairs there can be at a time.
    pub fn max_pairs(&self) -> usize {
        usize::from(lock(&self.0.pairs).granted)
    }

    /// How often the controller was reset.
    pub fn resets(&self) -> u64 {
        self.0.resets.load(Ordering::Relaxed)
    }

    /// The controller is gone, and nothing will ever work again.
    pub fn is_dead(&self) -> bool {
        self.0.is_dead()
    }

    /// The host wants the device back: hot unplug waits for this process to release it.
    pub fn is_wanted_back(&self) -> bool {
        self.0.wanted_back.load(Ordering::Relaxed)
    }

    /// A new queue pair. Blocks.
    ///
    /// # Errors
    /// Among others when there are [`Controller::max_pairs`] already (EBUSY).
    pub fn queue_pair(&self) -> Result<QueuePair, Error> {
        self.make_pair().map_err(|error| error.at(&self.0.name))
    }

    fn make_pair(&self) -> Result<QueuePair, Error> {
        let inner = &self.0;
        let mut pairs = lock(&inner.pairs);
        let granted = usize::from(pairs.granted);
        pairs.links.resize(granted, None);
        let Some(at) = pairs.links.iter().position(Option::is_none) else {
            let text = format!("all {granted} queues that the controller grants are in use");
            return Err(Error::new(text).with_errno(libc::EBUSY));
        };
        let id = at as u16 + 1;
        let event = inner.events.get(at + 1).map(EventFd::try_clone);
        let event = event.unwrap_or_else(|| Err(std::io::Error::from_raw_os_error(libc::ENOENT)));
        let event = event.map_err(|error| Error::os(format_args!("interrupt {id}"), &error))?;
        let entries = inner.capabilities.max_entries().min(ENTRIES);
        let link = Arc::new(Link::new(id, entries, event, &inner.space, inner.page())?);
        // Known from here on: a reset in the middle makes its queues, too, and creating them then fails.
        pairs.links[at] = Some(link.clone());
        drop(pairs);
        let pair = QueuePair::new(inner.clone(), link.clone());
        let created = pair.and_then(|pair| {
            let made = inner.create_queues(&link, false);
            made.map(|()| pair).map_err(|failure| failure.error(&format!("making queue {id}")))
        });
        if created.is_err() {
            inner.delete_pair(&link);
        }
        created
    }

    /// The identifiers of the namespaces that there are, at most 1024.
    pub fn namespaces(&self) -> Result<Vec<u32>, Error> {
        self.0
            .active_namespaces()
            .map_err(|failure| failure.error("asking for its namespaces").at(&self.0.name))
    }

    /// Opens a namespace.
    pub fn namespace(&self, id: u32) -> Result<Namespace, Error> {
        self.0.namespace(id).map_err(|error| error.at(&self.0.name))
    }

    /// Calls `listener` when a namespace has changed or the controller is gone, on a thread of the controller's,
    /// while the listener lives.
    pub fn listen(&self, listener: &Arc<dyn Fn() + Send + Sync>) {
        let mut listeners = lock(&self.0.listeners);
        listeners.retain(|other| other.strong_count() > 0);
        listeners.push(Arc::downgrade(listener));
    }

    /// Asks for the lengths of all open namespaces, as when the controller says that one has changed: for
    /// those that do not say so. Blocks.
    pub fn refresh(&self) {
        self.0.refresh();
    }

    /// Resets the controller: everything that it has in flight is given to it again.
    pub fn reset(&self) {
        self.0.want_reset();
    }
}
