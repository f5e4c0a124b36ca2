//! What `--export` and `block-export-add` say, read into a disk to serve.

use super::{NewExport, Service};
use crate::block::Error;
use crate::export::core::watch::DEFAULT_TIMEOUT;
use crate::export::core::{Address, FailureOptions, ReadErrors, WriteErrors, listening_fd};
use crate::export::vhost_user_blk::DiskOptions;
use crate::options::{self, Map};
use serde::Deserialize;
use std::time::Duration;

/// The serial number of disks that are given none.
const SERIAL: &str = "vhost_user_blk";

/// `--export type=vhost-user-blk,…`
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct VhostUserBlkExport {
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
    addr: options::Value,
    num_queues: Option<u16>,
    logical_block_size: Option<options::Size>,
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

/// One name, or a list of them.
type Iothreads = options::Value;

impl Service {
    /// `--export`: serves a node.
    pub fn export_add(&mut self, mut options: Map) -> Result<(), Error> {
        let export_type = options.take_required_str("type")?;
        match &*export_type {
            "vhost-user-blk" => {}
            "nbd" | "fuse" | "vduse-blk" => {
                return Err(Error::new(format!(
                    "exports of type '{export_type}' are not available"
                )));
            }
            other => {
                return Err(Error::new(format!(
                    "Parameter 'type' does not accept value '{other}'"
                )));
            }
        }
        let options: VhostUserBlkExport = options::from_map(options)?;
        let address = parse_address(options.addr)?;
        let id = options.id;
        if !options::is_identifier(&id) {
            return Err(Error::new("Invalid block export id"));
        }
        if self.exports.iter().any(|served| served.id == id) {
            return Err(Error::new(format!("Block export id '{id}' is already in use")));
        }
        let node = self.graph.find(&options.node_name).map_err(|_| {
            let name = &options.node_name;
            Error::new(format!("Cannot find device='' nor node-name='{name}'"))
        })?;
        let workers = match options.iothread {
            None => vec![self.main_worker()?],
            Some(options::Value::List(names)) if !names.is_empty() => {
                let find = |name: &options::Value| self.iothread(name.as_str().unwrap_or_default());
                names.iter().map(find).collect::<Result<_, _>>()?
            }
            Some(name) => vec![self.iothread(name.as_str().unwrap_or_default())?],
        };
        let block = match options.logical_block_size {
            // Zero is how scripts say that they have no wish.
            None | Some(options::Size(0)) => 512,
            Some(size) => size.0,
        };
        let disk = DiskOptions {
            writable: options.writable,
            write_through: options.writethrough,
            logical_block_size: check_block_size(&id, block)?,
            num_queues: options.num_queues.unwrap_or(1),
            serial: SERIAL.into(),
            failures: FailureOptions {
                werror: options.werror,
                rerror: options.rerror,
                io_timeout: options
                    .io_timeout
                    .map_or(DEFAULT_TIMEOUT, |seconds| Duration::from_secs(seconds.into())),
            },
        };
        let (allow_inactive, accept_loss) = (options.allow_inactive, options.accept_loss);
        self.export(NewExport { id, node, disk, address, workers, allow_inactive, accept_loss })
    }
}

/// A block size as the guest can be told: a power of two from 512 bytes to 2 MiB.
pub fn check_block_size(id: &str, size: u64) -> Result<u32, Error> {
    let property = format!("Property {id}.logical-block-size doesn't take value");
    if !(512..=2 << 20).contains(&size) {
        return Err(Error::new(format!("{property} {size} (minimum: 512, maximum: 2097152)")));
    }
    if !size.is_power_of_two() {
        return Err(Error::new(format!("{property} '{size}', it's not a power of 2")));
    }
    Ok(size as u32)
}

/// A `SocketAddress` that can be listened on here.
fn parse_address(addr: options::Value) -> Result<Address, Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Unix {
        path: std::path::PathBuf,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Fd {
        str: String,
    }
    let at = |error: options::Error| Error::from(error.under("addr"));
    let options::Value::Map(mut map) = addr else {
        return Err(Error::new("Invalid parameter type for 'addr', expected: object"));
    };
    match &*map.take_required_str("type").map_err(at)? {
        "unix" => {
            let Unix { path } = options::from_map(map).map_err(at)?;
            Ok(Address::Path { path, mode: None, owner: None })
        }
        "fd" => {
            let Fd { str } = options::from_map(map).map_err(at)?;
            let fd =
                str.parse().map_err(|_| Error::new(format!("Unable to parse FD number {str}")))?;
            // SAFETY: whoever started the program says that this descriptor is ours to take.
            Ok(Address::Listening(unsafe { listening_fd(fd) }?))
        }
        "inet" | "vsock" => {
            Err(Error::new("Only socket address types 'unix' and 'fd' are supported"))
        }
        other => Err(Error::new(format!("Parameter 'type' does not accept value '{other}'"))),
    }
}
