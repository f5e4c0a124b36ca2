//! Turns to change the graph, and the users that a drain pauses.

use super::*;
use std::task::Poll;

#[test]
fn changes_take_turns() {
    let bench = Bench::new();
    let (graph, names) = (bench.graph.clone(), Arc::new(Mutex::new(Vec::new())));
    bench.open("driver=store,tag=turns,node-name=f").unwrap();
    let told = names.clone();
    bench.worker.block_on(move || async move {
        let node = graph.find("f").unwrap();
        let drained = graph.drain(&node).await.unwrap();
        let (theirs, note) = (graph.clone(), told.clone());
        crate::io::current().spawn(async move {
            theirs.delete("f").await.unwrap();
            note.lock().push("deleted");
        });
        crate::io::sleep(std::time::Duration::from_millis(1)).await;
        assert!(graph.find("f").is_ok(), "nobody changes a drained graph");
        told.lock().push("resumed");
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
