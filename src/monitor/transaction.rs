//! `transaction`: several commands carried out at one moment, or none of them.

use super::bitmaps::{self, Merge, Named};
use super::kept_out::explained;
use super::reply::{CommandError, Outcome, done};
use super::{overlays, snapshots};
use crate::options::{self, Map, Value};
use crate::service::{Service, Step};
use serde::Deserialize;
use serde::de::Error as _;

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum CompletionMode {
    #[default]
    Individual,
    Grouped,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Properties {
    #[serde(default)]
    completion_mode: CompletionMode,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    #[serde(rename = "type")]
    kind: String,
    data: Value,
}

pub async fn transaction(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        actions: Vec<Value>,
        #[serde(default)]
        properties: Properties,
    }
    let given = arguments.clone();
    let Arguments { actions, properties } = options::from_map(arguments)?;
    let mut steps = Vec::with_capacity(actions.len());
    for (index, action) in actions.into_iter().enumerate() {
        let at = format!("actions[{index}]");
        let Action { kind, data } =
            options::from_value(action).map_err(|error| error.under(&at))?;
        // Nothing here continues afterwards, so that it could fail later.
        if matches!(properties.completion_mode, CompletionMode::Grouped) && kind != "abort" {
            return Err(CommandError::new(format!(
                "Action '{}' does not support Transaction property completion-mode = grouped",
                kind.escape_debug()
            )));
        }
        steps.push(step(service, &kind, data, &format!("{at}.data"))?);
    }
    done(explained(service.transaction(steps).await, &given))
}

/// Reads an action. `at` is where its data is in the arguments.
fn step(service: &Service, kind: &str, data: Value, at: &str) -> Result<Step, CommandError> {
    let data = members(data).map_err(|error| error.under(at))?;
    let read = match kind {
        "abort" => data.finish().map(|()| Step::Abort),
        "block-dirty-bitmap-add" => {
            bitmaps::parse_add(data).map(|(node, new)| Step::AddBitmap { node, new })
        }
        "block-dirty-bitmap-remove" => {
            options::from_map(data).map(|Named { node, name }| Step::RemoveBitmap { node, name })
        }
        "block-dirty-bitmap-clear" => {
            options::from_map(data).map(|Named { node, name }| Step::ClearBitmap { node, name })
        }
        "block-dirty-bitmap-enable" | "block-dirty-bitmap-disable" => {
            let enable = kind == "block-dirty-bitmap-enable";
            let read = options::from_map(data);
            read.map(|Named { node, name }| Step::EnableBitmap { node, name, enable })
        }
        "block-dirty-bitmap-merge" => {
            let read = bitmaps::parse_merge(data);
            read.map(|Merge { node, target, sources }| Step::MergeBitmaps { node, target, sources })
        }
        "blockdev-snapshot" => overlays::parse_snapshot(data),
        "blockdev-snapshot-sync" => overlays::parse_snapshot_sync(data),
        "blockdev-snapshot-internal-sync" => {
            let read = snapshots::parse_create(data).map_err(|error| error.under(at))?;
            let (node, name) = snapshots::find(service, read)?;
            return Ok(Step::Snapshot { node, name });
        }
        // They start jobs.
        "blockdev-backup" | "drive-backup" => {
            return Err(CommandError::new(format!("Actions of type '{kind}' are not available")));
        }
        _ => return Err(options::Error::unknown_variant(kind, &[]).under("type").into()),
    };
    Ok(read.map_err(|error| error.under(at))?)
}

/// The members of an object.
pub(super) fn members(value: Value) -> Result<Map, options::Error> {
    #[derive(Deserialize)]
    struct Any {}
    match value {
        Value::Map(map) => Ok(map),
        // To be told so.
        other => options::from_value::<Any>(other).map(|Any {}| Map::new()),
    }
}
