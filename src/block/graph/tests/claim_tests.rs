//! Tests of claims: which changes of the graph wait for each other.

use super::*;
use std::task::Poll;

/// Polls a future once: whether it is ready.
async fn ready<F: Future>(future: &mut std::pin::Pin<Box<F>>) -> bool {
    std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await
}

/// Two disks over stores of their own, `a` over `fa` and `b` over `fb`.
fn two_disks(bench: &Bench, tag: &str) {
    for disk in ["a", "b"] {
        let file = format!("file.driver=store,file.tag={tag}{disk},file.node-name=f{disk}");
        bench.open(&format!("driver=pass,node-name={disk},{file}")).unwrap();
    }
}

#[test]
fn changes_of_one_disk_are_made_in_their_order() {
    let bench = Bench::new();
    two_disks(&bench, "order");
    let graph = bench.graph.clone();
    bench.worker.block_on(move || async move {
        let [a, fa, b] = ["a", "fa", "b"].map(|name| graph.find(name).unwrap());
        let drained = graph.drain(&a).await.unwrap();
        let mut second = Box::pin(graph.drain(&fa));
        assert!(!ready(&mut second).await);
        // It wants what the second waits for, but came later.
        let both = [b.clone(), fa.clone()];
        let mut third = Box::pin(graph.drain_all(&both));
        assert!(!ready(&mut third).await);
        drop(drained);
        assert!(!ready(&mut third).await);
        let drained = second.await.unwrap();
        assert!(!ready(&mut third).await);
        drop(drained);
        third.await.unwrap();
    });
}

#[test]
fn changes_of_other_disks_do_not_wait() {
    let bench = Bench::new();
    two_disks(&bench, "other");
    bench.open("driver=store,tag=otherx,node-name=x").unwrap();
    let graph = bench.graph.clone();
    bench.worker.block_on(move || async move {
        let [a, b] = ["a", "b"].map(|name| graph.find(name).unwrap());
        let _drained = graph.drain(&a).await.unwrap();
        let options = |text: &str| keyval::parse(text, None).unwrap().options;
        graph.resize(&b, 4096).await.unwrap_err();
        graph.resize(&graph.find("fb").unwrap(), 4096).await.unwrap();
        graph.change_bitmaps(&b, &[], async |_: &Arc<Node>| Ok(())).await.unwrap();
        assert!(graph.with_snapshots(&b, async |_: &dyn Snapshots| Ok(())).await.is_none());
        graph
            .open(options("driver=pass,node-name=c,file.driver=store,file.tag=otherc"))
            .await
            .unwrap();
        graph.replace(&b, Role::File, &graph.find("x").unwrap()).await.unwrap();
        graph.activate(&b).await.unwrap();
        let hold = graph.attach(&b, "export 'e'", writes(), None).unwrap();
        hold.detach().await;
        graph.delete("b").await.unwrap();
        graph.delete("c").await.unwrap();
        graph.tidy().await;
    });
}

#[test]
fn a_change_waits_for_changes_of_the_nodes_that_it_reads() {
    let bench = Bench::new();
    two_disks(&bench, "reads");
    let graph = bench.graph.clone();
    bench.worker.block_on(move || async move {
        let [a, b] = ["a", "b"].map(|name| graph.find(name).unwrap());
        let drained = graph.drain(&b).await.unwrap();
        let sources = [b.clone()];
        let mut merge = Box::pin(graph.change_bitmaps(&a, &sources, async |_: &Arc<Node>| Ok(())));
        let [nodes, read] = [[a.clone()], [b.clone()]];
        let mut reading = Box::pin(graph.drain_reading(&nodes, &read));
        assert!(!ready(&mut merge).await && !ready(&mut reading).await);
        drop(drained);
        merge.await.unwrap();
        // A change of what is read waits in turn.
        let reading = reading.await.unwrap();
        let mut change = Box::pin(graph.change_bitmaps(&b, &[], async |_: &Arc<Node>| Ok(())));
        assert!(!ready(&mut change).await);
        drop(reading);
        change.await.unwrap();
    });
}

#[test]
fn disks_that_share_a_backing_file_change_independently() {
    let bench = Bench::new();
    bench.open("driver=store,tag=sharedbase,node-name=base").unwrap();
    for disk in ["a", "b"] {
        let file = format!("file.driver=store,file.tag=shared{disk}");
        bench.open(&format!("driver=pass,node-name={disk},{file},backing=base")).unwrap();
    }
    let graph = bench.graph.clone();
    bench.worker.block_on(move || async move {
        let [a, b, base] = ["a", "b", "base"].map(|name| graph.find(name).unwrap());
        let drained = [graph.drain(&a).await.unwrap(), graph.drain(&b).await.unwrap()];
        let mut below = Box::pin(graph.drain(&base));
        assert!(!ready(&mut below).await);
        drop(drained);
        below.await.unwrap();
    });
}

#[test]
fn an_opening_that_finds_a_node_changing_begins_again_when_it_can_have_it() {
    let bench = Bench::new();
    two_disks(&bench, "again");
    let graph = bench.graph.clone();
    bench.worker.block_on(move || async move {
        let b = graph.find("b").unwrap();
        let drained = graph.drain(&b).await.unwrap();
        let text =
            "driver=pass,node-name=c,file.driver=store,file.tag=againc,file.node-name=fc,data-file=b";
        let options = keyval::parse(text, None).unwrap().options;
        let mut opening = Box::pin(graph.open(options));
        while !store("againc").is_closed() {
            assert!(!ready(&mut opening).await);
            crate::io::task::yield_now().await;
        }
        store("againc").closed.store(false, Ordering::SeqCst);
        // What was opened has been given back meanwhile.
        while graph.find("fc").is_ok() {
            assert!(!ready(&mut opening).await);
            crate::io::task::yield_now().await;
        }
        drop(drained);
        opening.await.unwrap();
        assert!(graph.find("fc").is_ok());
    });
}

#[test]
fn a_node_whose_end_takes_long_holds_up_only_who_waits_for_it() {
    let bench = Bench::new();
    two_disks(&bench, "end");
    let graph = bench.graph.clone();
    store("enda").stall.store(true, Ordering::SeqCst);
    bench.worker.block_on(move || async move {
        let mut deletion = Box::pin(graph.delete("a"));
        assert!(!ready(&mut deletion).await);
        while !graph.0.state.lock().nodes.values().any(|entry| entry.closing) {
            crate::io::task::yield_now().await;
        }
        let a = graph.find("a").unwrap();
        assert!(graph.attach(&a, "export 'e'", reads(), None).is_err(), "it is being closed");
        drop(a);
        let hold = graph.attach(&graph.find("b").unwrap(), "export 'e'", reads(), None).unwrap();
        graph.tidy().await;
        graph.delete("b").await.unwrap_err();
        hold.detach().await;
        graph.delete("b").await.unwrap();
        assert!(store("endb").is_closed() && !ready(&mut deletion).await);
        store("enda").stall.store(false, Ordering::SeqCst);
        deletion.await.unwrap();
        assert!(store("enda").is_closed());
    });
}
