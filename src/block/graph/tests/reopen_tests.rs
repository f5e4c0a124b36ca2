//! Tests of reopening nodes in use: all of them change, or none.

use super::*;
use std::time::Duration;

impl Bench {
    fn reopen(&self, all: &[&str]) -> Result<(), String> {
        let read = |options: &&str| {
            let options = keyval::parse(options, None).unwrap().options;
            Reopening { path: String::new(), options }
        };
        let (graph, all) = (self.graph.clone(), all.iter().map(read).collect::<Vec<_>>());
        let result = self.worker.block_on(move || async move { graph.reopen(&all).await });
        result.map_err(|e| e.to_string())
    }
}

/// A user that can be moved, and notes where to.
#[derive(Default)]
struct Disk {
    moved: Mutex<Vec<Arc<Node>>>,
    paused: AtomicUsize,
    /// Milliseconds; 0: it has none of its own.
    patience: AtomicU64,
}

impl User for Disk {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        self.hold();
        Box::pin(std::future::ready(()))
    }
    fn hold(&self) {
        self.paused.fetch_add(1, Ordering::SeqCst);
    }
    fn resume(&self) {
        self.paused.fetch_sub(1, Ordering::SeqCst);
    }
    fn can_move(&self) -> bool {
        true
    }
    fn patience(&self) -> Option<Duration> {
        let patience = self.patience.load(Ordering::SeqCst);
        (patience > 0).then(|| Duration::from_millis(patience))
    }
    fn moved<'a>(&'a self, node: &'a Arc<Node>) -> LocalFuture<'a, ()> {
        assert_eq!(self.paused.load(Ordering::SeqCst), 1, "moved while paused");
        self.moved.lock().push(node.clone());
        Box::pin(std::future::ready(()))
    }
}

/// Layers `s` over `r` over the store `f`, with a user of `r` that writes.
fn pile(bench: &Bench, tag: &str) -> (Arc<Disk>, Attachment) {
    bench.open(&format!("driver=store,tag={tag},node-name=f")).unwrap();
    bench.open("driver=pass,node-name=r,file=f").unwrap();
    bench.open("driver=pass,node-name=s,file=r").unwrap();
    let disk = Arc::new(Disk::default());
    let user: Arc<dyn User> = disk.clone();
    let node = bench.graph.find("r").unwrap();
    let hold = bench.graph.attach(&node, "export 'e0'", writes(), Some(user)).unwrap();
    (disk, hold)
}

#[test]
fn a_node_that_is_opened_again_has_the_users_the_locks_and_the_place_of_the_one_before() {
    let bench = Bench::new();
    let (disk, hold) = pile(&bench, "again");
    let [f, r, s] = ["f", "r", "s"].map(|name| bench.graph.find(name).unwrap());
    bench.reopen(&["driver=store,tag=again,node-name=f,align=4096"]).unwrap();
    let new = bench.graph.find("f").unwrap();
    assert!(!Arc::ptr_eq(&f, &new));
    assert!(Arc::ptr_eq(&r.driver().children()[0].node(), &new));
    assert_eq!((r.traits().request_align, s.traits().request_align), (4096, 4096));
    assert_eq!(store("again").locked(), writes());
    assert!(disk.moved.lock().is_empty());

    let both = [
        "driver=pass,node-name=r,file=f,discard=unmap",
        "driver=store,tag=again,node-name=f,discard=unmap",
    ];
    bench.reopen(&both).unwrap();
    let now = bench.graph.find("r").unwrap();
    assert!(disk.moved.lock().iter().all(|node| Arc::ptr_eq(node, &now)));
    assert_eq!(disk.moved.lock().len(), 1);
    assert_eq!(disk.paused.load(Ordering::SeqCst), 0);
    assert!(now.options().discard);
    assert_eq!(s.traits().request_align, 1);
    assert_eq!(store("again").locked(), writes());
    assert_eq!(bench.names().len(), 3);
    drop(hold);
    assert_eq!(store("again").locked(), Perms::NONE);
    for name in ["s", "r", "f"] {
        bench.delete(name).unwrap();
    }
    assert_eq!(bench.names().len(), 0);
}

#[test]
fn nodes_that_cannot_all_be_opened_again_stay_as_they_were() {
    let bench = Bench::new();
    let (disk, _hold) = pile(&bench, "stay");
    bench.open("driver=store,tag=stay-g,node-name=g,align=512").unwrap();
    let before = ["f", "g", "r", "s"].map(|name| bench.graph.find(name).unwrap());
    let f = "driver=store,tag=stay,node-name=f,align=4096";
    for (wanted, why) in [
        (&[f, "driver=pass,node-name=r,file=f,broken=on"][..], "broken"),
        (&[f, "driver=pass,node-name=r,file=f,read-only=on"], "Read-only block node 'r'"),
        (&["driver=store,tag=stay,node-name=f,read-only=on"], "Read-only block node 'f'"),
        (
            &["driver=pass,node-name=r,file=s"],
            "Making 's' a file child of 'r' would create a cycle",
        ),
        (
            &["driver=pass,node-name=r,file=g", "driver=store,tag=stay-g,node-name=g,broken=on"],
            "broken",
        ),
        (&["driver=pass,node-name=r,file=nope"], "Cannot find device=''"),
        (&["driver=store,node-name=r"], "Cannot change the option 'driver'"),
        (&["driver=pass,node-name=r,file.driver=store,file.tag=stay"], "Cannot change the option"),
        (&[f, f], "Node 'f' is to be opened again twice"),
    ] {
        let error = bench.reopen(wanted).unwrap_err();
        assert!(error.starts_with(why), "{wanted:?}: {error}");
        let now = ["f", "g", "r", "s"].map(|name| bench.graph.find(name).unwrap());
        assert!(before.iter().zip(&now).all(|(a, b)| Arc::ptr_eq(a, b)), "{wanted:?}");
        assert_eq!(bench.names().len(), 4, "{wanted:?}");
        assert_eq!((store("stay").locked(), store("stay-g").locked()), (writes(), Perms::NONE));
        assert_eq!(disk.paused.load(Ordering::SeqCst), 0);
        assert_eq!(now[3].traits().request_align, 1);
    }
    assert!(disk.moved.lock().is_empty());
    // They can be opened again after all that.
    bench.reopen(&[f, "driver=pass,node-name=r,file=f"]).unwrap();
    assert_eq!(before[3].traits().request_align, 4096);
    bench.reopen(&["driver=pass,node-name=r,file=g"]).unwrap();
    assert_eq!((store("stay").locked(), store("stay-g").locked()), (Perms::NONE, writes()));
    bench.delete("f").unwrap();
}

#[test]
fn a_child_that_is_defined_within_its_parent_is_opened_again_with_it() {
    let bench = Bench::new();
    bench.open("driver=pass,node-name=r,file.driver=store,file.tag=within").unwrap();
    let _hold = bench.attach("r", reads()).unwrap();
    let stuck = bench.reopen(&["driver=pass,node-name=r,file.driver=store,file.tag=within"]);
    assert_eq!(stuck.unwrap_err(), "Node 'r' is in use by an unnamed block device");
    drop(_hold);
    let child = || bench.graph.find("r").unwrap().driver().children()[0].node();
    let before = child();
    bench
        .reopen(&["driver=pass,node-name=r,cache.direct=on,file.driver=store,file.tag=within"])
        .unwrap();
    let now = child();
    assert!(!Arc::ptr_eq(&before, &now));
    assert_eq!(before.name(), now.name());
    assert!(now.options().direct && !before.options().direct);
    bench.delete("r").unwrap();
    assert_eq!(bench.names().len(), 0);
}

#[test]
fn a_user_that_comes_while_a_node_is_opened_again_is_moved_with_the_others() {
    let bench = Bench::new();
    let (disk, hold) = pile(&bench, "while");
    store("while").stall.store(true, Ordering::SeqCst);
    let graph = bench.graph.clone();
    let late = bench.worker.block_on(move || async move {
        let options = keyval::parse("driver=pass,node-name=r,file=f", None).unwrap().options;
        let wanted = [Reopening { path: String::new(), options }];
        let mut reopen = Box::pin(graph.reopen(&wanted));
        // It waits for the flush.
        assert!(
            std::future::poll_fn(|cx| std::task::Poll::Ready(
                reopen.as_mut().poll(cx).is_pending()
            ))
            .await
        );
        let late = Arc::new(Disk::default());
        let user: Arc<dyn User> = late.clone();
        let node = graph.find("r").unwrap();
        let hold = graph.attach(&node, "export 'e1'", reads(), Some(user)).unwrap();
        assert_eq!(late.paused.load(Ordering::SeqCst), 1);
        store("while").stall.store(false, Ordering::SeqCst);
        reopen.await.unwrap();
        assert_eq!(late.paused.load(Ordering::SeqCst), 0);
        drop(hold);
        late
    });
    let now = bench.graph.find("r").unwrap();
    assert!(Arc::ptr_eq(&late.moved.lock()[0], &now) && Arc::ptr_eq(&disk.moved.lock()[0], &now));
    drop(hold);
}

#[test]
fn nodes_whose_storage_does_not_answer_when_they_are_opened_again_stay_when_it_does() {
    let bench = Bench::new();
    let (disk, hold) = pile(&bench, "silent");
    let before = ["f", "r"].map(|name| bench.graph.find(name).unwrap());
    disk.patience.store(20, Ordering::SeqCst);
    let gate = store("silent-gate");
    gate.stall.store(true, Ordering::SeqCst);
    let wanted = [
        "driver=pass,node-name=r,file=f",
        "driver=store,tag=silent,node-name=f,align=4096,after=silent-gate",
    ];
    let error = bench.reopen(&wanted).unwrap_err();
    assert_eq!(error, "Opening node 'f' again has not ended within 0.04 s");
    assert_eq!(disk.paused.load(Ordering::SeqCst), 1, "nobody writes beside the opening");
    gate.stall.store(false, Ordering::SeqCst);
    // The next change waits until the one before has been taken back.
    disk.patience.store(0, Ordering::SeqCst);
    bench.reopen(&["driver=pass,node-name=s,file=r"]).unwrap();
    let graph = bench.graph.clone();
    let node = before[0].clone();
    bench.worker.block_on(move || async move { graph.drain(&node).await.map(drop) }).unwrap();
    let now = ["f", "r"].map(|name| bench.graph.find(name).unwrap());
    assert!(before.iter().zip(&now).all(|(a, b)| Arc::ptr_eq(a, b)));
    assert_eq!(disk.paused.load(Ordering::SeqCst), 0);
    assert_eq!(now[1].traits().request_align, 1);
    assert_eq!(store("silent").locked(), writes());
    assert_eq!(bench.names().len(), 3);
    bench.reopen(&wanted).unwrap();
    assert_eq!(bench.graph.find("r").unwrap().traits().request_align, 4096);
    drop(hold);
}
