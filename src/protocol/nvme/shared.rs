//! The open controllers of this process, each shared by its nodes and closed with the last of them.

use super::entry::{NvmeOptions, from_driver};
use super::worker_queue::{Host, WorkerQueue};
use crate::block::{Drive, DriveHealth, Error};
use crate::io::sync::Mutex;
use crate::io::{self, Errno, IoResult, PerWorker};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use vublk_vfio::real::Vfio;
use vublk_vfio::{Controller, HostRange, Options, PciAddress, PciFunction, Registration};

/// How long to wait for a controller that is being released: longer than that takes.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(1);

static CONTROLLERS: Mutex<BTreeMap<PciAddress, Weak<Shared>>> = Mutex::new(BTreeMap::new());
static ADOPTED: Mutex<BTreeMap<PciAddress, Arc<dyn PciFunction>>> = Mutex::new(BTreeMap::new());

/// From now on the device of this address is `function`, not one that the kernel gives: for drivers of
/// other buses, and the fake controller.
pub fn adopt(address: PciAddress, function: Arc<dyn PciFunction>) {
    ADOPTED.lock().insert(address, function);
}

/// A controller of this process.
pub struct Shared {
    address: PciAddress,
    /// None before it is open and once it is being released.
    controller: Mutex<Option<Controller>>,
    /// Namespaces that nodes are on.
    claimed: Mutex<BTreeSet<u32>>,
    /// The queue pair of each worker, as far as the controller has enough. Closed when no node is on it any more.
    worker_queues: PerWorker<WorkerQueue>,
    /// Workers that have a queue pair, for those that get none.
    hosts: Mutex<Vec<Host>>,
    next_host: AtomicUsize,
    registered: Mutex<Vec<(HostRange, Weak<Registration>)>>,
}

impl Shared {
    /// # Errors
    /// When it is being released.
    pub fn controller(&self) -> Result<Controller, Error> {
        let controller = self.controller.lock().clone();
        controller.ok_or_else(|| Error::new(format!("{}: it is being closed", self.address)))
    }

    pub fn worker_queues(&self) -> &PerWorker<WorkerQueue> {
        &self.worker_queues
    }

    /// A worker has a queue pair now.
    pub fn add_host(&self, host: Host) {
        self.hosts.lock().push(host);
    }

    pub fn remove_host(&self, queue: u16) {
        self.hosts.lock().retain(|host| host.queue != queue);
    }

    /// One of the workers that have a queue pair, in turns.
    pub fn host(&self) -> Option<Host> {
        let hosts = self.hosts.lock();
        let next = self.next_host.fetch_add(1, Ordering::Relaxed);
        hosts.get(next % hosts.len().max(1)).cloned()
    }

    /// Lets the device reach a guest's memory; once, however many nodes ask.
    pub fn register(&self, memory: HostRange) -> Result<Arc<Registration>, Error> {
        let controller = self.controller()?;
        let mut registered = self.registered.lock();
        registered.retain(|(_, registration)| registration.strong_count() > 0);
        let known = registered.iter().find(|(known, _)| *known == memory);
        if let Some(registration) = known.and_then(|(_, registration)| registration.upgrade()) {
            return Ok(registration);
        }
        let registration = Arc::new(controller.register(memory).map_err(from_driver)?);
        registered.push((memory, Arc::downgrade(&registration)));
        Ok(registration)
    }
}

impl Drive for Shared {
    fn name(&self) -> String {
        self.address.to_string()
    }

    fn health(&self) -> Option<DriveHealth> {
        /// Bytes of a data unit.
        const UNIT: u128 = 512_000;
        let health = self.controller.lock().as_ref()?.last_health()?;
        Some(DriveHealth {
            warnings: health.warnings,
            celsius: i32::from(health.temperature) - 273,
            used_percent: health.used,
            spare_percent: health.spare,
            spare_threshold_percent: health.spare_threshold,
            bytes_read: health.units_read.saturating_mul(UNIT),
            bytes_written: health.units_written.saturating_mul(UNIT),
            media_errors: health.media_errors,
            unsafe_shutdowns: health.unsafe_shutdowns,
            logged_errors: health.error_entries,
        })
    }
}

/// A node's hold on a namespace of a controller.
pub struct Claim {
    shared: Arc<Shared>,
    namespace: u32,
    given_up: AtomicBool,
}

impl Claim {
    /// Opens the controller, or shares one that is open.
    pub async fn take(options: &NvmeOptions) -> Result<Claim, Error> {
        let (address, namespace, began) = (options.device, options.namespace, Instant::now());
        loop {
            match Shared::find(address).and_then(|shared| Claim::join(shared, namespace)) {
                Some(Ok(claim)) => {
                    claim.open(options.io_timeout).await?;
                    return Ok(claim);
                }
                Some(Err(error)) => return Err(error),
                // It is being released; the next user opens it again.
                None if began.elapsed() < PATIENCE => io::sleep(PAUSE).await,
                None => {
                    let text = format!("{address}: still being closed");
                    return Err(Error::new(text).with_errno(Errno(libc::EBUSY)));
                }
            }
        }
    }

    /// None if the controller is being released.
    fn join(shared: Arc<Shared>, namespace: u32) -> Option<Result<Claim, Error>> {
        let mut claimed = shared.claimed.lock();
        if shared.worker_queues.is_closed() {
            return None;
        }
        let is_new = claimed.insert(namespace);
        drop(claimed);
        Some(if is_new {
            Ok(Claim { shared, namespace, given_up: AtomicBool::new(false) })
        } else {
            let address = shared.address;
            let text = format!("{address}: namespace {namespace} is open in this process already");
            Err(Error::new(text).with_errno(Errno(libc::EBUSY)))
        })
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    async fn open(&self, io_timeout: Option<Duration>) -> Result<(), Error> {
        let shared = self.shared.clone();
        let opened = io::offload(move || shared.open(io_timeout)).await;
        if opened.is_err() {
            let _ = self.give_up().await;
        }
        opened
    }

    fn release(&self) -> bool {
        if self.given_up.swap(true, Ordering::SeqCst) {
            return false;
        }
        let mut claimed = self.shared.claimed.lock();
        claimed.remove(&self.namespace);
        let last = claimed.is_empty();
        if last {
            // Under the lock: nobody joins a controller that is about to go.
            self.shared.worker_queues.close();
        }
        last
    }

    /// Lets go of the namespace. If nobody else is on the controller, it has been shut down when this
    /// is done.
    pub async fn give_up(&self) -> IoResult {
        if !self.release() {
            return Ok(());
        }
        if !self.shared.worker_queues.left_within(PATIENCE).await {
            log::error!("{}: its queues are still in use", self.shared.address);
            return Err(Errno(libc::ETIMEDOUT));
        }
        // The address is free for others when the node is gone: it still has the device open.
        let controller = self.shared.controller.lock().take();
        if let Some(controller) = controller {
            io::offload(move || controller.close()).await;
        }
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.release();
    }
}

impl Shared {
    /// The controller of this address, open or not. None while one is being released.
    fn find(address: PciAddress) -> Option<Arc<Shared>> {
        let mut controllers = CONTROLLERS.lock();
        if let Some(known) = controllers.get(&address) {
            return known.upgrade();
        }
        let shared = Arc::new(Shared {
            address,
            controller: Mutex::default(),
            claimed: Mutex::default(),
            worker_queues: PerWorker::default(),
            hosts: Mutex::default(),
            next_host: AtomicUsize::new(0),
            registered: Mutex::default(),
        });
        controllers.insert(address, Arc::downgrade(&shared));
        Some(shared)
    }

    /// The address is free for a new one.
    fn forget(&self) {
        let mut controllers = CONTROLLERS.lock();
        let is_me = |known: &Weak<Shared>| std::ptr::eq(known.as_ptr(), self);
        if controllers.get(&self.address).is_some_and(is_me) {
            controllers.remove(&self.address);
        }
    }

    /// Opens the controller unless it is open. Blocks.
    ///
    /// # Errors
    /// Among others when it is open with another time-out than is asked for.
    fn open(&self, io_timeout: Option<Duration>) -> Result<(), Error> {
        // Held throughout: a second caller waits for the first, and then shares the controller.
        let mut controller = self.controller.lock();
        if let Some(controller) = &*controller {
            let (theirs, ours) = (controller.io_timeout(), io_timeout);
            return match ours.is_none_or(|ours| ours == theirs) {
                true => Ok(()),
                false => Err(Error::new(format!(
                    "{}: it is open with io-timeout={}, which all its namespaces share",
                    self.address,
                    theirs.as_secs()
                ))),
            };
        }
        let adopted = ADOPTED.lock().get(&self.address).cloned();
        let function = match adopted {
            Some(function) => function,
            None => Arc::new(Vfio::open(self.address).map_err(from_driver)?),
        };
        let mut options = Options::default();
        options.io_timeout = io_timeout.unwrap_or(options.io_timeout);
        let opened = Controller::open(function, &options).map_err(from_driver)?;
        *controller = Some(opened);
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The address is free only when the controller has been shut down, although others may still hold a
        // reference.
        if let Some(controller) = self.controller.lock().take() {
            controller.close();
        }
        self.forget();
    }
}
