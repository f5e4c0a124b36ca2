//! The commands for jobs, and `blockdev-create`, which starts one.

use super::kept_out::explained;
use super::reply::{CommandError, Outcome, done, object};
use crate::drivers;
use crate::job::{Job, JobInfo, Kind, NewJob, Progress, Status};
use crate::options::{self, Map, Value};
use crate::service::Service;
use serde::Deserialize;

/// Does something with the job that the arguments name.
pub fn with_job(
    service: &Service,
    arguments: Map,
    act: fn(&Job) -> Result<(), crate::block::Error>,
) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        id: String,
    }
    let Arguments { id } = options::from_map(arguments)?;
    done(service.jobs().find(&id).and_then(|job| act(&job)))
}

pub fn query_jobs(service: &Service, arguments: Map) -> Outcome {
    arguments.finish()?;
    let jobs = service.jobs().query().into_iter().map(|info| {
        let JobInfo { id, kind, status, progress, error } = info;
        let mut job = Map::from_iter([
            ("current-progress", Value::from(progress.current)),
            ("status", Value::from(status.name())),
            ("total-progress", Value::from(progress.total)),
            ("type", Value::from(kind.name())),
            ("id", Value::from(id)),
        ]);
        if let Some(error) = error {
            job.insert("error", error);
        }
        Value::Map(job)
    });
    Ok(Value::List(jobs.collect()))
}

/// The data of QEMU's event JOB_STATUS_CHANGE.
pub fn status_change(id: String, status: Status) -> Value {
    object([("status", Value::from(status.name())), ("id", Value::from(id))])
}

pub fn blockdev_create(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Arguments {
        job_id: String,
        options: Value,
    }
    let given = arguments.clone();
    let Arguments { job_id: id, options } = options::from_map(arguments)?;
    let Value::Map(mut options) = options else {
        let text = "Invalid parameter type for 'options', expected: object";
        return Err(CommandError::new(text));
    };
    let in_options = |error: options::Error| CommandError::from(error.under("options"));
    let name = options.take_required_str("driver").map_err(in_options)?;
    let registry = drivers::registry();
    let Some(entry) = registry.get(&name) else {
        let name = name.escape_debug();
        let text = format!("Parameter 'driver' does not accept value '{name}'");
        return Err(CommandError::new(text));
    };
    let Some(prepare) = entry.create.and_then(|create| create.on_nodes) else {
        options.finish().map_err(in_options)?;
        return Err(CommandError::new("Driver does not support blockdev-create"));
    };
    let make = prepare(registry, options).map_err(in_options)?;
    service.graph().policy().check_driver(entry.name, false)?;
    // As in QEMU it is forgotten only when it is told to be.
    let (kind, progress) = (Kind::Create, Progress { current: 0, total: 1 });
    let new = NewJob { id, kind, auto_finalize: true, auto_dismiss: false, progress };
    done(service.start_job(new, |graph, job| async move {
        let made = make(&graph).await.map(drop);
        job.set_progress(Progress { current: 1, total: 1 });
        explained(made, &given)
    }))
}
