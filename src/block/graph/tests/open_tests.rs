//! Tests of opening nodes: names, wrong options, children, and closing.

use super::*;

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
