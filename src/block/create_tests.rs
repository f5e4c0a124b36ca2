//! Tests of creation: options, and the files that remain after an error.

use super::*;
use crate::io::{Worker, WorkerOptions};
use crate::options::{json, qemuopts};

const fn option(name: &'static str, value: ValueType) -> CreateOption {
    CreateOption::new(name, value, "")
}

const fn entry(name: &'static str, create: Option<&'static CreateEntry>) -> DriverEntry {
    let open: super::super::registry::OpenFn =
        |_, _| Box::pin(std::future::ready(Err(Error::new("not here"))));
    let kind = Kind::Format;
    DriverEntry { create, ..DriverEntry::new(name, kind, open) }
}

const fn protocol(name: &'static str, create: Option<&'static CreateEntry>) -> DriverEntry {
    DriverEntry { kind: Kind::Protocol, ..entry(name, create) }
}

static FMT: DriverEntry = entry(
    "fmt",
    Some(&CreateEntry {
        options: &[
            option("size", ValueType::Size),
            CreateOption { default: Some("64k"), ..option("cluster", ValueType::Size) },
        ],
        create: |creation, options| Box::pin(creation.create_file(options)),
        measure: None,
        amend: &[],
        on_nodes: None,
    }),
);
static STORE: DriverEntry = protocol(
    "store",
    Some(&CreateEntry {
        options: &[
            option("fast", ValueType::Bool),
            option("mode", ValueType::Str),
            option("size", ValueType::Size),
        ],
        // Tells what it was given.
        create: |_, options| {
            let text = json::to_text(&options.into());
            Box::pin(std::future::ready(Err(Error::new(text))))
        },
        measure: None,
        amend: &[],
        on_nodes: None,
    }),
);
static FIXED: DriverEntry = protocol("fixed", None);

fn creation(
    format: &str,
    driver: &str,
    options: &str,
    size: Option<u64>,
) -> Result<Creation, Error> {
    let registry = Box::leak(Box::new(Registry::new(&[&[&FMT, &STORE, &FIXED]])));
    let file = Map::from_iter([("driver", driver), ("filename", "x")]);
    let given = qemuopts::parse(options, None).unwrap().options;
    Creation::new(registry, format, ("x", file), given, size)
}

#[test]
fn the_line_shows_what_was_given_and_defaults_in_the_order_of_the_options() {
    let line = |options, size| creation("fmt", "store", options, size).map(|c| c.describe());
    assert_eq!(line("", Some(1024)).unwrap(), "Formatting 'x', fmt=fmt size=1024 cluster=65536");
    assert_eq!(
        line("mode=a b,fast=on,cluster=4k,size=1k", None).unwrap(),
        "Formatting 'x', fmt=fmt size=1024 cluster=4096 fast=on mode=a b"
    );
}

#[test]
fn what_cannot_be_made_is_refused_in_qemus_words() {
    for (format, driver, options, size, wanted) in [
        ("nope", "store", "", Some(1), "Unknown file format 'nope'"),
        ("fmt", "nope", "", Some(1), "Unknown protocol 'nope'"),
        // A format in its own file, and so on.
        ("fmt", "fmt", "", Some(1), "Unknown protocol 'fmt'"),
        ("fixed", "store", "", Some(1), "Format driver 'fixed' does not support image creation"),
        ("fmt", "fixed", "", Some(1), "Protocol driver 'fixed' does not support image creation"),
        ("fmt", "store", "foo=1", Some(1), "Invalid parameter 'foo'"),
        ("fmt", "store", "fast=1", Some(1), "Parameter 'fast' expects 'on' or 'off'"),
        ("fmt", "store", "", None, "Image creation needs a size parameter"),
        ("fmt", "store", "size=1", Some(1), "The image size must be specified only once"),
    ] {
        let error = creation(format, driver, options, size).err().unwrap();
        assert_eq!(error.to_string(), wanted, "{format} {driver} {options}");
    }
}

#[test]
fn the_protocol_gets_its_own_options_and_the_name() {
    let worker = Worker::start("create", WorkerOptions::default()).unwrap();
    let reported = worker.block_on(|| async {
        creation("fmt", "store", "fast=off,cluster=4k", Some(512)).unwrap().run().await
    });
    assert_eq!(
        reported.unwrap_err().to_string(),
        r#"{"filename": "x", "fast": false, "size": 512}"#
    );
}
