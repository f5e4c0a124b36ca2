//! A disk that is offered to NBD clients.

use super::connection;
use super::contexts::{self, Context};
use super::lanes::Lanes;
use super::offer::{Client, Offer};
use super::options::Options;
use super::server::Server;
use crate::block::bitmap::Bitmap;
use crate::block::extents::backing;
use crate::block::graph::User;
use crate::block::{Error, LocalFuture, Node, SECTOR};
use crate::export::core::failure::Operation;
use crate::export::core::{Disk, Export, Parts};
use crate::io::sync::{Mutex, Waiters};
use crate::io::{Socket, Worker, driven, offload};
use crate::nbd::option::BlockSizes;
use crate::nbd::{ExportFlags, MAX_DATA, MAX_MINIMUM_BLOCK, MAX_STRING, PREFERRED_BLOCK};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// An export of the server, until it is dropped.
pub(super) struct Offered {
    shared: Arc<Shared>,
    server: Server,
    /// The server has it.
    is_listed: bool,
}

/// What the connections of an export share.
pub(super) struct Shared {
    pub disk: Arc<Disk>,
    pub lanes: Arc<Lanes>,
    pub contexts: Vec<Context>,
    name: String,
    description: String,
    /// Marked as in use.
    bitmaps: Vec<Arc<Bitmap>>,
    workers: Vec<Arc<Worker>>,
    next_worker: AtomicUsize,
    /// As its node wants memory for I/O.
    buffer_align: AtomicUsize,
    clients: Mutex<Clients>,
}

#[derive(Default)]
struct Clients {
    next: u64,
    /// To cut them off.
    all: BTreeMap<u64, Arc<Socket>>,
    ending: bool,
    waiting: Waiters,
}

impl Offered {
    /// Checks what was asked for, and prepares the export. Nobody is served before [`Export::start`].
    ///
    /// # Errors
    /// The server does not run, a name is too long, or a bitmap cannot be told of.
    pub fn new(parts: Parts, options: Options) -> Result<Offered, Error> {
        let Options { server, name, description, bitmaps, allocation_depth } = options;
        server.check_running()?;
        let Parts { name: id, node, disk, workers, first_worker, metrics } = parts;
        let name = name.unwrap_or_else(|| node.name().to_owned());
        check_length("export name", &name)?;
        let description = description.unwrap_or_default();
        check_length("description", &description)?;
        if server.find(&name).is_some() {
            let name = name.escape_debug();
            return Err(Error::new(format!("NBD server already has export named '{name}'")));
        }
        let found = bitmaps.iter().map(|wanted| wanted.find(&node, disk.writable));
        let bitmaps: Vec<_> = found.collect::<Result<_, _>>()?;
        bitmaps.iter().for_each(|bitmap| bitmap.set_busy(true));
        let align = buffer_align(&node);
        let disk = Arc::new(Disk::new(&id, node, disk, SECTOR as u32, metrics));
        let shared = Shared {
            disk,
            lanes: Arc::new(Lanes::new(workers.len())),
            contexts: contexts::all(&bitmaps, allocation_depth),
            name,
            description,
            bitmaps,
            next_worker: AtomicUsize::new(first_worker),
            workers,
            buffer_align: AtomicUsize::new(align),
            clients: Mutex::default(),
        };
        Ok(Offered { shared: Arc::new(shared), server, is_listed: false })
    }
}

fn check_length(what: &str, text: &str) -> Result<(), Error> {
    match text.len() > MAX_STRING {
        true => Err(Error::new(format!("{what} '{}' too long", text.escape_debug()))),
        false => Ok(()),
    }
}

fn buffer_align(node: &Node) -> usize {
    node.driver().traits().buffer_align as usize
}

/// A bitmap that block status is to tell of: by its name in the chain of images, or on a node of its own.
pub(super) enum WantedBitmap {
    Named(String),
    Of(Arc<Node>, String),
}

impl WantedBitmap {
    fn find(&self, root: &Arc<Node>, writable: bool) -> Result<Arc<Bitmap>, Error> {
        let (mut layer, name) = match self {
            WantedBitmap::Named(name) => (Some(root.clone()), name),
            WantedBitmap::Of(node, name) => (Some(node.clone()), name),
        };
        let mut found = None;
        while let (None, Some(node)) = (&found, &layer) {
            found = node.bitmaps().find(name).ok();
            layer = match self {
                WantedBitmap::Of(..) => None,
                WantedBitmap::Named(_) => match backing(node) {
                    Some(below) => Some(below),
                    None => node.driver().children().first().map(|child| child.node()),
                },
            };
        }
        let shown = name.escape_debug();
        let bitmap = found.ok_or_else(|| Error::new(format!("Bitmap '{shown}' is not found")))?;
        let flags = bitmap.flags();
        if flags.inconsistent {
            return Err(crate::block::bitmap::inconsistent(name));
        }
        if flags.busy {
            return Err(Error::new(format!(
                "Bitmap '{shown}' is currently in use by another operation and cannot be used"
            )));
        }
        let shows_own = matches!(self, WantedBitmap::Named(_)) || root.bitmaps().find(name).is_ok();
        if !writable && flags.recording && shows_own && !root.is_read_only() {
            return Err(Error::new(format!(
                "Enabled bitmap '{shown}' incompatible with readonly export"
            )));
        }
        Ok(bitmap)
    }
}

impl Export for Offered {
    fn type_name(&self) -> &'static str {
        super::ENTRY.name
    }

    fn disk(&self) -> &Arc<Disk> {
        &self.shared.disk
    }

    fn user(&self) -> Arc<dyn User> {
        self.shared.clone()
    }

    fn start(&mut self, _ended: Box<dyn FnOnce() + Send>) -> Result<(), Error> {
        self.server.add(self.shared.clone())?;
        self.is_listed = true;
        Ok(())
    }

    fn is_in_use(&self) -> bool {
        !self.shared.clients.lock().all.is_empty()
    }

    /// None is ever held: NBD reports all errors.
    fn retry_held(&self) {}

    fn fail_held(&self) {}
}

impl Drop for Offered {
    fn drop(&mut self) {
        if self.is_listed {
            self.server.remove(&self.shared.name);
        }
        let (sender, gone) = std::sync::mpsc::channel();
        let shared = self.shared.clone();
        self.shared.workers[0].send(move |local| {
            local.io().spawn(async move {
                shared.end_clients().await;
                let _ = sender.send(());
            });
        });
        let _ = driven::receive(&gone);
        let Shared { disk, bitmaps, .. } = &*self.shared;
        bitmaps.iter().for_each(|bitmap| bitmap.set_busy(false));
        disk.losses.note_at_the_end(&disk.name, &disk.node());
        disk.log_end();
    }
}

impl Shared {
    /// As memory for data is to be aligned, in bytes.
    pub fn buffer_align(&self) -> usize {
        self.buffer_align.load(Ordering::Relaxed)
    }

    /// Counts a request that has ended.
    pub fn count(&self, operation: Option<Operation>) {
        let counters = &self.disk.counters;
        counters.requests.fetch_add(1, Ordering::Relaxed);
        if operation == Some(Operation::Flush) {
            counters.flushes.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Cuts all clients off, and waits until nothing of them is in flight.
    async fn end_clients(&self) {
        let all: Vec<_> = {
            let mut clients = self.clients.lock();
            clients.ending = true;
            clients.all.values().cloned().collect()
        };
        all.iter().for_each(|socket| socket.shut_down());
        drop(all);
        let none = |clients: &mut Clients| if clients.all.is_empty() { Ok(()) } else { Err(()) };
        self.clients.wait_for(|clients| none(clients).map_err(|()| &mut clients.waiting)).await;
    }

    fn client_came(&self, socket: &Arc<Socket>) -> Option<u64> {
        let mut clients = self.clients.lock();
        if clients.ending {
            return None;
        }
        clients.next += 1;
        let number = clients.next;
        clients.all.insert(number, socket.clone());
        if let Some(metrics) = &self.disk.metrics {
            metrics.connected.store(true, Ordering::Relaxed);
            metrics.connections.fetch_add(1, Ordering::Relaxed);
        }
        Some(number)
    }

    fn client_left(&self, number: u64) {
        let waiting = {
            let mut clients = self.clients.lock();
            clients.all.remove(&number);
            if let Some(metrics) = &self.disk.metrics {
                metrics.connected.store(!clients.all.is_empty(), Ordering::Relaxed);
            }
            clients.waiting.take()
        };
        waiting.wake();
    }
}

impl Offer for Shared {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn size(&self) -> u64 {
        self.disk.capacity.load(Ordering::Relaxed) * SECTOR
    }

    fn flags(&self) -> ExportFlags {
        let mut flags = ExportFlags::HAS_FLAGS | ExportFlags::SEND_FLUSH | ExportFlags::SEND_FUA;
        flags |= ExportFlags::SEND_CACHE;
        match self.disk.options.writable {
            true => {
                flags |= ExportFlags::SEND_TRIM
                    | ExportFlags::SEND_WRITE_ZEROES
                    | ExportFlags::SEND_FAST_ZERO;
            }
            false => flags |= ExportFlags::READ_ONLY,
        }
        flags
    }

    fn block_sizes(&self) -> BlockSizes {
        let traits = self.disk.node().driver().traits();
        let minimum = traits.request_align.min(MAX_MINIMUM_BLOCK);
        BlockSizes { minimum, preferred: PREFERRED_BLOCK.max(minimum), maximum: MAX_DATA }
    }

    fn contexts(&self) -> &[Context] {
        &self.contexts
    }

    fn adopt(self: Arc<Self>, client: Client) {
        if !self.disk.hand_over.is_active() {
            return log::warn!(export = &*self.disk.name; "NBD client refused: the disk is inactive");
        }
        let Some(number) = self.client_came(&client.socket) else { return };
        let lane = self.next_worker.fetch_add(1, Ordering::Relaxed) % self.workers.len();
        let worker = self.workers[lane].clone();
        worker.send(move |local| {
            let group = client.ticket.number();
            local.io().spawn_apart(group, async move {
                connection::serve(self.clone(), lane, client).await;
                self.client_left(number);
            });
        });
    }
}

impl User for Shared {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        self.lanes.pause();
        Box::pin(self.lanes.at_rest())
    }

    fn hold(&self) {
        self.lanes.pause();
    }

    fn resume(&self) {
        self.lanes.resume();
    }

    fn patience(&self) -> Option<Duration> {
        let timeout = self.disk.options.failures.io_timeout;
        (!timeout.is_zero()).then_some(timeout)
    }

    fn in_flight(&self) -> LocalFuture<'_, String> {
        let text = match self.lanes.count() {
            1 => "1 request in flight".to_owned(),
            count => format!("{count} requests in flight"),
        };
        Box::pin(std::future::ready(text))
    }

    fn can_move(&self) -> bool {
        true
    }

    fn moved<'a>(&'a self, node: &'a Arc<Node>) -> LocalFuture<'a, ()> {
        Box::pin(async move {
            self.disk.change_node(node);
            self.buffer_align.store(buffer_align(node), Ordering::Relaxed);
            if self.disk.options.writable {
                let disk = self.disk.clone();
                offload(move || disk.losses.follow(&disk.name, &disk.node())).await;
            }
        })
    }

    fn resized(&self) {
        self.disk.take_size();
        self.buffer_align.store(buffer_align(&self.disk.node()), Ordering::Relaxed);
    }
}
