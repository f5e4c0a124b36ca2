//! Objects of a service: the workers that exports name, and the secrets that open disks.

use super::Service;
use crate::block::Error;
use crate::crypto::{object, secrets};
use crate::io::{self, Worker, WorkerOptions};
use crate::options::{self, Map, Value, similar};
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
    pub async fn object_add(&self, mut options: Map) -> Result<(), Error> {
        let qom_type = options.take_required_str("qom-type")?;
        match &*qom_type {
            "iothread" => {
                let object: IothreadObject = options::from_map(options)?;
                let mut worker = WorkerOptions::default();
                if let Some(ns) = object.poll_max_ns {
                    worker.poll_max = Duration::from_nanos(ns);
                }
                self.add_iothread(object.id, worker).await
            }
            "secret" | "secret_keyring" => {
                if let Some(id) = options.get("id").and_then(Value::as_str)
                    && self.state().iothreads.iter().any(|(name, _)| name == id)
                {
                    return Err(duplicate(id));
                }
                // A file may lie on storage that does not answer.
                Ok(io::offload(move || object::add(&qom_type, options)).await?)
            }
            other if options::OBJECT_TYPES.contains(&other) => {
                Err(Error::new(format!("objects of type '{other}' are not available")))
            }
            other => {
                let text = format!("Parameter 'qom-type' does not accept value '{other}'");
                Err(Error::new(text).with_advice(similar::did_you_mean(other, ["iothread"])))
            }
        }
    }

    /// Adds a worker that exports can name.
    pub async fn add_iothread(&self, id: String, options: WorkerOptions) -> Result<(), Error> {
        if !options::is_identifier(&id) {
            return Err(Error::new("Parameter 'id' expects an identifier").with_hint(
                "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
            ));
        }
        {
            let mut state = self.state();
            if state.iothreads.iter().any(|(name, _)| *name == id) || secrets::exists(&id) {
                return Err(duplicate(&id));
            }
            state.iothreads.push((id.clone(), None));
        }
        let name = id.clone();
        let worker = io::offload(move || start_worker(&name, options)).await;
        let mut state = self.state();
        match (worker, state.iothreads.iter_mut().find(|(name, _)| *name == id)) {
            (Ok(worker), Some((_, place))) => {
                *place = Some(Arc::new(worker));
                Ok(())
            }
            (worker, _) => {
                state.iothreads.retain(|(name, _)| *name != id);
                worker.map(drop)
            }
        }
    }

    pub fn iothread(&self, id: &str) -> Result<Arc<Worker>, Error> {
        let state = self.state();
        let found = state.iothreads.iter().find(|(name, _)| name == id);
        found
            .and_then(|(_, worker)| worker.clone())
            .ok_or_else(|| Error::new(format!("iothread \"{id}\" not found")))
    }

    /// Deletes an object that nothing uses.
    pub async fn object_del(&self, id: &str) -> Result<(), Error> {
        // Disks that a secret has opened have their keys.
        if secrets::remove(id) {
            return Ok(());
        }
        let shown = id.escape_debug();
        let worker = {
            let mut state = self.state();
            let is_match = |(name, worker): &(String, Option<_>)| name == id && worker.is_some();
            let found = state.iothreads.iter().position(is_match);
            let index = found.ok_or_else(|| Error::new(format!("object '{shown}' not found")))?;
            // Everything that runs on a worker holds a reference to it.
            if state.iothreads[index].1.as_ref().is_some_and(|it| Arc::strong_count(it) > 1) {
                return Err(Error::new(format!("object '{shown}' is in use, can not be deleted")));
            }
            state.iothreads.remove(index)
        };
        io::offload(move || drop(worker)).await;
        Ok(())
    }

    pub(super) async fn main_worker(&self) -> Result<Arc<Worker>, Error> {
        if let Some(main) = self.state().main.clone() {
            return Ok(main);
        }
        let started = io::offload(|| start_worker("main", WorkerOptions::default())).await?;
        let (main, spare) = {
            let mut state = self.state();
            match state.main.clone() {
                Some(main) => (main, Some(started)),
                None => (state.main.insert(Arc::new(started)).clone(), None),
            }
        };
        if spare.is_some() {
            io::offload(move || drop(spare)).await;
        }
        Ok(main)
    }
}

fn duplicate(id: &str) -> Error {
    Error::new(format!("attempt to add duplicate property '{id}' to object (type 'container')"))
}

pub(super) fn start_worker(name: &str, options: WorkerOptions) -> Result<Worker, Error> {
    Worker::start(name, options)
        .map_err(|error| Error::os(format!("cannot start worker '{name}'"), error))
}
