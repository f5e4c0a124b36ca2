//! Options of `--export` and `block-export-add`, parsed into a disk to serve.

use super::{NewExport, Service};
use crate::block::Error;
use crate::export;
use crate::export::core::watch::DEFAULT_TIMEOUT;
use crate::export::core::{DiskOptions, FailureOptions, ReadErrors, WriteErrors};
use crate::options::{self, Map};
use serde::Deserialize;
use std::time::Duration;

/// The options that exports of all types have.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct CommonOptions {
    id: String,
    node_name: String,
    #[serde(default)]
    writable: bool,
    #[serde(default)]
    writethrough: bool,
    #[serde(default)]
    iothread: Option<Iothreads>,
    #[serde(rename = "fixed-iothread", default)]
    _fixed_iothread: bool,
    #[serde(default)]
    allow_inactive: bool,
    #[serde(default)]
    werror: WriteErrors,
    #[serde(default)]
    rerror: ReadErrors,
    /// Losses of earlier processes are known to the operator.
    #[serde(default)]
    accept_loss: bool,
    /// Seconds.
    io_timeout: Option<u32>,
}

impl CommonOptions {
    const NAMES: [&str; 10] = [
        "id",
        "node-name",
        "writable",
        "writethrough",
        "iothread",
        "allow-inactive",
        "werror",
        "rerror",
        "accept-loss",
        "io-timeout",
    ];
}

/// One name, or a list of them.
type Iothreads = options::Value;

impl Service {
    /// `--export`: serves a node.
    pub async fn export_add(&self, mut options: Map) -> Result<(), Error> {
        let entry = export::by_name(&options.take_required_str("type")?)?;
        if !entry.has_error_policies
            && let Some(policy) = ["werror", "rerror"].into_iter().find(|key| options.contains(key))
        {
            return Err(Error::new(format!("Parameter '{policy}' is unexpected")));
        }
        let (options, own): (CommonOptions, Map) = options::split_map(options)?;
        let transport = (entry.parse)(own, &self.reading(&CommonOptions::NAMES))?;
        let id = options.id;
        if !options::is_identifier(&id) {
            return Err(Error::new("Invalid block export id"));
        }
        self.state().exports.check_id(&id)?;
        let node = self.graph().find(&options.node_name).map_err(|_| {
            let name = &options.node_name;
            Error::new(format!("Cannot find device='' nor node-name='{name}'"))
        })?;
        let workers = match options.iothread {
            None => vec![self.main_worker().await?],
            Some(options::Value::List(names)) if !names.is_empty() => {
                let find = |name: &options::Value| self.iothread(name.as_str().unwrap_or_default());
                names.iter().map(find).collect::<Result<_, _>>()?
            }
            Some(name) => vec![self.iothread(name.as_str().unwrap_or_default())?],
        };
        let disk = DiskOptions {
            writable: options.writable,
            write_through: options.writethrough,
            failures: FailureOptions {
                werror: options.werror,
                rerror: options.rerror,
                io_timeout: options
                    .io_timeout
                    .map_or(DEFAULT_TIMEOUT, |seconds| Duration::from_secs(seconds.into())),
            },
        };
        let (allow_inactive, accept_loss) = (options.allow_inactive, options.accept_loss);
        let new = NewExport { id, node, disk, transport, workers, allow_inactive, accept_loss };
        self.export(new).await
    }
}
