//! Tests of active and inactive nodes, and of the locks that they take and release.

use super::*;
use crate::io::Errno;

impl Store {
    fn calls(&self, what: &'static str) -> Option<Errno> {
        self.state.calls.lock().push(what);
        self.state.sick.load(Ordering::SeqCst).then_some(Errno(libc::EIO))
    }
}

impl HandOver for Store {
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        assert_ne!(self.state.locked(), Perms::NONE, "locks come first");
        let sick = self.calls("activate").map(|errno| Error::os("sick", errno));
        Box::pin(std::future::ready(sick.map_or(Ok(()), Err)))
    }
    fn inactivate(&self) -> LocalFuture<'_, IoResult> {
        assert_ne!(self.state.locked(), Perms::NONE, "locks go last");
        Box::pin(std::future::ready(self.calls("inactivate").map_or(Ok(()), Err)))
    }
}

impl HandOver for Layer {}

impl Bench {
    fn activate(&self, activity: &Activity) -> Result<(), String> {
        let activity = activity.clone();
        let result = self.worker.block_on(move || async move { activity.activate().await });
        result.map_err(|e| e.to_string())
    }

    fn inactivate(&self, activity: &Activity) -> Result<(), String> {
        let activity = activity.clone();
        let result = self.worker.block_on(move || async move { activity.inactivate().await });
        result.map_err(|e| e.to_string())
    }

    fn write(&self, name: &str) -> IoResult {
        let node = self.graph.find(name).unwrap();
        self.worker.block_on(move || async move {
            let mut data = [0; 512];
            node.write(0, &IoVec::from_mut(&mut data), WriteFlags::empty()).await
        })
    }
}

/// A pass over a store, and what is known of the store.
fn two(bench: &Bench, tag: &str, more: &str) -> Arc<StoreState> {
    let options = format!("driver=pass,node-name=top,file.driver=store,file.tag={tag}{more}");
    bench.open(&options).unwrap();
    store(tag)
}

fn calls(state: &StoreState) -> Vec<&'static str> {
    std::mem::take(&mut *state.calls.lock())
}

#[test]
fn an_inactive_node_has_users_and_no_locks_until_it_is_activated() {
    let bench = Bench::new();
    let state = two(&bench, "activity-1", ",active=off");
    let hold = bench.attach("top", writes()).unwrap();
    assert_eq!(state.locked(), Perms::NONE);
    assert!(!hold.activity().is_active() && !hold.node().is_active());
    assert_eq!(bench.write("top"), Err(Errno(libc::EPERM)));
    assert!(bench.graph.query().iter().all(|info| !info.active));
    bench.activate(&hold.activity()).unwrap();
    assert_eq!(calls(&state), ["activate"]);
    assert_eq!(state.locked(), writes());
    assert_eq!(bench.write("top"), Ok(()));
    // Once is enough.
    bench.activate(&hold.activity()).unwrap();
    assert_eq!(calls(&state), [""; 0]);
    bench.inactivate(&hold.activity()).unwrap();
    assert_eq!(calls(&state), ["inactivate"]);
    assert_eq!((state.locked(), bench.write("top")), (Perms::NONE, Err(Errno(libc::EPERM))));
    // What changes above meanwhile is locked when it becomes active.
    hold.change(reads()).unwrap();
    assert_eq!(state.locked(), Perms::NONE);
    bench.activate(&hold.activity()).unwrap();
    assert_eq!(state.locked(), reads());
}

#[test]
fn an_activation_that_fails_changes_nothing() {
    let bench = Bench::new();
    let state = two(&bench, "activity-2", ",active=off");
    let hold = bench.attach("top", writes()).unwrap();
    state.refuse.store(true, Ordering::SeqCst);
    bench.activate(&hold.activity()).unwrap_err();
    assert!(!hold.node().is_active() && !hold.activity().is_active());
    assert_eq!((calls(&state), state.locked()), (vec![], Perms::NONE));
    state.refuse.store(false, Ordering::SeqCst);
    state.sick.store(true, Ordering::SeqCst);
    let error = bench.activate(&hold.activity()).unwrap_err();
    assert!(error.contains("sick"), "{error}");
    assert!(!hold.node().is_active() && !hold.activity().is_active());
    assert_eq!(state.locked(), Perms::NONE);
    assert_eq!(bench.write("top"), Err(Errno(libc::EPERM)));
    state.sick.store(false, Ordering::SeqCst);
    bench.activate(&hold.activity()).unwrap();
    assert_eq!(bench.write("top"), Ok(()));
}

#[test]
fn an_image_that_cannot_be_brought_to_its_storage_stays_ours() {
    let bench = Bench::new();
    let state = two(&bench, "activity-3", "");
    let hold = bench.attach("top", writes()).unwrap();
    state.sick.store(true, Ordering::SeqCst);
    let error = bench.inactivate(&hold.activity()).unwrap_err();
    assert!(error.contains("cannot be handed over"), "{error}");
    assert!(hold.node().is_active() && hold.activity().is_active());
    assert_eq!((state.locked(), bench.write("top")), (writes(), Ok(())));
    // Nor does one whose driver knows of no others.
    bench.open("driver=strict,node-name=strict,file.driver=store,file.tag=activity-4").unwrap();
    let hold = bench.attach("strict", writes()).unwrap();
    let error = bench.inactivate(&hold.activity()).unwrap_err();
    assert!(error.contains("driver 'strict' cannot hand its image over"), "{error}");
    assert!(hold.node().is_active() && store("activity-4").locked() != Perms::NONE);
    let error = bench.open("driver=strict,node-name=s,active=off,file.driver=store,file.tag=x");
    assert_eq!(error.err().unwrap(), "Driver 'strict' cannot be opened inactive");
}

#[test]
fn a_node_stays_active_as_long_as_anybody_needs_it() {
    let bench = Bench::new();
    let state = two(&bench, "activity-5", "");
    let holds = [(); 2].map(|()| bench.attach("top", writes()).unwrap());
    bench.inactivate(&holds[0].activity()).unwrap();
    assert!(holds[0].node().is_active() && !holds[0].activity().is_active());
    assert_eq!((calls(&state), state.locked()), (vec![], writes()));
    bench.inactivate(&holds[1].activity()).unwrap();
    assert!(!holds[0].node().is_active());
    bench.activate(&holds[0].activity()).unwrap();
    assert!(holds[1].node().is_active() && !holds[1].activity().is_active());
    // A node below two others is closed with the second.
    bench.open("driver=store,tag=activity-6,node-name=both").unwrap();
    for name in ["a", "b"] {
        bench.open(&format!("driver=pass,node-name={name},file=both")).unwrap();
    }
    let holds = ["a", "b"].map(|name| bench.attach(name, reads()).unwrap());
    bench.inactivate(&holds[0].activity()).unwrap();
    assert!(!holds[0].node().is_active() && bench.graph.find("both").unwrap().is_active());
    bench.inactivate(&holds[1].activity()).unwrap();
    assert!(!bench.graph.find("both").unwrap().is_active());
    assert_eq!(store("activity-6").locked(), Perms::NONE);
}

#[test]
fn an_active_node_stands_on_active_nodes_only() {
    let bench = Bench::new();
    bench.open("driver=store,tag=activity-7,node-name=low,active=off").unwrap();
    let error = bench.open("driver=pass,node-name=top,file=low").err().unwrap();
    assert_eq!(error, "Active node 'top' cannot stand on inactive node 'low'");
    bench.open("driver=pass,node-name=top,file.driver=store,file.tag=activity-8").unwrap();
    let error = bench.replace("top", Role::File, "low").unwrap_err();
    assert_eq!(error, "Active node 'top' cannot stand on inactive node 'low'");
    assert_eq!(bench.resize("low", 1 << 21).unwrap_err(), "Node 'low' is inactive");
    bench.delete("low").unwrap();
    assert!(store("activity-7").calls.lock().is_empty());
}
