//! The commands for internal snapshots.

use super::reply::{CommandError, Outcome, done};
use crate::block::Node;
use crate::options::{self, Map};
use crate::service::Service;
use serde::Deserialize;
use std::sync::Arc;

/// A device and the name of its snapshot to be.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Create {
    device: String,
    name: String,
}

pub(super) fn parse_create(arguments: Map) -> Result<Create, options::Error> {
    options::from_map(arguments)
}

/// The node that is meant.
pub(super) fn find(
    service: &Service,
    Create { device, name }: Create,
) -> Result<(Arc<Node>, String), CommandError> {
    let node = root(service, &device)?;
    if node.is_read_only() {
        return Err(CommandError::new(format!("Device '{}' is read only", node.name())));
    }
    Ok((node, name))
}

pub async fn create(service: &Service, arguments: Map) -> Outcome {
    let (node, name) = find(service, parse_create(arguments)?)?;
    done(service.create_snapshot(&node, &name).await)
}

pub async fn delete(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        device: String,
        id: Option<String>,
        name: Option<String>,
    }
    let Arguments { device, id, name } = options::from_map(arguments)?;
    let node = root(service, &device)?;
    let deleted = service.delete_snapshot(&node, id.as_deref(), name.as_deref()).await?;
    Ok(deleted.to_value())
}

/// The node of this name, which no other node stands on.
fn root(service: &Service, device: &str) -> Result<Arc<Node>, CommandError> {
    let shown = device.escape_debug();
    let Ok(node) = service.graph().find(device) else {
        let text = format!("Cannot find device='{shown}' nor node-name='{shown}'");
        return Err(CommandError::new(text));
    };
    let is_child = |other: &Arc<Node>| {
        other.driver().children().iter().any(|child| Arc::ptr_eq(&child.node(), &node))
    };
    if service.graph().nodes().iter().any(is_child) {
        return Err(CommandError::new("Need a root block node"));
    }
    if !node.is_active() {
        return Err(CommandError::new(format!("Node '{shown}' is inactive")));
    }
    Ok(node)
}
