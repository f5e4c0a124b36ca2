//! The graph over drivers that do nothing but tell what was asked of them.

mod activity_tests;
mod change_tests;
mod claim_tests;
mod depth_tests;
mod drain_tests;
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

/// What is known of a store, also after it is gone.
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
    told: Mutex<Vec<&'static str>>,
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

/// A user that notes what it is told.
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

// ---- Opening

#[test]
fn wrong_options_are_refused_in_qemus_words_and_leave_nothing() {
    let bench = Bench::new();
    for (options, wanted) in [
        ("driver=store,tag=w", "'node-name' must be specified for the root node"),
        ("node-name=a", "Parameter 'driver' is missing"),
        ("driver=nope,node-name=a", "Parameter 'driver' does not accept value 'nope'"),
        ("driver=store,tag=w,node-name=9a", "Invalid node-name: '9a'"),
        ("driver=store,tag=w,node-name=", "Invalid node-name: ''"),
        ("driver=store,tag=w,node-name=#block1", "Invalid node-name: '#block1'"),
        ("driver=store,tag=w,node-name=a2345678901234567890123456789012", "Node name too long"),
        ("driver=store,tag=w,node-name=a,more=1", "Parameter 'more' is unexpected"),
        ("driver=store,node-name=a", "Parameter 'tag' is missing"),
        (
            "driver=store,tag=w,node-name=a,discard=x",
            "Parameter 'discard' does not accept value 'x'",
        ),
        (
            "driver=store,tag=w,node-name=a,cache.direct=x",
            "Parameter 'cache.direct' expects 'on' or 'off'",
        ),
        ("driver=store,tag=w,node-name=a,cache.x=on", "Parameter 'cache.x' is unexpected"),
        (
            "driver=store,tag=w,node-name=a,force-share=on",
            "force-share=on can only be used with read-only images",
        ),
        (
            "driver=store,tag=w,node-name=a,detect-zeroes=unmap",
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
        ("driver=pass,node-name=a", "Parameter 'file' is missing"),
        ("driver=pass,node-name=a,file=b", "Cannot find device='b' nor node-name='b'"),
        ("driver=pass,node-name=a,file=", "Cannot find device='' nor node-name=''"),
        ("driver=pass,node-name=a,file.tag=w", "Parameter 'file.driver' is missing"),
        (
            "driver=pass,node-name=a,file.driver=store,file.tag=w,file.x=1",
            "Parameter 'file.x' is unexpected",
        ),
        (
            "driver=pass,node-name=a,file.driver=pass,file.file.driver=store,file.file.cache.direct=1",
            "Parameter 'file.file.cache.direct' expects 'on' or 'off'",
        ),
        (
            "driver=pass,node-name=a,file.driver=store,file.tag=w,file.node-name=a",
            "Duplicate nodes with node-name='a'",
        ),
        ("driver=pass,node-name=a,file.driver=store,file.tag=w1,broken=on", "broken"),
        ("driver=pass,node-name=a,file.driver=store,file.tag=w,file.broken=on", "broken"),
    ] {
        assert_eq!(bench.open(options).err().as_deref(), Some(wanted), "{options}");
        assert!(bench.names().is_empty(), "{options}");
    }
    assert!(store("w1").is_closed(), "what had been opened was closed");
    assert_eq!(store("w1").locked(), Perms::NONE);
}

#[test]
fn a_name_is_given_once() {
    let bench = Bench::new();
    bench.open("driver=store,tag=once,node-name=a").unwrap();
    let error = bench.open("driver=store,tag=once,node-name=a").err().unwrap();
    assert_eq!(error, "Duplicate nodes with node-name='a'");
    assert_eq!(bench.names(), ["a"]);
}

#[test]
fn unnamed_children_get_a_name_and_go_with_their_parent() {
    let bench = Bench::new();
    bench.open("driver=pass,node-name=a,file.driver=store,file.tag=unnamed").unwrap();
    let names = bench.names();
    assert_eq!(names.len(), 2);
    let hidden = &names[1];
    assert!(hidden.starts_with("#block"), "{hidden}");
    assert_eq!(
        bench.delete(hidden).unwrap_err(),
        format!("Node {hidden} is not owned by the monitor")
    );
    assert_eq!(bench.graph.query()[0].children, [(Role::File, hidden.clone())]);
    bench.delete("a").unwrap();
    assert!(bench.names().is_empty());
    assert!(store("unnamed").is_closed());
}

#[test]
fn nodes_in_use_are_not_deleted() {
    let bench = Bench::new();
    bench.open("driver=store,tag=use,node-name=f").unwrap();
    bench.open("driver=pass,node-name=r,file=f").unwrap();
    assert_eq!(bench.delete("x").unwrap_err(), "Failed to find node with node-name='x'");
    assert_eq!(bench.delete("f").unwrap_err(), "Block device f is in use");
    let export = bench.attach("r", reads()).unwrap();
    assert_eq!(bench.delete("r").unwrap_err(), "Node r is in use");
    drop(export);
    bench.delete("r").unwrap();
    assert_eq!(bench.names(), ["f"]);
    assert!(!store("use").is_closed());
    bench.delete("f").unwrap();
    assert!(store("use").is_closed());
}

#[test]
fn a_child_that_others_use_outlives_its_parent() {
    let bench = Bench::new();
    bench
        .open("driver=pass,node-name=a,file.driver=store,file.tag=outlive,file.node-name=f")
        .unwrap();
    bench.open("driver=pass,node-name=b,file=f").unwrap();
    bench.delete("a").unwrap();
    assert_eq!(bench.names(), ["b", "f"]);
    bench.delete("b").unwrap();
    assert!(bench.names().is_empty() && store("outlive").is_closed());
}

#[test]
fn inline_children_take_over_caching_and_access() {
    let bench = Bench::new();
    let top = "driver=pass,node-name=a,file.driver=pass,file.node-name=b,file.file.driver=store,\
               file.file.tag=inherit,file.file.node-name=c";
    let options = format!(
        "{top},cache.direct=on,cache.no-flush=on,read-only=on,force-share=on,\
         file.file.cache.no-flush=off"
    );
    bench.open(&options).unwrap();
    let [c, b, a] = ["c", "b", "a"].map(|name| bench.graph.find(name).unwrap().options());
    assert!(a.direct && a.no_flush && a.read_only && a.force_share && !a.discard);
    assert!(b.direct && b.no_flush && b.read_only && b.force_share && b.discard);
    assert!(c.direct && !c.no_flush && c.read_only && c.force_share && c.discard);
}

#[test]
fn what_cannot_be_written_is_read_only_where_that_was_allowed() {
    let bench = Bench::new();
    bench.open("driver=store,tag=wp,node-name=a,write-protected=on,auto-read-only=on").unwrap();
    bench.open("driver=store,tag=wp2,node-name=b,write-protected=on").unwrap();
    assert!(bench.graph.find("a").unwrap().options().read_only);
    assert!(!bench.graph.find("b").unwrap().options().read_only);
    for name in ["a", "b"] {
        assert_eq!(bench.attach(name, writes()).err().unwrap(), "Block node is read-only");
        bench.attach(name, reads()).unwrap();
    }
}

// ---- Permissions

#[test]
fn permissions_reach_the_locks_and_leave_with_their_holder() {
    let bench = Bench::new();
    bench.open("driver=store,tag=reach,node-name=f").unwrap();
    bench.open("driver=pass,node-name=r,file=f").unwrap();
    let locked = || store("reach").locked();
    assert_eq!(locked(), Perms::NONE);
    let first = bench.attach("r", writes()).unwrap();
    assert_eq!(locked(), writes());
    let second = bench.attach("f", writes()).unwrap();
    assert_eq!(locked(), writes());
    drop(first);
    assert_eq!(locked(), writes());
    assert_eq!(bench.graph.find("r").unwrap().held(), Perm::empty());
    second.change(reads()).unwrap();
    assert_eq!(locked(), reads());
    drop(second);
    assert_eq!(locked(), Perms::NONE);
    assert_eq!(bench.graph.find("f").unwrap().held(), Perm::empty());
}

#[test]
fn conflicts_name_both_sides_and_change_nothing() {
    let bench = Bench::new();
    bench.open("driver=store,tag=conflict,node-name=f").unwrap();
    bench.open("driver=pass,node-name=r,file=f").unwrap();
    let writer = bench.attach("r", writes()).unwrap();
    assert_eq!(
        bench.open("driver=strict,node-name=q,file=f").err().unwrap(),
        "Permission conflict on node 'f': permissions 'write' are both required by node 'r' (uses \
         node 'f' as 'file' child) and unshared by node 'q' (uses node 'f' as 'file' child)."
    );
    assert_eq!(bench.names(), ["r", "f"]);
    assert_eq!(store("conflict").locked(), writes());
    drop(writer);
    bench.open("driver=strict,node-name=q,file=f").unwrap();
    let locked = store("conflict").locked();
    assert!(locked.held.contains(Perm::WRITE) && !locked.shared.contains(Perm::WRITE));
    assert_eq!(
        bench.attach("f", writes()).err().unwrap(),
        "Permission conflict on node 'f': permissions 'write' are both required by an unnamed \
         block device (uses node 'f' as 'root' child) and unshared by node 'q' (uses node 'f' as \
         'file' child)."
    );
    assert_eq!(
        bench.open("driver=strict,node-name=q2,file=f").err().unwrap(),
        "Permission conflict on node 'f': permissions 'write, resize' are both required by node \
         'q' (uses node 'f' as 'file' child) and unshared by node 'q2' (uses node 'f' as 'file' \
         child)."
    );
    assert_eq!(store("conflict").locked(), locked);
    let two = [bench.attach("q", writes()), bench.attach("q", writes())];
    assert!(two.iter().all(Result::is_ok), "two users that share are legal");
}

#[test]
fn a_lock_that_is_refused_rolls_back_those_already_taken() {
    let bench = Bench::new();
    bench.open("driver=store,tag=rb1,node-name=f").unwrap();
    bench.open("driver=store,tag=rb2,node-name=g").unwrap();
    bench.open("driver=pass,node-name=r,file=f,data-file=g").unwrap();
    for (refusing, other) in [("rb1", "rb2"), ("rb2", "rb1")] {
        store(refusing).refuse.store(true, Ordering::SeqCst);
        let error = bench.attach("r", writes()).err().unwrap();
        assert_eq!(error, "Failed to get \"write\" lock");
        store(refusing).refuse.store(false, Ordering::SeqCst);
        assert_eq!(store(other).locked(), Perms::NONE);
        assert_eq!(store(refusing).locked(), Perms::NONE);
        for name in ["r", "f", "g"] {
            assert_eq!(bench.graph.find(name).unwrap().held(), Perm::empty(), "{name}");
        }
    }
    let rolled_back = ["rb1", "rb2"].map(|tag| store(tag).rollbacks.load(Ordering::SeqCst));
    assert_eq!(rolled_back.iter().sum::<usize>(), 1, "the second lock failed in one of the orders");
    bench.attach("r", writes()).unwrap();
}

#[test]
fn a_node_that_is_reached_twice_is_judged_by_where_it_ends_up() {
    // Both edges of r change in one transaction; between the two there would be a conflict.
    let bench = Bench::new();
    bench.open("driver=store,tag=twice,node-name=f").unwrap();
    bench.open("driver=pass,node-name=a,file=f").unwrap();
    bench.open("driver=pass,node-name=r,file=a,data-file=f").unwrap();
    let alone = Perms { held: READ, shared: READ };
    let user = bench.attach("r", alone).unwrap();
    let wide = Perms { held: READ | Perm::WRITE, shared: SHARE_ALL };
    user.change(wide).unwrap();
    assert_eq!(store("twice").locked(), wide);
}

#[test]
fn locks_that_will_not_go_do_not_keep_a_user_from_going() {
    let bench = Bench::new();
    bench.open("driver=store,tag=stuck,node-name=f").unwrap();
    let user = bench.attach("f", writes()).unwrap();
    store("stuck").refuse.store(true, Ordering::SeqCst);
    drop(user);
    assert_eq!(bench.graph.find("f").unwrap().held(), Perm::empty());
    assert_eq!(store("stuck").locked(), writes());
    store("stuck").refuse.store(false, Ordering::SeqCst);
    drop(bench.attach("f", reads()).unwrap());
    assert_eq!(store("stuck").locked(), Perms::NONE);
}

#[test]
fn force_share_lets_others_write() {
    let bench = Bench::new();
    bench.open("driver=store,tag=force,node-name=f").unwrap();
    let _writer = bench.attach("f", writes()).unwrap();
    assert!(bench.open("driver=pass,node-name=a,file=f,read-only=on").is_ok());
    let alone = Perms { held: READ, shared: READ };
    assert!(bench.attach("a", alone).is_err());
    bench.open("driver=pass,node-name=b,file=f,read-only=on,force-share=on").unwrap();
    bench.attach("b", alone).unwrap();
}
