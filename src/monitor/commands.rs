//! The commands: their arguments, what they do to the service, and what they reply.
//!
//! The rule held here: a command that is listed does all that its QEMU namesake does of what this
//! program has; one that is not there is not listed.

use super::reply::{CommandError, Outcome, done, object};
use super::slow::export_id;
use super::{jobs, slow};
use crate::export::core::{Failure, IoError};
use crate::io::Errno;
use crate::job::Job;
use crate::options::{self, Map, Value, similar};
use crate::service::{Pending, Service};
use serde::Deserialize;

type Act = fn(&Service, Map) -> Outcome;

/// What [`run`] does at once, by name: these look at what is in memory, or start background work.
const COMMANDS: &[(&str, Act)] = &[
    ("block-set-write-threshold", block_set_write_threshold),
    ("blockdev-create", jobs::blockdev_create),
    ("job-cancel", |service, arguments| jobs::with_job(service, arguments, Job::cancel)),
    ("job-complete", |service, arguments| jobs::with_job(service, arguments, Job::complete)),
    ("job-dismiss", |service, arguments| jobs::with_job(service, arguments, Job::dismiss)),
    ("job-finalize", |service, arguments| jobs::with_job(service, arguments, Job::finalize)),
    ("job-pause", |service, arguments| jobs::with_job(service, arguments, Job::pause)),
    ("job-resume", |service, arguments| jobs::with_job(service, arguments, Job::resume)),
    ("query-block", |_, arguments| {
        arguments.finish()?;
        // No device of a guest is in this process.
        Ok(Value::List(Vec::new()))
    }),
    ("query-block-exports", query_block_exports),
    ("query-commands", query_commands),
    ("query-jobs", jobs::query_jobs),
    ("query-version", |_, arguments| {
        arguments.finish()?;
        Ok(version())
    }),
    ("x-block-export-fail", |service, arguments| done(service.fail_held(&export_id(arguments)?))),
    ("x-block-export-retry", |service, arguments| done(service.retry_held(&export_id(arguments)?))),
];

/// What the session itself does.
const OF_THE_SESSION: [&str; 2] = ["qmp_capabilities", "quit"];

/// What a command has come to when it has begun.
pub enum Begun {
    Ended(Value),
    Later(Pending<Outcome>),
}

/// Begins a command.
pub fn run(command: &str, arguments: Map, service: &Service) -> Result<Begun, CommandError> {
    if let Some((_, act)) = COMMANDS.iter().find(|(name, _)| *name == command) {
        return act(service, arguments).map(Begun::Ended);
    }
    if let Some(&(name, task)) = slow::COMMANDS.iter().find(|(name, _)| *name == command) {
        let pending = service.spawn(name, async move |service| task(&service, arguments).await);
        return Ok(Begun::Later(pending));
    }
    let shown = command.escape_debug();
    let not_found = CommandError::not_found(format!("The command {shown} has not been found"));
    Err(not_found.with_advice(similar::did_you_mean(command, names())))
}

/// The QEMU version whose commands these are, and our own as the package.
pub fn version() -> Value {
    let number = |n: u64| Value::from(n);
    let qemu = object([("micro", number(0)), ("minor", number(2)), ("major", number(7))]);
    let package = format!("vublk {}", env!("CARGO_PKG_VERSION"));
    object([("qemu", qemu), ("package", Value::from(package))])
}

fn block_set_write_threshold(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Arguments {
        node_name: String,
        write_threshold: u64,
    }
    let Arguments { node_name, write_threshold } = options::from_map(arguments)?;
    let missing = |_| CommandError::new(format!("Device '{}' not found", node_name.escape_debug()));
    let node = service.graph().find(&node_name).map_err(missing)?;
    node.set_write_threshold(write_threshold);
    Ok(Value::Map(Map::new()))
}

fn query_block_exports(service: &Service, arguments: Map) -> Outcome {
    arguments.finish()?;
    let exports = service.exports().into_iter().map(|export| {
        let mut info = Map::from_iter([
            ("id", Value::from(export.id)),
            ("type", Value::from(export.type_name)),
            ("node-name", Value::from(export.node_name)),
            ("shutting-down", Value::from(export.shutting_down)),
        ]);
        // Of our own, where there is something to tell.
        if export.flush_failed {
            info.insert("x-flush-failed", true);
        }
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

fn query_commands(_: &Service, arguments: Map) -> Outcome {
    arguments.finish()?;
    Ok(Value::List(names().map(|name| object([("name", Value::from(name))])).collect()))
}

/// The names of all commands.
fn names() -> impl Iterator<Item = &'static str> {
    let slow = slow::COMMANDS.iter().map(|(name, _)| *name);
    COMMANDS.iter().map(|(name, _)| *name).chain(slow).chain(OF_THE_SESSION)
}
