//! `vublk serve`: disks for virtual machines, with the defaults that an expert would choose.

use super::confine::{self, SandboxArgs, Wanted};
use super::disk_names::{DiskName, DiskNames};
use super::log::{self, LogArgs};
use super::looks;
use super::outlet::{Outlet, standard};
use super::policy::PolicyArgs;
use super::process::{EndSignals, Manager, wait_unless_ended};
use super::secret;
use super::sockets::{Descriptors, SocketArg};
use super::startup::Startup;
use crate::block::Error;
use crate::drivers;
use crate::export::core::watch::DEFAULT_TIMEOUT;
use crate::export::core::{Address, DiskOptions, FailureOptions, ReadErrors, WriteErrors};
use crate::export::vhost_user_blk::{self, DeviceOptions, MAX_QUEUES, check_block_size};
use crate::io::{WorkerOptions, descriptors};
use crate::metrics;
use crate::options::{Map, Size, Value, bytes, size};
use crate::sandbox::{self, Plan};
use crate::service::{NewExport, Service};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Serve disks to virtual machines over vhost-user-blk
#[derive(clap::Args)]
pub struct Serve {
    /// The images or block devices to serve
    #[arg(required = true, value_name = "IMAGE", value_hint = clap::ValueHint::FilePath)]
    images: Vec<PathBuf>,
    /// The socket that a virtual machine connects to; one for each IMAGE, in their order. Also:
    /// fd:N, a descriptor left open; systemd[:NAME], of its socket activation; connect:PATH, a
    /// socket that the virtual machine's side listens on
    #[arg(short, long = "socket", required = true, value_name = "SOCKET", value_hint = clap::ValueHint::FilePath)]
    sockets: Vec<SocketArg>,
    /// The images' format. It is never guessed: a guest can write another format's header to its disk
    #[arg(short, long, value_parser = formats())]
    format: Option<String>,
    /// The disk's name in metrics and logs; one for each IMAGE, in their order [default: the name
    /// of the image's file without its ending]
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<String>,
    /// A file with the passphrase of the encrypted images, all bytes of it. A name without a slash is also looked for among
    /// systemd's credentials ($CREDENTIALS_DIRECTORY)
    #[arg(long, value_name = "PATH", value_hint = clap::ValueHint::FilePath)]
    secret_file: Option<PathBuf>,
    /// Serve read-only
    #[arg(short, long)]
    read_only: bool,
    /// Serve guests that are migrated to here: an image is locked when its guest comes, and waited
    /// for until the daemon that the guest leaves gives it up
    #[arg(long)]
    incoming: bool,
    /// Virtqueues to offer to each virtual machine
    #[arg(long, default_value_t = MAX_QUEUES, value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES as i64))]
    num_queues: u16,
    /// Threads that serve all queues of all disks [default: processors, at most 4]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
    /// How the host's page cache and flushes are used
    #[arg(long, value_enum, default_value_t = Cache::None)]
    cache: Cache,
    /// Whether discards give space back to the file system
    #[arg(long, value_enum, default_value_t = Discard::Unmap)]
    discard: Discard,
    /// Bytes in the guest's smallest addressable block
    #[arg(long, default_value = "512", value_parser = parse_size)]
    logical_block_size: Size,
    /// Serial number that the guest sees, up to 20 bytes [default: vublk0, vublk1, …]
    #[arg(long)]
    serial: Option<String>,
    /// What to do about writes and flushes that the storage fails
    #[arg(long, value_enum, default_value_t)]
    werror: WriteErrors,
    /// What to do about reads that the storage fails
    #[arg(long, value_enum, default_value_t)]
    rerror: ReadErrors,
    /// Accept what failed flushes of earlier daemons may have lost: the guest's flushes work again
    #[arg(long)]
    accept_loss: bool,
    /// Keep what is written apart from the image, which stays as it is, and forget it at the end
    #[arg(long, conflicts_with_all = ["incoming", "read_only"])]
    snapshot: bool,
    /// Seconds that a request may take before its connection is closed; 0: any time
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_TIMEOUT.as_secs() as u32)]
    io_timeout: u32,
    /// Longest time that an idle worker spins before it sleeps, in microseconds
    #[arg(long, default_value_t = 32)]
    poll_max_us: u64,
    /// Processors to pin the workers to, such as 2,3 or 2-5
    #[arg(long, value_parser = parse_cpus)]
    worker_cpus: Option<Cpus>,
    /// Permissions of the sockets, in octal
    #[arg(long, value_parser = parse_mode)]
    socket_mode: Option<u32>,
    /// Owner of the sockets: USER[:GROUP], as numbers
    #[arg(long, value_parser = parse_owner)]
    socket_owner: Option<(u32, u32)>,
    /// Offer metrics for Prometheus and for vublk top: unix:PATH, or an address and port of the
    /// loopback interface, such as 127.0.0.1:9100
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<metrics::Address>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    sandbox: SandboxArgs,
    /// Say more; twice for even more
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(flatten)]
    log: LogArgs,
    /// Whether to print nothing on standard output.
    #[arg(skip)]
    quiet: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Cache {
    /// Around the page cache; a guest's flush reaches the disk
    None,
    /// Through the page cache; a guest's flush reaches the disk
    Writeback,
    /// Through the page cache; every write reaches the disk before it completes
    Writethrough,
    /// Around the page cache; every write reaches the disk before it completes
    Directsync,
    /// Through the page cache; flushes are ignored, a crash of the host loses data
    Unsafe,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Discard {
    Ignore,
    Unmap,
}

/// The name of the secret of `--secret-file`.
const SECRET: &str = "secret-file";

#[derive(Clone)]
struct Cpus(Vec<usize>);

impl Serve {
    /// One raw image, with defaults for the rest; prints nothing.
    pub fn raw(image: PathBuf, read_only: bool, socket: SocketArg) -> Serve {
        #[derive(clap::Parser)]
        struct Defaults {
            #[command(flatten)]
            serve: Serve,
        }
        let required = ["vublk", "-f", "raw", "image", "--socket", "socket"];
        let Defaults { serve } = clap::Parser::parse_from(required);
        Serve { images: vec![image], sockets: vec![socket], read_only, quiet: true, ..serve }
    }

    pub fn run(self) -> super::Outcome {
        let signals = EndSignals::block();
        let mut descriptors = Descriptors::new();
        log::start(self.verbose, self.log)?;
        if self.images.len() != self.sockets.len() {
            let (images, sockets) = (self.images.len(), self.sockets.len());
            return Err(format!("{images} images but {sockets} sockets: give one for each").into());
        }
        let disks = self.disk_names()?;
        if self.serial.as_ref().is_some_and(|serial| serial.len() > 20) {
            return Err("--serial: at most 20 bytes".into());
        }
        descriptors::raise_limit();
        let stop = signals.descriptor()?;
        let service = Service::start(drivers::registry(), self.policy.clone().policy())?;
        let mut startup = Startup::new(service, stop);
        let service = startup.service().clone();
        service.wait_for_locks(Some(EndSignals::have_come));
        if let Some(file) = &self.secret_file {
            secret::add(SECRET, file)?;
        }
        let observed = self.metrics.is_some().then(|| service.observe());
        let workers = self.start_workers(&mut startup)?;
        for (index, (image, socket)) in self.images.iter().zip(&self.sockets).enumerate() {
            let address = descriptors.address(socket, self.socket_mode, self.socket_owner)?;
            self.serve_one(&mut startup, &workers, (index, &disks[index]), image, address)?;
        }
        let metrics = self.metrics.as_ref().zip(observed);
        let metrics = metrics.map(|(at, observed)| {
            metrics::Server::start(at, observed, log::dropped, EndSignals::have_come)
        });
        let metrics = metrics.transpose().map_err(|e| e.at("--metrics"))?;
        let manager = Manager::find();
        self.confine(&service, metrics.as_ref())?;
        let printed = self.print_attach_lines()?;
        manager.notify(Manager::READY);
        // A connection that was passed to us is the only one of its disk.
        let mut left = self.images.len();
        while left > 0 && wait_unless_ended(startup.stop(), service.events_descriptor(), None) {
            left -= service.take_ended().len();
            sandbox::report_refused();
        }
        manager.notify(Manager::STOPPING);
        drop(metrics);
        drop((service, startup));
        sandbox::report_refused();
        printed.drain();
        manager.drain();
        Ok(())
    }

    /// Prints how the disks are attached to virtual machines, without waiting for the reader.
    fn print_attach_lines(&self) -> Result<Outlet, String> {
        let stdout = Outlet::start("stdout", standard(libc::STDOUT_FILENO), |_| Vec::new());
        let stdout = stdout.map_err(|e| format!("standard output: {e}"))?;
        for socket in &self.sockets {
            if let SocketArg::Path(path) = socket
                && !self.quiet
            {
                stdout.push(attach_lines(path));
            }
        }
        Ok(stdout)
    }

    /// Everything is open: gives up what is not needed any more.
    fn confine(&self, service: &Service, metrics: Option<&metrics::Server>) -> super::Outcome {
        let connects = self.sockets.iter().any(|socket| matches!(socket, SocketArg::Connect(_)));
        let metrics = metrics.and_then(metrics::Server::path).map(Path::to_owned);
        let mut sockets = if self.socket_owner.is_none() { service.sockets() } else { Vec::new() };
        sockets.extend(metrics.clone());
        let wanted = Wanted { args: &self.sandbox, by_default: true, sockets };
        let mut plan = Plan { connects, ..confine::plan(service) };
        plan.own.extend(metrics);
        wanted.enter(plan)
    }

    /// The disks' names.
    fn disk_names(&self) -> Result<Vec<DiskName>, String> {
        let (images, names) = (self.images.len(), self.names.len());
        if names != 0 && names != images {
            return Err(format!("{images} images but {names} names: give one for each, or none"));
        }
        let mut used = DiskNames::default();
        if names != 0 {
            return self.names.iter().map(|name| used.given(name)).collect();
        }
        Ok(self.images.iter().map(|image| used.of_image(image)).collect())
    }

    /// Starts the workers, and gives their names.
    fn start_workers(&self, startup: &mut Startup) -> Result<Vec<String>, Error> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let pinned = self.worker_cpus.as_ref().map(|cpus| &*cpus.0);
        let default = pinned.map_or(processors.min(4), <[usize]>::len);
        let count = self.workers.map_or(default, usize::from);
        let mut names = Vec::new();
        for index in 0..count {
            let name = format!("worker{index}");
            let options = WorkerOptions {
                poll_max: Duration::from_micros(self.poll_max_us),
                cpu: pinned.map(|cpus| cpus[index % cpus.len()]),
                ..WorkerOptions::default()
            };
            let id = name.clone();
            startup.run("worker", async move |service| service.add_iothread(id, options).await)?;
            names.push(name);
        }
        Ok(names)
    }

    fn serve_one(
        &self,
        startup: &mut Startup,
        workers: &[String],
        (index, name): (usize, &DiskName),
        image: &Path,
        address: Address,
    ) -> super::Outcome {
        let shown = image.display();
        let id = name.export.clone();
        let format = match &self.format {
            Some(format) => format,
            None => return Err(self.missing_format(startup, image)?.into()),
        };
        let options = self.node_options(format, &name.node, image)?;
        let open = async move |service: Service| service.blockdev_add(options).await;
        let mut node = startup.run("image", open).map_err(|e| e.at(&shown))?;
        if self.snapshot {
            let name = format!("{}-snapshot", name.node);
            let overlay = startup
                .run("snapshot", async move |service| service.add_overlay(&name, &node).await);
            node = overlay.map_err(|e| e.at(&shown))?;
        }
        let logical_block_size = self.logical_block_size.0;
        check_block_size(&id, logical_block_size)?;
        let device = DeviceOptions {
            num_queues: self.num_queues,
            serial: self.serial.clone().unwrap_or_else(|| format!("vublk{index}")),
        };
        let socket = match &address {
            Address::Path { path, .. } => Some(path.clone()),
            _ => None,
        };
        let transport = Box::new(vhost_user_blk::Options { address, logical_block_size, device });
        let disk = DiskOptions {
            writable: !self.read_only,
            write_through: matches!(self.cache, Cache::Writethrough | Cache::Directsync),
            failures: FailureOptions {
                werror: self.werror,
                rerror: self.rerror,
                io_timeout: Duration::from_secs(self.io_timeout.into()),
            },
        };
        let workers = workers.iter().map(|name| startup.service().iothread(name));
        let workers = workers.collect::<Result<_, _>>()?;
        let (allow_inactive, accept_loss) = (self.incoming, self.accept_loss);
        let new = NewExport { id, node, disk, transport, workers, allow_inactive, accept_loss };
        let export = async move |service: Service| service.export(new).await;
        let served = startup.run("export", export).map_err(|e| match &socket {
            Some(path) => e.with_missing_folder(path),
            None => e,
        });
        Ok(served.map_err(|e| e.at(&shown))?)
    }

    /// The error for an image that is served without a format.
    fn missing_format(&self, startup: &mut Startup, image: &Path) -> Result<Error, Error> {
        let shown = image.display().to_string();
        let mut options = self.file_options(image).map_err(Error::new)?;
        options.insert("node-name", "unnamed");
        options.insert("read-only", Value::Bool(true));
        options.insert("force-share", Value::Bool(true));
        let filename = shown.clone();
        let guess = async move |service: Service| {
            let node = service.blockdev_add(options).await?;
            let guessed = service.guess_format(&node, &filename).await?;
            Ok((node.len(), guessed))
        };
        let (len, guessed) = startup.run("image", guess).map_err(|e| e.at(&shown))?;
        Ok(looks::unnamed(&shown, len, guessed))
    }

    /// The graph for one image: its format over the protocol that its file wants.
    fn node_options(&self, format: &str, name: &str, image: &Path) -> Result<Map, String> {
        let mut node = self.common_options();
        node.insert("driver", format);
        node.insert("node-name", name);
        node.insert("active", Value::Bool(!self.incoming));
        node.insert("file", Value::Map(self.file_options(image)?));
        if self.secret_file.is_some() {
            let entry = drivers::registry().known(format).map_err(|error| error.to_string())?;
            let key = entry.options.iter().map(|option| option.name);
            let key = key.into_iter().find(|name| name.ends_with("key-secret"));
            let none = || format!("--secret-file: images of {format} are not encrypted");
            node.insert(key.ok_or_else(none)?, SECRET);
        }
        Ok(node)
    }

    /// The protocol that an image's file wants.
    fn file_options(&self, image: &Path) -> Result<Map, String> {
        use std::os::unix::fs::FileTypeExt;
        let filename = &*bytes::text_of_name(image.as_os_str());
        let is_device =
            std::fs::metadata(image).is_ok_and(|found| found.file_type().is_block_device());
        let mut file = self.common_options();
        file.insert("filename", filename);
        match protocol(filename) {
            Some(driver) => {
                file.insert("driver", driver);
            }
            None => {
                let registry = drivers::registry();
                let entry =
                    if is_device { registry.of_path(filename) } else { registry.of_files() };
                file.insert("driver", entry.map_err(|error| error.to_string())?.name);
                file.insert("aio", "io_uring");
            }
        }
        Ok(file)
    }

    /// The options that every node of an image has.
    fn common_options(&self) -> Map {
        let mut cache = Map::new();
        let direct = matches!(self.cache, Cache::None | Cache::Directsync);
        cache.insert("direct", Value::Bool(direct));
        cache.insert("no-flush", Value::Bool(self.cache == Cache::Unsafe));
        let discard = if self.discard == Discard::Unmap { "unmap" } else { "ignore" };
        let mut node = Map::new();
        node.insert("cache", cache);
        node.insert("discard", discard);
        node.insert("read-only", Value::Bool(self.read_only || self.snapshot));
        node
    }
}

/// The lines that attach the disk to a virtual machine.
fn attach_lines(socket: &Path) -> String {
    let path = socket.canonicalize().unwrap_or_else(|_| socket.to_owned());
    let path = path.display();
    format!(
        "{path}: ready\n  \
         QEMU:             -object memory-backend-memfd,id=mem,size=RAM,share=on \
         -machine memory-backend=mem -chardev socket,id=vublk,path={path},reconnect=1 \
         -device vhost-user-blk-pci,chardev=vublk,num-queues=VCPUS\n  \
         QEMU 9.2 or later: the same with reconnect-ms=1000 in place of reconnect=1\n  \
         Cloud Hypervisor: --memory size=RAM,shared=on \
         --disk vhost_user=true,socket={path},num_queues=VCPUS\n"
    )
}

fn parse_size(text: &str) -> Result<Size, String> {
    let wrong = |_| format!("'{text}' is not a size: bytes, or a number with k, M, G, T, P or E");
    size::parse(text).map(Size).map_err(wrong)
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(format!("'{text}' is not an octal mode such as 660")),
    }
}

/// The driver of a name such as `nvme://…`. Other colons are part of a file's name.
fn protocol(name: &str) -> Option<&'static str> {
    let (prefix, _) = name.split_once("://")?;
    let entry = drivers::registry().by_prefix(prefix)?;
    (!entry.takes_paths()).then_some(entry.name)
}

/// `USER[:GROUP]`; the group is the user's number if it is not given.
fn parse_owner(text: &str) -> Result<(u32, u32), String> {
    let (user, group) = text.split_once(':').unwrap_or((text, text));
    let number = |part: &str| part.parse().map_err(|_| format!("'{part}' is not a numeric ID"));
    Ok((number(user)?, number(group)?))
}

/// Reads the name of an image format, of which completions offer all.
fn formats() -> clap::builder::PossibleValuesParser {
    drivers::formats().collect::<Vec<_>>().into()
}

fn parse_cpus(text: &str) -> Result<Cpus, String> {
    let number = |part: &str| match part.parse::<usize>() {
        Ok(n) if is_allowed(n) => Ok(n),
        Ok(_) => Err(format!("there is no processor {part}, or this process may not use it")),
        Err(_) => Err(format!("'{part}' is not the number of a processor")),
    };
    let mut cpus = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            Some((first, last)) => cpus.extend(number(first)?..=number(last)?),
            None => cpus.push(number(part)?),
        }
    }
    if cpus.is_empty() { Err("no processors".into()) } else { Ok(Cpus(cpus)) }
}

/// Whether this process may run on a processor.
fn is_allowed(cpu: usize) -> bool {
    if cpu >= libc::CPU_SETSIZE as usize {
        return false;
    }
    // SAFETY: all zeroes are a valid set, which the call fills; the number is within it.
    unsafe {
        let mut set = std::mem::zeroed::<libc::cpu_set_t>();
        let size = size_of::<libc::cpu_set_t>();
        libc::sched_getaffinity(0, size, &mut set) == 0 && libc::CPU_ISSET(cpu, &set)
    }
}
