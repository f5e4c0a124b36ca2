//! Tests of permissions: conflicts, the locks that follow them, and rollback.

use super::*;

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
