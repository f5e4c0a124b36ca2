//! Tests of the option deserializer: conversions, refusals, and their messages.

use super::*;
use crate::options::{NodeRef, NodeRefOrNull, keyval};
use serde::Deserialize;

#[derive(Deserialize, Debug, PartialEq, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum Aio {
    Threads,
    IoUring,
}

#[derive(Deserialize, Debug, PartialEq, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct Cache {
    direct: bool,
    no_flush: bool,
}

#[derive(Deserialize, Debug, PartialEq)]
#[serde(rename = "type", rename_all = "kebab-case")]
enum Address {
    Unix(UnixAddress),
    Fd { r#str: String },
    Nowhere,
}

#[derive(Deserialize, Debug, PartialEq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct UnixAddress {
    path: String,
}

#[derive(Deserialize, Debug, PartialEq, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct All {
    filename: Option<String>,
    cache: Cache,
    aio: Option<Aio>,
    addr: Option<Address>,
    num_queues: Option<u16>,
    int: Option<i64>,
    small: Option<i8>,
    size: Option<Size>,
    weight: Option<f64>,
    file: Option<NodeRef>,
    backing: Option<NodeRefOrNull>,
    children: Vec<NodeRef>,
    names: Vec<UnixAddress>,
    any: Option<Value>,
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    keyval::parse_argument(text, None).and_then(|p| from_map(p.options)).map_err(|e| e.to_string())
}

fn all(text: &str) -> Result<All, String> {
    read(text)
}

#[test]
fn text_converts_to_what_the_field_is() {
    let found =
        all("filename=a,cache.direct=y,aio=io-uring,addr.type=unix,addr.path=s,num-queues=0x10,\
         int=-010,small=-128,size=1.5k,weight=1.5,file=n,backing=b,children.0=x,\
         children.1.driver=null-co")
        .unwrap();
    let inline = Map::from_iter([("driver", Value::Text("null-co".into()))]);
    let wanted = All {
        filename: Some("a".into()),
        cache: Cache { direct: true, no_flush: false },
        aio: Some(Aio::IoUring),
        addr: Some(Address::Unix(UnixAddress { path: "s".into() })),
        num_queues: Some(16),
        int: Some(-8),
        small: Some(-128),
        size: Some(Size(1536)),
        weight: Some(1.5),
        file: Some(NodeRef::Name("n".into())),
        backing: Some(NodeRefOrNull::Name("b".into())),
        children: vec![NodeRef::Name("x".into()), NodeRef::Inline(inline)],
        ..All::default()
    };
    assert_eq!(found, wanted);
}

#[test]
fn every_spelling_of_a_boolean_in_text_is_known() {
    for (text, wanted) in [
        ("on", true),
        ("yes", true),
        ("true", true),
        ("y", true),
        ("off", false),
        ("no", false),
        ("false", false),
        ("n", false),
    ] {
        assert_eq!(all(&format!("cache.direct={text}")).unwrap().cache.direct, wanted);
    }
}

#[test]
fn json_keeps_its_types_and_inner_values_survive_untouched() {
    let found =
        all(r#"{"cache":{"no-flush":true},"size":18446744073709551615,"weight":2,"backing":null,
            "file":{"driver":"x","n":1},"addr":{"type":"fd","str":"3"},"any":[1,{"a":null},"s"]}"#)
        .unwrap();
    assert!(found.cache.no_flush);
    assert_eq!(found.size, Some(Size(u64::MAX)));
    assert_eq!(found.weight, Some(2.0));
    assert_eq!(found.backing, Some(NodeRefOrNull::Null));
    assert_eq!(found.addr, Some(Address::Fd { r#str: "3".into() }));
    let Some(NodeRef::Inline(file)) = found.file else { panic!("{:?}", found.file) };
    assert_eq!(file.get("driver"), Some(&Value::Str("x".into())));
    assert_eq!(file.get("n"), Some(&Value::Int(1)));
    let Some(Value::List(any)) = found.any else { panic!("{:?}", found.any) };
    assert_eq!(any[2], Value::Str("s".into()));

    let Some(Value::Map(any)) = all("any.x=1,any.y.0=2").unwrap().any else {
        panic!("not an object")
    };
    assert_eq!(any.get_path("y.0"), Some(&Value::Text("2".into())));
}

#[test]
fn errors_name_the_whole_parameter_in_qemus_words() {
    for (given, wanted) in [
        // Keyval.
        ("bogus=1", "Parameter 'bogus' is unexpected"),
        ("cache.bogus=1", "Parameter 'cache.bogus' is unexpected"),
        ("zz.a=1,zz.b=2", "Parameter 'zz' is unexpected"),
        ("cache.direct=maybe", "Parameter 'cache.direct' expects 'on' or 'off'"),
        ("cache.direct=On", "Parameter 'cache.direct' expects 'on' or 'off'"),
        ("cache.direct=", "Parameter 'cache.direct' expects 'on' or 'off'"),
        ("cache=on", "Invalid parameter type for 'cache', expected: object"),
        ("cache.direct.x=on", "Parameters 'cache.direct.*' are unexpected"),
        ("filename.a=x", "Parameters 'filename.*' are unexpected"),
        ("filename.0=x", "Parameters 'filename.*' are unexpected"),
        ("aio=bogus", "Parameter 'aio' does not accept value 'bogus'"),
        ("num-queues=x", "Parameter 'num-queues' expects integer"),
        ("num-queues=--1", "Parameter 'num-queues' expects integer"),
        ("num-queues=0x", "Parameter 'num-queues' expects integer"),
        ("num-queues=08", "Parameter 'num-queues' expects integer"),
        ("num-queues=1k", "Parameter 'num-queues' expects integer"),
        ("num-queues=", "Parameter 'num-queues' expects integer"),
        ("num-queues=-1", "Parameter 'num-queues' expects uint16_t"),
        ("num-queues=65536", "Parameter 'num-queues' expects uint16_t"),
        ("int=99999999999999999999", "Parameter 'int' expects integer"),
        ("small=128", "Parameter 'small' expects int8_t"),
        ("size=1Q", "Parameter 'size' expects size"),
        ("size=-1", "Parameter 'size' expects size"),
        ("size=16E", "Parameter 'size' expects size"),
        ("weight=nan", "Parameter 'weight' expects number"),
        ("children=a", "Invalid parameter type for 'children', expected: array"),
        ("children.x=a", "Invalid parameter type for 'children', expected: array"),
        ("names.0.zz=1", "Parameter 'names.0.path' is missing"),
        ("addr.type=bogus", "Parameter 'type' does not accept value 'bogus'"),
        ("addr.path=x", "Parameter 'addr.type' is missing"),
        ("addr.type=unix", "Parameter 'addr.path' is missing"),
        ("addr.type=unix,addr.path=x,addr.z=1", "Parameter 'addr.z' is unexpected"),
        ("addr.type=nowhere,addr.z=1", "Parameter 'addr.z' is unexpected"),
        ("addr=unix", "Invalid parameter type for 'addr', expected: object"),
        // JSON.
        (r#"{"filename":1}"#, "Invalid parameter type for 'filename', expected: string"),
        (r#"{"filename":{"a":1}}"#, "Invalid parameter type for 'filename', expected: string"),
        (r#"{"filename":null}"#, "Invalid parameter type for 'filename', expected: string"),
        (r#"{"aio":1}"#, "Invalid parameter type for 'aio', expected: string"),
        (r#"{"cache":[]}"#, "Invalid parameter type for 'cache', expected: object"),
        (
            r#"{"cache":{"direct":1}}"#,
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        (
            r#"{"cache":{"direct":"on"}}"#,
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        (r#"{"cache.direct":true}"#, "Parameter 'cache.direct' is unexpected"),
        (r#"{"int":"1"}"#, "Invalid parameter type for 'int', expected: integer"),
        (r#"{"int":1.0}"#, "Invalid parameter type for 'int', expected: integer"),
        (r#"{"int":99999999999999999999}"#, "Invalid parameter type for 'int', expected: integer"),
        (r#"{"num-queues":65536}"#, "Parameter 'num-queues' expects uint16_t"),
        (r#"{"num-queues":-1}"#, "Parameter 'num-queues' expects uint16_t"),
        (r#"{"size":"1k"}"#, "Parameter 'size' expects uint64"),
        (r#"{"size":-1}"#, "Parameter 'size' expects uint64"),
        (r#"{"weight":"1"}"#, "Invalid parameter type for 'weight', expected: number"),
        (r#"{"file":1}"#, "Invalid parameter type for 'file', expected: BlockdevRef"),
        (r#"{"file":null}"#, "Invalid parameter type for 'file', expected: BlockdevRef"),
        (r#"{"file":[]}"#, "Invalid parameter type for 'file', expected: BlockdevRef"),
        (r#"{"backing":1}"#, "Invalid parameter type for 'backing', expected: BlockdevRefOrNull"),
        (r#"{"children":"a"}"#, "Invalid parameter type for 'children', expected: array"),
        (r#"{"children":[1]}"#, "Invalid parameter type for 'children[0]', expected: BlockdevRef"),
        (r#"{"names":[{"path":"a"},{}]}"#, "Parameter 'names[1].path' is missing"),
    ] {
        assert_eq!(all(given), Err(wanted.to_owned()), "{given}");
    }
}

#[test]
fn a_missing_option_is_reported_before_a_superfluous_one() {
    assert_eq!(read::<UnixAddress>("zz=1"), Err("Parameter 'path' is missing".into()));
    assert_eq!(read::<UnixAddress>("zz=1,path=x"), Err("Parameter 'zz' is unexpected".into()));
}

#[test]
fn the_empty_backing_name_means_no_backing() {
    assert_eq!(all("backing=").unwrap().backing, Some(NodeRefOrNull::Null));
}

#[test]
fn a_struct_takes_its_keys_and_leaves_the_others_to_be_read() {
    let given = keyval::parse("path=a,other=b,more=c", None).unwrap().options;
    let (address, rest): (UnixAddress, Map) = split_map(given).unwrap();
    assert_eq!(address, UnixAddress { path: "a".into() });
    assert_eq!(rest.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["other", "more"]);
    let missing = split_map::<UnixAddress>(rest).unwrap_err();
    assert_eq!(missing.to_string(), "Parameter 'path' is missing");
}
