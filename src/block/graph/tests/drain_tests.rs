//! Tests of the order of changes to the graph, and of the users that a drain pauses.

use super::*;
use crate::block::graph::{Meanwhile, Step};
use std::task::Poll;
use std::time::Duration;

#[test]
fn changes_are_made_one_after_another() {
    let bench = Bench::new();
    let (graph, names) = (bench.graph.clone(), Arc::new(Mutex::new(Vec::new())));
    bench.open("driver=store,tag=turns,node-name=f").unwrap();
    let changes = names.clone();
    bench.worker.block_on(move || async move {
        let node = graph.find("f").unwrap();
        let drained = graph.drain(&node).await.unwrap();
        let (clone, note) = (graph.clone(), changes.clone());
        crate::io::current().spawn(async move {
            clone.delete("f").await.unwrap();
            note.lock().push("deleted");
        });
        crate::io::sleep(std::time::Duration::from_millis(1)).await;
        assert!(graph.find("f").is_ok(), "nobody changes a drained graph");
        changes.lock().push("resumed");
        drop(drained);
    });
    while names.lock().len() < 2 {
        std::thread::yield_now();
    }
    assert_eq!(*names.lock(), ["resumed", "deleted"]);
}

#[test]
fn who_comes_to_a_drained_node_starts_paused() {
    let bench = Bench::new();
    bench.open("driver=store,tag=late,node-name=f").unwrap();
    let top = bench.open("driver=pass,node-name=r,file=f").unwrap();
    let other = bench.open("driver=store,tag=late2,node-name=o").unwrap();
    let graph = bench.graph.clone();
    bench.worker.block_on(move || async move {
        let attach = |node: &Arc<Node>| {
            let export = Arc::new(Export::default());
            let user: Arc<dyn User> = export.clone();
            let hold = graph.attach(node, "export 'e'", reads(), Some(user)).unwrap();
            (export, hold)
        };
        let paused = |export: &Export| export.paused.load(Ordering::SeqCst);
        let bottom = graph.find("f").unwrap();
        let (before, _hold) = attach(&top);
        let drain = graph.drain(&bottom);
        let mut drain = std::pin::pin!(drain);
        // In the middle of the drain: the first user has been asked, and has not come to rest.
        let polled = std::future::poll_fn(|cx| Poll::Ready(drain.as_mut().poll(cx).is_pending()));
        assert!(polled.await && paused(&before) == 1);
        let (above, _hold) = attach(&top);
        let (at, _hold) = attach(&bottom);
        let (elsewhere, _hold) = attach(&other);
        assert_eq!([&above, &at, &elsewhere].map(|e| paused(e)), [1, 1, 0]);
        let drained = drain.await.unwrap();
        let (last, _hold) = attach(&top);
        assert_eq!([&before, &above, &at, &last].map(|e| paused(e)), [1; 4]);
        drop(drained);
        assert_eq!([&before, &above, &at, &last, &elsewhere].map(|e| paused(e)), [0; 5]);
        let (after, _hold) = attach(&top);
        assert_eq!(paused(&after), 0);
    });
}

/// Two disks with an export each.
async fn two_exports(graph: &Graph, tag: &str) -> [(Arc<Node>, Arc<Export>, Attachment); 2] {
    let mut all = Vec::new();
    for disk in ["a", "b"] {
        let text = format!("driver=store,node-name={disk},tag={tag}{disk}");
        let node = graph.open(keyval::parse(&text, None).unwrap().options).await.unwrap();
        let export = Arc::new(Export::default());
        let user: Arc<dyn User> = export.clone();
        let hold = graph.attach(&node, &format!("export 'e{disk}'"), reads(), Some(user)).unwrap();
        all.push((node, export, hold));
    }
    all.try_into().ok().unwrap()
}

#[test]
fn a_drain_that_takes_too_long_names_the_disk_and_its_requests_and_leaves_all_as_before() {
    let bench = Bench::new();
    let graph = bench.graph.clone();
    bench.worker.block_on(move || async move {
        let [(a, slow, _hold), (b, healthy, _other)] = two_exports(&graph, "deadline").await;
        slow.busy.store(true, Ordering::SeqCst);
        slow.patience.store(500, Ordering::SeqCst);
        let error = graph.drain_all(&[b.clone(), a.clone()]).await.err().unwrap().to_string();
        let changes =
            "I/O has not ended within 0.5 s: export 'ea' (node 'a') has 1 request in flight";
        assert_eq!(error, changes);
        let paused = || [&slow, &healthy].map(|export| export.paused.load(Ordering::SeqCst));
        assert_eq!(paused(), [0, 0]);
        slow.busy.store(false, Ordering::SeqCst);
        slow.patience.store(0, Ordering::SeqCst);
        let drained = graph.drain_all(&[b, a]).await.unwrap();
        assert_eq!(paused(), [1, 1]);
        drop(drained);
        assert_eq!(paused(), [0, 0]);
    });
}

#[test]
fn users_at_rest_go_on_while_a_drain_waits_for_others_and_are_paused_again() {
    let bench = Bench::new();
    let graph = bench.graph.clone();
    bench.worker.block_on(move || async move {
        let [(a, slow, _hold), (b, healthy, _other)] = two_exports(&graph, "grace").await;
        slow.busy.store(true, Ordering::SeqCst);
        let paused = || [&slow, &healthy].map(|export| export.paused.load(Ordering::SeqCst));
        let (clone, nodes) = (graph.clone(), [a.clone(), b.clone()]);
        let (ended, is_paused) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let (end, then, both) = (ended.clone(), is_paused.clone(), [slow.clone(), healthy.clone()]);
        crate::io::current().spawn(async move {
            let drained = clone.drain_all(&nodes).await.unwrap();
            *then.lock() = Some(both.map(|export| export.paused.load(Ordering::SeqCst)));
            drop(drained);
            end.store(true, Ordering::SeqCst);
        });
        while healthy.pauses.load(Ordering::SeqCst) == 0 || paused() != [1, 0] {
            crate::io::sleep(std::time::Duration::from_millis(1)).await;
        }
        slow.busy.store(false, Ordering::SeqCst);
        while !ended.load(Ordering::SeqCst) {
            crate::io::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert_eq!(*is_paused.lock(), Some([1, 1]));
        assert_eq!(paused(), [0, 0]);
    });
}

#[test]
fn a_step_that_takes_too_long_fails_and_is_undone_when_it_has_ended() {
    let bench = Bench::new();
    let graph = bench.graph.clone();
    bench.worker.block_on(move || async move {
        let [(a, slow, _hold), (b, healthy, _other)] = two_exports(&graph, "step").await;
        slow.patience.store(100, Ordering::SeqCst);
        let paused = || [&slow, &healthy].map(|export| export.paused.load(Ordering::SeqCst));
        for meanwhile in [Meanwhile::Use, Meanwhile::Requests, Meanwhile::Nothing] {
            let (goes_on, undone) =
                (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
            let (clone, note) = (goes_on.clone(), undone.clone());
            let work = async move {
                while clone.load(Ordering::SeqCst) {
                    crate::io::sleep(Duration::from_millis(1)).await;
                }
                Ok(7)
            };
            let late = async move |result: Result<usize, Error>| {
                note.store(result.unwrap(), Ordering::SeqCst);
            };
            let drained = graph.drain_all(&[a.clone(), b.clone()]).await.unwrap();
            let step = Step { node: &a, what: "Flushing node 'a'".to_owned(), meanwhile };
            let error = drained.step(step, work, late).await.unwrap_err().to_string();
            assert_eq!(error, "Flushing node 'a' has not ended within 0.1 s");
            drop(drained);
            let stays = usize::from(meanwhile == Meanwhile::Nothing);
            assert_eq!(paused(), [stays, 0]);
            // Others change the other disk, and this one when the step has ended.
            drop(graph.drain(&b).await.unwrap());
            let (clone, node) = (graph.clone(), a.clone());
            let changed = Arc::new(AtomicBool::new(false));
            let changes = changed.clone();
            crate::io::current().spawn(async move {
                drop(clone.drain(&node).await.unwrap());
                changes.store(true, Ordering::SeqCst);
            });
            crate::io::sleep(Duration::from_millis(5)).await;
            assert!(!changed.load(Ordering::SeqCst) && undone.load(Ordering::SeqCst) == 0);
            goes_on.store(false, Ordering::SeqCst);
            while !changed.load(Ordering::SeqCst) {
                crate::io::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(undone.load(Ordering::SeqCst), 7);
            assert_eq!(paused(), [0, 0]);
        }
        // In time: nothing is undone.
        let drained = graph.drain(&a).await.unwrap();
        let step = Step { node: &a, what: String::new(), meanwhile: Meanwhile::Use };
        let done = drained.step(step, async { Ok(3) }, async |_| panic!("it was in time")).await;
        assert_eq!(done.unwrap(), 3);
    });
}
