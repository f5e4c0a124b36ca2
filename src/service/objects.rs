//! Objects of a service: the workers that exports name.

use super::Service;
use crate::block::Error;
use crate::io::{Worker, WorkerOptions};
use crate::options::{self, Map};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

/// `--object iothread,…`
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct IothreadObject {
    id: String,
    poll_max_ns: Option<u64>,
    // Accepted, because scripts give them; our own rules for spinning and batching hold.
    #[serde(rename = "poll-grow")]
    _poll_grow: Option<u64>,
    #[serde(rename = "poll-shrink")]
    _poll_shrink: Option<u64>,
    #[serde(rename = "aio-max-batch")]
    _aio_max_batch: Option<u64>,
    #[serde(rename = "thread-pool-min")]
    _thread_pool_min: Option<u64>,
    #[serde(rename = "thread-pool-max")]
    _thread_pool_max: Option<u64>,
}

impl Service {
    /// `--object`: adds an object of the type that `qom-type` names.
    pub fn object_add(&mut self, mut options: Map) -> Result<(), Error> {
        let qom_type = options.take_required_str("qom-type")?;
        match &*qom_type {
            "iothread" => {
                let object: IothreadObject = options::from_map(options)?;
                let mut worker = WorkerOptions::default();
                if let Some(ns) = object.poll_max_ns {
                    worker.poll_max = Duration::from_nanos(ns);
                }
                self.add_iothread(&object.id, worker)
            }
            other if OBJECT_TYPES.contains(&other) => {
                Err(Error::new(format!("objects of type '{other}' are not available")))
            }
            other => {
                Err(Error::new(format!("Parameter 'qom-type' does not accept value '{other}'")))
            }
        }
    }

    /// Adds a worker that exports can name.
    pub fn add_iothread(&mut self, id: &str, options: WorkerOptions) -> Result<(), Error> {
        if !options::is_identifier(id) {
            return Err(Error::new("Parameter 'id' expects an identifier").with_hint(
                "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
            ));
        }
        if self.iothreads.iter().any(|(name, _)| name == id) {
            return Err(Error::new(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        let worker = start_worker(id, options)?;
        self.iothreads.push((id.to_owned(), Arc::new(worker)));
        Ok(())
    }

    pub fn iothread(&self, id: &str) -> Result<Arc<Worker>, Error> {
        let found = self.iothreads.iter().find(|(name, _)| name == id);
        found
            .map(|(_, worker)| worker.clone())
            .ok_or_else(|| Error::new(format!("iothread \"{id}\" not found")))
    }

    /// Deletes an object that nothing uses.
    pub fn object_del(&mut self, id: &str) -> Result<(), Error> {
        let shown = id.escape_debug();
        let found = self.iothreads.iter().position(|(name, _)| name == id);
        let index = found.ok_or_else(|| Error::new(format!("object '{shown}' not found")))?;
        // Everything that runs on a worker holds a reference to it.
        if Arc::strong_count(&self.iothreads[index].1) > 1 {
            return Err(Error::new(format!("object '{shown}' is in use, can not be deleted")));
        }
        self.iothreads.remove(index);
        Ok(())
    }

    pub(super) fn main_worker(&mut self) -> Result<Arc<Worker>, Error> {
        if let Some(main) = &self.main {
            return Ok(main.clone());
        }
        let main = Arc::new(start_worker("main", WorkerOptions::default())?);
        self.main = Some(main.clone());
        Ok(main)
    }
}

/// What qemu-storage-daemon 7.2 knows, so that a type that we lack is told from one that nobody has.
const OBJECT_TYPES: [&str; 14] = [
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "iothread",
    "main-loop",
    "pr-manager-helper",
    "secret",
    "secret_keyring",
    "thread-context",
    "throttle-group",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

pub(super) fn start_worker(name: &str, options: WorkerOptions) -> Result<Worker, Error> {
    Worker::start(name, options)
        .map_err(|error| Error::os(format!("cannot start worker '{name}'"), error))
}
