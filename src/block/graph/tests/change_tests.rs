//! Tests of changes below running users: retargeted edges, lengths, the end of the graph.

use super::*;

#[test]
fn an_edge_is_turned_with_users_paused_and_permissions_moved() {
    let bench = Bench::new();
    bench.open("driver=store,tag=turn1,node-name=f").unwrap();
    bench.open("driver=store,tag=turn2,node-name=g").unwrap();
    bench.open("driver=store,tag=turn3,node-name=h,align=4096").unwrap();
    bench.open("driver=pass,node-name=r,file=f").unwrap();
    bench.open("driver=pass,node-name=s,file=r").unwrap();
    let export = Arc::new(Export::default());
    let top = bench.graph.find("s").unwrap();
    let user: Arc<dyn User> = export.clone();
    let _hold = bench.graph.attach(&top, "export", writes(), Some(user)).unwrap();

    bench.replace("r", Role::File, "g").unwrap();
    assert_eq!(export.pauses.load(Ordering::SeqCst), 1);
    assert_eq!(export.paused.load(Ordering::SeqCst), 0);
    assert_eq!((store("turn1").locked(), store("turn2").locked()), (Perms::NONE, writes()));
    bench.delete("f").unwrap();
    assert_eq!(bench.delete("g").unwrap_err(), "Block device g is in use");

    assert_eq!(bench.replace("r", Role::File, "s").unwrap_err(), "Making 'r' stand on itself");
    assert_eq!(
        bench.replace("r", Role::Backing, "g").unwrap_err(),
        "Node 'r' does not have a 'backing' child"
    );
    // What its requests should look like is what those of the new one should, up to the top.
    bench.replace("r", Role::File, "h").unwrap();
    assert_eq!(top.traits().request_align, 4096);
    assert_eq!(export.resizes.load(Ordering::SeqCst), 1);
    bench.replace("r", Role::File, "g").unwrap();
    assert_eq!(top.traits().request_align, 1);
    assert_eq!(export.paused.load(Ordering::SeqCst), 0);
    assert_eq!((store("turn2").locked(), store("turn3").locked()), (writes(), Perms::NONE));
}

#[test]
fn fast_requests_keep_the_node_that_they_were_mapped_to() {
    const ROUNDS: u64 = 200;
    let bench = Bench::new();
    bench.open("driver=store,tag=load0,id=0,node-name=n0").unwrap();
    let top = bench.open("driver=pass,node-name=r,file=n0").unwrap();
    bench.delete("n0").unwrap_err();
    let stop = AtomicBool::new(false);
    let requests = AtomicU64::new(0);
    let broken = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let announcer = top.announcer();
                let mut pending = std::collections::VecDeque::new();
                while !stop.load(Ordering::SeqCst) {
                    let guard = announcer.enter();
                    let mapping = top.map(guard.in_flight(), 0, 512, Access::Read);
                    let Target::Data { offset, .. } = mapping.target else { panic!("not fast") };
                    pending.push_back((offset >> ID_SHIFT, guard.begin()));
                    drop(guard);
                    if pending.len() > 3 {
                        let (id, generation) = pending.pop_front().unwrap();
                        if store(&format!("load{id}")).is_closed() {
                            broken.store(true, Ordering::SeqCst);
                        }
                        announcer.end(generation);
                        announcer.settle();
                        requests.fetch_add(1, Ordering::SeqCst);
                    }
                }
                pending.drain(..).for_each(|(_, generation)| announcer.end(generation));
                announcer.settle();
            });
        }
        for id in 1..=ROUNDS {
            bench.open(&format!("driver=store,tag=load{id},id={id},node-name=n{id}")).unwrap();
            bench.replace("r", Role::File, &format!("n{id}")).unwrap();
            bench.delete(&format!("n{}", id - 1)).unwrap();
            assert!(store(&format!("load{}", id - 1)).is_closed());
            let seen = requests.load(Ordering::SeqCst);
            while requests.load(Ordering::SeqCst) == seen {
                std::thread::yield_now();
            }
            if broken.load(Ordering::SeqCst) {
                break;
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(!broken.load(Ordering::SeqCst), "a node was closed under a request");
    assert_eq!(bench.names(), [format!("n{ROUNDS}"), "r".into()]);
}

#[test]
fn resizing_asks_for_permission_and_tells_users() {
    let bench = Bench::new();
    bench.open("driver=store,tag=size,node-name=f").unwrap();
    let top = bench.open("driver=pass,node-name=r,file=f").unwrap();
    let export = Arc::new(Export::default());
    let user: Arc<dyn User> = export.clone();
    let hold = bench.graph.attach(&top, "export 'e0'", writes(), Some(user)).unwrap();
    bench.resize("f", 2 << 20).unwrap();
    assert_eq!(top.len(), 2 << 20);
    assert_eq!(export.resizes.load(Ordering::SeqCst), 1);
    assert_eq!(export.paused.load(Ordering::SeqCst), 0);
    assert_eq!(store("size").locked(), writes());

    hold.change(Perms { shared: SHARE_ALL - Perm::RESIZE, ..writes() }).unwrap();
    assert_eq!(
        bench.resize("r", 1 << 20).unwrap_err(),
        "Image format driver does not support resize"
    );
    assert_eq!(
        bench.resize("f", 1 << 20).unwrap_err(),
        "Permission conflict on node 'f': permissions 'resize' are both required by an unnamed \
         block device (uses node 'f' as 'root' child) and unshared by node 'r' (uses node 'f' as \
         'file' child)."
    );
    assert_eq!(export.resizes.load(Ordering::SeqCst), 1);

    bench.open("driver=store,tag=size2,node-name=ro,read-only=on").unwrap();
    assert_eq!(bench.resize("ro", 1 << 20).unwrap_err(), "Image is read-only");
}

#[test]
fn closing_the_graph_leaves_what_users_hold() {
    let bench = Bench::new();
    bench.open("driver=pass,node-name=a,file.driver=store,file.tag=close1").unwrap();
    bench.open("driver=store,tag=close2,node-name=b").unwrap();
    let user = bench.attach("b", reads()).unwrap();
    let close = |graph: Graph| bench.worker.block_on(move || async move { graph.close().await });
    close(bench.graph.clone());
    assert_eq!(bench.names(), ["b"]);
    assert!(store("close1").is_closed() && !store("close2").is_closed());
    drop(user);
    close(bench.graph.clone());
    assert!(bench.names().is_empty() && store("close2").is_closed());
}
