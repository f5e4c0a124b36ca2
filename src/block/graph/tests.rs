//! Tests of the graph over drivers that only record their calls.

mod activity_tests;
mod change_tests;
mod claim_tests;
mod depth_tests;
mod drain_tests;
mod open_tests;
mod permission_tests;
mod reopen_tests;

use super::*;
use crate::block::registry::{DriverEntry, Kind, OpenFn};
use crate::block::*;
use crate::io::{InFlight, IoResult, IoVec, WorkerOptions};
use crate::options::{NodeRef, json, keyval};
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

// ---- Drivers

/// The state of a store, also after it is gone.
#[derive(Default)]
struct StoreState {
    closed: AtomicBool,
    /// Locks are refused from here on.
    refuse: AtomicBool,
    len: AtomicU64,
    /// By all that are open.
    locked: Mutex<HashMap<usize, Perms>>,
    /// Rollbacks seen.
    rollbacks: AtomicUsize,
    /// Handing over fails.
    sick: AtomicBool,
    /// Flushes do not end.
    stall: AtomicBool,
    calls: Mutex<Vec<&'static str>>,
}

static STORES: LazyLock<Mutex<HashMap<String, Arc<StoreState>>>> = LazyLock::new(Mutex::default);

/// A store by its tag; each test has tags of its own.
fn store(tag: &str) -> Arc<StoreState> {
    STORES.lock().entry(tag.to_owned()).or_default().clone()
}

impl StoreState {
    fn locked(&self) -> Perms {
        self.locked.lock().values().fold(Perms::NONE, |all, one| all.and(*one))
    }
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }
    async fn unstalled(&self) {
        while self.stall.load(Ordering::SeqCst) {
            crate::io::sleep(std::time::Duration::from_millis(1)).await;
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct StoreOptions {
    tag: String,
    align: Option<u32>,
    #[serde(default)]
    broken: bool,
    #[serde(default)]
    write_protected: bool,
    id: Option<u64>,
    /// It is opened when the store of this tag does not stall.
    after: Option<String>,
}

/// The bottom: `id` shows in where it maps to.
struct Store {
    state: Arc<StoreState>,
    id: u64,
    traits: Traits,
    /// Of this one among all that are open.
    number: usize,
    is_closed: AtomicBool,
}

impl Store {
    fn locked(&self) -> Perms {
        self.state.locked.lock().get(&self.number).copied().unwrap_or(Perms::NONE)
    }
    fn set_locked(&self, perms: Perms) {
        self.state.locked.lock().insert(self.number, perms);
    }
}

const ID_SHIFT: u32 = 32;

async fn open_store(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: StoreOptions = opening.parse(map)?;
    if options.broken {
        return Err(Error::new("broken"));
    }
    if let Some(tag) = options.after {
        store(&tag).unstalled().await;
    }
    let state = store(&options.tag);
    state.len.store(1 << 20, Ordering::SeqCst);
    let mut traits = Traits { request_align: options.align.unwrap_or(1), ..Traits::default() };
    if options.write_protected {
        traits.abilities |= Abilities::READ_ONLY;
    }
    static OPENED: AtomicUsize = AtomicUsize::new(0);
    let number = OPENED.fetch_add(1, Ordering::SeqCst);
    let (id, is_closed) = (options.id.unwrap_or(0), AtomicBool::new(false));
    Ok(Box::new(Store { state, id, traits, number, is_closed }))
}

impl Driver for Store {
    fn entry(&self) -> &'static DriverEntry {
        &STORE
    }
    fn traits(&self) -> Traits {
        self.traits
    }
    fn len(&self) -> u64 {
        self.state.len.load(Ordering::SeqCst)
    }
    fn map<'a>(&'a self, _: &'a InFlight, at: u64, want: u64, _: Access) -> Mapping<'a> {
        Mapping {
            len: want,
            target: Target::Data { leaf: self, offset: (self.id << ID_SHIFT) + at },
        }
    }
    fn read<'a>(&'a self, _: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        into.zero();
        Box::pin(std::future::ready(Ok(())))
    }
    fn write<'a>(&'a self, _: u64, _: &'a IoVec<'a>, _: WriteFlags) -> LocalFuture<'a, IoResult> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async {
            self.state.unstalled().await;
            Ok(())
        })
    }
    fn status(&self, _: u64, len: u64, _: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(std::future::ready(Ok(Extent { len, status: Status::DATA, place: None })))
    }
    fn locks(&self) -> Option<&dyn Locks> {
        Some(self)
    }
    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }
    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
    fn close(&self) -> LocalFuture<'_, IoResult> {
        assert!(!self.is_closed.swap(true, Ordering::SeqCst), "closed once");
        self.state.closed.store(true, Ordering::SeqCst);
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Leaf for Store {
    unsafe fn start(
        &self,
        _: &crate::io::Io,
        _: crate::io::Op,
        _: crate::io::Token,
    ) -> crate::io::Started {
        crate::io::Started::Done(Ok(()))
    }
}

impl Locks for Store {
    fn prepare(&self, old: Perms, new: Perms) -> Result<(), Error> {
        assert_eq!(old, self.locked(), "prepared from where the locks stand");
        if self.state.refuse.load(Ordering::SeqCst) {
            return Err(Error::new("Failed to get \"write\" lock"));
        }
        self.set_locked(old.and(new));
        Ok(())
    }
    fn commit(&self, old: Perms, new: Perms) {
        assert_eq!(self.locked(), old.and(new), "prepared before");
        self.set_locked(new);
    }
    fn rollback(&self, old: Perms, _: Perms) {
        self.state.rollbacks.fetch_add(1, Ordering::SeqCst);
        self.set_locked(old);
    }
    fn take_over(&self, _: &dyn Locks, held: Perms) -> Result<(), Error> {
        self.set_locked(held);
        Ok(())
    }
}

impl Image for Store {
    fn resize(&self, len: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        self.state.len.store(len, Ordering::SeqCst);
        Box::pin(std::future::ready(Ok(())))
    }
    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        Box::pin(std::future::ready(Ok(0)))
    }
}

/// A layer that passes everything to its first child.
struct Layer {
    entry: &'static DriverEntry,
    children: Vec<Child>,
    perms: fn(Perms) -> Perms,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct LayerOptions {
    file: NodeRef,
    data_file: Option<NodeRef>,
    backing: Option<NodeRef>,
    #[serde(default)]
    broken: bool,
}

async fn open_layer(
    opening: &mut Opening,
    map: Map,
    entry: &'static DriverEntry,
    perms: fn(Perms) -> Perms,
) -> Result<Box<dyn Driver>, Error> {
    let options: LayerOptions = opening.parse(map)?;
    let during = perms(Perms::NONE);
    let mut children = vec![opening.child(Role::File, options.file, during).await?];
    if let Some(data) = options.data_file {
        children.push(opening.child(Role::DataFile, data, during).await?);
    }
    if let Some(backing) = options.backing {
        children.push(opening.child(Role::Backing, backing, during).await?);
    }
    if options.broken {
        return Err(Error::new("broken"));
    }
    Ok(Box::new(Layer { entry, children, perms }))
}

impl Driver for Layer {
    fn entry(&self) -> &'static DriverEntry {
        self.entry
    }
    fn traits(&self) -> Traits {
        self.children[0].node().traits()
    }
    fn len(&self) -> u64 {
        self.children[0].node().len()
    }
    fn children(&self) -> &[Child] {
        &self.children
    }
    fn map<'a>(&'a self, io: &'a InFlight, at: u64, want: u64, access: Access) -> Mapping<'a> {
        self.children[0].fast(io).map(io, at, want, access)
    }
    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(async move { self.children[0].node().read(at, into).await })
    }
    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        f: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(async move { self.children[0].node().write(at, from, f).await })
    }
    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move { self.children[0].node().flush().await })
    }
    fn status(&self, at: u64, len: u64, p: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(async move { self.children[0].node().status(at, len, p).await })
    }
    fn hand_over(&self) -> Option<&dyn HandOver> {
        (self.name() == "pass").then_some(self as _)
    }
    fn child_perms(&self, _: usize, own: Perms) -> Perms {
        (self.perms)(own)
    }
}

/// What a format holds from the beginning: it may write at any time.
fn strict(own: Perms) -> Perms {
    Perms::format(Perms { held: own.held | Perm::WRITE, ..own })
}

const fn entry(name: &'static str, open: OpenFn) -> DriverEntry {
    DriverEntry::new(name, Kind::Format, open)
}

static STORE: DriverEntry = entry("store", |o, map| Box::pin(open_store(o, map)));
static PASS: DriverEntry = DriverEntry {
    children: &[Role::File],
    ..entry("pass", |o, map| Box::pin(open_layer(o, map, &PASS, |own| own)))
};
static STRICT: DriverEntry =
    entry("strict", |o, map| Box::pin(open_layer(o, map, &STRICT, strict)));

// ---- The bench

struct Bench {
    graph: Graph,
    worker: Worker,
}

const READ: Perm = Perm::CONSISTENT_READ;
const SHARE_ALL: Perm = Perm::all();

fn reads() -> Perms {
    Perms { held: READ, shared: SHARE_ALL }
}

fn writes() -> Perms {
    Perms { held: READ | Perm::WRITE, shared: SHARE_ALL }
}

impl Bench {
    fn new() -> Bench {
        static REGISTRY: LazyLock<Registry> =
            LazyLock::new(|| Registry::new(&[&[&STORE, &PASS, &STRICT]]));
        let worker = Worker::start("graph", WorkerOptions::default()).unwrap();
        Bench { graph: Graph::new(&REGISTRY), worker }
    }

    fn open(&self, options: &str) -> Result<Arc<Node>, String> {
        let options = match json::parse(options) {
            Ok(crate::options::Value::Map(map)) => map,
            _ => keyval::parse(options, None).map_err(|e| e.to_string())?.options,
        };
        self.graph.open_on(&self.worker, options).map_err(|e| e.to_string())
    }

    fn delete(&self, name: &str) -> Result<(), String> {
        let (graph, name) = (self.graph.clone(), name.to_owned());
        let result = self.worker.block_on(move || async move { graph.delete(&name).await });
        result.map_err(|e| e.to_string())
    }

    fn attach(&self, name: &str, perms: Perms) -> Result<Attachment, String> {
        let node = self.graph.find(name).unwrap();
        self.graph.attach(&node, "an unnamed block device", perms, None).map_err(|e| e.to_string())
    }

    fn replace(&self, parent: &str, role: Role, node: &str) -> Result<(), String> {
        let graph = self.graph.clone();
        let parent = graph.find(parent).unwrap();
        let node = graph.find(node).unwrap();
        let result =
            self.worker.block_on(move || async move { graph.replace(&parent, role, &node).await });
        result.map_err(|e| e.to_string())
    }

    fn resize(&self, name: &str, len: u64) -> Result<(), String> {
        let (graph, node) = (self.graph.clone(), self.graph.find(name).unwrap());
        let result = self.worker.block_on(move || async move { graph.resize(&node, len).await });
        result.map_err(|e| e.to_string())
    }

    fn names(&self) -> Vec<String> {
        self.graph.query().into_iter().map(|info| info.name).collect()
    }
}

/// A user that records its calls.
#[derive(Default)]
struct Export {
    paused: AtomicUsize,
    pauses: AtomicUsize,
    resizes: AtomicUsize,
    /// A request does not end.
    busy: AtomicBool,
    /// Milliseconds; 0: it has none of its own.
    patience: AtomicU64,
}

impl User for Export {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        self.paused.fetch_add(1, Ordering::SeqCst);
        self.pauses.fetch_add(1, Ordering::SeqCst);
        Box::pin(async {
            crate::io::sleep(std::time::Duration::from_micros(10)).await;
            while self.busy.load(Ordering::SeqCst) {
                crate::io::sleep(std::time::Duration::from_millis(1)).await;
            }
        })
    }
    fn patience(&self) -> Option<std::time::Duration> {
        let patience = self.patience.load(Ordering::SeqCst);
        (patience > 0).then(|| std::time::Duration::from_millis(patience))
    }
    fn in_flight(&self) -> LocalFuture<'_, String> {
        Box::pin(std::future::ready("1 request in flight".to_owned()))
    }
    fn hold(&self) {
        self.paused.fetch_add(1, Ordering::SeqCst);
    }
    fn resume(&self) {
        self.paused.fetch_sub(1, Ordering::SeqCst);
    }
    fn resized(&self) {
        assert_eq!(self.paused.load(Ordering::SeqCst), 1, "told while paused");
        self.resizes.fetch_add(1, Ordering::SeqCst);
    }
}
