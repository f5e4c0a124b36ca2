//! The commands: their arguments, what they do to the service, and what they reply.
//!
//! The rule held here: a command that is listed does all that its QEMU namesake does of what this
//! program has; one that is not there is not listed.

use crate::block::Error;
use crate::block::graph::NodeInfo;
use crate::block::node::DetectZeroes;
use crate::export::vhost_user_blk::{Failure, IoError};
use crate::io::Errno;
use crate::options::{self, Map, Value};
use crate::service::Service;
use serde::Deserialize;

/// Why a command failed.
#[derive(Debug)]
pub struct CommandError {
    class: &'static str,
    text: String,
}

impl CommandError {
    pub fn new(text: impl Into<String>) -> CommandError {
        CommandError { class: "GenericError", text: text.into() }
    }

    pub fn not_found(text: impl Into<String>) -> CommandError {
        CommandError { class: "CommandNotFound", text: text.into() }
    }

    /// As replies carry it.
    pub fn into_value(self) -> Value {
        object([("class", Value::from(self.class)), ("desc", Value::from(self.text))])
    }
}

impl From<Error> for CommandError {
    fn from(error: Error) -> CommandError {
        CommandError::new(error.to_string())
    }
}

impl From<options::Error> for CommandError {
    fn from(error: options::Error) -> CommandError {
        CommandError::new(error.to_string())
    }
}

type Outcome = Result<Value, CommandError>;
type Act = fn(&mut Service, Map) -> Outcome;

/// What [`run`] knows, by name.
const COMMANDS: [(&str, Act); 14] = [
    ("block-export-add", block_export_add),
    ("block-export-del", block_export_del),
    ("block_resize", block_resize),
    ("blockdev-add", |service, arguments| done(service.blockdev_add(arguments).map(drop))),
    ("blockdev-del", blockdev_del),
    ("object-add", |service, arguments| done(service.object_add(arguments))),
    ("object-del", object_del),
    ("query-block", |_, arguments| {
        arguments.finish()?;
        // No device of a guest is in this process.
        Ok(Value::List(Vec::new()))
    }),
    ("query-block-exports", query_block_exports),
    ("query-commands", query_commands),
    ("query-named-block-nodes", query_named_block_nodes),
    ("query-version", |_, arguments| {
        arguments.finish()?;
        Ok(version())
    }),
    ("x-block-export-fail", |service, arguments| done(service.fail_held(&export_id(arguments)?))),
    ("x-block-export-retry", |service, arguments| done(service.retry_held(&export_id(arguments)?))),
];

/// What the session itself does.
const OF_THE_SESSION: [&str; 2] = ["qmp_capabilities", "quit"];

/// Runs a command.
pub fn run(command: &str, arguments: Map, service: &mut Service) -> Outcome {
    match COMMANDS.iter().find(|(name, _)| *name == command) {
        Some((_, act)) => act(service, arguments),
        None => {
            let command = command.escape_debug();
            Err(CommandError::not_found(format!("The command {command} has not been found")))
        }
    }
}

/// The QEMU version whose commands these are, and our own as the package.
pub fn version() -> Value {
    let number = |n: u64| Value::from(n);
    let qemu = object([("micro", number(0)), ("minor", number(2)), ("major", number(7))]);
    let package = format!("vublk {}", env!("CARGO_PKG_VERSION"));
    object([("qemu", qemu), ("package", Value::from(package))])
}

pub fn object<const N: usize>(members: [(&str, Value); N]) -> Value {
    Value::Map(Map::from_iter(members))
}

fn done(result: Result<(), Error>) -> Outcome {
    result?;
    Ok(Value::Map(Map::new()))
}

fn block_export_add(service: &mut Service, arguments: Map) -> Outcome {
    // The numbers of descriptors are between the process and whoever started it: a client could name
    // one that is in use.
    if let Some(Value::Str(kind)) = arguments.get_path("addr.type")
        && kind == "fd"
    {
        let name = arguments.get_path("addr.str").and_then(Value::as_str).unwrap_or_default();
        let name = name.escape_debug();
        let text = format!("File descriptor named '{name}' has not been found");
        return Err(CommandError::new(text));
    }
    done(service.export_add(arguments))
}

fn block_export_del(service: &mut Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        Safe,
        Hard,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        id: String,
        mode: Option<Mode>,
    }
    // Front ends hold no reference, as in QEMU, so the two modes do the same.
    let Arguments { id, mode: None | Some(Mode::Safe | Mode::Hard) } =
        options::from_map(arguments)?;
    done(service.export_del(&id))
}

fn block_resize(service: &mut Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Arguments {
        device: Option<String>,
        node_name: Option<String>,
        size: i64,
    }
    let Arguments { device, node_name, size } = options::from_map(arguments)?;
    let node = node_name.as_deref().and_then(|name| service.graph().find(name).ok());
    let Some(node) = node else {
        let [device, name] = [device, node_name].map(|name| name.unwrap_or_default());
        let (device, name) = (device.escape_debug(), name.escape_debug());
        let text = format!("Cannot find device='{device}' nor node-name='{name}'");
        return Err(CommandError::new(text));
    };
    let size =
        u64::try_from(size).map_err(|_| CommandError::new("Parameter 'size' expects a >0 size"))?;
    done(service.resize(&node, size))
}

fn blockdev_del(service: &mut Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Arguments {
        node_name: String,
    }
    let Arguments { node_name } = options::from_map(arguments)?;
    done(service.blockdev_del(&node_name))
}

fn object_del(service: &mut Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        id: String,
    }
    let Arguments { id } = options::from_map(arguments)?;
    done(service.object_del(&id))
}

fn query_block_exports(service: &mut Service, arguments: Map) -> Outcome {
    arguments.finish()?;
    let exports = service.exports().into_iter().map(|export| {
        let mut info = Map::from_iter([
            ("id", Value::from(export.id)),
            ("type", Value::from("vhost-user-blk")),
            ("node-name", Value::from(export.node_name)),
            ("shutting-down", Value::from(export.shutting_down)),
        ]);
        // Of our own, where there is something to tell.
        if let Some(Failure { operation, offset, len, errno }) = export.last_failure {
            info.insert("x-held", export.held as u64);
            info.insert("x-errors", export.errors);
            let last = object([
                ("operation", Value::from(operation.name())),
                ("offset", Value::from(offset)),
                ("length", Value::from(len)),
                ("reason", Value::from(errno.to_string())),
            ]);
            info.insert("x-last-error", last);
        }
        Value::Map(info)
    });
    Ok(Value::List(exports.collect()))
}

/// The data of QEMU's event BLOCK_IO_ERROR. No device of a guest is in this process.
pub fn block_io_error(error: IoError) -> Value {
    let IoError { export, node, failure, action } = error;
    object([
        ("device", Value::from("")),
        ("node-name", Value::from(node)),
        ("operation", Value::from(failure.operation.kind())),
        ("action", Value::from(action.name())),
        ("nospace", Value::from(failure.errno == Errno::ENOSPC)),
        ("reason", Value::from(failure.errno.to_string())),
        ("x-export", Value::from(export)),
    ])
}

fn export_id(arguments: Map) -> Result<String, CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        id: String,
    }
    let Arguments { id } = options::from_map(arguments)?;
    Ok(id)
}

fn query_commands(_: &mut Service, arguments: Map) -> Outcome {
    arguments.finish()?;
    let names = COMMANDS.iter().map(|(name, _)| *name).chain(OF_THE_SESSION);
    Ok(Value::List(names.map(|name| object([("name", Value::from(name))])).collect()))
}

fn query_named_block_nodes(service: &mut Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        // There are no backing files yet, which is all that it leaves out.
        #[serde(rename = "flat")]
        _flat: Option<bool>,
    }
    let Arguments { .. } = options::from_map(arguments)?;
    let nodes = service.query_nodes();
    Ok(Value::List(nodes.into_iter().map(|(info, allocated)| node(info, allocated)).collect()))
}

/// `BlockDeviceInfo` of QEMU's schema.
fn node(info: NodeInfo, allocated: Option<u64>) -> Value {
    let NodeInfo { name, driver, read_only, options, len, filename, .. } = info;
    let filename = filename.unwrap_or_else(|| format!("json:{{\"driver\": \"{driver}\"}}"));
    let mut image = Map::from_iter([
        ("virtual-size", Value::from(len)),
        ("filename", Value::from(&*filename)),
        ("format", Value::from(driver)),
        ("dirty-flag", Value::from(false)),
    ]);
    if let Some(allocated) = allocated {
        image.insert("actual-size", Value::from(allocated));
    }
    let cache = object([
        ("no-flush", Value::from(options.no_flush)),
        ("direct", Value::from(options.direct)),
        ("writeback", Value::from(true)),
    ]);
    let detect_zeroes = match options.detect_zeroes {
        DetectZeroes::Off => "off",
        DetectZeroes::On => "on",
        DetectZeroes::Unmap => "unmap",
    };
    let mut node = Map::from_iter([
        ("node-name", Value::from(name)),
        ("drv", Value::from(driver)),
        ("file", Value::from(filename)),
        ("ro", Value::from(read_only)),
        ("encrypted", Value::from(false)),
        ("detect_zeroes", Value::from(detect_zeroes)),
        ("backing_file_depth", Value::from(0u64)),
        ("image", Value::Map(image)),
        ("cache", cache),
    ]);
    for limit in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr", "write_threshold"] {
        node.insert(limit, 0u64);
    }
    Value::Map(node)
}
