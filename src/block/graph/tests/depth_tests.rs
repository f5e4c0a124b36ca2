//! Tests of the depth limit, for each change that makes a graph deeper.

use super::*;
use crate::block::depth::DEPTH_LIMIT;

/// Opens a store and layers over it, `count` nodes in all, whose names begin with `name`. The last one's name.
fn pile(bench: &Bench, name: &str, count: usize) -> String {
    bench.open(&format!("driver=store,tag=deep-{name},node-name={name}1")).unwrap();
    for n in 2..=count {
        bench.open(&format!("driver=pass,node-name={name}{n},file={name}{}", n - 1)).unwrap();
    }
    format!("{name}{count}")
}

#[test]
fn a_graph_has_a_depth_limit() {
    let bench = Bench::new();
    let deepest = pile(&bench, "n", DEPTH_LIMIT);
    let error = bench.open(&format!("driver=pass,node-name=top,file={deepest}")).err().unwrap();
    assert_eq!(error, format!("'top' is more than {DEPTH_LIMIT} nodes deep"));
    assert_eq!(bench.names().len(), DEPTH_LIMIT);
}

#[test]
fn an_edge_is_not_turned_to_what_is_too_deep_for_a_node_far_above() {
    let bench = Bench::new();
    let top = pile(&bench, "a", 4);
    let deepest = pile(&bench, "n", DEPTH_LIMIT - 3);
    let fits = format!("n{}", DEPTH_LIMIT - 3 - 1);
    // It has two parents, one of which would still fit.
    bench.open("driver=pass,node-name=b,file=a3").unwrap();
    bench.open("driver=pass,node-name=c,file=b").unwrap();
    let user = bench.attach(&top, writes()).unwrap();
    let also = bench.attach("c", reads()).unwrap();
    let error = bench.replace("a2", Role::File, &deepest).unwrap_err();
    assert_eq!(error, format!("'c' is more than {DEPTH_LIMIT} nodes deep"));
    assert_eq!((store("deep-a").locked(), store("deep-n").locked()), (writes(), Perms::NONE));
    drop(also);
    bench.delete("c").unwrap();
    // What is no longer there no longer counts.
    bench.replace("a2", Role::File, &deepest).unwrap();
    assert_eq!((store("deep-a").locked(), store("deep-n").locked()), (Perms::NONE, writes()));
    let error = bench.open("driver=pass,node-name=c,file=b").err().unwrap();
    assert_eq!(error, format!("'c' is more than {DEPTH_LIMIT} nodes deep"));
    bench.replace("a2", Role::File, &fits).unwrap();
    bench.open("driver=pass,node-name=c,file=b").unwrap();
    drop(user);
    assert_eq!(store("deep-n").locked(), Perms::NONE);
}

#[test]
fn the_end_of_a_long_chain_looks_at_each_node_a_few_times() {
    let looked_at = |count: usize| {
        let bench = Bench::new();
        let mut below = "backing=base".to_owned();
        bench.open("driver=store,tag=deep-base,node-name=base").unwrap();
        for n in 0..count {
            let file = format!("file.driver=store,file.tag=deep-end{n}");
            bench.open(&format!("driver=pass,node-name=c{n},{file},{below}")).unwrap();
            below = format!("backing=c{n}");
        }
        let graph = bench.graph.clone();
        graph.0.state.lock().claims.looked_at.set(0);
        bench.worker.block_on(move || async move {
            graph.close().await;
            assert_eq!(graph.nodes().len(), 0);
            graph.0.state.lock().claims.looked_at.get()
        })
    };
    let [short, long] = [looked_at(50), looked_at(200)];
    assert!(long < 6 * short, "{short} for 50 images, {long} for 200");
}

#[test]
fn the_last_hold_on_a_long_chain_needs_little_stack() {
    let bench = Bench::new();
    let store = bench.open("driver=store,tag=deep-drop,node-name=f").unwrap();
    let mut node = store.clone();
    for n in 0..10_000 {
        let children = vec![Child::new(Role::File, node)];
        let layer = Layer { entry: &PASS, children, perms: |own| own };
        let notices = bench.graph.notices().clone();
        node = Node::new(format!("{n}"), Box::new(layer), NodeOptions::default(), notices);
    }
    std::thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(move || drop(node))
        .unwrap()
        .join()
        .unwrap();
    // Of the bench's own names there are the graph's hold and this one.
    assert_eq!(Arc::strong_count(&store), 2);
}
