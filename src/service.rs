//! What one process serves: its block graph, its workers, its exports. The command lines and the
//! monitor all act through this, so that a thing is done, refused and worded in one way.

mod handover;
mod holders;
mod live;
mod looks;
mod observed;
mod overlays;
mod patience;
mod pending;
mod snapshots;
mod transaction;

pub use handover::wait_for_socket;
pub use live::ExportInfo;
pub use observed::Observed;
pub use overlays::NewOverlay;
pub use patience::is_locked;
pub use pending::Pending;
pub use transaction::Step;

use crate::block::graph::{Attachment, Graph};
use crate::block::registry::Guess;
use crate::block::{Error, Node, OpenPolicy, Perm, Perms, Registry, TemporaryImage, probe};
use crate::export::core::watch::DEFAULT_TIMEOUT;
use crate::export::core::{
    Address, ExportMetrics, FailureOptions, IoErrors, ReadErrors, WriteErrors, listening_fd,
};
use crate::export::vhost_user_blk::{DiskOptions, Export, ExportOptions};
use crate::io::{Worker, WorkerOptions};
use crate::options::{self, Map};
use live::Ended;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// The serial number of disks that are given none.
const SERIAL: &str = "vhost_user_blk";

/// What overlays are made in.
const OVERLAY_FORMAT: &str = "qcow2";

/// Queues at most that an export may have: messages that bring a queue's descriptors name it by 8 bits, so
/// that the descriptors of queue 256 would become those of queue 0.
pub const MAX_QUEUES: u16 = 256;

/// Opens a named node, and warns if it looks like one of another format.
async fn open_disk(graph: Graph, options: Map) -> Result<Arc<Node>, Error> {
    let node = graph.open(options).await?;
    looks::warn_of_raw(graph.registry(), &node).await;
    Ok(node)
}

/// A running service. Dropping it ends the exports, then closes the graph.
pub struct Service {
    graph: Graph,
    /// Opens, closes and changes the graph; serves no guest.
    control: Worker,
    /// By id, in the order in which they came.
    iothreads: Vec<(String, Arc<Worker>)>,
    /// For exports that name no iothread; made when the first one does.
    main: Option<Arc<Worker>>,
    /// Newest last.
    exports: Vec<Served>,
    /// What ends the wait for images that are locked; `None`: they are not waited for.
    patience: Option<fn() -> bool>,
    /// Those of them that have ended and were not asked for yet.
    ended: Arc<Ended>,
    /// What the storage has failed and was not asked for yet.
    io_errors: Arc<IoErrors>,
    /// What can be watched; `None`: nothing is counted for that.
    observed: Option<Arc<Observed>>,
    /// What exports do is counted, watched or not.
    counts: bool,
}

struct Served {
    id: String,
    /// Of what it served when it was told to end.
    node_name: String,
    /// The socket file that it has made.
    socket: Option<PathBuf>,
    metrics: Option<Arc<ExportMetrics>>,
    state: State,
}

enum State {
    Serving(Box<Export>, Attachment),
    /// Told to end; the thread waits for it.
    Ending(JoinHandle<()>),
}

impl State {
    /// Ends the export, or waits until it has.
    fn end(self) {
        match self {
            // In this order: no more requests, then no more user.
            State::Serving(export, attachment) => {
                drop(export);
                drop(attachment);
            }
            State::Ending(thread) => drop(thread.join()),
        }
    }
}

/// `--object iothread,…`
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct IothreadObject {
    id: String,
    poll_max_ns: Option<u64>,
    // Accepted, because scripts give them; our own rules for spinning and batching hold.
    #[serde(rename = "poll-grow")]
    _poll_grow: Option<u64>,
    #[serde(rename = "poll-shrink")]
    _poll_shrink: Option<u64>,
    #[serde(rename = "aio-max-batch")]
    _aio_max_batch: Option<u64>,
    #[serde(rename = "thread-pool-min")]
    _thread_pool_min: Option<u64>,
    #[serde(rename = "thread-pool-max")]
    _thread_pool_max: Option<u64>,
}

/// `--export type=vhost-user-blk,…`
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct VhostUserBlkExport {
    id: String,
    node_name: String,
    #[serde(default)]
    writable: bool,
    #[serde(default)]
    writethrough: bool,
    #[serde(default)]
    iothread: Option<Iothreads>,
    #[serde(rename = "fixed-iothread", default)]
    _fixed_iothread: bool,
    #[serde(default)]
    allow_inactive: bool,
    addr: options::Value,
    num_queues: Option<u16>,
    logical_block_size: Option<options::Size>,
    #[serde(default)]
    werror: WriteErrors,
    #[serde(default)]
    rerror: ReadErrors,
    /// Losses of earlier processes are known to the operator.
    #[serde(default)]
    accept_loss: bool,
    /// Seconds.
    io_timeout: Option<u32>,
}

/// One name, or a list of them.
type Iothreads = options::Value;

/// A disk to serve, whoever asks for it.
pub struct NewExport {
    pub id: String,
    pub node: Arc<Node>,
    pub disk: DiskOptions,
    pub address: Address,
    pub workers: Vec<Arc<Worker>>,
    /// A node that is inactive stays so until the first front end starts a ring. Else it becomes
    /// active now.
    pub allow_inactive: bool,
    /// The operator knows what failed flushes of earlier processes have lost.
    pub accept_loss: bool,
}

impl Service {
    /// A service without anything. `policy` says what may be opened.
    pub fn new(registry: &'static Registry, policy: OpenPolicy) -> Result<Service, Error> {
        let options = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
        let control = start_worker("control", options)?;
        let graph = Graph::with_policy(registry, policy);
        let ended = Ended::new()?;
        let io_errors = ended.io_errors()?;
        ended.listen(graph.notices())?;
        let (iothreads, exports) = (Vec::new(), Vec::new());
        let patience = Some((|| false) as fn() -> bool);
        Ok(Service {
            graph,
            control,
            iothreads,
            main: None,
            exports,
            patience,
            ended,
            io_errors,
            observed: None,
            counts: false,
        })
    }

    /// Exports that are made from now on can be watched through what this gives.
    pub fn observe(&mut self) -> Arc<Observed> {
        self.observed.get_or_insert_default().clone()
    }

    /// Exports that are made from now on count their requests, so that [`Service::counted`] has something
    /// to tell.
    pub fn count_requests(&mut self) {
        self.counts = true;
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// `--blockdev`: opens a named node. Warns if it looks like one of another format.
    pub fn blockdev_add(&self, options: Map) -> Result<Arc<Node>, Error> {
        self.patiently(|| {
            let (graph, options) = (self.graph.clone(), options.clone());
            self.control.block_on(move || open_disk(graph, options))
        })
    }

    /// The format that the first bytes of a node tell; `filename` is how it is called.
    pub fn look_at(&self, node: &Arc<Node>, filename: &str) -> Result<Option<Guess>, Error> {
        let (registry, node, filename) = (self.graph.registry(), node.clone(), filename.to_owned());
        self.control.block_on(move || async move { probe::look(registry, &node, &filename).await })
    }

    /// Opens a node, `name`, over `node`: it takes what is written, in a file that is gone afterwards.
    pub fn add_overlay(&self, name: &str, node: &Arc<Node>) -> Result<Arc<Node>, Error> {
        let (graph, name, node) = (self.graph.clone(), name.to_owned(), node.clone());
        self.control.block_on(move || async move {
            let image =
                TemporaryImage::create(graph.registry(), OVERLAY_FORMAT, node.len()).await?;
            graph.open(image.options(&name, node.name())?).await
        })
    }

    /// Waits for locked images from now on until `give_up` says true, and no longer than it makes
    /// sense; with `None` not at all.
    pub fn wait_for_locks(&mut self, give_up: Option<fn() -> bool>) {
        self.patience = give_up;
    }

    fn patiently<T>(&self, mut attempt: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
        match self.patience {
            Some(give_up) => patience::patiently(give_up, attempt),
            None => attempt(),
        }
    }

    /// `--object`: adds an object of the type that `qom-type` names.
    pub fn object_add(&mut self, mut options: Map) -> Result<(), Error> {
        let qom_type = options.take_required_str("qom-type")?;
        match &*qom_type {
            "iothread" => {
                let object: IothreadObject = options::from_map(options)?;
                let mut worker = WorkerOptions::default();
                if let Some(ns) = object.poll_max_ns {
                    worker.poll_max = Duration::from_nanos(ns);
                }
                self.add_iothread(&object.id, worker)
            }
            other if OBJECT_TYPES.contains(&other) => {
                Err(Error::new(format!("objects of type '{other}' are not available")))
            }
            other => {
                Err(Error::new(format!("Parameter 'qom-type' does not accept value '{other}'")))
            }
        }
    }

    /// Adds a worker that exports can name.
    pub fn add_iothread(&mut self, id: &str, options: WorkerOptions) -> Result<(), Error> {
        if !options::is_identifier(id) {
            return Err(Error::new("Parameter 'id' expects an identifier").with_hint(
                "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
            ));
        }
        if self.iothreads.iter().any(|(name, _)| name == id) {
            return Err(Error::new(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        let worker = start_worker(id, options)?;
        self.iothreads.push((id.to_owned(), Arc::new(worker)));
        Ok(())
    }

    pub fn iothread(&self, id: &str) -> Result<Arc<Worker>, Error> {
        let found = self.iothreads.iter().find(|(name, _)| name == id);
        found
            .map(|(_, worker)| worker.clone())
            .ok_or_else(|| Error::new(format!("iothread \"{id}\" not found")))
    }

    /// `--export`: serves a node.
    pub fn export_add(&mut self, mut options: Map) -> Result<(), Error> {
        let export_type = options.take_required_str("type")?;
        match &*export_type {
            "vhost-user-blk" => {}
            "nbd" | "fuse" | "vduse-blk" => {
                return Err(Error::new(format!(
                    "exports of type '{export_type}' are not available"
                )));
            }
            other => {
                return Err(Error::new(format!(
                    "Parameter 'type' does not accept value '{other}'"
                )));
            }
        }
        let options: VhostUserBlkExport = options::from_map(options)?;
        let address = parse_address(options.addr)?;
        let id = options.id;
        if !options::is_identifier(&id) {
            return Err(Error::new("Invalid block export id"));
        }
        if self.exports.iter().any(|served| served.id == id) {
            return Err(Error::new(format!("Block export id '{id}' is already in use")));
        }
        let node = self.graph.find(&options.node_name).map_err(|_| {
            let name = &options.node_name;
            Error::new(format!("Cannot find device='' nor node-name='{name}'"))
        })?;
        let workers = match options.iothread {
            None => vec![self.main_worker()?],
            Some(options::Value::List(names)) if !names.is_empty() => {
                let find = |name: &options::Value| self.iothread(name.as_str().unwrap_or_default());
                names.iter().map(find).collect::<Result<_, _>>()?
            }
            Some(name) => vec![self.iothread(name.as_str().unwrap_or_default())?],
        };
        let block = match options.logical_block_size {
            // Zero is how scripts say that they have no wish.
            None | Some(options::Size(0)) => 512,
            Some(size) => size.0,
        };
        let disk = DiskOptions {
            writable: options.writable,
            write_through: options.writethrough,
            logical_block_size: check_block_size(&id, block)?,
            num_queues: options.num_queues.unwrap_or(1),
            serial: SERIAL.into(),
            failures: FailureOptions {
                werror: options.werror,
                rerror: options.rerror,
                io_timeout: options
                    .io_timeout
                    .map_or(DEFAULT_TIMEOUT, |seconds| Duration::from_secs(seconds.into())),
            },
        };
        let (allow_inactive, accept_loss) = (options.allow_inactive, options.accept_loss);
        self.export(NewExport { id, node, disk, address, workers, allow_inactive, accept_loss })
    }

    /// Serves a node.
    pub fn export(&mut self, new: NewExport) -> Result<(), Error> {
        let NewExport { id, node, disk, address, workers, allow_inactive, accept_loss } = new;
        if disk.num_queues == 0 {
            return Err(Error::new("num-queues must be greater than 0"));
        }
        if disk.num_queues > MAX_QUEUES {
            return Err(Error::new(format!("num-queues must be at most {MAX_QUEUES}")));
        }
        if disk.writable && node.is_read_only() {
            return Err(Error::new("Cannot export read-only node as writable"));
        }
        let mut held = Perm::CONSISTENT_READ;
        if disk.writable {
            held |= Perm::WRITE;
        }
        let perms = Perms { held, shared: Perm::all() };
        let first_worker = self.exports.len();
        let queues = disk.num_queues;
        let is_timed = self.observed.is_some();
        let metrics = (is_timed || self.counts).then(|| {
            let of = (node.name(), node.len());
            Arc::new(ExportMetrics::new(&id, of, disk.writable, queues, is_timed))
        });
        let name = id.clone();
        let options = ExportOptions { name, disk, workers, first_worker, metrics: metrics.clone() };
        if let (Address::Path { path, .. }, Some(give_up)) = (&address, self.patience) {
            handover::wait_for_socket(path, SOCKET_PATIENCE, give_up);
        }
        if !allow_inactive {
            self.activate(&node)?;
        }
        let socket = match &address {
            Address::Path { path, .. } => Some(path.clone()),
            _ => None,
        };
        // The front end is let in last: by then all permissions are held.
        let export = Export::new(node.clone(), address, options)?;
        export.tell(self.io_errors.clone());
        let user = Some(export.user());
        let what = format!("export '{id}'");
        let attachment = self.patiently(|| self.graph.attach(&node, &what, perms, user.clone()))?;
        export.take_up_losses(accept_loss)?;
        export.follow(attachment.activity());
        let (name, ended) = (id.clone(), self.ended.clone());
        let export = export.start(move || ended.tell(name))?;
        if let (Some(observed), Some(metrics)) = (&self.observed, &metrics) {
            observed.add(metrics.clone());
            observed.add_drives(node.drives());
        }
        let state = State::Serving(Box::new(export), attachment);
        let node_name = node.name().to_owned();
        self.exports.push(Served { id, node_name, socket, metrics, state });
        Ok(())
    }

    /// Makes a node active, unless it is.
    fn activate(&self, node: &Arc<Node>) -> Result<(), Error> {
        self.patiently(|| {
            let (graph, node) = (self.graph.clone(), node.clone());
            self.control.block_on(move || async move { graph.activate(&node).await })
        })
    }

    fn main_worker(&mut self) -> Result<Arc<Worker>, Error> {
        if let Some(main) = &self.main {
            return Ok(main.clone());
        }
        let main = Arc::new(start_worker("main", WorkerOptions::default())?);
        self.main = Some(main.clone());
        Ok(main)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // In this order: no more requests, then no more users, then no more nodes.
        self.end_exports();
        let graph = self.graph.clone();
        self.control.block_on(move || async move { graph.close().await });
    }
}

/// How long a socket may be listened on by others before it is refused.
pub const SOCKET_PATIENCE: Duration = Duration::from_secs(2);

/// What qemu-storage-daemon 7.2 knows, so that a type that we lack is told from one that nobody has.
const OBJECT_TYPES: [&str; 14] = [
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "iothread",
    "main-loop",
    "pr-manager-helper",
    "secret",
    "secret_keyring",
    "thread-context",
    "throttle-group",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

fn start_worker(name: &str, options: WorkerOptions) -> Result<Worker, Error> {
    Worker::start(name, options)
        .map_err(|error| Error::os(format!("cannot start worker '{name}'"), error))
}

/// A block size as the guest can be told: a power of two from 512 bytes to 2 MiB.
pub fn check_block_size(id: &str, size: u64) -> Result<u32, Error> {
    let property = format!("Property {id}.logical-block-size doesn't take value");
    if !(512..=2 << 20).contains(&size) {
        return Err(Error::new(format!("{property} {size} (minimum: 512, maximum: 2097152)")));
    }
    if !size.is_power_of_two() {
        return Err(Error::new(format!("{property} '{size}', it's not a power of 2")));
    }
    Ok(size as u32)
}

/// A `SocketAddress` that can be listened on here.
fn parse_address(addr: options::Value) -> Result<Address, Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Unix {
        path: std::path::PathBuf,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Fd {
        str: String,
    }
    let at = |error: options::Error| Error::from(error.under("addr"));
    let options::Value::Map(mut map) = addr else {
        return Err(Error::new("Invalid parameter type for 'addr', expected: object"));
    };
    match &*map.take_required_str("type").map_err(at)? {
        "unix" => {
            let Unix { path } = options::from_map(map).map_err(at)?;
            Ok(Address::Path { path, mode: None, owner: None })
        }
        "fd" => {
            let Fd { str } = options::from_map(map).map_err(at)?;
            let fd =
                str.parse().map_err(|_| Error::new(format!("Unable to parse FD number {str}")))?;
            // SAFETY: whoever started the program says that this descriptor is ours to take.
            Ok(Address::Listening(unsafe { listening_fd(fd) }?))
        }
        "inet" | "vsock" => {
            Err(Error::new("Only socket address types 'unix' and 'fd' are supported"))
        }
        other => Err(Error::new(format!("Parameter 'type' does not accept value '{other}'"))),
    }
}
