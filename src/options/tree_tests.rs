//! Tests of the tree of options: taking options out, and what is left.

use super::super::json;
use super::*;

fn map(text: &str) -> Map {
    match json::parse(text).unwrap() {
        Value::Map(m) => m,
        other => panic!("{other:?}"),
    }
}

#[test]
fn dotted_keys_become_nested_objects_and_lists() {
    for (given, wanted) in [
        (r#"{"a.b":1}"#, r#"{"a":{"b":1}}"#),
        (r#"{"a.b":1,"c":2,"a.d":3}"#, r#"{"a":{"b":1,"d":3},"c":2}"#),
        (r#"{"a":{"b.c":1},"a.b.d":2}"#, r#"{"a":{"b":{"c":1,"d":2}}}"#),
        (r#"{"a.1":2,"a.0":1}"#, r#"{"a":[1,2]}"#),
        (r#"{"a":[1],"a.1.x":2}"#, r#"{"a":[1,{"x":2}]}"#),
        (r#"{"a":{"b":1},"a.b":1}"#, r#"{"a":{"b":1}}"#),
        (r#"{"a":{},"b":[]}"#, r#"{"a":{},"b":[]}"#),
        (r#"{"a":[[1,2],[3]]}"#, r#"{"a":[[1,2],[3]]}"#),
    ] {
        assert_eq!(map(given).crumple().unwrap(), map(wanted), "{given}");
    }
}

#[test]
fn contradictions_between_dotted_keys_are_refused() {
    for (given, wanted) in [
        (r#"{"a":1,"a.b":2}"#, "Parameters 'a.*' used inconsistently"),
        (r#"{"a.b":2,"a":1}"#, "Parameters 'a.*' used inconsistently"),
        (r#"{"x":{"a.b":2,"a":1}}"#, "Parameters 'x.a.*' used inconsistently"),
        (r#"{"a.0":2,"a.x":1}"#, "Parameters 'a.*' used inconsistently"),
        (r#"{"a.0":2,"a.2":1}"#, "Parameter 'a.1' missing"),
        (r#"{"a.00":2}"#, "Parameter 'a.0' missing"),
        (r#"{"x":{"a.1":2}}"#, "Parameter 'x.a.0' missing"),
        (r#"{"a":{"b":1},"a.b":2}"#, "Parameter 'a.b' is given twice with different values"),
        (r#"{"a..b":1}"#, "Invalid parameter 'a..b'"),
        (r#"{".a":1}"#, "Invalid parameter '.a'"),
        (r#"{"":1}"#, "Invalid parameter ''"),
    ] {
        assert_eq!(map(given).crumple().unwrap_err().to_string(), wanted, "{given}");
    }
}

#[test]
fn flattening_undoes_crumpling() {
    let tree = map(r#"{"a":{"b":[1,{"c":null}]},"d":{},"e":[]}"#);
    let flat = tree.clone().flatten().unwrap();
    assert_eq!(flat, map(r#"{"a.b.0":1,"a.b.1.c":null,"d":{},"e":[]}"#));
    assert_eq!(flat.crumple().unwrap(), tree);
}

#[test]
fn depth_and_width_are_bounded_whichever_way_they_are_spelled() {
    let deep = [(vec!["a"; 100_000].join("."), true)];
    assert!(Map::from_iter(deep).crumple().is_err());
    let edge = [(vec!["a"; MAX_DEPTH].join("."), true)];
    assert!(Map::from_iter(edge).crumple().is_ok());
    let wide = Value::List(vec![Value::Null; MAX_KEYS + 1]);
    assert!(Map::from_iter([("a", wide)]).crumple().is_err());
}

#[test]
fn merging_joins_objects_and_refuses_two_meanings() {
    let merged = |a: &str, b: &str| {
        let mut a = map(a);
        a.merge(map(b)).map(|()| a).map_err(|e| e.to_string())
    };
    assert_eq!(
        merged(r#"{"a":{"b":1},"c":2}"#, r#"{"a":{"d":3},"c":2}"#),
        Ok(map(r#"{"a":{"b":1,"d":3},"c":2}"#))
    );
    assert_eq!(
        merged(r#"{"a":{"b":1}}"#, r#"{"a":{"b":2}}"#),
        Err("Parameter 'a.b' is given twice with different values".into())
    );
    assert_eq!(
        merged(r#"{"a":{"b":1}}"#, r#"{"a":"x"}"#),
        Err("Parameters 'a.*' used inconsistently".into())
    );
}

#[test]
fn taking_removes_and_what_is_left_is_named() {
    let mut m = map(r#"{"driver":"file","read-only":true,"zoom":{"a":1}}"#);
    assert_eq!(m.take_required_str("driver").unwrap(), "file");
    assert_eq!(m.take_opt_bool("read-only").unwrap(), Some(true));
    assert_eq!(m.take_opt_bool("read-only").unwrap(), None);
    assert_eq!(m.get_path("zoom.a"), Some(&Value::Int(1)));
    assert_eq!(
        m.take_required_str("driver").unwrap_err().to_string(),
        "Parameter 'driver' is missing"
    );
    assert_eq!(m.finish().unwrap_err().to_string(), "Parameter 'zoom' is unexpected");
}
