//! The option syntax against the real `qemu-storage-daemon`: same refusals, same words.
//!
//! `VUBLK_SEED` repeats the random part.

use std::process::{Command, Stdio};

use serde::Deserialize;
use vublk::options::{self, Error, NodeRef, NodeRefOrNull, Size, keyval};

/// What the real program says about `option`, empty if it takes it; `None` without the program.
/// The monitor asked for behind it has no chardev, so the program always ends by itself.
fn theirs(option: &str, argument: &str) -> Option<String> {
    let child = Command::new("qemu-storage-daemon")
        .args([option, argument, "--monitor", "chardev=none"])
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output();
    let output = match child {
        Ok(output) => output,
        Err(e) => panic!("qemu-storage-daemon (tests/setup.sh installs it): {e}"),
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let start = format!("qemu-storage-daemon: {option} {argument}: ");
    match said.strip_prefix(&start) {
        Some(sentence) => Some(sentence.trim_end().to_owned()),
        // It got as far as the option behind.
        None if said.contains("chardev \"none\" not found") => Some(String::new()),
        None => panic!("{argument:?}: {said:?}"),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[allow(dead_code)] // Only whether they can be read counts here.
struct File {
    node_name: Option<String>,
    read_only: Option<bool>,
    cache: Option<Cache>,
    filename: String,
    aio: Option<Aio>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[allow(dead_code)]
struct Cache {
    direct: Option<bool>,
    no_flush: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Aio {
    Threads,
    Native,
    IoUring,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[allow(dead_code)]
struct NullCo {
    node_name: Option<String>,
    size: Option<i64>,
    read_zeroes: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[allow(dead_code)]
struct Qcow2 {
    node_name: Option<String>,
    file: NodeRef,
    backing: Option<NodeRefOrNull>,
    l2_cache_size: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[allow(dead_code)]
struct Quorum {
    node_name: Option<String>,
    children: Vec<NodeRef>,
    vote_threshold: i64,
}

#[derive(Deserialize)]
#[serde(rename = "driver", rename_all = "kebab-case")]
#[allow(dead_code)]
enum Blockdev {
    File(File),
    NullCo(NullCo),
    Qcow2(Qcow2),
    Quorum(Quorum),
}

#[derive(Deserialize)]
#[serde(rename = "type", rename_all = "kebab-case")]
#[allow(dead_code)]
enum Export {
    VhostUserBlk(VhostUserBlk),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[allow(dead_code)]
struct VhostUserBlk {
    id: String,
    node_name: String,
    writable: Option<bool>,
    addr: Address,
    logical_block_size: Option<Size>,
    num_queues: Option<u16>,
}

#[derive(Deserialize)]
#[serde(rename = "type", rename_all = "kebab-case")]
#[allow(dead_code)]
enum Address {
    Unix { path: String },
    Fd { str: String },
}

/// What we say, empty if the options can be read; opening what they name is not tried.
fn ours(option: &str, argument: &str) -> String {
    let read = || -> Result<String, Error> {
        if option == "--export" {
            let parsed = keyval::parse_argument(argument, Some("type"))?;
            return options::from_map::<Export>(parsed.options).map(|_| String::new());
        }
        let parsed = keyval::parse_argument(argument, Some("driver"))?;
        if parsed.help {
            return Ok("Help is not available for this option".to_owned());
        }
        options::from_map::<Blockdev>(parsed.options).map(|_| String::new())
    };
    read().unwrap_or_else(|e| e.to_string())
}

const REFUSED: &[(&str, &[&str])] = &[
    (
        "--blockdev",
        &[
            "",
            "node-name=a",
            "file",
            "driver=bogus",
            "driver=file,filename",
            "driver=file,=x",
            "driver=file,.a=x",
            "driver=file,a.=x",
            "driver=file,a..b=x",
            "driver=file,1a=x",
            "driver=file,a.1x=x",
            "driver=file,a%b=x",
            "driver=file,a%b",
            "driver=file,,x=1",
            "driver=file,,",
            "driver=file,,,x=1",
            "driver=file,-a=1",
            "driver=file,_x=1",
            "driver=file,é=1",
            ",driver=file",
            "a,,b",
            "a,,b=c",
            "help",
            "?",
            "file,help",
            "file,?",
            "help,driver=file",
            "?,help",
            "file,help,x",
            "file,helpx",
            "help=x",
            "file,help=1,filename=a",
            " {\"driver\":\"file\"}",
            "[1]",
            "file,filename=a,cache.bogus=1",
            "file,filename=a,bogus=1",
            "file,filename=a,cache.direct=maybe",
            "file,filename=a,cache=on",
            "file,filename=a,cache=on,cache.direct=on",
            "file,filename=a,cache.direct=on,cache=on",
            "file,filename=a,cache.direct.x=on",
            "file,filename=a,aio=bogus",
            "file,filename.a=x",
            "file,filename=a,zz.a=x,zz.b=1",
            "file,filename=a,zz.0=x,zz.1=1",
            "driver.a=file,filename=x",
            "null-co,size=1M",
            "null-co,size=",
            "null-co,size=99999999999999999999",
            "null-co,a.0=1,a.2=2",
            "null-co,a.1=1",
            "null-co,a.01=1",
            "null-co,a.99999999999999999999=1",
            "null-co,a.0=1,a.b=2",
            "null-co,a.c.0=1,a.c.x=2",
            "qcow2",
            "qcow2,file=a,file.filename=b",
            "qcow2,file=x,l2-cache-size=1.5M",
            "quorum,vote-threshold=1,children=a",
            "quorum,vote-threshold=1,children.x=a",
            "quorum,vote-threshold=1,children.0=a,children.2=b",
            r#"{"driver":"file","filename":1}"#,
            r#"{"driver":"file","filename":null}"#,
            r#"{"driver":"file","filename":{"a":1}}"#,
            r#"{"driver":"file","node-name":"a"}"#,
            r#"{"driver":"file","filename":"a","aio":1}"#,
            r#"{"driver":"file","filename":"a","read-only":"on"}"#,
            r#"{"driver":"file","filename":"a","read-only":null}"#,
            r#"{"driver":"file","filename":"a","cache.direct":true}"#,
            r#"{"driver":"file","filename":"a","cache":{"direct":1}}"#,
            r#"{"driver":"file","filename":"a","cache":[]}"#,
            r#"{"driver":"null-co","size":"1M"}"#,
            r#"{"driver":"null-co","size":1.0}"#,
            r#"{"driver":"null-co","size":1e3}"#,
            r#"{"driver":"null-co","size":99999999999999999999}"#,
            r#"{"driver":"qcow2","file":1}"#,
            r#"{"driver":"qcow2","file":null}"#,
            r#"{"driver":"qcow2","file":[]}"#,
            r#"{"driver":"qcow2","file":"x","backing":1}"#,
            r#"{"driver":"quorum","vote-threshold":1,"children":"a"}"#,
            r#"{"driver":"quorum","vote-threshold":1,"children":{"0":"a"}}"#,
            r#"{"driver":1}"#,
            "{}",
            "{",
            "{,}",
            "{]",
            "{1:2}",
            r#"{"driver":"file""#,
            r#"{"driver":"file"} x"#,
            r#"{"driver":"file"}}"#,
            r#"{"driver":"file","driver":"file"}"#,
            r#"{'driver':'zork'}"#,
            r#"{"a":01}"#,
            r#"{"a":1.}"#,
            r#"{"a":-}"#,
            r#"{"a":+1}"#,
            r#"{"a":&}"#,
            r#"{"a":"b}"#,
            r#"{"a":"\x"}"#,
            r#"{"a":"\ud800"}"#,
            r#"{"a":bogus}"#,
            r#"{"a":}"#,
            r#"{"a":1,}"#,
            r#"{"a":[1,]}"#,
            r#"{"a":[1 2]}"#,
            r#"{"a":1 "b":2}"#,
            r#"{"a" 1}"#,
        ],
    ),
    (
        "--export",
        &[
            "bogus,id=e,node-name=n",
            "vhost-user-blk,id=e,node-name=n",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix",
            "vhost-user-blk,id=e,node-name=n,addr.type=bogus",
            "vhost-user-blk,id=e,node-name=n,addr=unix",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,addr.z=1",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,writable=TRUE",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,num-queues=-1",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,num-queues=65536",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,num-queues=x",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,num-queues=0x",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,num-queues=08",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,logical-block-size=1Q",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,logical-block-size=-1",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,logical-block-size=16E",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,logical-block-size=.5k",
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=x,logical-block-size=1.5",
            r#"{"type":"vhost-user-blk","id":"e","node-name":"n","addr":"unix"}"#,
            r#"{"type":"vhost-user-blk","id":"e","node-name":"n","addr":{"type":"unix","path":"x"},
                "num-queues":65536}"#,
            r#"{"type":"vhost-user-blk","id":"e","node-name":"n","addr":{"type":"unix","path":"x"},
                "logical-block-size":"1k"}"#,
        ],
    ),
];

#[test]
fn what_we_refuse_is_refused_in_the_words_of_the_real_program() {
    for (option, arguments) in REFUSED {
        for argument in *arguments {
            let Some(theirs) = theirs(option, argument) else { return };
            assert_eq!(ours(option, argument), theirs, "{option} {argument}");
        }
    }
}

/// On `null-co`, which touches no file. Without a node name the real program refuses at the latest
/// when it is about to open the node.
#[test]
fn random_keyval_is_refused_in_the_words_of_the_real_program() {
    let seed = match std::env::var("VUBLK_SEED") {
        Ok(seed) => seed.parse().expect("VUBLK_SEED: a number"),
        Err(_) => 1u64,
    };
    eprintln!("VUBLK_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let pieces: Vec<_> =
        ", , ,, = = . . a b a.b a.0 a.1 0 1 -x _ size= read-zeroes= on 5 0x1F é % help"
            .split(' ')
            .collect();
    for _ in 0..150 {
        let tail: String =
            (0..rng.usize(1..9)).map(|_| pieces[rng.usize(..pieces.len())]).collect();
        let argument = format!("null-co,{tail}");
        let Some(theirs) = theirs("--blockdev", &argument) else { return };
        let ours = ours("--blockdev", &argument);
        let ours = if ours.is_empty() {
            "'node-name' must be specified for the root node".to_owned()
        } else {
            ours
        };
        assert_eq!(ours, theirs, "{argument}");
    }
}
